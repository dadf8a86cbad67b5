"""diffusers' own pipelines, with the source of an edit in their sequence.

    from byg_plugin.pipelines import FluxBygPipeline

    pipe = FluxBygPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    pipe.load_lora_weights("byg_flux-ema.safetensors")
    pipe(image=photo, prompt="make it snow").images[0]

A class here is its family's pipeline and nothing else: schedulers, callbacks, offloading, generators and outputs are diffusers'. While it
is called, hooks on the network append the source's tokens to the noisy ones and drop their outputs; they run outside what `accelerate`
and `torch.compile` wrap. A class comes into being, and diffusers is imported, when its name is first asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from byg_plugin import families
from byg_plugin.config.sections import ConditioningConfig, DatasetConfig, SampleConfig
from byg_plugin.data.buckets import bucket_for, to_tensor
from byg_plugin.editing.request import native_size
from byg_plugin.editing.sources import as_seen
from byg_plugin.families import HIGH, LOW, FamilySpec
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.card import STOCHASTIC, LoraCard, has_card
from byg_plugin.lora.files import naming, read_metadata
from byg_plugin.models import flux2, flux_vae, normalised_vae, wan, zimage
from byg_plugin.models.one_call import image_positions
from byg_plugin.models.tokens import PATCH, pack, pack_length

Given = dict[str, Any]
"""Arguments of a call by keyword."""
_UNSHIFTED = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
_OF_THE_HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


class BygPipeline:
    """What the pipelines add to diffusers' own.

    Attributes:
        families: the values of `model.family` whose LoRAs it edits with; the first whose number of experts fits is meant where no LoRA
            says which.
        exact_time: module that takes the times, to which diffusers gives them rounded to 16 bits; its first argument is the time times
            `time_unit`.
        samplers: what a card may name: a few-step editor's, whose steps the pipeline makes by diffusers' Euler scheduler.
        guided_by: the argument of classifier-free guidance, which a few-step editor has none of.
        position: where the source's tokens stand, as `conditioning.position`. `load_lora_weights` sets it.
    """

    families: ClassVar[tuple[str, ...]]
    exact_time: ClassVar[str | None] = None
    time_unit: ClassVar[float] = 1000.0
    samplers: ClassVar[tuple[str, ...]] = (STOCHASTIC,)
    guided_by: ClassVar[str] = "guidance_scale"
    position: str = "same"
    scheduler: Any
    _card: LoraCard | None = None
    _own_boundary: tuple[float | None] | None = None
    """The pipeline's, where a LoRA's card has taken its place."""

    # --- LoRA ---

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        *,
        position: str | None = None,
        **options: Any,
    ) -> None:
        """diffusers' own, and what a LoRA of byg_plugin says of itself: position, guidance, text length, resolution and schedule.

        A file of byg_plugin is read in any of its formats; of two experts, either file, their common name or the name of one on the hub
        means both. Any other LoRA is diffusers' matter, and leaves the position as it is.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder or a hub id (with `weight_name`), or tensors, which say nothing.
            adapter_name: as in diffusers.
            position: instead of what the file says.
            options: diffusers' own.

        Raises:
            ValueError: the file is unusable, for another family or network, or of another position than a LoRA that is still loaded.
        """
        given = pretrained_model_name_or_path_or_dict
        if position is not None:
            self._check_position(position)
        path = None if isinstance(given, dict) else _lora_file(str(given), options)
        if not isinstance(given, dict) and not self._has_loras():
            self._forget_card()  # of one that was unloaded; tensors may be its own
        if path is None or not has_card(read_metadata(path)):
            super().load_lora_weights(given, adapter_name=adapter_name, **options)  # type: ignore[misc]
            self.position = position or self.position
            return
        if "load_into_transformer_2" in options:
            raise ValueError(f"{path}: load_into_transformer_2 is for other LoRAs: one call loads what both experts need, leave it out")
        with naming(path):
            card = LoraCard.from_metadata(read_metadata(path))
            spec = self._fitting(card)
            tensors, _ = lora_formats.read_named(path, spec.name)
            position = position or card.position or "same"
            self._check_position(position)
            self._refuse_mixture(position, card)
            by_expert = self._by_network(tensors)
        for expert, state in by_expert.items():
            into = {"load_into_transformer_2": True} if expert == LOW else {}
            super().load_lora_weights(state, adapter_name=adapter_name, **options, **into)  # type: ignore[misc]
        self.position, self._card = position, card
        if card.boundary is not None:
            self._own_boundary = self._own_boundary or (self.config.boundary_ratio,)
            self.register_to_config(boundary_ratio=card.boundary)

    def _forget_card(self) -> None:
        self._card = None
        if self._own_boundary is not None:
            self.register_to_config(boundary_ratio=self._own_boundary[0])
            self._own_boundary = None

    def _fitting(self, card: LoraCard) -> FamilySpec:
        if card.sampler is not None and (card.sampler not in self.samplers or card.steps is None):
            raise ValueError(f"the LoRA edits in {card.steps} {card.sampler} steps, which this pipeline does not make: use EditPipeline")
        if card.family not in self.families:
            raise ValueError(f"the LoRA was trained for {card.family!r}, {type(self).__name__} is for {', '.join(self.families)}")
        spec = families.named(card.family)
        if spec.has_experts != (len(self._networks()) > 1):
            ours, theirs = ("one network", "two experts") if spec.has_experts else ("two experts", "one network")
            raise ValueError(f"the LoRA was trained for {card.family!r}, which is {theirs}; this pipeline has {ours}")
        return spec

    def _by_network(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors of each network under diffusers' names; one LoRA that two experts share is for both.

        Raises:
            ValueError: a layer is not in the network, or has another size there.
        """
        networks = self._networks()
        experts = {name.partition(".")[0] for name in tensors}
        by_network: dict[str, dict[str, Tensor]] = {}
        for expert, network in networks.items():
            own = expert if expert in experts else HIGH
            state = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == own}
            # What torch.compile wraps has its modules' names behind a prefix.
            modules = dict(getattr(network, "_orig_mod", network).named_modules())
            for name, tensor in state.items():
                layer, _, kind = name.removesuffix(".weight").rpartition(".lora_")
                module: Any = modules.get(layer)
                found = None if module is None else module.in_features if kind == "A" else module.out_features
                has = tensor.shape[1] if kind == "A" else tensor.shape[0]
                if found != has:
                    where = "the network has no such layer" if found is None else f"the network's has {found}"
                    side = "inputs" if kind == "A" else "outputs"
                    raise ValueError(f"the LoRA's {layer} has {has} {side}, {where}: it was trained on another model")
            by_network[expert] = {f"{HIGH}.{name}": tensor for name, tensor in state.items()}
        return by_network

    def _check_position(self, position: str) -> None:
        known = families.named(self.families[0]).positions
        if position not in known:
            raise ValueError(f"position = {position!r} is not one of {', '.join(known)}, where {type(self).__name__} can have the source")

    def _refuse_mixture(self, position: str, card: LoraCard) -> None:
        if self._card is None or not self._has_loras():
            return
        away = "unload_lora_weights() first, of a fused one unfuse_lora() too"
        if (card.sampler or self._card.sampler) and _steps(card) != _steps(self._card):
            raise ValueError(f"the LoRA edits in {_steps(card)}, the one that is loaded in {_steps(self._card)}: {away}")
        if position != self.position:
            raise ValueError(f"the LoRA needs position {position!r}, the one that is loaded {self.position!r}: {away}, or give position=")

    def _has_loras(self) -> bool:
        return any(self.get_list_adapters().values()) or bool(getattr(self, "num_fused_loras", 0))

    # --- a call ---

    @torch.no_grad()
    def __call__(
        self, image: Any = None, prompt: Any = None, *, height: int | None = None, width: int | None = None, **arguments: Any
    ) -> Any:
        """Edit images: diffusers' own call with a source.

        Args:
            image: a picture or a list of them: PIL, or arrays (H, W, 3) and tensors (3, H, W) in [0, 1], which are rounded to 8 bits. It
                is cropped to the nearest of the sizes that the LoRA was trained at (Wan: of the native ones), as `edit.py` does.
            prompt: what to change: one text, or a list of as many as there are images. One image may have several.
            height, width: both or neither: the image has this size already, and the edit gets it.
            arguments: all others of the family's pipeline. Steps, guidance and `max_sequence_length` have the LoRA's or the family's
                values where they are left out.

        Returns:
            What diffusers' pipeline returns.

        Raises:
            ValueError: there is no image, its size does not fit, or images and prompts differ in number.
        """
        return self._edit(_pictures(image, "image"), prompt, height, width, arguments)

    def _edit(self, clips: list[list[Image.Image]], prompt: Any, height: int | None, width: int | None, arguments: Given) -> Any:
        size = self._size(clips, height, width)
        copies = self._copies(len(clips), prompt, arguments)
        few_steps = self._few_steps()
        if few_steps is not None:
            self._refuse_guided(few_steps, arguments)
        arguments = {key: value for key, value in arguments.items() if key != self.guided_by or value is not None}
        arguments = self._defaults(len(clips) * copies, arguments) | arguments
        number = 1 if (asked := arguments.get(self._number_argument)) is None else asked
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{self._number_argument} = {number!r} is not a whole number from 1 on")
        generator, edits = arguments.get("generator"), len(clips) * copies * number
        if isinstance(generator, list) and len(generator) != edits:
            raise ValueError(f"{len(generator)} generators for {edits} edits: give one, or as many as there are edits")
        dataset, multiple = self._dataset(), self._multiple()
        pixels = torch.stack([torch.stack([to_tensor(as_seen(frame, dataset, multiple, size)) for frame in clip], dim=1) for clip in clips])
        source = self._encode(pixels).repeat_interleave(copies * number, dim=0)
        # Copies of lists: diffusers' Z-Image writes chat templates into the caller's own lists of texts, and twice into one given twice.
        own = {name: list(value) if isinstance(value, list) else value for name, value in (arguments | {"prompt": prompt}).items()}
        with self._schedule(generator), self._source_in_sequence(source):
            return super().__call__(height=size[1], width=size[0], **own)  # type: ignore[misc]

    _number_argument: ClassVar[str] = "num_images_per_prompt"

    def _copies(self, images: int, prompt: Any, arguments: Given) -> int:
        """How many prompts an image has."""
        embeddings = arguments.get("prompt_embeds")
        if prompt is None and embeddings is None:
            raise ValueError("prompt is missing: say what to change, or give prompt_embeds")
        if not (prompt is None or isinstance(prompt, str) or (isinstance(prompt, list | tuple) and prompt)):
            raise ValueError(f"prompt = {prompt!r} is no text and no list of texts")
        prompts = 1 if isinstance(prompt, str) else len(embeddings if prompt is None else prompt)
        if images not in (1, prompts):
            raise ValueError(f"{images} images and {prompts} prompts: give each image a prompt, or one image")
        return prompts // images

    def _defaults(self, prompts: int, given: Given) -> Given:
        spec, card = self._spec(), self._card or LoraCard()
        steps = spec.defaults.get("sample", {}).get("steps", SampleConfig.model_fields["steps"].default)
        length = card.max_text_tokens or ConditioningConfig.model_fields["max_text_tokens"].default
        guidance = self._guidance(spec, prompts, given)
        few_steps = self._few_steps()
        if few_steps is not None:
            guidance = {key: value for key, value in guidance.items() if key != "negative_prompt"}
            steps, guidance = few_steps, guidance | ({self.guided_by: spec.unguided} if self.guided_by in guidance else {})
        return {"num_inference_steps": steps, "max_sequence_length": length, **guidance}

    def _few_steps(self) -> int | None:
        """Of a few-step editor, as long as it is loaded or fused."""
        return self._card.steps if self._card is not None and self._card.sampler is not None and self._has_loras() else None

    def _refuse_guided(self, steps: int, given: Given) -> None:
        negative = [key for key, value in given.items() if key.startswith("negative_prompt") and value is not None]
        scale = given.get(self.guided_by)
        if negative or scale not in (None, self._spec().unguided):
            name = negative[0] if negative else f"{self.guided_by} = {scale}"
            raise ValueError(f"{name}: this LoRA edits in {steps} steps without guidance, leave it out")

    def _guidance(self, spec: FamilySpec, prompts: int, given: Given) -> Given:
        return {"guidance_scale": spec.guidance_scales[0]}

    def _spec(self) -> FamilySpec:
        if self._card is not None and self._card.family is not None:
            return families.named(self._card.family)
        two = len(self._networks()) > 1
        return next(spec for spec in map(families.named, self.families) if spec.has_experts == two)

    def _networks(self) -> dict[str, nn.Module]:
        found = {name: getattr(self, name, None) for name in (HIGH, LOW)}
        return {name: network for name, network in found.items() if network is not None}

    @contextmanager
    def _schedule(self, generator: Any = None) -> Iterator[None]:
        """A LoRA that was trained for a schedule without shift is sampled so, and a few-step editor with fresh noise in every step.

        Raises:
            ValueError: the scheduler makes no such steps.
        """
        given = self.scheduler
        try:
            if self._card is not None and self._card.schedule == "uniform":
                changes = {key: value for key, value in _UNSHIFTED.items() if key in given.config}
                self.scheduler = type(given).from_config(given.config, **changes)
            if self._few_steps() is not None:
                self.scheduler = _with_fresh_noise(self.scheduler, generator)
            yield
        finally:
            self.scheduler = given

    # --- pixels ---

    def _multiple(self) -> int:
        return int(getattr(self, "vae_scale_factor_spatial", None) or self.vae_scale_factor) * PATCH

    def _dataset(self) -> DatasetConfig:
        resolution = (self._card or LoraCard()).resolution or DatasetConfig.model_fields["resolution"].default
        sizes = {"resolution": resolution, **native_size(self._spec().name)}
        return DatasetConfig.model_validate({"tuples": ".", "cache_dir": ".", **sizes})

    def _size(self, clips: Sequence[Sequence[Image.Image]], height: int | None, width: int | None) -> tuple[int, int]:
        """(width, height) of the edits."""
        sizes = {frame.size for clip in clips for frame in clip}
        if height is None and width is None:
            sizes = {bucket_for(size, self._dataset(), self._multiple()) for size in sizes}
            if len(sizes) > 1:
                raise ValueError(f"images of one call need one size, got {sorted(sizes)}: edit them one by one")
            return sizes.pop()
        if sizes != {(width, height)}:
            found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes))
            raise ValueError(f"the image is {found}, width = {width} and height = {height}: leave both out, or scale the image before")
        if any(side % self._multiple() for size in sizes for side in size):
            raise ValueError(f"width = {width} and height = {height} must be multiples of {self._multiple()}: leave both out")
        return sizes.pop()

    def _encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> latents (B, C, F', H', W') as the network takes them, float32."""
        # Not to the VAE's device: offloaded, it comes to this one only when it is called.
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        return self._normalised(self.vae.encode(self._plain(pixels)).latent_dist.mode().float())

    def _plain(self, pixels: Tensor) -> Tensor:
        """As the VAE takes them."""
        return pixels

    def _normalised(self, mode: Tensor) -> Tensor:
        return normalised_vae.normalise(self.vae, mode)

    # --- the network's call ---

    @contextmanager
    def _source_in_sequence(self, source: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for network in self._networks().values():
                stack.enter_context(self._positions(network, source))
                handles = [
                    network.register_forward_pre_hook(partial(self._append, source), with_kwargs=True),
                    network.register_forward_hook(partial(self._drop, source)),
                ]
                if self.exact_time is not None:
                    handles.append(network.get_submodule(self.exact_time).register_forward_pre_hook(self._exact_times))
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _positions(self, network: nn.Module, source: Tensor) -> AbstractContextManager[None]:
        """Where the network works out positions itself, the source's while it is entered."""
        return nullcontext()

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        """The arguments of the network's call, with the source's tokens behind the noisy ones."""
        raise NotImplementedError

    def _drop(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The outputs of the noisy tokens."""
        return (output[0][:, : output[0].shape[1] // 2],)

    def _exact_times(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._exact_time(args[0]) * self.time_unit, *args[1:])

    def _exact_time(self, times: Tensor) -> Tensor:
        """t of this step in float32, as often as there are `times`."""
        return (self._current_timestep.float() / 1000).to(times.device).expand(len(times))

    def _source_id(self) -> int:
        return self._spec().source_id(self.position)


def _steps(card: LoraCard) -> str:
    return "the family's steps" if card.sampler is None else f"{card.steps} {card.sampler} steps of the {card.schedule} schedule"


def _with_fresh_noise(scheduler: Any, generator: Any) -> Any:
    """The scheduler whose every step predicts the data and goes on with fresh noise of `generator`, which the pipelines do not give it.

    Raises:
        ValueError: it makes no such steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"the scheduler is {type(scheduler).__name__}, and this LoRA was trained for stochastic steps, which "
            "FlowMatchEulerDiscreteScheduler makes: set pipe.scheduler to one"
        )
    fresh: Any = copy.copy(scheduler)
    fresh.register_to_config(stochastic_sampling=True)  # of the copy alone
    fresh.step = partial(fresh.step, generator=generator)
    return fresh


def _appended(given: Given, tokens: Tensor, ids_key: str | None = None, first: int = 0) -> Given:
    """`hidden_states` with tokens (S, L, D) behind its own L, and the position ids with as many, moved to the first id `first`."""
    noisy = given["hidden_states"]
    changed = {"hidden_states": torch.cat([noisy, tokens.to(noisy).repeat(len(noisy) // len(tokens), 1, 1)], dim=1)}
    if ids_key is not None:
        ids = given[ids_key]
        moved = ids[..., -tokens.shape[1] :, :].clone()  # behind a text's, where they are in one table
        moved[..., 0] = first
        changed[ids_key] = torch.cat([ids, moved], dim=-2)
    return given | changed


class _WithFluxVae(BygPipeline):
    """Its VAE takes pictures, not clips."""

    def _plain(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 0]

    def _normalised(self, mode: Tensor) -> Tensor:
        return flux_vae.normalise(self.vae, mode).unsqueeze(2)


class _Flux(_WithFluxVae):
    families = ("flux",)
    guided_by = "true_cfg_scale"
    exact_time = "time_text_embed"

    def _guidance(self, spec: FamilySpec, prompts: int, given: Given) -> Given:
        guidance = (self._card or LoraCard()).guidance
        return {"guidance_scale": ConditioningConfig.model_fields["guidance"].default if guidance is None else guidance}

    def _exact_times(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        t, *others = super()._exact_times(module, args)
        if len(others) == 2:  # guidance comes second, where the network takes it
            others[0] = torch.full_like(t, self.guidance_scale * self.time_unit)
        return (t, *others)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        return args, _appended(given, pack(source), "img_ids", self._source_id())


class _Flux2Klein(_WithFluxVae):
    families = ("flux2-klein-4b", "flux2-klein-9b")
    exact_time = "time_guidance_embed.time_proj"

    def _normalised(self, mode: Tensor) -> Tensor:
        return flux2.normalise(self.vae, mode).unsqueeze(2)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        return args, _appended(given, source.flatten(2).transpose(1, 2), "img_ids", self._source_id())


class _ZImage(_WithFluxVae):
    families = ("z-image",)

    def _positions(self, network: nn.Module, source: Tensor) -> AbstractContextManager[None]:
        return zimage.same_positions(network, pack_length(*source.shape[-2:]), with_source=True)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        noisy, *others = args  # a list of (C, 1, H, W), twice as long under guidance
        return ([torch.cat([one, source[index % len(source)].to(one)], dim=1) for index, one in enumerate(noisy)], *others), given

    def _drop(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return ([one[:, :1] for one in output[0]],)


class _QwenImage(BygPipeline):
    families = ("qwen-image",)
    guided_by = "true_cfg_scale"
    exact_time = "time_text_embed"
    time_unit = 1.0

    def _guidance(self, spec: FamilySpec, prompts: int, given: Given) -> Given:
        scale = given.get("true_cfg_scale", spec.guidance_scales[0])
        named = given.get("negative_prompt") is not None or given.get("negative_prompt_embeds") is not None
        negative = {} if named or scale <= spec.unguided else {"negative_prompt": [spec.negative] * prompts}
        return {"true_cfg_scale": scale, **negative}

    def _positions(self, network: nn.Module, source: Tensor) -> AbstractContextManager[None]:
        return image_positions(network, doubled=self._source_id() == 0)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        # An image's number in its list is its frame.
        shapes = [images * (1 + self._source_id()) for images in given["img_shapes"]]
        return args, _appended(given, pack(source)) | {"img_shapes": shapes}


class _Krea2(BygPipeline):
    families = ("krea2",)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        appended = _appended(given, pack(source), "position_ids", self._source_id())
        return args, appended | {"timestep": self._exact_time(given["timestep"])}


class _Wan(BygPipeline):
    families = ("wan2.2-t2v-a14b", "wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "wan2.2-ti2v-5b")
    samplers = ()  # its schedulers take no nodes of ours
    _number_argument = "num_videos_per_prompt"

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        *,
        video: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Edit images or clips: diffusers' own call with a source.

        Args:
            image: as of the other pipelines; its edit is a clip of one frame.
            video: instead of `image`: the frames of a clip, as a list of PIL images or an array or tensor with frames first; or a list of
                such clips, of one length.
            num_frames: of the clip, if given: 4n + 1.
            prompt, height, width, arguments: as of the other pipelines.

        Raises:
            ValueError: there is no image and no clip, or both; a size or length does not fit; clips and prompts differ in number.
        """
        if (image is None) == (video is None):
            raise ValueError("give image= or video=: what to edit" + ("" if image is None else ", not both"))
        clips = _pictures(image, "image") if video is None else _clips(video)
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) > 1 or (num_frames is not None and lengths != [num_frames]):
            asked = "" if num_frames is None else f", num_frames = {num_frames}"
            raise ValueError(f"the clip has {' and '.join(map(str, lengths))} frames{asked}: they must be as many; cut the clip")
        multiple = self.vae_scale_factor_temporal
        if lengths[0] % multiple != 1:
            fitting = (lengths[0] - 1) // multiple * multiple + 1
            raise ValueError(f"the clip has {lengths[0]} frames, and Wan takes {multiple}n + 1: cut it to {fitting}")
        return self._edit(clips, prompt, height, width, arguments | {"num_frames": lengths[0]})

    def _guidance(self, spec: FamilySpec, prompts: int, given: Given) -> Given:
        high, low = spec.guidance_scales
        scales = {} if "guidance_scale" in given else {"guidance_scale": high} | ({"guidance_scale_2": low} if spec.has_experts else {})
        named = given.get("negative_prompt") is not None or given.get("negative_prompt_embeds") is not None
        return scales | ({} if named else {"negative_prompt": spec.negative})

    def _positions(self, network: nn.Module, source: Tensor) -> AbstractContextManager[None]:
        return wan.source_positions(network, self.position, source.shape[2], True)

    def _append(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], given: Given) -> tuple[tuple[Any, ...], Given]:
        noisy, t = given["hidden_states"], given["timestep"]
        frames = torch.cat([noisy, source.to(noisy)], dim=2)
        # The 5B's has an entry for each token, all one t.
        return args, given | {"hidden_states": frames, "timestep": t if t.ndim == 1 else t[:, 0]}

    def _drop(self, source: Tensor, network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0][:, :, : source.shape[2]],)


# --- what the user gives ---


def _pictures(images: Any, argument: str) -> list[list[Image.Image]]:
    """Clips of one frame."""
    return [[picture] for picture in _flat(images, argument)]


def _clips(video: Any) -> list[list[Image.Image]]:
    nested = getattr(video, "ndim", 0) == 5 or (
        isinstance(video, list | tuple) and bool(video) and (isinstance(video[0], list | tuple) or getattr(video[0], "ndim", 0) == 4)
    )
    return [_flat(clip, "video") for clip in (video if nested else [video])]


def _flat(images: Any, argument: str) -> list[Image.Image]:
    """PIL images of one image, an array, a tensor or a list of them.

    Raises:
        ValueError: it is none of these, empty, or has values outside [0, 1].
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, list | tuple) and images:
        return [picture for one in images for picture in _flat(one, argument)]
    if isinstance(images, Tensor):
        images = images.detach().float().cpu().movedim(-3, -1).numpy() if images.ndim in (3, 4) else images
    if not isinstance(images, np.ndarray) or images.ndim not in (3, 4) or images.shape[-1] != 3 or not images.size:
        said = "missing" if images is None else f"a {type(images).__name__}{list(getattr(images, 'shape', ())) or ''}"
        raise ValueError(f"{argument} is {said}: give a PIL image, an array (H, W, 3) or a tensor (3, H, W), or a list of them")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{argument} has values from {images.min():g} to {images.max():g}: they lie in [0, 1]")
    rounded = (images * 255).round().astype("uint8")
    return [Image.fromarray(one) for one in (rounded if rounded.ndim == 4 else rounded[None])]


def _lora_file(name: str, options: Given) -> Path | None:
    """The file that a name means, from the hub where it is not here; None: diffusers is to find it, or not."""
    path, weight_name = Path(name).expanduser(), options.get("weight_name")
    if path.is_dir():
        folder = path / (options.get("subfolder") or "")
        files = [folder / weight_name] if weight_name else sorted(folder.glob("*.safetensors"))
        pair = len(files) == 2 and set(files) == set(lora_formats.expert_files(files[0]).values())
        if len(files) != 1 and not pair:
            raise ValueError(f"{folder}: holds {len(files)} LoRA files: name one with weight_name=")
        return files[0]
    if path.is_file() or (local := [file for file in lora_formats.expert_files(path).values() if file.is_file()]):
        return path if path.is_file() else local[0]
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: no such file")
    if weight_name is None or Path(weight_name).suffix != ".safetensors":
        return None
    from huggingface_hub import hf_hub_download

    fetch = partial(hf_hub_download, name, **{key: options[key] for key in _OF_THE_HUB if options.get(key) is not None})
    stem = Path(weight_name).stem
    for suffix, other in zip(families.EXPERT_SUFFIXES.values(), reversed(families.EXPERT_SUFFIXES.values()), strict=True):
        if stem.endswith(suffix):
            fetch(f"{stem.removesuffix(suffix)}{other}.safetensors")  # beside it in the cache
    return Path(fetch(weight_name))


# --- the classes ---

_CLASSES: dict[str, tuple[type[BygPipeline], str]] = {
    "FluxBygPipeline": (_Flux, "FluxPipeline"),
    "Flux2KleinBygPipeline": (_Flux2Klein, "Flux2KleinPipeline"),
    "ZImageBygPipeline": (_ZImage, "ZImagePipeline"),
    "QwenImageBygPipeline": (_QwenImage, "QwenImagePipeline"),
    "Krea2BygPipeline": (_Krea2, "Krea2Pipeline"),
    "WanBygPipeline": (_Wan, "WanPipeline"),
}
__all__ = ["BygPipeline", *_CLASSES]


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import diffusers

    ours, parent = _CLASSES[name]
    needed = max(families.named(family).diffusers for family in ours.families)
    found = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if found < needed or not hasattr(diffusers, parent):
        wanted = ".".join(map(str, needed))
        raise AttributeError(
            f"{name} needs diffusers {wanted} or later, this is {diffusers.__version__}: pip install -U 'diffusers>={wanted}'"
        )
    members = {"__doc__": f"diffusers' `{parent}`, editing a source.\n\n{BygPipeline.__doc__}", "__module__": __name__}
    globals()[name] = type(name, (ours, getattr(diffusers, parent)), members)
    return globals()[name]
