"""The frozen base under DeepSpeed's ZeRO-3, without an optimizer: each layer is gathered for its own pass and freed after it.

The network is called directly. A forward pass through DeepSpeed's engine counts gradients, of which the base has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from byg_plugin.hosts.deepspeed import start_deepspeed
from byg_plugin.hosts.sharding import hand_on


class Zero3Shards:
    """See `sharding.Shards`.

    Args:
        device: where the layers are computed.
        settings: DeepSpeed's configuration, without "auto"; `offload_param` is in it.
    """

    def __init__(self, device: torch.device, settings: Mapping[str, Any]):
        self.device = device
        zero = settings["zero_optimization"]
        assert zero["memory_efficient_linear"] is False, "it would keep every frozen linear's input, in the whole process"
        self._settings = dict(settings)
        self._engines: list[Any] = []

    def cut(self, network: nn.Module) -> None:
        """See `Shards`. A module's children come before it: DeepSpeed cuts all that it finds below and is not cut yet."""
        deepspeed = start_deepspeed()
        swapper = None
        for module in reversed(list(network.modules())):
            if not [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                continue
            hand_on(module, self.device, self.device)
            made = deepspeed.zero.Init(module=module, config_dict_or_path=self._settings, param_swapper=swapper)
            swapper = made.param_swapper
        engine, *_ = deepspeed.initialize(model=network, config=self._settings)
        self._engines.append(engine)

    def after_backward(self) -> None:
        """A module whose input has no gradient stays gathered otherwise: the first of every pass."""
        for engine in self._engines:
            engine.optimizer.release_backward_leftovers()
