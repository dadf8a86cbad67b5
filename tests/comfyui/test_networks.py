"""A source in ComfyUI's own networks of all families, by the nodes' patches: their velocity is the one that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.families import SPECS
from byg_plugin.models import make_family
from comfyui.source import Source
from tests.support import comfyui_bases as bases
from tests.support import comfyui_networks as networks
from tests.support.comfyui import MARKS, comfyui

pytestmark = MARKS
NAMES = {"flux": "flux", "flux2": "flux2-klein-4b", "zimage": "z-image", "qwen": "qwen-image", "krea2": "krea2", "wan": "wan2.1-t2v-1.3b"}
CASES = [(architecture, position) for architecture, name in NAMES.items() for position in SPECS[name].positions]
T = 0.77


@pytest.fixture(scope="module", autouse=True)
def comfy() -> Iterator[None]:
    """ComfyUI on the path."""
    with comfyui():
        yield


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(architecture: str, seed: int, height: int = 4, width: int = 8) -> Tensor:
    channels, frames = (128 if architecture == "flux2" else 16), (3 if architecture == "wan" else 1)
    return random(seed, 1, channels, frames, height, width)


def texts(architecture: str, seed: int, batch: int = 1) -> tuple[dict[str, Tensor], SimpleNamespace]:
    """One text for our family, and the same as ComfyUI's arguments."""
    if architecture == "flux":
        rows, pooled = random(seed, batch, 8, 24), random(seed + 1, batch, 20)
        arguments: dict[str, Any] = {"y": pooled, "guidance": torch.full((batch,), 3.5)}
        return {"t5": rows, "pooled": pooled}, SimpleNamespace(rows=rows, arguments=arguments)
    if architecture == "wan":
        rows = random(seed, batch, 8, 24)
        return {"umt5": rows}, SimpleNamespace(rows=rows, arguments={})
    width = {"flux2": 48, "zimage": 16, "qwen": 24, "krea2": 96}[architecture]
    if architecture == "krea2":
        rows = random(seed, batch, 7, 12, width)
        return {"qwen": rows, "mask": torch.ones(batch, 7, dtype=torch.bool)}, SimpleNamespace(rows=rows.flatten(2), arguments={})
    rows = random(seed, batch, 7, width)
    arguments = {"num_tokens": 7} if architecture == "zimage" else {}
    return {"qwen": rows, "mask": torch.ones(batch, 7, dtype=torch.bool)}, SimpleNamespace(rows=rows, arguments=arguments)


def family_of(architecture: str, position: str, folder: Path) -> Any:
    return make_family(bases.config_of(NAMES[architecture], folder, conditioning={"position": position}))


def found(architecture: str, source: Source, x: Tensor, text: SimpleNamespace, network: Any, **options: Any) -> Tensor:
    model = networks.theirs(architecture, network)
    if architecture in networks.PLANE:
        source.samples = source.samples[:, :, 0]
    with networks.patched(model, source) as patches:
        return networks.call(architecture, model, x, torch.full((len(x),), T), text, {**patches, **options})


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "position"), CASES)
def test_the_velocity_is_ours(architecture: str, position: str, tmp_path: Path) -> None:
    network, x, clean = networks.ours(architecture), latents(architecture, 1), latents(architecture, 2)
    text, their_text = texts(architecture, 3)
    family = family_of(architecture, position, tmp_path)
    wanted = family.velocity(network, x, torch.tensor([T]), text, clean)
    v = found(architecture, Source(clean, position, architecture, 1.0), x, their_text, network)
    size = wanted.abs().max()
    assert (wanted - family.velocity(network, x, torch.tensor([T]), text, None)).abs().max() > 0.01 * size, "the source has no effect"
    torch.testing.assert_close(v, wanted, rtol=0, atol=float(1e-4 * size))


@torch.no_grad()
@pytest.mark.parametrize("architecture", list(NAMES))
def test_without_source_it_is_the_network(architecture: str, tmp_path: Path) -> None:
    network, x = networks.ours(architecture), latents(architecture, 1)
    text, their_text = texts(architecture, 3)
    wanted = family_of(architecture, "same", tmp_path).velocity(network, x, torch.tensor([T]), text, None)
    v = found(architecture, Source(latents(architecture, 2), "same", architecture, 0.0), x, their_text, network)
    torch.testing.assert_close(v, wanted, rtol=0, atol=float(1e-4 * wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("architecture", list(NAMES))
def test_both_conditions_of_a_call_see_the_source(architecture: str) -> None:
    """ComfyUI puts the two conditions of guidance into one batch: one source for both, and of two pictures each its own."""
    network, x = networks.ours(architecture), torch.cat([latents(architecture, 1), latents(architecture, 4)])
    clean = torch.cat([latents(architecture, 2), latents(architecture, 5)])
    _, text = texts(architecture, 3, batch=4)
    both = found(architecture, Source(clean, "same", architecture, 1.0), x.repeat(2, 1, 1, 1, 1), text, network, cond_or_uncond=[0, 1])
    for row in range(4):
        arguments = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in text.arguments.items()}
        one = SimpleNamespace(rows=text.rows[row : row + 1], arguments=arguments)
        picture = row % 2
        alone = found(architecture, Source(clean[picture : picture + 1], "same", architecture, 1.0), x[picture : picture + 1], one, network)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=float(1e-4 * alone.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("position", ["same", "reference"])
def test_odd_grids_of_qwen_image_are_centred_as_trained(position: str, tmp_path: Path) -> None:
    network, x, clean = networks.ours("qwen"), latents("qwen", 1, 6, 10), latents("qwen", 2, 6, 10)
    text, their_text = texts("qwen", 3)
    wanted = family_of("qwen", position, tmp_path).velocity(network, x, torch.tensor([T]), text, clean)
    v = found("qwen", Source(clean, position, "qwen", 1.0), x, their_text, network)
    torch.testing.assert_close(v, wanted, rtol=0, atol=float(1e-4 * wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "argument"), [("flux", "ref_latents"), ("krea2", "ref_latents"), ("zimage", "ref_latents"), ("wan", "context_latents")]
)
def test_a_second_source_is_refused(architecture: str, argument: str) -> None:
    _, text = texts(architecture, 3)
    clean = latents(architecture, 2)
    text.arguments[argument] = [clean]
    with pytest.raises(ValueError, match="remove ReferenceLatent or BerniniConditioning"):
        found(architecture, Source(clean, "same", architecture, 1.0), latents(architecture, 1), text, networks.ours(architecture))
