"""Frozen judges of an edit whose answer is differentiable with respect to the edited picture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from byg_plugin.config.critic import CriticConfig
    from byg_plugin.config.sections import Config
    from byg_plugin.critics.critic import Critic
    from byg_plugin.critics.vlm import Described
    from byg_plugin.models.base import Family

logger = logging.getLogger(__name__)


def check_critic(config: Config) -> Described:
    """That the configured critic can be one; reads no weights.

    Raises:
        ValueError: critic.path is not set or holds no model that can answer, a package is missing, or the device.
    """
    from byg_plugin.config.extras import require
    from byg_plugin.critics.vlm import describe

    critic = config.critic
    if critic.path is None:
        raise ValueError(
            f'objective.name = "{config.objective.name}" asks a critic: set critic.path to a vision-language model, e.g. '
            '"Qwen/Qwen3-VL-2B-Instruct"'
        )
    require("transformers", "critic.path", "diffusers")
    if critic.quantization == "nf4":
        require("bitsandbytes", 'critic.quantization = "nf4"', "bnb", 'set critic.quantization = "none"')
    return describe(critic)


def check_instructions(described: Described, instructions: Iterable[tuple[str, str]]) -> None:
    """That the critic reads instructions as text.

    Args:
        described: the critic.
        instructions: that it is asked about, each after its tuple's id.

    Raises:
        ValueError: one spells out a mark of the model's own.
    """
    marks = described.dialogue.marks()
    for name, text in instructions:
        if (mark := next((mark for mark in marks if mark in text), None)) is not None:
            raise ValueError(
                f"dataset.tuples: the instruction of tuple {name} holds {mark!r}, which critic.path = {described.path} reads as a mark of "
                "its own and not as text: take it out of the instruction"
            )


def make_critic(config: Config, family: Family, device: torch.device, sources: Sequence[Tensor]) -> Critic:
    """The configured critic, which has shown that it can tell Yes from No.

    Args:
        config: the whole configuration.
        family: whose latents are judged.
        device: of the networks; `critic.device` may name another one.
        sources: latents (C, 1, h, w) of pictures to try it with, one or more, some perhaps twice.

    Raises:
        ValueError: see `check_critic`; its weights cannot be read; it answers too few known questions rightly.
    """
    from byg_plugin.critics import probe, vlm
    from byg_plugin.critics.critic import Critic
    from byg_plugin.critics.decode import Decoder
    from byg_plugin.critics.questions import VERSION

    critic, described = config.critic, check_critic(config)
    where = critic_device(critic, device)
    judge = vlm.load(critic, described, where)
    decoder = Decoder(family, family.load_vae(where), critic.tile, recompute=critic.gradient_checkpointing)
    made = Critic(judge, decoder, critic, config.objective.criticised_from)
    logger.info("critic: %s on %s, questions of version %d", described.path, where, VERSION)
    if critic.least_accuracy:
        pictures = [decoder.pixels(latents[None].to(where))[0] for latents in _different(sources)]
        found = probe.refuse_a_blind_one(made, pictures, critic.least_accuracy, described.path)
        logger.info("critic: %.0f %% of %d known questions answered rightly", 100 * found.right, probe.PAIRS)
    return made


def _different(sources: Sequence[Tensor]) -> list[Tensor]:
    """Each picture once: several tuples may have one source, and another picture must be another one."""
    import torch

    found: list[Tensor] = []
    for latents in sources:
        if not any(latents.shape == seen.shape and torch.equal(latents, seen) for seen in found):
            found.append(latents)
    return found


def shares_device(critic: CriticConfig, device: torch.device) -> bool:
    """Whether the critic lives where the networks do; also asked of a device that is not this machine's."""
    import torch

    where = device if critic.device == "auto" else torch.device(critic.device)
    return (where.type, where.index or 0) == (device.type, device.index or 0)


def critic_device(critic: CriticConfig, device: torch.device) -> torch.device:
    """Where the critic lives.

    Raises:
        ValueError: critic.device is none of this machine's.
    """
    import torch

    name = critic.device
    if name == "auto":
        return device
    where = torch.device(name)
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'critic.device = "{name}": this machine has {torch.cuda.device_count()} CUDA devices; set critic.device = "auto"')
    return where
