"""The nodes. ComfyUI is imported where it is used, so that everything beside it can be tested without."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import card as cards
from . import loader, schedule, sizes
from .families import POSITIONS, Family, architecture_of, check_position, families, family_named, members
from .guidance import qwen_guidance
from .source import KEY, UNCONNECTED, Source, check_source, refuse_no_source

CARD = "byg_card"  # of the attachments of a MODEL
AS_TRAINED = "as trained"
NONE, PARTNER = "none", "the other half of the pair"
CATEGORY = "ByG"
logger = logging.getLogger(__name__)


def _architecture(model: Any) -> str:
    return architecture_of(model.model.model_config.unet_config)


def _card(model: Any) -> cards.Card | None:
    return model.get_attachment(CARD)


def _family(model: Any, name: str) -> Family:
    """The family that is named, or that the LoRA's card tells, or the only one of the model's architecture.

    Raises:
        ValueError: it is for another architecture, or nothing tells it.
    """
    architecture = _architecture(model)
    card = _card(model)
    if name == AS_TRAINED and card is None:
        several = members(architecture)
        if len(several) > 1:
            raise ValueError(f"choose the family, no ByG LoRA Loader tells it: {', '.join(family.name for family in several)}")
        return several[0]
    family = family_named(card.family if name == AS_TRAINED and card is not None else name)
    if family.architecture != architecture:
        raise ValueError(f"family {family.name!r} is not the connected model's: choose {AS_TRAINED!r} or one of {architecture}")
    return family


class BygLoraLoader:
    """Loads an edit LoRA, of a family of two networks both halves, and tells how it was trained."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Loads an edit LoRA of byg_plugin, reads its card and says what does not fit."
    RETURN_TYPES = ("MODEL", "MODEL", list(POSITIONS), "FLOAT", "FLOAT", "FLOAT", "INT", "FLOAT", "STRING", "SAMPLER")
    RETURN_NAMES = ("model", "model_low", "position", "guidance", "cfg", "cfg_low", "steps", "shift", "report", "sampler")
    OUTPUT_TOOLTIPS = (
        "the model with the LoRA: of Wan2.2 A14B the high-noise network",
        "the low-noise network with its LoRA",
        "of the source, for ByG Source",
        "for FluxGuidance",
        "for CFGGuider or KSampler; 1 where guidance is an input of the network",
        "the same for the low-noise network",
        "of a published edit, or those that a few-step LoRA was trained for",
        "the published shift; 0 where it depends on the size: ByG Schedule knows it",
        "what was loaded",
        "for SamplerCustomAdvanced: euler, or of a few-step LoRA lcm",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        files = folder_paths.get_filename_list("loras")
        strength = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": "1: as trained; 0: the base"})
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "the base; of Wan2.2 A14B the high-noise network"}),
                "lora": (files, {"tooltip": "of Wan2.2 A14B the high-noise file"}),
                "strength": strength,
            },
            "optional": {
                "model_low": ("MODEL", {"tooltip": "the low-noise network of Wan2.2 A14B"}),
                "lora_low": ([PARTNER, NONE, *files], {"tooltip": "the low-noise file; a LoRA of both networks is one file"}),
                "strength_low": strength,
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, lora_low: str = NONE, **others: Any) -> str:
        """A file that is written anew, by training on, is read anew."""
        import os

        import folder_paths

        names = filter(None, (lora, lora_low, cards.partner_of(lora)))
        paths = filter(None, (folder_paths.get_full_path("loras", name) for name in names))
        return ", ".join(f"{status.st_mtime_ns}:{status.st_size}" for status in map(os.stat, paths))

    def load(
        self, model: Any, lora: str, strength: float, model_low: Any = None, lora_low: str = PARTNER, strength_low: float = 1.0
    ) -> dict[str, Any]:
        """See `INPUT_TYPES` and `RETURN_NAMES`."""
        from comfy.samplers import sampler_object

        high, card, family, text = _loaded(model, lora, strength, "high_noise")
        texts, low = [text], None
        if family.boundary is None and model_low is not None:
            raise ValueError(f"{family.name} is one network: disconnect model_low")
        if family.boundary is not None and model_low is not None:
            low_file = self._low_file(lora, lora_low, card)
            if low_file is None:
                loader.check_family(card, _architecture(model_low), lora)
                low = _with_card(model_low, card, lora)
            else:
                low, low_card, _, text = _loaded(model_low, low_file, strength_low, "low_noise")
                if loader.kind(low_card) != loader.kind(card):
                    raise ValueError(f"{lora} ({loader.words(card)}) and {low_file} ({loader.words(low_card)}) are no pair")
                texts.append(text)
        report = "\n\n".join(texts)
        logger.info("ByG LoRA Loader: %s", report)
        cfg, cfg_low = family.cfg if card.guided and not family.embeds_guidance else (1.0, 1.0)
        shift = 0.0 if isinstance(family.shift, dict) else float(family.shift)
        guidance = card.guidance if family.embeds_guidance and card.guidance is not None else 0.0
        steps, sampler = card.steps or family.steps, sampler_object(cards.SAMPLERS[card.sampler])
        result = (high, low, card.position, guidance, cfg, cfg_low, steps, shift, report, sampler)
        return {"ui": {"text": [report]}, "result": result}

    @staticmethod
    def _low_file(lora: str, lora_low: str, card: cards.Card) -> str | None:
        """The low-noise network's file; None: it shall have none.

        Raises:
            ValueError: the other half is not there.
        """
        import folder_paths

        if lora_low == NONE:
            return None
        if lora_low != PARTNER:
            return lora_low
        if card.expert == "both":
            return lora
        name = cards.partner_of(lora)
        if name is None or folder_paths.get_full_path("loras", name) is None:
            raise ValueError(
                f"{lora}: the low-noise half of the pair is not beside it{f' ({name})' if name else ''}: put it there, name it in "
                f"lora_low, or choose {NONE!r}"
            )
        return name


def _loaded(model: Any, file: str, strength: float, expert: str) -> tuple[Any, cards.Card, Family, str]:
    """A clone of the model with the file's LoRA, the file's card, its family, and words for both.

    Raises:
        ValueError: they do not fit.
    """
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils
    import folder_paths

    path = folder_paths.get_full_path_or_raise("loras", file)
    metadata, shapes = cards.read_header(path)
    card = cards.card_of(metadata, file)
    family = loader.check_family(card, _architecture(model), file)
    loader.check_experts(card, file, expert)
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    fit = loader.fit_of(shapes, key_map, _weights(model.model, shapes, key_map))
    loader.check_fit(fit, card, file)
    patched = _with_card(model, card, file)
    if strength != 0:
        tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
        patched.add_patches(comfy.lora.load_lora(tensors, key_map), strength)
    return patched, card, family, loader.report(card, family, file, fit, strength)


def _with_card(model: Any, card: cards.Card, file: str) -> Any:
    """A clone that has the card, and makes no step before ByG Source gives it a source.

    Raises:
        ValueError: another loader has given the model a card that does not go with this one.
    """
    from comfy.patcher_extension import WrappersMP

    loader.check_mixture(_card(model), card, file)
    patched = model.clone()
    patched.set_attachments(CARD, card)
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, UNCONNECTED)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, UNCONNECTED, refuse_no_source)
    return patched


def _weights(network: Any, file: Iterable[str], key_map: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """ComfyUI's key -> shape, of the weights that a file's tensors are for. A state dict has packed ones in the shape of their storage."""
    import comfy.utils

    targets = [key_map[name] for name in {cards.layer_of(key) for key in file} & key_map.keys()]
    keys = {target if isinstance(target, str) else target[0] for target in targets}
    return {key: tuple(comfy.utils.get_attr(network, key).shape) for key in keys}


class BygSource:
    """Gives a model the source of an edit."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The picture or clip to edit, as the LoRA was trained to see it. Sample the latent that comes out, at full noise."
    RETURN_TYPES = ("MODEL", "LATENT", "MODEL")
    RETURN_NAMES = ("model", "latent", "model_low")
    OUTPUT_TOOLTIPS = (
        "the model with the source",
        "an empty latent of the source's size, to sample",
        "the low-noise network with the source",
    )
    FUNCTION = "connect"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {}),
                "source": ("LATENT", {"tooltip": "the encoded source: VAE Encode of what ByG Size gives"}),
                "position": ([AS_TRAINED, *POSITIONS], {"tooltip": "where the source's tokens are; as trained: what the LoRA's card says"}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 2.0,
                        "step": 0.05,
                        "tooltip": "1: as trained; 0: without the source; others cost two calls a step",
                    },
                ),
            },
            "optional": {"model_low": ("MODEL", {"tooltip": "the low-noise network of Wan2.2 A14B"})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, Any]) -> bool | str:
        """The loader's `position` is a list without 'as trained', which ComfyUI would not let in; it leaves all inputs to this."""
        from comfy_execution.validation import validate_node_input

        takes = {name: entry[0] for group in cls.INPUT_TYPES().values() for name, entry in group.items()}
        for name, kind in input_types.items():
            if name != "position" and not validate_node_input(kind, takes[name]):
                return f"{name} takes {takes[name]}, not {kind}"
        kind = input_types.get("position", "COMBO")
        listed = kind == "STRING" or validate_node_input(kind, "COMBO")
        return True if listed else f"position takes ByG LoRA Loader's position, not {kind}"

    def connect(self, model: Any, source: dict[str, Any], position: str, strength: float, model_low: Any = None) -> tuple[Any, Any, Any]:
        """See `INPUT_TYPES` and `RETURN_NAMES`."""
        samples = source["samples"]
        patched = with_source(model, samples, position, strength)
        low = None if model_low is None else with_source(model_low, samples, position, strength)
        empty = {key: value for key, value in source.items() if key not in ("samples", "noise_mask")}
        return patched, {**empty, "samples": torch.zeros_like(samples)}, low


def with_source(model: Any, samples: Tensor, position: str, strength: float) -> Any:
    """A clone of a model that sees the source.

    Raises:
        ValueError: the position is none of the model's or not known, the model has a source already, or the latent is not its VAE's.
    """
    from comfy.patcher_extension import WrappersMP

    architecture = _architecture(model)
    card = _card(model)
    if position == AS_TRAINED:
        if card is None:
            raise ValueError(
                "ByG Source: no ByG LoRA Loader tells how the LoRA was trained: choose the position, or load it with that node"
            )
        position = card.position
    check_position(position, architecture)
    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        raise ValueError("ByG Source: this model has a source already: connect one source")
    latents = model.model.latent_format
    check_source(samples, latents.latent_channels, latents.latent_dimensions, architecture)
    if card is not None and position != card.position:
        logger.warning("ByG Source: the LoRA was trained with position %r, not %r: expect worse edits", card.position, position)
    patched = model.clone()
    source = Source(samples, position, architecture, strength)
    for name, patch in source.object_patches(patched.get_model_object).items():
        patched.add_object_patch(name, patch)
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, UNCONNECTED)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, source.wrapper(model.model.process_latent_in))
    if strength != 0:
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, with_memory_of_source)
    if architecture == "qwen":
        patched.set_model_sampler_cfg_function(qwen_guidance)
    return patched


def with_memory_of_source(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """For `WrappersMP.PREPARE_SAMPLING`: memory is estimated for twice as many tokens."""
    doubled = [*noise_shape[:-1], 2 * noise_shape[-1]]
    return executor(model, doubled, *args, **kwargs)


class BygSchedule:
    """The family's own times."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The sigmas that byg_plugin's edit.py samples with, for SamplerCustomAdvanced with ByG LoRA Loader's sampler."
    RETURN_TYPES = ("SIGMAS", "SIGMAS", "SIGMAS")
    RETURN_NAMES = ("sigmas", "sigmas_high", "sigmas_low")
    OUTPUT_TOOLTIPS = ("all", "the high-noise network's, of a family of two", "the low-noise network's, of a family of two")
    FUNCTION = "times"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = {"default": 20, "min": 1, "max": schedule.MOST_STEPS}
        return {
            "required": {
                "model": ("MODEL", {}),
                "latent": ("LATENT", {"tooltip": "what will be sampled: some families' times depend on its size"}),
                "steps": ("INT", steps),
                "family": ([AS_TRAINED, *families()], {}),
            }
        }

    def times(self, model: Any, latent: dict[str, Any], steps: int, family: str) -> tuple[Tensor, Tensor, Tensor]:
        """See `INPUT_TYPES` and `RETURN_NAMES`."""
        known, card = _family(model, family), _card(model)
        height, width = latent["samples"].shape[-2:]
        shifted = card is None or card.schedule == "shifted"
        nodes = schedule.sigmas(known.shift, steps, height, width, shifted=shifted)
        boundary = (card.boundary if card is not None else None) or known.boundary
        if known.boundary is None or boundary is None:
            return nodes, nodes, nodes[-1:]
        return nodes, *schedule.split(nodes, boundary)


class BygSize:
    """Brings pictures to a size that the model takes."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Scales and crops pictures or a clip as the trainer does, to a size that the model takes."
    RETURN_TYPES = ("IMAGE", "INT", "INT")
    RETURN_NAMES = ("image", "width", "height")
    FUNCTION = "fit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {}),
                "model": ("MODEL", {"tooltip": "behind ByG LoRA Loader: its card tells family and resolution"}),
                "family": ([AS_TRAINED, *families()], {}),
                "resolution": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 4096,
                        "step": 16,
                        "tooltip": "side of the square with as many pixels; 0: as trained, Wan native",
                    },
                ),
            }
        }

    def fit(self, image: Tensor, model: Any, family: str, resolution: int) -> tuple[Tensor, int, int]:
        """See `INPUT_TYPES` and `RETURN_NAMES`."""
        known, card = _family(model, family), _card(model)
        if known.frame_multiple is None and model.model.latent_format.latent_dimensions == 3 and len(image) > 1:
            raise ValueError("ByG Size: this model's VAE takes a batch for a clip: give one picture at a time")
        trained = None if card is None else card.resolution
        side = resolution or known.native or trained
        if side is None:
            raise ValueError("ByG Size: no LoRA tells the resolution: set it, e.g. to 512 or 1024")
        step = sizes.step_of(side, known.pixel_multiple, known.native)
        size = sizes.size_for((image.shape[2], image.shape[1]), side, known.pixel_multiple, step)
        length = sizes.clip_length(len(image), known.frame_multiple)
        if length < len(image):
            logger.info("ByG Size: %d of %d frames are edited, %s takes %dn + 1", length, len(image), known.name, known.frame_multiple or 1)
        return sizes.fit(image[:length], size), *size


class BygSizeBack:
    """Puts edits back where they were cut out."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Puts an edit back into the frame of the picture it was cut out of, without a shift; what was cut off is the original's."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "put_back"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"edit": ("IMAGE", {}), "original": ("IMAGE", {"tooltip": "what ByG Size was given"})}}

    def put_back(self, edit: Tensor, original: Tensor) -> tuple[Tensor]:
        """See `INPUT_TYPES`."""
        return (sizes.put_back(edit, original),)


NODE_CLASS_MAPPINGS = {
    "BygLoraLoader": BygLoraLoader,
    "BygSource": BygSource,
    "BygSchedule": BygSchedule,
    "BygSize": BygSize,
    "BygSizeBack": BygSizeBack,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "BygLoraLoader": "ByG LoRA Loader",
    "BygSource": "ByG Source",
    "BygSchedule": "ByG Schedule",
    "BygSize": "ByG Size",
    "BygSizeBack": "ByG Size Back",
}
