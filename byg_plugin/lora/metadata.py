"""The metadata of our LoRA files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from byg_plugin.families import EXPERT_SUFFIXES
from byg_plugin.version import __version__

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config


class _Family(Protocol):
    """What is asked of a model family (`models.base.Family`)."""

    @property
    def boundary(self) -> float | None: ...

    def clip_frames(self, frames: int) -> int: ...


def lora_metadata(
    config: Config, step: int, weights: str, family: _Family | None = None, suffix: str = "", base: str | None = None
) -> dict[str, str]:
    """Metadata of a LoRA file: what a reader needs and what a maker wants to know. No paths, prompts or keys.

    `family` adds what only video has; `suffix` is what follows the file's stem, and names the expert of a pair; `base` is the base's
    place, where `[model]` does not have it.
    """
    expert = {value: key for key, value in EXPERT_SUFFIXES.items()}.get(suffix)
    base = base or config.model.part(expert or "transformer")
    video = {}
    if family is not None and family.boundary is not None:
        video = {"byg.boundary": repr(family.boundary), "byg.expert": suffix.removeprefix("_") or "both"}
    if family is not None and config.dataset.frames > 1:
        video |= {"byg.frames": str(family.clip_frames(config.dataset.frames)), "byg.fps": repr(config.fps)}
    return {
        **video,
        "byg.version": __version__,
        "byg.family": config.model.family,
        "byg.position": config.conditioning.position,
        "byg.guidance": repr(config.conditioning.guidance),
        "byg.max_text_tokens": str(config.conditioning.max_text_tokens),
        "byg.rank": str(config.lora.rank),
        "byg.alpha": str(config.lora.rank),  # the scale is folded into B
        "byg.base": base.replace("\\", "/").rstrip("/").rpartition("/")[2],
        "byg.resolution": str(config.dataset.resolution),
        "byg.schedule": config.sample.schedule,
        "byg.targets": config.lora.targets or "",
        "byg.objective": config.objective.model_dump_json(),
        "byg.weights": weights,
        "byg.step": str(step),
    }
