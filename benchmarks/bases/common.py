"""What both tiny bases are trained with: texts, times, averages, optimizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from byg_plugin import timesteps
from byg_plugin.demo import world
from byg_plugin.training.muon import Muon

Log = Callable[[str, int, dict[str, float]], None]
"""Stage, step, values."""

# Noise (standard deviation) added to the clean latents in training. The decoder does not see it, and it bounds how
# steep the velocity gets at small t: without it noise has to be amplified by 1/t where latents are constant.
DITHER = 0.1
NO_CAPTION = 0.1  # share of pictures that are shown without their caption
# Share of pictures whose caption tells one thing only, in the words of an instruction that would have led to it ("make the
# circle red"). A text-to-image model of the world has read such texts and draws what they name; one that has not would
# have to learn the language together with the editing.
INSTRUCTED = 0.3
# FLUX.1-dev has classifier-free guidance distilled into it; so has this base. Its target leans away from what it predicts
# without the caption by this share of the difference: a guidance scale of 1 / (1 - share) (Tang et al. 2025).
GUIDED_SHARE = 0.5


def word_tokenizer(
    specials: list[str], unknown: str, template: str, words: Sequence[str] | None = None, **names: str | int
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's vocabulary, or of other words; `specials` get the first ids, in order."""
    vocabulary = {word: i for i, word in enumerate([*specials, *(world.vocabulary() if words is None else words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(name, vocabulary[name]) for name in specials if name in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, **names)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """As `save_pretrained`, under a class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # transformers 5 writes a name here that 4 does not know; both know the older one.
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class Pictures(NamedTuple):
    """What the flow is trained on: latents (n, 16, 1, h, w) of scenes, and a caption and an instruction of each."""

    latents: Tensor
    captions: list[str]
    instructions: list[str]

    def texts(self, pick: Tensor, rng: torch.Generator) -> list[str]:
        """A text for each picked picture: none, the instruction or the caption."""
        chance = torch.rand(len(pick), generator=rng).tolist()
        shares = (NO_CAPTION, NO_CAPTION + INSTRUCTED)
        return [
            "" if c < shares[0] else self.instructions[i] if c < shares[1] else self.captions[i]
            for i, c in zip(pick.tolist(), chance, strict=True)
        ]


def sample_times(n: int, rng: torch.Generator) -> Tensor:
    """(n,) times: half uniform (stratified over the batch), a quarter logit-normal and noisier, a quarter crowded towards 0.

    What a picture shows is settled at large t, logit-normal times shifted by 2; an editor's last steps, and the prior
    it is trained with, live at small t.
    """
    kinds = torch.randperm(n, generator=rng)
    u = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    u = u[torch.randperm(n, generator=rng)]
    noisier = timesteps.shift(torch.sigmoid(torch.randn(n, generator=rng)), 2.0)
    return torch.where(kinds < n // 2, u, torch.where(kinds < 3 * n // 4, noisier, u.square()))


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """Of the learning rate: linear warm-up, then a cosine down to 1 %."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2)


def optimizers(matrices: list[nn.Parameter], rest: list[nn.Parameter], muon_rate: float, adamw_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for all else."""
    return [
        Muon(matrices, lr=muon_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=adamw_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


class Average:
    """Exponential moving average of parameters with a ramp, so that early weights are forgotten."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._live, self._decay, self.step = parameters, decay, 0
        self.mean = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        decay = min(self._decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self._live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the parameters."""
        for live, mean in zip(self._live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)
