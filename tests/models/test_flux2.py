"""FLUX.2 klein beside diffusers' own pipeline: the contract of all image families, and what is its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor, nn

from byg_plugin import sampling
from byg_plugin.data.buckets import to_tensor
from byg_plugin.models import files, flux2_files, make_family
from byg_plugin.models.base import Family
from byg_plugin.models.tokens import join_squares, split_squares
from tests.models.contract import CPU, PROMPTS, FamilyContract, T
from tests.support.comfyui import comfyui, needs_comfyui
from tests.support.tiny_flux2 import SCHEDULER, TINY_FLUX2, flux2_folder, qwen3_tokenizer, tiny_qwen3
from tests.support.tiny_qwen import randomised

NINE = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}


class TestContract(FamilyContract):
    name = "flux2-klein-4b"
    channels = 128
    height, width = 2, 3
    patch = 1
    text_tokens = 20
    head = "proj_out"
    sinusoids = "time_guidance_embed.time_proj"
    moved = "reference"
    full_size = (3_875_544_576, 5 * 12 + 20 * 2)

    def folder(self) -> Path:
        return flux2_folder()

    def pipeline(self, family: Family, network: nn.Module) -> Flux2KleinPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        return Flux2KleinPipeline(scheduler, family.load_vae(CPU), tiny_qwen3(), qwen3_tokenizer(), network)

    def run(self, pipe: Any, *, steps: int, latents: Tensor, output_type: str, prompt: list[str], **more: Any) -> Tensor:
        sizes = {"height": 32, "width": 48, "max_sequence_length": 20, "num_inference_steps": steps} | more
        out = pipe(prompt=prompt, latents=latents[:, :, 0], guidance_scale=4.0, output_type=output_type, **sizes).images
        if output_type != "latent":
            return out
        mean, variance = (value.view(1, -1, 1, 1) for value in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var))
        return ((split_squares(out) - mean) / (variance + 1e-4).sqrt()).unsqueeze(2)

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return flux2_files.to_native_layout(state)

    def full_network(self) -> nn.Module:
        with torch.device("meta"):
            return Flux2Transformer2DModel.from_config(files.shipped_config("flux2/transformer"))

    def test_the_other_size_is_refused(self, tmp_path: Path):
        shutil.copytree(self.folder(), tmp_path / "model")
        file = tmp_path / "model" / "transformer" / "config.json"
        config = json.loads(file.read_text())
        family = make_family(self.config(tmp_path, model={"path": str(tmp_path / "model")}))
        for width, loads in ((12288, False), (7680, True), (96, True)):
            file.write_text(json.dumps(config | {"joint_attention_dim": width}), encoding="utf-8")
            if loads:  # no published size: refused for its weights alone, which are of another
                with pytest.raises(ValueError, match="1 tensors have another shape .*, such as context_embedder.weight"):
                    family.meta_transformers()
                continue
            for look in (family.meta_transformers, lambda: next(iter(family.load_transformers(torch.float32)))):
                with pytest.raises(
                    ValueError, match=r"takes texts 12288 wide, so it is flux2-klein-9b, and model.family is flux2-klein-4b"
                ):
                    look()


def test_the_published_size_of_the_9b():
    class Nine(TestContract):
        name = "flux2-klein-9b"
        full_size = (9_078_581_248, 8 * 12 + 24 * 2)

        def full_network(self) -> nn.Module:
            with torch.device("meta"):
                return Flux2Transformer2DModel.from_config(files.shipped_config("flux2/transformer") | NINE)

    Nine().test_the_published_size_and_what_a_lora_of_it_is_taken_for()


@torch.no_grad()
def test_reference_positions_are_those_of_the_pipelines_image():
    """What makes the LoRA run in it: a source at `reference` is its `image=`."""
    contract = TestContract()
    family, network, noise = (
        contract.family("reference"),
        contract.network(),
        torch.randn(1, 128, 1, 4, 6, generator=torch.Generator().manual_seed(0)),
    )
    picture = Image.fromarray((np.random.default_rng(0).random((64, 96, 3)) * 255).astype(np.uint8))
    source = family.encode_pixels(family.load_vae(CPU), to_tensor(picture)[None, :, None])
    prompts = [PROMPTS[0]]
    nodes = sampling.sampling_nodes(family, 4, "shifted", tuple(noise.shape))
    field = sampling.guided(lambda *call: family.velocity(network, *call), contract.texts([""]), lambda t: 4.0, family)
    ours = sampling.sample(field, noise, contract.texts(prompts), source, nodes)
    pipe = contract.pipeline(family, network)
    size = {"height": 64, "width": 96}  # it refuses smaller pictures
    theirs = contract.run(pipe, prompt=prompts, steps=4, latents=noise, output_type="latent", image=[picture], **size)
    plain = contract.run(pipe, prompt=prompts, steps=4, latents=noise, output_type="latent", **size)
    assert (ours - theirs).abs().max() <= 1e-4 and (ours - plain).abs().max() > 1e-2


@needs_comfyui
@torch.no_grad()
@pytest.mark.parametrize("position", ["same", "reference"])
def test_comfyui_computes_the_same(position: str):
    """Its own FLUX.2 with the tiny network's weights; the source as a reference latent, for `same` at index scale 0."""
    contract = TestContract()
    network = randomised(type(contract.network())(**TINY_FLUX2 | {"timestep_guidance_channels": 256}), 0, std=0.15)
    state = flux2_files.to_native_layout(network.state_dict())
    noisy, source, texts = contract.latents(0), contract.latents(1), contract.texts()
    wanted = contract.family(position).velocity(network, noisy, T, texts, source)
    with comfyui() as comfy:
        config = comfy.detection.detect_unet_config(dict(state), "")
        theirs = comfy_flux().Flux(
            **own_sizes(config, position), dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
        )
        # Releases of 2026 call the norms' tensors so once a file is read.
        names = theirs.state_dict().keys()
        theirs.load_state_dict({name if name in names else name.replace(".scale", ".weight"): value for name, value in state.items()})
        found = theirs.eval()(noisy[:, :, 0], T, texts["qwen"], ref_latents=[source[:, :, 0]])
    assert (found - wanted[:, :, 0]).abs().max() <= 1e-4


def comfy_flux() -> Any:
    import comfy.ldm.flux.model

    return comfy.ldm.flux.model


def own_sizes(config: dict[str, Any], position: str) -> dict[str, Any]:
    """What ComfyUI takes for granted of heads of 128 channels, in tiny."""
    sizes = {key: value for key, value in config.items() if key != "image_model"}
    return sizes | {"num_heads": 2, "axes_dim": [4, 4, 4, 4], "ref_index_scale": 10.0 if position == "reference" else 0.0}


def test_squares_are_the_pipelines():
    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(split_squares(latents), Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(join_squares(split_squares(latents)), latents)
