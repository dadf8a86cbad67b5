"""The source of an edit as tokens after the noisy ones, by ComfyUI's own ways to patch a model: wrappers, object patches, options.

A patched model is a clone. Nothing of ComfyUI's classes is changed, and a model without the patch is what it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEY = "byg_source"
UNCONNECTED = "byg_no_source"  # of the wrapper that ByG Source takes away
_STACKED = "byg_stacked_tokens"  # in transformer_options: how many tokens of the noisy image stand before those of the source
PATCH = 2  # latents a side of a token


class Source:
    """Source latents and how a network sees them.

    Args:
        samples: (B, C, H, W) or (B, C, F, H, W), as the VAE node gives them.
        position: one of `families.POSITIONS`.
        architecture: a key of `families.ARCHITECTURES`.
        strength: 1: as trained; 0: no source; between and beyond, the velocities with and without it are mixed.
    """

    def __init__(self, samples: Tensor, position: str, architecture: str, strength: float):
        self.samples, self.position, self.architecture, self.strength = samples, position, architecture, strength

    def wrapper(self, process_in: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        """For `WrappersMP.DIFFUSION_MODEL`. `process_in` brings the VAE node's latents to the network's scale."""
        latents = process_in(self.samples)
        call = {"wan": self._wan, "zimage": self._stacked}.get(self.architecture, self._references)

        def wrapped(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.strength == 0:
                return executor(x, *args, **kwargs)
            bound = inspect.signature(executor.original).bind(x, *args, **kwargs)
            options = _argument(bound, "transformer_options") or {}
            source = for_batch(latents, x, len(options.get("cond_or_uncond") or [0]))
            refuse_other_sources(bound)
            with_source = call(executor, x, source, args, kwargs, options)
            if self.strength == 1:
                return with_source
            without = executor(x, *args, **kwargs)
            return without + self.strength * (with_source - without)

        return wrapped

    # --- one call of the network with the source ---

    def _references(self, executor: Any, x: Tensor, source: Tensor, args: Any, kwargs: Any, options: dict[str, Any]) -> Tensor:
        """FLUX.1, FLUX.2, Qwen-Image and Krea 2: ComfyUI's reference latents with the method `index`; `same` moves them back."""
        changes: dict[str, Any] = {"ref_latents": [source], "ref_latents_method": "index"}
        patch = self._ids_patch(x)
        if patch is not None:
            changes["transformer_options"] = _with_patch(options, "post_input", patch)
        return _call(executor, (x, *args), kwargs, changes)

    def _ids_patch(self, x: Tensor) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """What is to be done with the position ids, or None."""
        same = self.position == "same"
        # diffusers, which trains, centres odd grids of Qwen-Image one further up and left than ComfyUI.
        odd = [axis for axis, side in ((1, x.shape[-2]), (2, x.shape[-1])) if self.architecture == "qwen" and side // PATCH % 2]
        if not same and not odd:
            return None

        def patch(tokens: dict[str, Any]) -> dict[str, Any]:
            ids = tokens["img_ids"].clone()
            half = ids.shape[1] // 2
            for axis in odd:
                ids[..., axis] -= 1
            if same:
                ids[:, half:] = ids[:, :half]
            return {**tokens, "img_ids": ids}

        return patch

    def _wan(self, executor: Any, x: Tensor, source: Tensor, args: Any, kwargs: Any, options: dict[str, Any]) -> Tensor:
        """Wan: ComfyUI's in-context latents; `bernini` is what they are, for `same` see `rotation`."""
        _check_patched(executor, "rope_encode", self.position == "same")
        return _call(executor, (x, *args), kwargs, {"context_latents": [source]})

    def _stacked(self, executor: Any, x: Tensor, source: Tensor, args: Any, kwargs: Any, options: dict[str, Any]) -> Tensor:
        """Z-Image: the source under the noisy image, so that its tokens follow; see `embedding`."""
        _check_patched(executor, "embed_all", True)
        tokens = (x.shape[-2] // PATCH) * (x.shape[-1] // PATCH)
        changes = {"transformer_options": {**options, _STACKED: tokens}}
        out = _call(executor, (torch.cat([x, source], dim=-2), *args), kwargs, changes)
        return out[..., : x.shape[-2], :]

    # --- methods of a network that are patched as objects ---

    def object_patches(self, method: Callable[[str], Any]) -> dict[str, Any]:
        """Names of objects and what stands in for them; `method` gives what there is at a name."""
        if self.architecture == "wan":
            name = "diffusion_model.rope_encode"
            original = method(name)
            if "source_id" not in inspect.signature(original).parameters:
                raise ValueError("this ComfyUI is older than in-context latents for Wan (0.24): update it")
            return {name: rotation(original)} if self.position == "same" else {}
        if self.architecture == "zimage":
            name = "diffusion_model.embed_all"
            return {name: embedding(method(name))}
        return {}


def rotation(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wan's `rope_encode` without the turn by which an in-context latent is told from the target."""

    def rope_encode(*args: Any, source_id: int = 0, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    setattr(rope_encode, KEY, True)
    return rope_encode


def embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Z-Image's `embed_all` with the second half of a stacked image at the first half's positions."""

    def embed_all(*args: Any, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        options = transformer_options or {}
        embeds, rotations, end = original(*args, transformer_options=options, **kwargs)
        tokens = options.get(_STACKED)
        if tokens is None:
            return embeds, rotations, end
        image = rotations[-1]
        image = torch.cat([image[:, :tokens], image[:, :tokens], image[:, 2 * tokens :]], dim=1)
        return embeds, (*rotations[:-1], image), end

    setattr(embed_all, KEY, True)
    return embed_all


def _check_patched(executor: Any, name: str, wanted: bool) -> None:
    """Clones share a network, which has the object patches of one of them; guiders of two models call both with the first one's wrappers.

    Raises:
        ValueError: the network has not what this wrapper needs.
    """
    if hasattr(getattr(executor.class_obj, name), KEY) != wanted:
        raise ValueError(
            "ByG Source: the network that is sampled is not patched as its source needs, because another version of this model, or a "
            "guider's second model, is sampled beside it: use a guider of one model"
        )


# --- what does not fit ---


def check_source(samples: Tensor, channels: int, dimensions: int, architecture: str) -> None:
    """Refuse what is no encoded source of this model.

    Args:
        samples: as the VAE node gives them.
        channels: of the model's latents.
        dimensions: of them, beside batch and channels: 2 of pictures, 3 of clips and of pictures that are clips of one frame.
        architecture: of the network.

    Raises:
        ValueError: another VAE's latent, an empty one, a clip for a model of pictures, or a size that is no whole number of tokens.
    """
    if samples.ndim != dimensions + 2 or samples.shape[1] != channels:
        raise ValueError(
            f"ByG Source: the source latent has {samples.shape[1]} channels and {samples.ndim - 2} dimensions, this model's have "
            f"{channels} and {dimensions}: encode the source with the VAE of this model"
        )
    if samples.count_nonzero() == 0:
        raise ValueError("ByG Source: the source latent is empty: connect VAE Encode, not an empty latent")
    if dimensions == 3 and architecture != "wan" and samples.shape[2] != 1:
        raise ValueError(f"ByG Source: this model edits single pictures, the source has {samples.shape[2]} frames: give one picture")
    if architecture != "flux2" and any(side % PATCH for side in samples.shape[-2:]):
        raise ValueError(
            f"ByG Source: {samples.shape[-1]} x {samples.shape[-2]} latents cannot be cut into tokens of {PATCH} x {PATCH}: bring the "
            "source to size with ByG Size"
        )


def for_batch(source: Tensor, x: Tensor, chunks: int) -> Tensor:
    """The source beside each sample of a call, on its device and in its dtype.

    Args:
        source: (B, C, ...), or one for all.
        x: (chunks x B, C, ...): the conditions one after the other, each with the whole batch.
        chunks: how many conditions are in the call.

    Raises:
        ValueError: sizes, lengths or batches differ; says which and the remedy.
    """
    if x.ndim == 5 and source.shape[2] != x.shape[2]:
        raise ValueError(
            f"ByG Source: the source clip has {source.shape[2]} latent frames, the clip being sampled {x.shape[2]}: sample ByG Source's "
            "own `latent`, and use neither context windows nor another length"
        )
    if source.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"ByG Source: the source is {source.shape[-1]} x {source.shape[-2]} latents, the picture being sampled {x.shape[-1]} x "
            f"{x.shape[-2]}: sample ByG Source's own `latent`; conditions for a part of the picture are not possible"
        )
    batch = x.shape[0] // chunks
    if source.shape[0] not in (1, batch):
        raise ValueError(
            f"ByG Source: {source.shape[0]} sources and {batch} pictures being sampled: give one source, or as many as the batch has"
        )
    source = source.to(x)
    return source.expand(x.shape[0], *source.shape[1:]) if source.shape[0] == 1 else source.repeat(chunks, *[1] * (x.ndim - 1))


def refuse_other_sources(bound: inspect.BoundArguments) -> None:
    """One source alone: a second one would be placed by other rules.

    Raises:
        ValueError: the conditioning brings reference or in-context latents too.
    """
    if _other_sources(bound):
        raise ValueError(
            "ByG Source: the conditioning has reference latents of another node: remove ReferenceLatent or BerniniConditioning"
        )


def refuse_no_source(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
    """For `WrappersMP.DIFFUSION_MODEL` of a model that has an edit LoRA alone.

    Raises:
        ValueError: the conditioning brings no source either.
    """
    if not _other_sources(inspect.signature(executor.original).bind(*args, **kwargs)):
        raise ValueError("ByG LoRA Loader: the model is sampled without a source and would edit nothing: connect ByG Source")
    return executor(*args, **kwargs)


def _other_sources(bound: inspect.BoundArguments) -> bool:
    given = (_argument(bound, name) for name in ("ref_latents", "context_latents", "time_dim_concat"))
    return any(latents is not None and len(latents) for latents in given)


def _argument(bound: inspect.BoundArguments, name: str) -> Any:
    if name in bound.arguments:
        return bound.arguments[name]
    variable = _keywords_name(bound.signature)
    return bound.arguments.get(variable, {}).get(name) if variable else None


def _keywords_name(signature: inspect.Signature) -> str | None:
    return next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)


def _call(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str, Any]) -> Tensor:
    """The network with some of its arguments changed, whichever of them the caller gives by position."""
    signature = inspect.signature(executor.original)
    bound = signature.bind(*args, **kwargs)
    keywords = _keywords_name(signature)
    for name, value in changes.items():
        if name in signature.parameters:
            bound.arguments[name] = value
        else:
            assert keywords is not None, f"the network takes no {name}"
            bound.arguments[keywords] = {**bound.arguments.get(keywords, {}), name: value}
    # `arguments` must be in the signature's order to be unpacked.
    bound.arguments = {name: bound.arguments[name] for name in signature.parameters if name in bound.arguments}
    return executor(*bound.args, **bound.kwargs)


def _with_patch(options: dict[str, Any], name: str, patch: Callable[..., Any]) -> dict[str, Any]:
    patches = options.get("patches", {})
    return {**options, "patches": {**patches, name: [*patches.get(name, []), patch]}}
