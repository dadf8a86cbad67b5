"""Krea 2 beside diffusers' own pipeline: what the contract of all image families does not ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor, nn

from byg_plugin.models import make_family, qwen_files
from byg_plugin.models.base import Family
from byg_plugin.models.tokens import pack, unpack
from byg_plugin.texts import stack_texts, text_at
from tests.models.contract import CPU, PROMPTS, FamilyContract, T
from tests.support.tiny_qwen import krea2_folder, tiny_qwen3_vl

SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 6400, "base_shift": 0.5, "max_shift": 1.15}


class TestContract(FamilyContract):
    name = "krea2"
    head = "final_layer"
    sinusoids = "time_embed"
    moved = "reference"
    full_size = (12_820_073_036, 28 * 8)

    def folder(self) -> Path:
        return krea2_folder()

    def pipeline(self, family: Family, network: nn.Module) -> Krea2Pipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SCHEDULER)
        encoders = family.load_text_encoders(CPU)
        return Krea2Pipeline(scheduler, family.load_vae(CPU), tiny_qwen3_vl(), encoders.tokenizer, network)

    def run(self, pipe: Any, *, steps: int, latents: Tensor, output_type: str, prompt: list[str]) -> Tensor:
        sizes = {"guidance_scale": 3.5, "height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": steps}
        out = pipe(prompt, latents=pack(latents), output_type=output_type, **sizes).images
        return unpack(out, 4, 6) if output_type == "latent" else out

    def full_network(self) -> nn.Module:
        with torch.device("meta"):
            return Krea2Transformer2DModel()

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return qwen_files.to_native_krea2(state)

    def entering(self, t: Tensor) -> Tensor:
        return t

    def plain(self, pixels: Tensor) -> Tensor:
        return pixels

    @torch.no_grad()
    def test_texts_are_the_pipelines_rows_without_padding(self):
        """The pipeline pads before the template's end; the padding is masked in the network."""
        family = make_family(self.config(Path("unused"), conditioning={"max_text_tokens": 16}))
        encoders = family.load_text_encoders(CPU)
        rows, mask = self.pipeline(family, self.network()).get_text_hidden_states(PROMPTS, 16)
        ours = family.encode_texts(encoders, PROMPTS)
        for index in range(2):
            one = text_at(ours, index)["qwen"]
            assert one.shape == (int(mask[index].sum()), 12, 24)
            assert (one - rows[index][mask[index]]).abs().max() <= 1e-5
        alone = stack_texts([text_at(family.encode_texts(encoders, [prompt]), 0) for prompt in PROMPTS])
        assert (alone["qwen"] - ours["qwen"]).abs().max() <= 1e-5 and torch.equal(alone["mask"], ours["mask"])

    @torch.no_grad()
    def test_guidance_is_the_pipelines_formula(self):
        v, away = self.latents(0), self.latents(1)
        torch.testing.assert_close(self.family().guide(v, away, 4.5), v + 4.5 * (v - away), rtol=1e-5, atol=1e-5)
        assert self.config(Path("unused")).negative == ""
        assert self.config(Path("unused"), sample={"cfg_high_noise": 0.0}).negative is None
        assert self.config(Path("unused"), sample={"cfg_high_noise": 1.0}).negative == ""

    @torch.no_grad()
    def test_norms_stay_in_float32(self):
        network = self.network(torch.bfloat16)
        assert network.transformer_blocks[0].norm1.weight.dtype == torch.float32
        out = self.family().velocity(network, self.latents(0), T, self.texts(), self.latents(1))
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
