"""What ByG Source refuses, without ComfyUI."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from comfyui import source as sources
from comfyui.nodes import with_memory_of_source
from comfyui.source import Source, check_source, for_batch


@pytest.mark.parametrize(
    ("shape", "architecture", "says"),
    [
        ((1, 4, 8, 8), "flux", "4 channels and 2 dimensions, this model's have 16 and 2"),
        ((1, 16, 1, 8, 8), "flux", "16 channels and 3 dimensions, this model's have 16 and 2"),
        ((1, 16, 8, 8), "qwen", "2 dimensions, this model's have 16 and 3"),
        ((1, 16, 3, 8, 8), "krea2", "the source has 3 frames"),
        ((1, 16, 8, 7), "zimage", "7 x 8 latents cannot be cut into tokens"),
        ((1, 16, 3, 7, 8), "wan", "8 x 7 latents cannot be cut into tokens"),
    ],
)
def test_what_is_no_source_is_refused(shape: tuple[int, ...], architecture: str, says: str) -> None:
    dimensions = 2 if architecture in ("flux", "zimage") else 3
    with pytest.raises(ValueError, match=says):
        check_source(torch.ones(shape), 16, dimensions, architecture)


def test_an_empty_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="the source latent is empty"):
        check_source(torch.zeros(1, 16, 8, 8), 16, 2, "flux")


def test_sources_are_taken() -> None:
    check_source(torch.ones(2, 16, 8, 6), 16, 2, "flux")
    check_source(torch.ones(1, 128, 7, 5), 128, 2, "flux2")
    check_source(torch.ones(1, 16, 3, 8, 6), 16, 3, "wan")


def test_one_source_serves_all_and_several_their_own() -> None:
    one, two = torch.ones(1, 2, 4, 4), torch.stack([torch.ones(2, 4, 4), 2 * torch.ones(2, 4, 4)])
    x = torch.zeros(4, 2, 4, 4, dtype=torch.float64)
    assert for_batch(one, x, 2).shape == x.shape and for_batch(one, x, 2).dtype == torch.float64
    assert for_batch(two, x, 2)[:, 0, 0, 0].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("source", "x", "says"),
    [
        ((1, 2, 4, 4), (1, 2, 4, 6), "the source is 4 x 4 latents, the picture being sampled 6 x 4"),
        ((2, 2, 4, 4), (3, 2, 4, 4), "2 sources and 3 pictures"),
        ((3, 2, 4, 4), (1, 2, 4, 4), "3 sources and 1 pictures"),
        ((1, 2, 5, 4, 4), (1, 2, 3, 4, 4), "5 latent frames, the clip being sampled 3"),
    ],
)
def test_what_differs_from_the_sampled_is_refused(source: tuple[int, ...], x: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        for_batch(torch.ones(source), torch.zeros(x), 1)


class Executor:
    """ComfyUI's, for a network of one line."""

    class_obj = SimpleNamespace(rope_encode=lambda t, source_id=0: t)

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def original(self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: Any = None, **kwargs: Any) -> Tensor:
        self.calls.append({"options": transformer_options, **kwargs})
        sources = kwargs.get("context_latents")
        return x + (0 if sources is None else sources[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.original(*args, **kwargs)


X = torch.zeros(1, 16, 3, 4, 4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_strength_mixes_with_and_without(strength: float) -> None:
    executor = Executor()
    source = Source(torch.ones(1, 16, 3, 4, 4), "bernini", "wan", strength)
    out = source.wrapper(lambda latents: 3 * latents)(executor, X, torch.ones(1), torch.ones(1), {"cond_or_uncond": [0]})
    assert torch.equal(out, X + 3 * strength)
    assert len(executor.calls) == (1 if strength in (0.0, 1.0) else 2)


def test_arguments_are_changed_wherever_they_stand() -> None:
    executor = Executor()
    options = {"cond_or_uncond": [1], "patches": {"post_input": ["other"]}}
    source = Source(torch.ones(1, 16, 4, 4), "same", "flux", 1.0).wrapper(lambda latents: latents)
    for call in ({"args": (options,)}, {"kwargs": {"transformer_options": options}}):
        source(executor, X[:, :, 0], torch.ones(1), torch.ones(1), *call.get("args", ()), **call.get("kwargs", {}))
        seen = executor.calls[-1]
        assert seen["ref_latents_method"] == "index" and len(seen["ref_latents"]) == 1
        assert seen["options"]["patches"]["post_input"][0] == "other" and len(seen["options"]["patches"]["post_input"]) == 2
    assert options["patches"]["post_input"] == ["other"], "the caller's options are changed"


def test_a_position_of_its_own_needs_no_patch() -> None:
    assert Source(X, "kontext", "flux", 1.0)._ids_patch(X[:, :, 0]) is None
    assert Source(X, "bernini", "wan", 1.0).object_patches(lambda name: rope_encode) == {}


def rope_encode(t: int, source_id: int = 0) -> int:
    return 100 * source_id + t


def test_same_takes_the_turn_of_wan_away() -> None:
    patches = Source(X, "same", "wan", 1.0).object_patches(lambda name: rope_encode)
    assert patches["diffusion_model.rope_encode"](3, source_id=1) == 3


def test_an_old_comfyui_is_named() -> None:
    with pytest.raises(ValueError, match="update it"):
        Source(X, "bernini", "wan", 1.0).object_patches(lambda name: lambda t: t)


def test_a_second_source_is_refused() -> None:
    bound = inspect.signature(Executor().original).bind(X, X, X, context_latents=[X])
    with pytest.raises(ValueError, match="remove ReferenceLatent"):
        sources.refuse_other_sources(bound)


def ids_of(height: int, width: int, source_id: int) -> Tensor:
    """Position ids of a noisy picture and its source, in tokens."""
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    halves = [torch.cat([torch.full((len(grid), 1), float(first)), grid], dim=1) for first in (0, source_id)]
    return torch.cat(halves)[None]


def test_same_moves_the_source_onto_the_noisy_tokens() -> None:
    ids = ids_of(2, 3, 10)
    patch = Source(X, "same", "flux2", 1.0)._ids_patch(torch.zeros(1, 16, 4, 6))
    assert patch is not None
    moved = patch({"img_ids": ids, "txt": "text"})
    assert torch.equal(moved["img_ids"], ids_of(2, 3, 0)) and moved["txt"] == "text"
    assert torch.equal(ids, ids_of(2, 3, 10)), "ComfyUI's own ids are changed"


@pytest.mark.parametrize(("size", "moved"), [((4, 8), (0, 0)), ((6, 8), (1, 0)), ((4, 10), (0, 1)), ((6, 10), (1, 1))])
def test_odd_grids_of_qwen_image_begin_one_earlier(size: tuple[int, int], moved: tuple[int, int]) -> None:
    patch = Source(X, "reference", "qwen", 1.0)._ids_patch(torch.zeros(1, 16, 1, *size))
    ids = ids_of(size[0] // 2, size[1] // 2, 1)
    found = patch({"img_ids": ids})["img_ids"] if patch else ids
    assert torch.equal(ids - found, torch.tensor([0.0, *moved]).expand_as(ids))


def embed_all(x: Tensor, transformer_options: Any = None) -> tuple[Any, ...]:
    """As Z-Image's: rotations of captions, then of the image's tokens and of those that fill it up."""
    return (x,), (torch.zeros(1, 2), torch.arange(8.0)[None]), 7


def test_a_stacked_source_has_the_rotations_of_the_noisy_tokens() -> None:
    patched = sources.embedding(embed_all)
    _, rotations, end = patched(X, transformer_options={sources._STACKED: 3})
    assert rotations[1].tolist() == [[0, 1, 2, 0, 1, 2, 6, 7]] and rotations[0].shape == (1, 2) and end == 7
    assert torch.equal(patched(X)[1][1], torch.arange(8.0)[None]), "a call without a source is changed"


def test_memory_is_asked_for_both_halves() -> None:
    asked = with_memory_of_source(lambda model, shape, conds: (shape, conds), "model", torch.Size((1, 16, 3, 4, 6)), "conditions")
    assert asked == ([1, 16, 3, 4, 12], "conditions")


@pytest.mark.parametrize(("position", "loaded"), [("same", "bernini"), ("bernini", "same")])
def test_the_patch_of_another_clone_is_noticed(position: str, loaded: str) -> None:
    """Clones share one network."""
    executor = Executor()
    if loaded == "same":
        executor.class_obj = SimpleNamespace(rope_encode=sources.rotation(rope_encode))
    source = Source(torch.ones(1, 16, 3, 4, 4), position, "wan", 1.0).wrapper(lambda latents: latents)
    with pytest.raises(ValueError, match="use a guider of one model"):
        source(executor, X, torch.ones(1), torch.ones(1), {})
