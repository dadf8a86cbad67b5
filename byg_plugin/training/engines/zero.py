"""DeepSpeed ZeRO-1 and 2 over the LoRA: its optimizer, with stage 2 also its gradients, in shards. The base is whole on every process.

Each expert's LoRA has a DeepSpeed engine of its own: in one engine the expert that a step does not train moves by its momentum and
weight decay. DeepSpeed counts backward passes to find a step's end; an objective makes several in a micro-step, so the end is set by
hand, and the factor of the accumulation is ours (`scale_wrt_gas=False`). The network is called directly: stages 1 and 2 need no
forward pass through their engine, stage 3 would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.hosts.deepspeed import start_deepspeed
from byg_plugin.training.engine import Adapters, Trained, refuse_idle
from byg_plugin.training.engines.processes import Replicas
from byg_plugin.training.optimizers import make_optimizer


class ZeroEngine(Replicas):
    """See the module.

    Args:
        train: the `[train]` section.
        adapters: what is trained; one adapter.
        accumulation: micro-steps of an optimizer step.
        device: of the weights.
        settings: DeepSpeed's configuration, without "auto" (`training.deepspeed_settings.resolved`).
    """

    whole = False

    def __init__(self, train: TrainConfig, adapters: Adapters, accumulation: int, device: torch.device, settings: Mapping[str, Any]):
        super().__init__(adapters, device)
        self.accumulation = accumulation
        assert len(adapters) == 1 and not train.skip_grad_norm, "refused by read_launch, before a model is loaded"
        (self._adapter,) = adapters
        named = adapters[self._adapter]
        self._parameters = list(named.values())
        self._options = make_optimizer(train, self._parameters).state_dict()["param_groups"]
        by_expert: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            by_expert.setdefault(name.partition(".")[0], []).append(parameter)
        self._experts = {expert: _ExpertEngine(train, parameters, settings) for expert, parameters in by_expert.items()}
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._active = next(iter(self._experts.values()))
        self._micro = 0

    def begin(self, trained: Collection[Trained]) -> None:
        """See `Engine`."""
        ((_, expert),) = trained
        if expert is None:
            (self._active,) = self._experts.values()
        else:
            self._active = self._experts[expert]
        self._micro = 0

    def backward(self, loss: Tensor, *, last: bool) -> float:
        """See `Engine`. Every call is one of DeepSpeed's; only the last one of the step is its boundary."""
        scale = 1.0 / self.accumulation
        engine = self._active.engine
        engine.set_gradient_accumulation_boundary(last and self._micro == self.accumulation - 1)
        engine.backward(loss * scale, scale_wrt_gas=False)
        self._micro += last
        return scale

    def step(self, lr: float, check: Callable[[Mapping[str, Tensor]], None]) -> dict[str, Tensor]:
        """See `Engine`."""
        assert self._micro == self.accumulation, "the step's last backward has not been"
        part = self._active
        self._refuse_idle(part)
        norms = {self._adapter: part.norm().to(self.device)}
        try:
            check(norms)
            part.step(lr)
        finally:
            part.drop_gradients()
        return norms

    def _refuse_idle(self, part: _ExpertEngine) -> None:
        """DeepSpeed takes no gradient for one of zeros, by which momentum and weight decay would move the weight."""
        refuse_idle([self._names[id(p)] for p in part.parameters if id(p) not in part.reached])

    def broadcast(self) -> None:
        """See `Engine`."""
        super().broadcast()
        for part in self._experts.values():
            part.zero.refresh_fp32_params()

    def state(self) -> dict[str, dict[str, Any]]:
        """See `Engine`. Each value is gathered from the processes that hold its parts."""
        numbers = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        states = {numbers[id(p)]: state for part in self._experts.values() for p, state in part.states()}
        return {self._adapter: {"state": dict(sorted(states.items())), "param_groups": self._options}}

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """See `Engine`."""
        saved = states[self._adapter]["state"]
        numbers = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        for part in self._experts.values():
            part.load({id(p): saved[numbers[id(p)]] for p in part.parameters if saved.get(numbers[id(p)])})


class _ExpertEngine:
    """One expert's LoRA in its DeepSpeed engine."""

    def __init__(self, train: TrainConfig, parameters: list[nn.Parameter], settings: Mapping[str, Any]):
        deepspeed = start_deepspeed()
        self.parameters = parameters
        self.engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(parameters), optimizer=make_optimizer(train, parameters), config=dict(settings)
        )
        self.zero: Any = self.engine.optimizer
        self.reached: set[int] = set()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: self.reached.add(id(p)))

    def norm(self) -> Tensor:
        """Of the averaged gradients; infinite where one is not finite (DeepSpeed before 0.19.8 says 1)."""
        return torch.as_tensor(self.zero.scaled_global_norm()).float()

    def step(self, lr: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()

    def drop_gradients(self) -> None:
        """As DeepSpeed does after a step that it has left out."""
        self.reached.clear()
        self.zero.zero_grad(set_to_none=True)
        for index in self.zero.averaged_gradients:
            self.zero.averaged_gradients[index] = self.zero.all_grad_tensors[index] = None

    @property
    def _flat(self) -> nn.Parameter:
        """This process's part of all parameters, one after the other: what the optimizer inside steps."""
        (flat,) = self.zero.single_partition_of_fp32_groups
        return flat

    def states(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inside = self.zero.optimizer.state.get(self._flat, {})
        sharded = [key for key, value in inside.items() if _is_sharded(value, self._flat)]
        rest = {key: value for key, value in inside.items() if key not in sharded}
        found = []
        for parameter in self.parameters if inside else []:
            whole = {key: safe_get_full_optimizer_state(parameter, key) for key in sharded}
            copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in rest.items()}
            found.append((parameter, {key: {**whole, **copied}[key] for key in inside}))
        return found

    def load(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Weights first: DeepSpeed steps a copy of its own, which knows nothing of what was written into the parameters."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero.refresh_fp32_params()
        if not states:
            return
        first = states[id(self.parameters[0])]
        shape = self.parameters[0].shape
        self.zero.optimizer.state[self._flat] = {
            key: torch.zeros_like(self._flat) if isinstance(value, Tensor) and value.shape == shape else deepcopy(value)
            for key, value in first.items()
        }
        self.zero._lazy_init_hp_params_optimizer_state()
        for parameter in self.parameters:
            for key, value in states[id(parameter)].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _is_sharded(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape
