"""A frozen vision-language model of transformers as a function of pictures: logits of No and Yes, with gradient.

Which models: those whose image processor is a `View` (`pixels.py`), a line each in `KINDS`. The model's own code does the rest.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byg_plugin.critics.dialogue import Dialogue
from byg_plugin.critics.pixels import PaddedView, PatchView, SquareView, View
from byg_plugin.critics.questions import Question
from byg_plugin.models import files
from byg_plugin.models.base import at_least_float32
from byg_plugin.progress import quiet_loading

if TYPE_CHECKING:
    from byg_plugin.config.critic import CriticConfig

USUAL_SIDE = 448
"""critic.image_size of a model that takes any size."""
_TEXT_TOKENS = 512  # room for a question and the template


@dataclass(frozen=True, kw_only=True)
class Features:
    """One picture inside the model: (L, D) tokens, and what deeper layers get of it, each (L, D)."""

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()
    grid: Tensor | None = None

    def to(self, device: torch.device) -> Features:
        """The same on another device."""
        grid = None if self.grid is None else self.grid.to(device)
        return Features(tokens=self.tokens.to(device), deep=tuple(each.to(device) for each in self.deep), grid=grid)


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model as its files say, without its weights."""

    path: str
    config: Any
    kind: type[nn.Module]
    view: View
    dialogue: Dialogue


class Vlm:
    """A frozen model that answers questions about pictures.

    Args:
        model: an `AutoModelForImageTextToText`.
        described: what it is.
    """

    def __init__(self, model: Any, described: Described):
        self.model = model.requires_grad_(False).eval()
        self.view, self._dialogue, self._config = described.view, described.dialogue, described.config

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    def features(self, picture: Tensor) -> Features:
        """One picture (3, H, W) in [0, 1], on any device, as the language model takes it."""
        seen = self.view.see(picture.to(self.device))
        found = self.model.model.get_image_features(**seen.inputs, return_dict=True)
        deep = tuple(layer[0] for layer in getattr(found, "deepstack_features", None) or ())
        assert len(found.pooler_output[0]) == seen.tokens, "the view counts as the model does"
        return Features(tokens=found.pooler_output[0], deep=deep, grid=seen.grid)

    def logits(self, question: Question, pictures: Sequence[Features]) -> Tensor:
        """(2,): of No and of Yes, at least float32.

        Args:
            question: what is asked.
            pictures: those of `question.pictures`, in this order.
        """
        prompt = self._dialogue.prompt(question, [len(picture.tokens) for picture in pictures])
        ids = torch.tensor([prompt.ids], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures[0].grid is not None:
            inputs["image_grid_thw"] = torch.cat([picture.grid for picture in pictures])  # type: ignore[misc]
            inputs["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
        given = {"image": self._joined(pictures)}
        answer = self.model(**inputs, mm_encoder_outputs=given, logits_to_keep=1, use_cache=False)
        both = answer.logits[0, -1, [prompt.no, prompt.yes]]
        return at_least_float32(both)

    def _joined(self, pictures: Sequence[Features]) -> Any:
        """What `get_image_features` returns of several pictures at once."""
        deep = [[picture.deep[layer] for picture in pictures] for layer in range(len(pictures[0].deep))]
        tokens = [picture.tokens for picture in pictures]
        stacked = KINDS[self._config.model_type].stacked
        return SimpleNamespace(pooler_output=torch.stack(tokens) if stacked else tokens, deepstack_features=deep)


# --- what a model is ---


def _patch_view(config: Any, processor: Mapping[str, Any], size: int | None, path: str) -> PatchView:
    least, most = processor["size"]["shortest_edge"], processor["size"]["longest_edge"]
    side = USUAL_SIDE if size is None else size
    token = processor["patch_size"] * processor["merge_size"]
    if size is not None and not token**2 <= size**2 <= most:
        raise ValueError(f"critic.image_size = {size}: {path} sees pictures of {token} x {token} to {most:,} pixels; choose one between")
    limit, tokens = config.text_config.max_position_embeddings, 2 * (min(side**2, most) // token**2)
    if tokens + _TEXT_TOKENS > limit:
        raise ValueError(
            f"critic.image_size = {side}: two pictures are {tokens} tokens, and with a question of {_TEXT_TOKENS} {path} takes {limit}; "
            "lower critic.image_size"
        )
    return PatchView(
        patch=processor["patch_size"],
        merge=processor["merge_size"],
        frames=processor["temporal_patch_size"],
        least=min(least, side**2),
        most=min(most, side**2),
        mean=processor["image_mean"],
        std=processor["image_std"],
    )


def _one_side(processor: Mapping[str, Any], size: int | None, path: str) -> int:
    side = int(processor["size"]["height"])
    if size not in (None, side):
        raise ValueError(f"critic.image_size = {size}: {path} sees squares of {side} pixels alone; leave it out")
    return side


def _square_view(config: Any, processor: Mapping[str, Any], size: int | None, path: str) -> SquareView:
    side = _one_side(processor, size, path)
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    tokens = int((side // patch) ** 2 * config.downsample_ratio**2)
    return SquareView(side=side, tokens=tokens, mean=processor["image_mean"], std=processor["image_std"])


def _padded_view(config: Any, processor: Mapping[str, Any], size: int | None, path: str) -> PaddedView:
    side = _one_side(processor, size, path)
    tokens = (side // config.vision_config.patch_size) ** 2
    if config.vision_feature_select_strategy == "default":
        tokens -= 1
    return PaddedView(side=side, tokens=tokens + 1, mean=processor["image_mean"], std=processor["image_std"])


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Models of one image processor.

    Attributes:
        processor: start of the processor's class name.
        view: of the model's configuration, the processor's, critic.image_size and the path.
        sizes: what the processor's `size` names: a square, or the least and the most pixels.
        around: tokens before and after a picture that the template leaves out.
        stacked: whether the pictures' features are one tensor, and not a list.
    """

    processor: str
    view: Callable[[Any, Mapping[str, Any], int | None, str], View]
    sizes: tuple[str, str] = ("height", "width")
    around: tuple[str, ...] = ()
    stacked: bool = False


_PATCHES = Kind(processor="Qwen2VLImageProcessor", view=_patch_view, sizes=("shortest_edge", "longest_edge"))
KINDS = {
    "qwen2_vl": _PATCHES,
    "qwen2_5_vl": _PATCHES,
    "qwen3_vl": _PATCHES,
    "qwen3_vl_moe": _PATCHES,
    "internvl": Kind(processor="GotOcr2ImageProcessor", view=_square_view, around=("<img>", "</img>"), stacked=True),
    "llava_onevision": Kind(processor="LlavaOnevisionImageProcessor", view=_padded_view),
}
"""By `model_type`."""


def describe(critic: CriticConfig) -> Described:
    """What critic.path holds, and that it can be a critic; reads no weights.

    Raises:
        ValueError: it is no such model, its tokenizer cannot answer, critic.image_size does not fit it, or transformers is too old.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoImageProcessor, AutoTokenizer

    path = os.path.expanduser(str(critic.path))
    config = _read(path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    name, takes_pictures = config.model_type, type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if name not in KINDS:
        what = "takes no pictures" if not takes_pictures else "takes pictures by a processor that is not written in torch here"
        raise ValueError(f"critic.path = {path}: holds a {name}, which {what}; choose one of {', '.join(KINDS)}")
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    if "mm_encoder_outputs" not in inspect.signature(kind.forward).parameters:
        import transformers

        raise ValueError(
            f"critic.path: {kind.__name__} of transformers {transformers.__version__} does not take a picture's features (its "
            "mm_encoder_outputs): install transformers 5.23 or later"
        )
    processor = _read(path, lambda: AutoImageProcessor.from_pretrained(path, trust_remote_code=False, backend="pil")).to_dict()
    found = str(processor.get("image_processor_type"))
    if not found.startswith(KINDS[name].processor) or not all(processor[key] for key in ("do_resize", "do_rescale", "do_normalize")):
        raise ValueError(f"critic.path = {path}: its {found} prepares pictures in another way than a {name} usually has; use the original")
    _check_processor(path, processor, config.vision_config, KINDS[name].sizes)
    view = KINDS[name].view(config, processor, critic.image_size, path)
    tokenizer = _read(path, lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    around = tuple((tokenizer.convert_tokens_to_ids(token),) for token in KINDS[name].around) or ((), ())
    assert len(around) == 2
    dialogue = Dialogue(
        tokenizer=tokenizer, template=_template(path, tokenizer), picture=config.image_token_id, around=around, name=f"critic.path = {path}"
    )
    dialogue.check()
    return Described(path=path, config=config, kind=kind, view=view, dialogue=dialogue)


def _check_processor(path: str, processor: Mapping[str, Any], tower: Any, sizes: tuple[str, str]) -> None:
    """What our own transcription of the processor takes from its file, or takes for granted."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and value > 0

    def three(value: Any, least: float = -math.inf) -> bool:
        return (
            isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(x, int | float) and least < x < math.inf for x in value)
        )

    size, factor = processor.get("size"), processor.get("rescale_factor")
    first, second = (size.get(key) if isinstance(size, Mapping) else None for key in sizes)
    fine = {
        "image_mean": three(processor.get("image_mean")),
        "image_std": three(processor.get("image_std"), least=0),
        "rescale_factor": isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-3),
        "resample": processor.get("resample") == _BICUBIC,
        "size": whole(first) and whole(second) and (first == second if sizes == ("height", "width") else first <= second),
    }
    # The towers of these models have the same numbers, those of the others no such part.
    for key, of_tower in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        if key in processor:
            fine[key] = whole(processor[key]) and processor[key] == getattr(tower, of_tower, processor[key])
    if wrong := [f"{key} = {processor.get(key)!r:.80}" for key, is_fine in fine.items() if not is_fine]:
        raise ValueError(
            f"critic.path = {path}: its image processor has {', '.join(wrong)}, which such a model cannot have; download it again"
        )


_BICUBIC = 3  # PIL's number


def load(critic: CriticConfig, described: Described, device: torch.device) -> Vlm:
    """The model with its weights, frozen, on a device.

    Raises:
        ValueError: the weights cannot be read, or hold NaN or infinite values.
    """
    dtype = getattr(torch, critic.dtype)
    options: dict[str, Any] = {}
    if critic.quantization == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    with quiet_loading():
        model, loaded = _read(
            described.path,
            lambda: described.kind.from_pretrained(  # type: ignore[attr-defined]
                described.path,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                **options,
            ),
        )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"critic.path = {described.path}: {len(missing)} weights are missing, e.g. {missing[0]}: download it again")
    files.refuse_not_finite(model, Path(described.path))
    vlm = Vlm(model, described)
    if critic.gradient_checkpointing:
        _checkpointed(vlm.model)
    return vlm


def on_meta(described: Described, dtype: torch.dtype) -> nn.Module:
    """The model's shapes, for the memory sum."""
    with torch.device("meta"):
        return described.kind._from_config(described.config, dtype=dtype)  # type: ignore[attr-defined]


def _checkpointed(model: Any) -> None:
    """Layers recomputed in backward. Their flag alone is set: what is inside them stays in eval mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its name from version 6 on
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _template(path: str, tokenizer: Any) -> str:
    """The chat template: the tokenizer's, or that of an older processor in a file of its own."""
    from transformers.utils import cached_file

    silent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    template = tokenizer.chat_template  # also that of chat_template.jinja, which is the processor's
    if cached_file(path, "chat_template.jinja", **silent) is None and (beside := cached_file(path, "chat_template.json", **silent)):
        template = files.read_json(Path(beside)).get("chat_template")
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise ValueError(f"critic.path = {path}: has no chat template, so it cannot be asked; choose an instruction-tuned model")
    return template


def _read(path: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except torch.cuda.OutOfMemoryError:  # a RuntimeError that is not the files'
        raise
    except Exception as error:  # what a damaged file raises in transformers is of any kind
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"critic.path = {path}: cannot be loaded: {reason}; give a folder or hub id of a vision-language model") from error
