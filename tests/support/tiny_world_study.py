"""What tests of the tiny-world study share."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tiny_world as study

FEW = [
    'train.mixed_precision="no"',  # bfloat16 rounds merged weights otherwise than a LoRA, visibly
    "train.steps=20",
    "train.lr_warmup_steps=2",
    "train.global_batch_size=2",
    "train.batch_size=2",
    "objective.identity_warmup_steps=6",
    "objective.rollout_steps=2",
    "sample.steps=2",
]


def small(folder: Path, *words: str, **changes: object) -> study.Study:
    """A study of few steps and few edits."""
    options = study.parse(["--out", f"{folder}/out", "--work", f"{folder}/work", *words])
    options.set = [*FEW, *options.set]
    for name, value in changes.items():
        setattr(options, name, value)
    return study.Study(options)
