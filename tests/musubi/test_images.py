"""Inside the real musubi-tuner: Qwen-Image, Krea 2 and Z-Image beside the embedded host's call of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.models import make_family
from byg_plugin.objectives.base import Text
from byg_plugin.texts import MASK
from tests.support.musubi_host import Rig, embedded_config, needs_host
from tests.support.musubi_images import IMAGES, KREA2, MASKED, QWEN, ZIMAGE
from tests.support.musubi_runs import rig

pytestmark = needs_host


def text(family: str, *lengths: int) -> Text:
    """Random texts of these lengths, zeros after them."""
    rows = torch.randn(len(lengths), max(lengths), *IMAGES[family].text, generator=torch.Generator().manual_seed(sum(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"qwen": rows * mask.view(*mask.shape, *[1] * (rows.ndim - 2)), MASK: mask}


def picture(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 16, 1, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(it: Rig, folder: Path, noisy: Tensor, words: Text, source: Tensor | None) -> float:
    """The largest between this host's frozen base and the embedded host's, over the largest value."""
    config = embedded_config(folder, it.family, conditioning={"position": it.config.conditioning.position})
    t = torch.tensor([0.77, 0.33, 0.5])[: len(noisy)]
    network = IMAGES[it.family].network().eval()
    expected = make_family(config).velocity(network, noisy, t, words, source)
    found = it.call(it._load())(noisy, t, words, source)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


# 3 x 5 and 8 x 8 tokens; captions below, at and above a multiple of 32.
@pytest.mark.parametrize("sides", [(6, 10), (16, 16)])
@pytest.mark.parametrize("lengths", [(5, 40, 32), (64, 33, 64), (32, 32, 32)], ids=str)
@pytest.mark.parametrize("family", MASKED)
def test_texts_and_pictures_of_every_length(tmp_path: Path, family: str, lengths: tuple[int, ...], sides: tuple[int, int]):
    it, noisy, words = rig(family), picture(3, *sides), text(family, *lengths)
    for source in (None, picture(3, *sides, seed=2)):
        assert difference(it, tmp_path, noisy, words, source) < 1e-5
    one = {name: value[1:2, : lengths[1]] for name, value in words.items()}
    assert difference(it, tmp_path, noisy[1:2], one, None) < 1e-5


@pytest.mark.parametrize("options", [{"split_attn": True}, {"gradient_checkpointing": True}], ids=lambda each: next(iter(each)))
@pytest.mark.parametrize("family", MASKED)
def test_options_of_the_network_change_nothing(tmp_path: Path, family: str, options: dict[str, Any]):
    it = Rig(tmp_path, family, musubi=options)
    assert difference(it, tmp_path, picture(2, 4, 6), text(family, 5, 40), picture(2, 4, 6, seed=2)) < 1e-4


@pytest.mark.parametrize("family", [QWEN, KREA2])
def test_the_published_position_of_a_reference(tmp_path: Path, family: str):
    it = Rig(tmp_path, family, conditioning={"position": "reference"})
    noisy, source, words = picture(2, 4, 6), picture(2, 4, 6, seed=2), text(family, 5, 7)
    assert difference(it, tmp_path, noisy, words, source) < 1e-5
    same = rig(family).call(it._load())(noisy, torch.tensor([0.77, 0.33]), words, source)
    there = it.call(it._load())(noisy, torch.tensor([0.77, 0.33]), words, source)
    assert (same - there).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("sides", "length", "equal"), [((16, 16), 64, True), ((16, 16), 33, False), ((6, 10), 64, False)])
def test_the_hosts_own_z_image_is_another_function_where_padding_is_learned(sides: tuple[int, int], length: int, equal: bool):
    """Fails once the host has the tokens itself: then its own forward pass serves."""
    it, noisy, words, t = rig(ZIMAGE), picture(1, *sides), text(ZIMAGE, length), torch.tensor([0.6])
    network = it._load()
    own = -network(noisy, 1 - t, words["qwen"], None)
    ours = it.call(network)(noisy, t, words, None)
    worst = ((own - ours).abs().max() / ours.abs().max()).item()
    print(f"Z-Image, {sides[0] // 2} x {sides[1] // 2} tokens, {length} of text: differs by {worst:.1e}")
    assert worst < 1e-5 if equal else worst > 1e-2


@pytest.mark.parametrize(("family", "embedder"), [(QWEN, "time_text_embed.time_proj"), (KREA2, "tmlp"), (ZIMAGE, "t_embedder")])
@torch.no_grad()
def test_times_are_not_rounded_before_they_are_embedded(family: str, embedder: str):
    """Two times that bfloat16 does not tell apart."""
    it = rig(family)
    network = it._load().to(torch.bfloat16)
    seen: list[Tensor] = []
    network.get_submodule(embedder).register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        it.call(network)(picture(2, 4, 6), torch.tensor([0.9702, 0.9706]), text(family, 5, 7), None)
    assert (seen[0][0] != seen[0][1]).any()


def test_a_wrapped_forward_comes_back():
    it = rig(ZIMAGE)
    network = it._load()
    for wrapped in (False, True):
        if wrapped:
            network.forward = before = network.forward  # as accelerate does
        it.call(network)(picture(1, 4, 6), torch.tensor([0.5]), text(ZIMAGE, 5), None)
        assert vars(network).get("forward") is (before if wrapped else None)
