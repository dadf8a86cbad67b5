"""One of several CPU processes: trains by the host and writes down what this rank drew and ended with. Arguments: TOML, folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate
from torch import nn

from byg_plugin.config.loading import load_config
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import trainer as musubi_trainer

_prepare = accelerate.Accelerator.prepare_model
trainers: list[Any] = []
drawn: list[float] = []


def prepare_model(self: Any, model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> nn.Module:
    """On CPUs accelerate hands a frozen model to DDP too, which refuses it; on GPUs it looks whether it is frozen."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return _prepare(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode or frozen)


def make_trainer(*args: Any) -> Any:
    """The plugin's, remembered."""
    trainers.append(_make(*args))
    return trainers[-1]


def draw_batch(*inputs: Any, **options: Any) -> Any:
    batch = _draw(*inputs, **options)
    drawn.extend(batch.t.tolist())
    return batch


accelerate.Accelerator.prepare_model = prepare_model
_make, musubi.make_trainer = musubi.make_trainer, make_trainer
_draw, musubi_trainer.draw_batch = musubi_trainer.draw_batch, draw_batch
musubi.train(load_config(sys.argv[1]))
weights = {name: value.double().sum().item() for name, value in trainers[0].byg_fields.network.named_parameters()}
(Path(sys.argv[2]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"t": drawn, "weights": weights}), encoding="utf-8")
