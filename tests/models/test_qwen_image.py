"""Qwen-Image beside diffusers' own pipeline: what the contract of all image families does not ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from byg_plugin.models import make_family
from byg_plugin.models.base import Family
from byg_plugin.models.tokens import pack, unpack
from byg_plugin.texts import stack_texts, text_at
from tests.models.contract import CPU, PROMPTS, FamilyContract, T
from tests.support.tiny_qwen import krea2_folder, qwen_folder, tiny_language_model, write_qwen

SCHEDULER = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}


class TestContract(FamilyContract):
    name = "qwen-image"
    head = "proj_out"
    sinusoids = "time_text_embed.time_proj"
    moved = "reference"
    full_size = (20_430_401_088, 60 * 12 - 4)

    def folder(self) -> Path:
        return qwen_folder()

    def pipeline(self, family: Family, network: nn.Module) -> QwenImagePipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SCHEDULER)
        encoders = family.load_text_encoders(CPU)
        return QwenImagePipeline(scheduler, family.load_vae(CPU), tiny_language_model(), encoders.tokenizer, network)

    def run(self, pipe: Any, *, steps: int, latents: Tensor, output_type: str, prompt: list[str]) -> Tensor:
        sizes = {"height": 32, "width": 48, "max_sequence_length": 8, "num_inference_steps": steps}
        negative = {"negative_prompt": [" "] * len(prompt), "true_cfg_scale": 4.0}
        out = pipe(prompt, latents=pack(latents), output_type=output_type, **sizes, **negative).images
        return unpack(out, 4, 6) if output_type == "latent" else out

    def full_network(self) -> nn.Module:
        with torch.device("meta"):
            return QwenImageTransformer2DModel()

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def entering(self, t: Tensor) -> Tensor:
        return t

    def plain(self, pixels: Tensor) -> Tensor:
        return pixels

    @torch.no_grad()
    def test_texts_are_the_pipelines(self):
        family = make_family(self.config(Path("unused"), conditioning={"max_text_tokens": 16}))
        encoders = family.load_text_encoders(CPU)
        rows, mask = self.pipeline(family, self.network()).encode_prompt(PROMPTS, max_sequence_length=16)
        ours = family.encode_texts(encoders, PROMPTS)
        assert torch.equal(ours["mask"], mask.bool()) and (ours["qwen"] - rows).abs().max() <= 1e-6
        alone = stack_texts([text_at(family.encode_texts(encoders, [prompt]), 0) for prompt in PROMPTS])
        assert (alone["qwen"] - ours["qwen"]).abs().max() <= 1e-5 and torch.equal(alone["mask"], ours["mask"])

    def test_tables_made_without_autograd_serve_a_backward_pass(self):
        """The network keeps its position tables: those of inference mode cannot be saved for a backward pass."""
        network, family, texts = self.network(), self.family(), self.texts()
        with torch.inference_mode():
            # As on a device of its own, to which the network copies its tables in the first call.
            network.pos_embed.pos_freqs = network.pos_embed.pos_freqs.clone()
            family.velocity(network, self.latents(0), T, texts, None)
        source = self.latents(1).requires_grad_()
        family.velocity(network, self.latents(0), T, texts, source).square().sum().backward()
        assert source.grad is not None and source.grad.abs().max() > 0

    @torch.no_grad()
    def test_reference_is_the_second_image_of_the_edit_pipeline(self):
        """QwenImageEditPipeline lists the source as the second image, whose frame is 1."""
        network, family, texts, seen = self.network(), self.family("reference"), self.texts(), []
        network.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        family.velocity(network, self.latents(0), T, texts, self.latents(1))
        assert seen == [[[(1, 2, 3), (1, 2, 3)]] * 2]

    @pytest.mark.parametrize("key", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
    def test_other_checkpoints_of_the_class_are_refused(self, key: str, tmp_path: Path):
        write_qwen(tmp_path / "model")
        config = tmp_path / "model" / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: True}), encoding="utf-8")
        family = make_family(self.config(tmp_path, model={"path": str(tmp_path / "model")}))
        with pytest.raises(ValueError, match=f"{key} = True: looks like .*, whose input is not supplied here"):
            family.meta_transformers()

    def test_another_text_encoder_is_named(self, tmp_path: Path):
        family = make_family(self.config(tmp_path, model={"qwen": str(krea2_folder())}))
        with pytest.raises(ValueError, match=r"holds a qwen3_vl, not Qwen-Image's text encoder \(Qwen2.5-VL\)"):
            family.load_text_encoders(CPU)
