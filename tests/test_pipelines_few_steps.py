"""Few-step editors in diffusers' pipelines: the steps of `edit.py`, with the generator's noise, unguided and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers.scheduling_flow_match_euler_discrete as flow_match_euler
import pytest
import torch

from byg_plugin import EditPipeline, flow
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
from tests.support.tiny_wan import T2V, wan_config


def few_steps_lora(name: str, folder: Path, **card: Any) -> Path:
    return lora_of(name, folder, sampler="stochastic", steps=3, schedule="shifted", **card)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_few_step_editor_makes_the_steps_of_edit_py(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nodes, data predictions and no guidance, with the same fresh noise in both; its generators and draws are in the next test."""
    lora = few_steps_lora(name, tmp_path)
    draws = iter([0.5, -1.0])
    interpolate = flow.interpolate
    monkeypatch.setattr(flow, "interpolate", lambda x, fresh, t: interpolate(x, torch.full_like(fresh, next(draws)), t))
    editor = EditPipeline.from_lora(lora, model=str(image_folder(name)), dtype="float32", device="cpu")
    wanted = edited(editor, [[image(0)], [image(1)]], PROMPTS, steps=3, seeds=[4, 5]) / 2 + 0.5
    assert next(draws, None) is None
    fresh = iter([0.5, -1.0, 0.0])
    monkeypatch.setattr(flow_match_euler, "randn_tensor", lambda shape, **_: torch.full(shape, next(fresh)))
    pipe = opened(name)
    pipe.load_lora_weights(lora)
    scheduler = pipe.scheduler
    ours = edit(pipe, image=[image(0), image(1)], prompt=PROMPTS, num_inference_steps=3, generator=generators(4, 5))
    assert (ours - wanted[:, :, 0]).abs().max() <= 1e-4
    assert next(fresh, None) is None and pipe.scheduler is scheduler and not scheduler.config.stochastic_sampling


def test_fresh_noise_is_the_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(few_steps_lora("FluxBygPipeline", tmp_path))
    draws: list[torch.Tensor] = []
    plain = flow_match_euler.randn_tensor
    monkeypatch.setattr(flow_match_euler, "randn_tensor", lambda *shape, **given: draws.append(plain(*shape, **given)) or draws[-1])
    call = {"prompt": PROMPTS, "num_inference_steps": 3}
    pair = edit(pipe, image=image(1), **call, generator=generators(4, 5))
    assert len(draws) == 3 and not torch.equal(draws[0], draws[1])
    start = torch.randn(draws[0][:1].shape, generator=generators(4)[0])
    assert not torch.allclose(draws[0][0].flatten().sort().values, start.flatten().sort().values), "the noise that it starts from"
    alone = edit(pipe, image=image(1), prompt=PROMPTS[1], num_inference_steps=3, generator=generators(5)[0])
    assert (pair[1] - alone[0]).abs().max() <= 1e-5
    other = edit(pipe, image=image(1), prompt=PROMPTS[1], num_inference_steps=3, generator=generators(6)[0])
    assert (other - alone).abs().max() > 1e-3


def test_several_few_step_edits_of_a_prompt_are_those_of_one(tmp_path: Path):
    pipe = opened("ZImageBygPipeline")
    pipe.load_lora_weights(few_steps_lora("ZImageBygPipeline", tmp_path))
    call = {"image": [image(0), image(1)], "prompt": PROMPTS, "num_inference_steps": 3}
    pairs = edit(pipe, **call, num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    alone = edit(pipe, image=image(1), prompt=PROMPTS[1], num_inference_steps=3, generator=generators(3)[0])
    assert len(pairs) == 4 and (pairs[2] - alone[0]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="3 generators for 4 edits"):
        edit(pipe, **call, num_images_per_prompt=2, generator=generators(1, 2, 3))


def test_a_few_step_editor_brings_its_steps_and_is_not_guided(tmp_path: Path):
    pipe = opened("ZImageBygPipeline")
    pipe.load_lora_weights(few_steps_lora("ZImageBygPipeline", tmp_path))
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    pipe(image=image(), prompt="add snow", output_type="latent", guidance_scale=None)
    handle.remove()
    assert calls == [1, 1, 1], "its steps, without a second branch"
    edit(pipe, guidance_scale=0.0)
    for options, said in (
        ({"guidance_scale": 4.0}, "guidance_scale = 4.0: "),
        ({"negative_prompt": "blur"}, "negative_prompt: "),
        ({"negative_prompt_embeds": [torch.zeros(1, 4)]}, "negative_prompt_embeds: "),
    ):
        with pytest.raises(ValueError, match=said + "this LoRA edits in 3 steps without guidance"):
            edit(pipe, **options)


def test_a_refused_scheduler_keeps_its_shift(tmp_path: Path):
    """A schedule without shift is set up before the refusal."""
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(lora_of("FluxBygPipeline", tmp_path, sampler="stochastic", steps=3, schedule="uniform"))
    given = pipe.scheduler
    pipe.scheduler = other = diffusers.DPMSolverMultistepScheduler.from_config(given.config, flow_shift=3.0)
    try:
        with pytest.raises(ValueError, match="set pipe.scheduler to one"):
            edit(pipe)
        assert pipe.scheduler is other
    finally:
        pipe.scheduler = given


@pytest.mark.parametrize("name", ["FluxBygPipeline", "QwenImageBygPipeline"])
def test_the_second_branch_is_guidance_and_fluxs_embedding_is_not(name: str, tmp_path: Path):
    pipe = opened(name)
    pipe.load_lora_weights(few_steps_lora(name, tmp_path))
    with pytest.raises(ValueError, match=r"true_cfg_scale = 3.0: this LoRA edits in 3 steps"):
        edit(pipe, true_cfg_scale=3.0)
    edit(pipe, true_cfg_scale=None, guidance_scale=7.0)


def test_the_scheduler_is_as_it_was_after_an_error_and_one_without_such_steps_is_refused(tmp_path: Path):
    pipe = opened("FluxBygPipeline")
    pipe.load_lora_weights(few_steps_lora("FluxBygPipeline", tmp_path))
    given = pipe.scheduler

    def fail(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipe, callback_on_step_end=fail)
    assert pipe.scheduler is given and not given.config.stochastic_sampling and "step" not in vars(given)
    flow_times = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for other in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler):
        pipe.scheduler = other.from_config(given.config, **flow_times)
        try:
            with pytest.raises(ValueError, match=rf"the scheduler is {other.__name__}, .*set pipe.scheduler to one"):
                edit(pipe)
        finally:
            pipe.scheduler = given


def test_a_few_step_editor_is_alone_and_leaves_nothing(tmp_path: Path):
    pipe = opened("FluxBygPipeline")
    for folder in ("few", "usual", "other"):
        (tmp_path / folder).mkdir()
    few, usual = few_steps_lora("FluxBygPipeline", tmp_path / "few"), lora_of("FluxBygPipeline", tmp_path / "usual", schedule="shifted")
    other = lora_of("FluxBygPipeline", tmp_path / "other", sampler="stochastic", steps=8, schedule="shifted")
    pipe.load_lora_weights(usual)
    pipe.unload_lora_weights()
    base = edit(pipe)
    pipe.load_lora_weights(few)
    for one in (usual, other):
        with pytest.raises(ValueError, match="the one that is loaded in 3 stochastic steps of the shifted schedule: unload"):
            pipe.load_lora_weights(one)
    pipe.unload_lora_weights()
    assert torch.equal(edit(pipe), base), "the base by its own sampler"
    pipe.load_lora_weights(usual)
    with pytest.raises(ValueError, match="the one that is loaded in the family's steps: unload"):
        pipe.load_lora_weights(few)
    pipe.unload_lora_weights()
    try:
        pipe.load_lora_weights(few)
        loaded = edit(pipe)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert (edit(pipe) - loaded).abs().max() <= 1e-4, "a fused one is still sampled in its steps"
        with pytest.raises(ValueError, match="the family's steps, the one that is loaded in 3 stochastic"):
            pipe.load_lora_weights(usual)
    finally:
        forget("FluxBygPipeline")


def test_clips_have_no_few_steps_in_diffusers(tmp_path: Path):
    clips = write_card_lora(wan_config(tmp_path, T2V), tmp_path / "clips.safetensors", sampler="stochastic", steps=3)
    with pytest.raises(ValueError, match="edits in 3 stochastic steps, which this pipeline does not make: use EditPipeline"):
        opened("WanBygPipeline", wan_saved(T2V)).load_lora_weights(clips)
