"""The card of a LoRA file: what its header says of the training, under the keys `byg.*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from byg_plugin.families import EXPERT_SUFFIXES
from byg_plugin.version import __version__

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.families.geometry import Geometry

_PREFIX = "byg."
STOCHASTIC = "stochastic"
_EXPERTS = {suffix: expert for expert, suffix in EXPERT_SUFFIXES.items()}


@dataclass(frozen=True, kw_only=True)
class LoraCard:
    """What a reader of a LoRA file needs and what a maker wants to know; None is what a file does not say.

    The fields are the keys without `byg.`, in the order of the file. No paths, prompts or keys of services.

    Attributes:
        boundary: t from which the high-noise expert serves, of a family of two.
        expert: `high_noise`, `low_noise` or `both`, of a family of two.
        frames: of a clip.
        fps: frames a second of a clip.
        guidance: of the guidance embedding.
        alpha: as the file's tensors mean it.
        base: name of the frozen network's file or folder.
        resolution: side in pixels of the square with as many pixels as a bucket.
        targets: regular expression of the adapted layers' names; empty for the default.
        objective: the `[objective]` section as JSON.
        weights: `live` or `ema`.
        step: optimizer steps that were made.
        host: where it is not the embedded one.
        sampler: `stochastic` of a few-step editor: each step adds fresh noise, and nothing is guided.
        steps: of that sampler, as it was trained.
    """

    boundary: float | None = None
    expert: str | None = None
    frames: int | None = None
    fps: float | None = None
    version: str | None = None
    family: str | None = None
    position: str | None = None
    guidance: float | None = None
    max_text_tokens: int | None = None
    rank: int | None = None
    alpha: float | None = None
    base: str | None = None
    resolution: int | None = None
    schedule: str | None = None
    targets: str | None = None
    objective: str | None = None
    weights: str | None = None
    step: int | None = None
    host: str | None = None
    sampler: str | None = None
    steps: int | None = None

    @classmethod
    def of(
        cls, config: Config, step: int, weights: str, family: Geometry | None = None, suffix: str = "", base: str | None = None
    ) -> LoraCard:
        """The card of a file that a run writes.

        `family` adds what only video has; `suffix` is what follows the file's stem, and names the expert of a pair; `base` is the
        base's path or hub id, where `[model]` does not have it.
        """
        video: dict[str, Any] = {}
        if family is not None and family.boundary is not None:
            video = {"boundary": family.boundary, "expert": suffix.removeprefix("_") or "both"}
        if family is not None and config.dataset.frames > 1:
            video |= {"frames": family.clip_frames(config.dataset.frames), "fps": config.fps}
        few_steps: dict[str, Any] = {}
        if config.objective.few_steps is not None:
            assert config.objective.rollout is not None
            few_steps = {"sampler": STOCHASTIC, "steps": config.objective.few_steps, "schedule": config.objective.rollout[1]}
        return cls(
            **video,
            version=__version__,
            family=config.model.family,
            position=config.conditioning.position,
            guidance=config.conditioning.guidance,
            max_text_tokens=config.conditioning.max_text_tokens,
            rank=config.lora.rank,
            alpha=config.lora.rank,  # the scale is folded into B
            base=base_name(base or config.model.part(_EXPERTS.get(suffix, "transformer"))),
            resolution=config.dataset.resolution,
            **({"schedule": config.sample.schedule} | few_steps),
            targets=config.lora.targets or "",
            objective=config.objective.model_dump_json(),
            weights=weights,
            step=step,
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> LoraCard:
        """The card in a header; keys of others, and of later versions, are passed over.

        Raises:
            ValueError: a number is none; names the key.
        """
        return cls(**{name: _READ[name](key, metadata[key]) for name, key in KEYS.items() if key in metadata})

    def to_metadata(self) -> dict[str, str]:
        """The header's keys and values."""
        said = {key: getattr(self, name) for name, key in KEYS.items()}
        return {key: value if isinstance(value, str) else repr(value) for key, value in said.items() if value is not None}


KEYS = {field.name: _PREFIX + field.name for field in fields(LoraCard)}
"""Field -> the header's key."""


def has_card(metadata: Mapping[str, str]) -> bool:
    """Whether a header is one of ours."""
    return any(key.startswith(_PREFIX) for key in metadata)


def base_name(path: str) -> str:
    """The last part of a path or hub id, of either system: no folders of a person's machine go into results."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _text(key: str, text: str) -> str:
    return text


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise _damaged(key, text, "a whole number") from error


def _number(key: str, text: str) -> float:
    """An int where it is written as one: what is read is written as it was."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise _damaged(key, text, "a number") from error


def _damaged(key: str, text: str, wanted: str) -> ValueError:
    return ValueError(f"its metadata are damaged: {key} = {text[:40]!r}, expected {wanted}; train it, save it or download it again")


_READERS: dict[str, Callable[[str, str], Any]] = {"str": _text, "int": _whole, "float": _number}
_READ = {field.name: _READERS[str(field.type).removesuffix(" | None")] for field in fields(LoraCard)}
