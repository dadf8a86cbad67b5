"""Optimizers by name, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.muon import Muon


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to 0."""
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / (train.lr_warmup_steps + 1)
    if train.lr_schedule == "constant":
        return train.lr
    progress = (step - train.lr_warmup_steps) / max(1, train.steps - train.lr_warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(train: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """`train.optimizer` over LoRA weights."""
    options: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if train.optimizer == "muon":
        return Muon(parameters, lr=train.lr, weight_decay=train.weight_decay)
    import bitsandbytes as bnb

    made: torch.optim.Optimizer = bnb.optim.AdamW8bit(parameters, **options)
    return made
