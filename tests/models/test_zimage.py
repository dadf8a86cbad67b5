"""Z-Image beside diffusers' own pipeline: the contract of all image families, and what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.check import check
from byg_plugin.models import files, zimage_files
from byg_plugin.models.base import Family
from tests.models.contract import CPU, PROMPTS, FamilyContract, T
from tests.support.tiny_flux2 import qwen3_tokenizer, tiny_qwen3
from tests.support.tiny_zimage import SHIFT, zimage_folder


class TestContract(FamilyContract):
    name = "z-image"
    text_tokens = 20
    head = "all_final_layer.2-1"
    sinusoids = "t_embedder"
    moved = None
    full_size = (6_154_908_736, 30 * 7)

    def folder(self) -> Path:
        return zimage_folder()

    def pipeline(self, family: Family, network: nn.Module) -> ZImagePipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        return ZImagePipeline(scheduler, family.load_vae(CPU), tiny_qwen3(layers=3), qwen3_tokenizer(), network)

    def run(self, pipe: Any, *, steps: int, latents: Tensor, output_type: str, prompt: list[str]) -> Tensor:
        sizes = {"height": 32, "width": 48, "max_sequence_length": 20, "num_inference_steps": steps}
        # A copy: the pipeline writes its template into the list that it is given.
        out = pipe(prompt=list(prompt), latents=latents[:, :, 0], output_type=output_type, **sizes).images
        return out.unsqueeze(2) if output_type == "latent" else out

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return zimage_files.to_native_layout(state)

    def full_network(self) -> nn.Module:
        with torch.device("meta"):
            return ZImageTransformer2DModel.from_config(files.shipped_config("zimage/transformer"))

    def entering(self, t: Tensor) -> Tensor:
        return (1 - t) * 1000

    def halves(self, output: Tensor, length: int) -> Tensor:
        return output[:, : 2 * length]


@torch.no_grad()
def test_a_second_frame_without_our_positions_is_another_input():
    """The control of the swap: frames that stand one after another are told apart."""
    contract = TestContract()
    network, texts = contract.network(), contract.texts()
    pairs = [torch.cat([contract.latents(a), contract.latents(b)], dim=2) for a, b in ((0, 1), (1, 0))]
    rows = [one[kept] for one, kept in zip(texts["qwen"], texts["mask"], strict=True)]
    one, two = (torch.stack(network(list(pair), T, rows, return_dict=False)[0]) for pair in pairs)
    assert (one - two.flip(2)).abs().max() > 3e-4 * one.abs().max()


def test_texts_keep_their_own_lengths():
    texts = TestContract().texts()
    assert texts["qwen"].shape == (2, 20, 16) and texts["mask"].sum(1).tolist() == [2 + 8, 20]
    assert not texts["qwen"][0, 10:].any() and PROMPTS[0] == "add snow"


def test_sequence_counts_the_tokens_that_fill_up():
    family = TestContract().family(dataset={"resolution": 64})
    assert family.sequence_tokens(64, 96) == 64 + 32  # 2 x 24 and 20


def test_musubi_tuner_has_the_layers_apart():
    tensors = {f"transformer.layers.0.attention.to_q.lora_{a}.weight": torch.ones(2, 2) for a in "AB"}
    converted = lora_formats.convert(tensors, "musubi", family="z-image")
    assert set(converted) == {f"lora_unet_layers_0_attention_to_q.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    metadata = {"byg.family": "z-image"}
    musubi, comfy = check(converted, metadata, ["musubi", "comfyui"]).tools
    assert not musubi.lost and "native names alone" in comfy.lost[0].why
    fused = lora_formats.convert(tensors, "comfyui", family="z-image")
    renamed = {key.replace("diffusion_model.layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv"): t for key, t in fused.items()}
    assert "has no fused layer" in check(renamed, metadata, ["musubi"]).tools[0].lost[0].why
