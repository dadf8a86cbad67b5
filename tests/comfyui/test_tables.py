"""What the ComfyUI nodes know beside the trainer: families, schedules, guidance. No ComfyUI is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import comfyui_nodes
from byg_plugin.families import SPECS
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.sampling import sampling_nodes
from comfyui import families, guidance, schedule


def test_the_table_of_families_is_current() -> None:
    assert comfyui_nodes.FILE.read_text(encoding="utf-8") == comfyui_nodes.text(), "run: python -m benchmarks.comfyui_nodes"
    assert list(families.families()) == list(SPECS)
    assert {family.architecture for family in families.families().values()} == set(families.ARCHITECTURES)


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("size", [(64, 64), (90, 160)])
def test_sigmas_are_the_nodes_of_an_edit(name: str, steps: int, size: tuple[int, int]) -> None:
    geometry = SpecGeometry(SPECS[name])
    for kind in ("shifted", "uniform"):
        wanted = sampling_nodes(geometry, steps, kind, (1, 16, 1, *size))
        got = schedule.sigmas(families.family_named(name).shift, steps, *size, shifted=kind == "shifted")
        assert torch.equal(got, wanted)


def test_the_two_networks_share_the_steps_at_the_boundary() -> None:
    nodes = torch.tensor([1.0, 0.9, 0.875, 0.5, 0.0])
    high, low = schedule.split(nodes, 0.875)
    assert high.tolist() == nodes[:4].tolist() and low.tolist() == [0.5, 0.0]
    high, low = schedule.split(torch.tensor([1.0, 0.0]), 0.875)
    assert high.tolist() == [1.0, 0.0] and low.tolist() == [0.0]


def plain_guidance(name: str) -> SpecGeometry:
    """A family without the rule that only Qwen-Image has."""
    return SpecGeometry(replace(SPECS[name], guidance_keeps_length=False))


def test_qwen_image_alone_has_a_rule_of_its_own() -> None:
    """`with_source` sets it by the architecture."""
    assert {spec.lora_layout for spec in SPECS.values() if spec.guidance_keeps_length} == {"qwen"}


@pytest.mark.parametrize("name", list(SPECS))
def test_cfg_is_the_published_guidance(name: str) -> None:
    """ComfyUI's formula with `cfg` is the family's with its scale."""
    family, geometry = families.family_named(name), plain_guidance(name)
    v, negative = torch.tensor([1.0, -3.0]), torch.tensor([0.5, 2.0])
    for cfg, scale in zip(family.cfg, SPECS[name].guidance_scales, strict=True):
        torch.testing.assert_close(negative + cfg * (v - negative), geometry.guide(v, negative, scale))


@pytest.mark.parametrize("frames", [(), (1,)])
def test_guidance_of_qwen_image_is_the_trainers(frames: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    v, negative = (torch.randn(2, 16, 1, 4, 6, generator=g) for _ in range(2))
    wanted = SpecGeometry(SPECS["qwen-image"]).guide(v, negative, 4.0)
    sigma = 0.7
    args = {
        "cond": (sigma * v).reshape(2, 16, *frames, 4, 6),
        "uncond": (sigma * negative).reshape(2, 16, *frames, 4, 6),
        "cond_scale": 4.0,
    }
    got = guidance.qwen_guidance(args).reshape(2, 16, 1, 4, 6) / sigma
    torch.testing.assert_close(got, wanted)
    assert (wanted - plain_guidance("qwen-image").guide(v, negative, 4.0)).abs().max() > 0.1, "the rule has no effect"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"image_model": "flux", "guidance_embed": True}, "flux"),
        ({"image_model": "flux2", "hidden_size": 3072}, "flux2"),
        ({"image_model": "lumina2", "z_image_modulation": True}, "zimage"),
        ({"image_model": "qwen_image"}, "qwen"),
        ({"image_model": "krea2"}, "krea2"),
        ({"image_model": "wan2.1", "model_type": "t2v", "dim": 5120}, "wan"),
    ],
)
def test_architectures_are_recognised(config: dict[str, object], name: str) -> None:
    assert families.architecture_of(config) == name


@pytest.mark.parametrize(
    "config",
    [{}, {"image_model": "flux", "guidance_embed": False}, {"image_model": "wan2.1", "model_type": "i2v"}, {"image_model": "lumina2"}],
)
def test_other_networks_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the connected model is another one"):
        families.architecture_of(config)


def test_unknown_names_and_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="'sora', which these nodes do not know"):
        families.family_named("sora")
    with pytest.raises(ValueError, match="not one of this model's: same, bernini"):
        families.check_position("kontext", "wan")
    families.check_position("reference", "flux2")
