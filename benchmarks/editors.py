"""Editors that the study of the tiny world has trained, looked at again: their files, and what they make of held-out edits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import tiny_world_run as runs
from benchmarks.rollout_error import config_of
from byg_plugin.config.sections import Config
from byg_plugin.demo import world
from byg_plugin.hosts import make_host
from byg_plugin.lora.formats import read_named


def named_loras(parser: argparse.ArgumentParser, texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FILE` of a command line; the parser ends it where one is another or a name comes twice."""
    named = {}
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not Path(file).is_file():
            parser.error(f"{text}: NAME=FILE is asked for, and FILE must be there")
        if name in named:
            parser.error(f"{text}: there is another editor named {name}")
        named[name] = Path(file)
    return named


def float32_config() -> Config:
    """The recipe of the pictures' world without bfloat16."""
    config = config_of("flux")
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": "no"})})


class Editors:
    """Makes the study's held-out edits, in float32, by one LoRA after another.

    Args:
        edits: those of the report split or some of them.
    """

    def __init__(self, edits: Sequence[world.Edit]):
        self.edits, self._config = edits, float32_config()
        self.evaluator = runs.Evaluator(self._config, edits)

    def latents(self, lora: Path) -> Tensor:
        """(N, 16, 1, h, w): every edit by a LoRA, edit i from the noise of seed i."""
        host = make_host(self._config, self.evaluator.family, torch.device("cpu"), fresh=False)
        host.load_lora(read_named(lora, "flux")[0])
        with host.live() as velocity:
            return self.evaluator.latents(velocity, [edit.instruction for edit in self.edits])
