"""diffusers' pipelines with a source: their edits are `edit.py`'s, and everything else is as diffusers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byg_plugin import EditPipeline, families, pipelines
from byg_plugin.lora.files import read_lora, write_lora
from byg_plugin.lora.formats import convert
from tests.support.pipelines import (
    IMAGE_FAMILIES,
    PROMPTS,
    edit,
    edited,
    forget,
    generators,
    image,
    image_folder,
    lora_of,
    opened,
    wan_saved,
    write_card_lora,
)
from tests.support.tiny_wan import A14B, T2V, wan_config

CASES = [(name, position) for name, made in IMAGE_FAMILIES.items() for position in families.named(made.family).positions]


@pytest.mark.parametrize(("name", "position"), CASES)
def test_edits_are_those_of_edit_py(name: str, position: str, tmp_path: Path):
    """Three steps of a batch with the family's guidance: with the LoRA, and without it, which is the base with a source."""
    lora = lora_of(name, tmp_path, position)
    editor = EditPipeline.from_lora(lora, model=str(image_folder(name)), dtype="float32", device="cpu")
    clips = [[image(0)], [image(1)]]
    pipe = opened(name)
    pipe.load_lora_weights(lora)
    found = []
    for strength in (1.0, 0.0):
        if not strength:
            pipe.unload_lora_weights()
            editor._host.set_strength(0.0)
        wanted = edited(editor, clips, PROMPTS, steps=3, seeds=[4, 5]) / 2 + 0.5
        call = {"image": [clip[0] for clip in clips], "prompt": list(PROMPTS), "num_inference_steps": 3}
        ours = pipe(**call, generator=generators(4, 5), output_type="pt").images
        assert (ours - wanted[:, :, 0]).abs().max() <= 1e-5
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 1e-3, "the LoRA changes nothing"


# --- Wan ---


def wan_lora(folder: Path, family: str, position: str = "same", **sections: Any) -> Path:
    config = wan_config(folder, family, conditioning={"position": position}, **sections)
    return write_card_lora(config, folder / "lora.safetensors")


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(("family", "position"), [(A14B, "same"), (A14B, "bernini"), (T2V, "same")])
def test_wan_edits_are_those_of_edit_py(family: str, position: str, frames: int, tmp_path: Path):
    """Four steps, of two experts the last by the second; both LoRAs are read from the name of one."""
    lora = wan_lora(tmp_path, family, position)
    more = {"model": str(wan_saved(family)), "dtype": "float32", "device": "cpu", "solver": "unipc_diffusers"}
    editor = EditPipeline.from_lora(lora, resolution=48, **more)
    pipe = opened("WanBygPipeline", wan_saved(family))
    pipe.load_lora_weights(lora)
    clip = [image(seed, (48, 48)) for seed in range(frames)]
    source = {"image": clip[0]} if frames == 1 else {"video": clip}
    found = []
    for strength in (1.0, 0.0):
        if not strength:
            pipe.unload_lora_weights()
            editor._host.set_strength(0.0)
        wanted = edited(editor, [clip], PROMPTS[:1], steps=4, seeds=[4])[0] / 2 + 0.5
        ours = pipe(**source, prompt=PROMPTS[0], num_inference_steps=4, generator=generators(4)[0], output_type="pt").frames[0]
        assert (ours.transpose(0, 1) - wanted).abs().max() <= 1e-5
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 1e-3, "the LoRA changes nothing"


def test_a_time_for_every_token_is_one_time():
    """As the 5B's pipeline gives it, for the noisy tokens alone."""
    pipe, clip = opened("WanBygPipeline", wan_saved(T2V)), [image(seed, (48, 48)) for seed in range(5)]
    call = {"video": clip, "prompt": "add snow", "num_inference_steps": 2, "output_type": "pt"}
    usual = pipe(**call, generator=generators(4)[0]).frames
    pipe.register_to_config(expand_timesteps=True)
    try:
        assert torch.equal(pipe(**call, generator=generators(4)[0]).frames, usual)
    finally:
        pipe.register_to_config(expand_timesteps=False)


def test_several_clips_of_a_prompt_are_those_of_one():
    pipe = opened("WanBygPipeline", wan_saved(T2V))
    call = {"video": [image(seed, (48, 48)) for seed in range(5)], "prompt": "add snow", "num_inference_steps": 2, "output_type": "pt"}
    pair = pipe(**call, num_videos_per_prompt=2, generator=generators(4, 5)).frames
    alone = [pipe(**call, generator=generators(seed)).frames[0] for seed in (4, 5)]
    assert len(pair) == 2 and (pair - torch.stack(alone)).abs().max() <= 1e-5
    assert (pair[0] - pair[1]).abs().max() > 1e-3, "the two are one"


# --- diffusers' conventions ---


@pytest.fixture(scope="module")
def flux_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_of("FluxBygPipeline", tmp_path_factory.mktemp("lora"))


@pytest.fixture
def flux(flux_lora: Path) -> Any:
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(flux_lora)
    return pipe


def changes(pipe: Any) -> list[Any]:
    """How many hooks the network's modules have, and what hides a method of its class."""
    hidden = [key for key in vars(pipe.transformer) if callable(getattr(type(pipe.transformer), key, None))]
    return [*hidden, *(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.transformer.modules())]


def test_outputs_are_of_the_asked_type_and_the_sources_size(flux: Any):
    pixels = edit(flux)
    assert pixels.shape == (1, 3, 32, 64)
    assert edit(flux, output_type="pil")[0].size == (64, 32)
    assert abs(edit(flux, output_type="np")[0] - pixels[0].permute(1, 2, 0).numpy()).max() <= 1e-6
    assert edit(flux, output_type="latent").shape == (1, 8, 64)
    (same,) = flux(image=image(), prompt="add snow", num_inference_steps=2, output_type="pt", generator=generators(4)[0], return_dict=False)
    assert torch.equal(same, pixels)


def test_callbacks_see_steps_change_latents_and_interrupt(flux: Any):
    seen: list[tuple[int, int]] = []

    def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tensors["latents"].shape[1]))
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0}

    changed = edit(flux, num_inference_steps=4, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert seen == [(0, 8), (1, 8)], "of the source nothing is seen, and an interrupted call ends"
    assert not torch.allclose(changed, edit(flux, num_inference_steps=4), atol=1e-3)


def test_several_images_of_a_prompt_have_their_own_source(flux: Any):
    pair = edit(flux, image=[image(0), image(1)], prompt=PROMPTS, num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    alone = edit(flux, image=image(1), prompt=PROMPTS[1], num_images_per_prompt=1, generator=generators(3))
    assert pair.shape[0] == 4 and (pair[2] - alone[0]).abs().max() <= 1e-5
    texts = edit(flux, image=image(1), prompt=PROMPTS, generator=generators(3, 3))
    assert (texts[1] - alone[0]).abs().max() <= 1e-5, "one image, several prompts"


def test_the_callers_lists_of_texts_stay_as_they_were():
    """diffusers' Z-Image writes the chat template into the lists that it is given."""
    pipe, prompts, negative = opened("ZImageBygPipeline"), list(PROMPTS), ["", "blurred"]
    call = {"prompt": prompts, "negative_prompt": negative, "guidance_scale": 4.0}
    first, second = (edit(pipe, **call, generator=generators(4, 5)) for _ in range(2))
    assert prompts == PROMPTS and negative == ["", "blurred"]
    assert torch.equal(first, second)


def test_embeddings_instead_of_a_prompt_and_a_strength_of_the_adapter(flux: Any):
    prompt_embeds, pooled, _ = flux.encode_prompt("add snow", None, max_sequence_length=8)
    usual = edit(flux)
    given = edit(flux, prompt=None, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)
    assert (given - usual).abs().max() <= 1e-6
    half = edit(flux, joint_attention_kwargs={"scale": 0.5})
    assert (half - usual).abs().max() > 1e-4
    flux.set_adapters(flux.get_active_adapters(), 0.5)
    assert torch.allclose(edit(flux), half, atol=1e-5)


def test_the_card_gives_the_defaults_and_arguments_override_them(tmp_path: Path):
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(lora_of("FluxBygPipeline", tmp_path, guidance=2.5, schedule="uniform", resolution=32))
    seen: list[Any] = []

    def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(float(t))
        return {}

    scheduler = pipe.scheduler
    usual = edit(pipe, num_inference_steps=4, callback_on_step_end=look)
    assert usual.shape == (1, 3, 32, 32) and pipe.guidance_scale == 2.5 and seen == [1000, 750, 500, 250]
    assert pipe.scheduler is scheduler, "the schedule is the call's alone"
    pipe(image=image(), prompt="add snow", output_type="latent")
    assert pipe.num_timesteps == 20
    assert not torch.allclose(edit(pipe, num_inference_steps=4, guidance_scale=9.0), usual, atol=1e-4)


@pytest.mark.parametrize("name", ["FluxBygPipeline", "ZImageBygPipeline", "QwenImageBygPipeline"])
def test_nothing_stays_after_a_call_and_after_an_error(name: str):
    pipe = opened(name)
    before = changes(pipe)
    edit(pipe)
    assert changes(pipe) == before

    def fail(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=fail)
    assert changes(pipe) == before


def test_offloaded_models_and_compiled_networks_edit_alike(flux: Any):
    """accelerate's hooks lie below ours; a compiled network must not keep the first call's source."""
    usual = [edit(flux, image=image(seed)) for seed in (0, 1)]
    assert (usual[0] - usual[1]).abs().max() > 1e-4
    network = flux.transformer
    flux.enable_model_cpu_offload(device="cpu")
    try:
        for seed in (0, 1):
            assert torch.equal(edit(flux, image=image(seed)), usual[seed])
        assert hasattr(network, "_hf_hook"), "the pipeline has put its hooks back"
    finally:
        flux.remove_all_hooks()
    flux.transformer = torch.compile(network, backend="eager")
    try:
        for seed in (0, 1):
            assert torch.allclose(edit(flux, image=image(seed)), usual[seed], atol=1e-6)
    finally:
        flux.transformer = network


def test_a_lora_loads_into_a_compiled_network(flux_lora: Path):
    pipe = opened("FluxBygPipeline")
    call = {"image": image(0, (64, 32)), "height": 32, "width": 64}
    base = edit(pipe, **call)
    network = pipe.transformer
    pipe.transformer = torch.compile(network, backend="eager")
    try:
        pipe.load_lora_weights(flux_lora)
        compiled = edit(pipe, **call)
    finally:
        pipe.transformer = network
    usual = edit(pipe, **call)
    assert torch.allclose(compiled, usual, atol=1e-6) and (usual - base).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["FluxBygPipeline", "Flux2KleinBygPipeline", "QwenImageBygPipeline", "Krea2BygPipeline"])
def test_times_are_exact_in_16_bit(name: str):
    """As in training; diffusers' own would round them."""
    pipe, seen, times = opened(name), [], []
    module, factor = IMAGE_FAMILIES[name].sinusoids
    handle = pipe.transformer.get_submodule(module).register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))

    def look(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times.append(t.float() / 1000 * factor)
        return {}

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    pipe.to(torch.bfloat16)
    try:
        edit(pipe, num_inference_steps=3, callback_on_step_end=look)
    finally:
        handle.remove()
        pipe.to(torch.float32)
        for part, before in zip(parts, weights, strict=True):
            part.load_state_dict(before)
    entered = torch.stack([t[0].float() for t in seen]).unique()
    is_time = entered.abs() <= 1000
    torch.testing.assert_close(entered[is_time], torch.stack(times).unique(), rtol=1e-6, atol=0)
    assert entered[~is_time].tolist() == ([3500.0] if name == "FluxBygPipeline" else []), "and FLUX.1's guidance"


# --- loading ---


def test_any_of_our_formats_loads_and_other_loras_leave_the_position(flux_lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(flux_lora)
    write_lora(tmp_path / "musubi.safetensors", convert(tensors, "musubi"), metadata | {"byg.position": "kontext"})
    write_lora(tmp_path / "style.safetensors", tensors, {})
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(tmp_path, weight_name="musubi.safetensors")
    usual = edit(pipe)
    pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    pipe.set_adapters(["default_0", "style"])
    assert pipe.position == "kontext" and (edit(pipe) - usual).abs().max() > 1e-4
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors, position="kontext")
    assert torch.allclose(edit(pipe), usual, atol=1e-5), "tensors say nothing of a position"
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "musubi.safetensors", position="same")
    assert pipe.position == "same" and (edit(pipe) - usual).abs().max() > 1e-5


def test_a_lora_without_a_card_is_not_sampled_by_one_that_was_unloaded(flux_lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(flux_lora)
    write_lora(tmp_path / "ours.safetensors", tensors, metadata)
    write_lora(tmp_path / "style.safetensors", tensors, {})
    pipe = opened("FluxBygPipeline")
    try:
        pipe.load_lora_weights(tmp_path / "style.safetensors")
        usual = edit(pipe)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path / "ours.safetensors")
        assert edit(pipe).shape != usual.shape, "it was trained for another resolution"
        pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="beside")
        assert edit(pipe).shape != usual.shape, "its own LoRA is there still"
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path / "style.safetensors")
        assert torch.equal(edit(pipe), usual)
    finally:
        forget("FluxBygPipeline")


def test_a_fused_lora_keeps_its_position(tmp_path: Path):
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(lora_of("FluxBygPipeline", tmp_path, "kontext"))
    usual = edit(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    try:
        assert pipe.position == "kontext" and (edit(pipe) - usual).abs().max() <= 1e-4
    finally:
        forget("FluxBygPipeline")


def test_a_pair_on_the_hub_is_fetched_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wan_lora(tmp_path, A14B, "bernini")
    fetched: list[tuple[Any, ...]] = []

    def fetch(repo: str, name: str, **options: Any) -> str:
        fetched.append((repo, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    pipe = opened("WanBygPipeline", wan_saved(A14B))
    pipe.load_lora_weights("someone/editor", weight_name="lora_low_noise.safetensors", revision="abc")
    assert [call[1] for call in fetched] == ["lora_high_noise.safetensors", "lora_low_noise.safetensors"]
    assert all(call[0] == "someone/editor" and call[2] == {"revision": "abc"} for call in fetched)
    assert pipe.position == "bernini" and set(pipe.get_list_adapters()) == {"transformer", "transformer_2"}


def test_a_lora_that_experts_share_is_for_both_and_brings_its_boundary(tmp_path: Path):
    config = wan_config(tmp_path, A14B, lora={"experts": "shared"}, model={"boundary": 0.5})
    pipe = opened("WanBygPipeline", wan_saved(A14B))
    pipe.load_lora_weights(write_card_lora(config, tmp_path / "lora.safetensors"))
    try:
        assert set(pipe.get_list_adapters()) == {"transformer", "transformer_2"} and pipe.config.boundary_ratio == 0.5
        pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="again")
        pipe.unload_lora_weights()
        write_lora(tmp_path / "style.safetensors", read_lora(tmp_path / "lora.safetensors")[0], {})
        pipe.load_lora_weights(tmp_path / "style.safetensors")
        assert pipe.get_list_adapters() == {"transformer": ["default_0"]} and pipe.config.boundary_ratio == 0.875
    finally:
        pipe.register_to_config(boundary_ratio=0.875)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": None}, "image is missing: give a PIL image"),
        ({"image": []}, "image is a list"),
        ({"image": "photo.png"}, "image is a str"),
        ({"image": torch.zeros(1, 1, 8, 8)}, r"image is a ndarray\[1, 8, 8, 1\]"),
        ({"image": torch.full((3, 32, 32), 2.0)}, r"image has values from 2 to 2: they lie in \[0, 1\]"),
        ({"image": [image(), image(0, (70, 100))], "prompt": PROMPTS}, "images of one call need one size, got .*edit them one by one"),
        ({"height": 64, "width": 64}, "the image is 100 x 70, width = 64 and height = 64: leave both out"),
        ({"height": 70}, "the image is 100 x 70, width = None and height = 70"),
        ({"height": 70, "width": 100}, "width = 100 and height = 70 must be multiples of 16"),
        ({"image": [image(), image(1)]}, "2 images and 1 prompts: give each image a prompt"),
        ({"image": [image(), image(1)], "prompt": [*PROMPTS, "add sky"]}, "2 images and 3 prompts"),
        ({"prompt": None}, "prompt is missing: say what to change"),
        ({"prompt": []}, r"prompt = \[\] is no text and no list of texts"),
        ({"prompt": 5}, "prompt = 5 is no text"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0 is not a whole number from 1 on"),
        ({"num_images_per_prompt": -1}, "num_images_per_prompt = -1 is not"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt = 1.5 is not"),
    ],
)
def test_a_call_that_cannot_be_honoured_says_why(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        edit(opened("FluxBygPipeline"), **options)


def test_an_array_of_the_asked_size_is_taken_as_it_is():
    pipe = opened("FluxBygPipeline")
    array = np.asarray(image(0, (64, 32))) / 255
    usual = edit(pipe, image=image(0, (64, 32)), height=32, width=64)
    assert torch.equal(edit(pipe, image=array, height=32, width=64), usual)
    assert torch.equal(edit(pipe, image=torch.from_numpy(array).permute(2, 0, 1)[None], height=32, width=64), usual)
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        edit(pipe, guidance=3.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give image= or video=: what to edit$"),
        ({"image": image(), "video": [image()]}, "not both"),
        ({"video": [image()] * 6}, r"the clip has 6 frames, and Wan takes 4n \+ 1: cut it to 5"),
        ({"video": [image()] * 5, "num_frames": 9}, "the clip has 5 frames, num_frames = 9: they must be as many"),
        ({"video": [[image()] * 5, [image()]], "prompt": PROMPTS}, "the clip has 1 and 5 frames"),
        ({"video": [[image()] * 5] * 2}, "2 images and 1 prompts"),
    ],
)
def test_a_clip_that_does_not_fit_says_why(options: dict[str, Any], said: str):
    pipe = opened("WanBygPipeline", wan_saved(T2V))
    with pytest.raises(ValueError, match=said):
        pipe(**({"prompt": "add snow"} | options))


def test_loras_that_do_not_fit_are_refused(flux_lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(flux_lora)
    wider = {name: torch.cat([value, value], dim=1) if "lora_A" in name else value for name, value in tensors.items()}
    for name, some, said in (
        ("family", metadata | {"byg.family": "krea2"}, "trained for 'krea2', FluxBygPipeline is for flux"),
        ("position", metadata | {"byg.position": "bernini"}, "position = 'bernini' is not one of same, kontext"),
    ):
        write_lora(tmp_path / f"{name}.safetensors", tensors, some)
        with pytest.raises(ValueError, match=said):
            opened("FluxBygPipeline").load_lora_weights(tmp_path / f"{name}.safetensors")
    write_lora(tmp_path / "wider.safetensors", wider, metadata)
    write_lora(tmp_path / "kontext.safetensors", tensors, metadata | {"byg.position": "kontext"})
    pipe = opened("FluxBygPipeline")
    for given, options, said in (
        (tmp_path / "wider.safetensors", {}, "has 64 inputs, the network's has 32: it was trained on another model"),
        (tmp_path / "none.safetensors", {}, "none.safetensors: no such file"),
        (tmp_path, {}, "holds 4 LoRA files: name one with weight_name="),
        (flux_lora, {"position": "middle"}, "position = 'middle' is not one of same, kontext"),
        (flux_lora, {"load_into_transformer_2": True}, "load_into_transformer_2 is for other LoRAs"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe.load_lora_weights(given, **options)
    assert not any(pipe.get_list_adapters().values())
    pipe.load_lora_weights(flux_lora)
    with pytest.raises(ValueError, match=r"needs position 'kontext', the one that is loaded 'same': unload_lora_weights\(\) first"):
        pipe.load_lora_weights(tmp_path / "kontext.safetensors")


def test_experts_that_the_pipeline_does_not_have_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="trained for 'wan2.2-t2v-a14b', which is two experts; this pipeline has one network"):
        opened("WanBygPipeline", wan_saved(T2V)).load_lora_weights(wan_lora(tmp_path, A14B))


def test_a_class_that_this_diffusers_lacks_says_which_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(vars(pipelines), "Krea2BygPipeline", raising=False)
    monkeypatch.setattr("diffusers.__version__", "0.35.2")
    with pytest.raises(AttributeError, match="Krea2BygPipeline needs diffusers 0.39 or later, this is 0.35.2"):
        _ = pipelines.Krea2BygPipeline
    with pytest.raises(AttributeError, match="has no attribute 'OtherPipeline'"):
        _ = pipelines.OtherPipeline
