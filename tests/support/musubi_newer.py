"""The names of a later musubi-tuner on the checkout's classes: previews are prepared by a public seam that gives resources of any kind,
the number of frames is rounded by a method, a batch has entries of its items, and `process_batch` gets more than it got."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def rename_seams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names that were called, as they are called."""
    base = importlib.import_module("musubi_tuner.training.trainer_base").NetworkTrainer
    datasets = importlib.import_module("musubi_tuner.dataset.image_video_dataset")
    manager = getattr(datasets, "BucketBatchManager", None) or importlib.import_module("musubi_tuner.dataset.bucket").BucketBatchManager
    prepare, infer, batch_of = base._prepare_sampling, base.sample_image_inference, manager.__getitem__
    called: list[str] = []

    def prepare_sampling(self: Any, args: Any, accelerator: Any, vae_dtype: Any) -> Any:
        called.append("prepare_sampling")
        return prepare(self, args, accelerator, vae_dtype)

    def round_sample_frame_count(self: Any, frames: int) -> int:
        called.append("round_sample_frame_count")
        return (frames - 1) // self.vae_frame_stride * self.vae_frame_stride + 1

    def sample_image_inference(
        self: Any, accelerator: Any, args: Any, transformer: Any, dit_dtype: Any, sample_resources: Any, *rest: Any
    ) -> Any:
        rest[1]["frame_count"] = self.round_sample_frame_count(rest[1].get("frame_count", 1))
        return infer(self, accelerator, args, transformer, dit_dtype, sample_resources, *rest)

    def process_batch(
        self: Any,
        args: Any,
        accelerator: Any,
        transformer: Any,
        network: Any,
        batch: Any,
        latents: Any,
        noise: Any,
        scheduler: Any,
        dtypes: Any,
        sample_resources: Any,
        global_step: int,
        items: Any,
        more: Any = None,
    ) -> Any:
        raise AssertionError("the plugin's own takes its place")

    def with_items(self: Any, index: int) -> Any:
        batch = batch_of(self, index)
        called.append("item_extras")
        return {**batch, "item_extras": [{"caption": "x"}] * len(batch["latents"])}

    monkeypatch.setattr(base, "prepare_sampling", prepare_sampling, raising=False)
    monkeypatch.setattr(base, "_prepare_sampling", lambda self, *inputs: self.prepare_sampling(*inputs))  # the old loop calls it
    monkeypatch.setattr(base, "round_sample_frame_count", round_sample_frame_count, raising=False)
    monkeypatch.setattr(base, "sample_image_inference", sample_image_inference)
    monkeypatch.setattr(base, "process_batch", process_batch)
    monkeypatch.setattr(manager, "__getitem__", with_items)
    return called
