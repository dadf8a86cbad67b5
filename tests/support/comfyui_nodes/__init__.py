"""Nodes of the tests, loaded by ComfyUI itself: conditioning and latents from files, results into files. No text encoder, no VAE."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from safetensors.torch import load_file, save_file


def _read(name: str) -> dict[str, Any]:
    return load_file(os.path.join(folder_paths.get_input_directory(), name))


class TestConditioning:
    """`cross` is the sequence, `pooled` what is pooled, `mask` of the attention."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "read", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": ("STRING", {})}}

    def read(self, file: str) -> tuple[Any]:
        tensors = _read(file)
        names = {"pooled": "pooled_output", "mask": "attention_mask"}
        return ([[tensors["cross"], {new: tensors[old] for old, new in names.items() if old in tensors}]],)


class TestLatent:
    """`samples`."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "read", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": ("STRING", {})}}

    def read(self, file: str) -> tuple[Any]:
        return ({"samples": _read(file)["samples"]},)


class TestSave:
    """A latent, as ComfyUI's nodes hand it on, and in the network's own scale."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "save", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT", {}), "model": ("MODEL", {}), "file": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        return float("nan")  # never from the cache

    def save(self, latent: dict[str, Any], model: Any, file: str) -> dict[str, Any]:
        samples = latent["samples"].float().contiguous()
        scaled = model.model.process_latent_in(samples).contiguous()
        save_file({"samples": samples, "scaled": scaled.clone()}, os.path.join(folder_paths.get_output_directory(), file))
        return {}


class TestSigmas:
    """A schedule into a file."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "save", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"sigmas": ("SIGMAS", {}), "file": ("STRING", {})}}

    def save(self, sigmas: Any, file: str) -> dict[str, Any]:
        save_file({"sigmas": sigmas.contiguous()}, os.path.join(folder_paths.get_output_directory(), file))
        return {}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestConditioning, TestLatent, TestSave, TestSigmas)}
