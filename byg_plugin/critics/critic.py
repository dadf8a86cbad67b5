"""The critique of an edit: a frozen vision-language model answers questions about the decoded picture, and says which way it is wrong.

loss = mean over samples and questions of the two-way cross-entropy over [No, Yes], at logits multiplied by a factor that rises
while the editor learns. Its gradient with respect to x0 is taken at once, in pieces: pixels without a graph, one question of one
sample after another with respect to the pixels, then the decoder tile by tile. What is returned carries that gradient and no graph.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byg_plugin.critics.decode import Decoder
from byg_plugin.critics.questions import EDITED, SOURCE, Question, questions
from byg_plugin.critics.vlm import Features, Vlm
from byg_plugin.objectives.base import Batch, Metrics

if TYPE_CHECKING:
    from byg_plugin.config.critic import CriticConfig


class Critic:
    """See the module; an `objectives.base.Critique`.

    Args:
        vlm: that answers.
        decoder: of the latents that are judged, on the same device.
        config: the section `[critic]`.
        first: updates of the editor before the first one that is judged.
    """

    def __init__(self, vlm: Vlm, decoder: Decoder, config: CriticConfig, first: int = 0):
        self.vlm, self.decoder, self._config, self._first = vlm, decoder, config, first
        self._sources = _Kept(config.kept_sources)

    def __call__(self, x0: Tensor, batch: Batch, *, identity_question: bool) -> tuple[Tensor, Metrics]:
        """See `objectives.base.Critique`."""
        assert len(batch.words) == len(x0), "a critic reads the tuples' own words"
        # Also around the backward passes, whose products autocast would round.
        with torch.autocast(x0.device.type, enabled=False), torch.autocast(self.vlm.device.type, enabled=False):
            return self._criticise(x0, batch, identity_question)

    def _criticise(self, x0: Tensor, batch: Batch, identity_question: bool) -> tuple[Tensor, Metrics]:
        latents = x0.detach().to(self.vlm.device)
        asked = [questions(words.instruction, words.edit_type, identity=identity_question) for words in batch.words]
        sources = self._sources_of(batch.source)
        differentiate = x0.requires_grad and torch.is_grad_enabled()
        scale = self.scale(batch.updates)
        losses, gradients, answers = [], [], []
        for picture, source, its in zip(self.decoder.pixels(latents), sources, asked, strict=True):
            loss, gradient, right = self.judge(picture, source, its, scale=scale, differentiate=differentiate)
            losses.append(loss)
            gradients.append(gradient)
            answers.append(right)
        value = torch.stack(losses).mean().to(x0.device)
        if differentiate:
            of_pixels = torch.stack(gradients) / len(gradients)
            value = _Known.apply(x0, value, self.decoder.pull_back(latents, of_pixels).to(x0))
        return value.float(), _metrics(asked, answers, x0.device)

    def scale(self, updates: int | None) -> float:
        """The factor of the logits after so many updates: from `scale_from` at the first judged one to 1 in `scale_steps`; None: 1."""
        if updates is None:
            return 1.0
        start, steps = self._config.scale_from, self._config.scale_steps
        updates = max(0, updates - self._first)
        return 1.0 if updates >= steps else start + (1 - start) * updates / steps

    def judge(
        self, picture: Tensor, source: Features, asked: Sequence[Question], *, scale: float = 1.0, differentiate: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of one sample: the mean loss of its questions, the gradient with respect to the picture, the right answers' probabilities.

        Args:
            picture: (3, H, W) in [0, 1].
            source: the source inside the model.
            asked: the questions.
            scale: of the logits in the loss; probabilities are of the logits as they are.
            differentiate: whether the gradient is taken; otherwise it is 0.
        """
        losses, right, gradient = [], [], torch.zeros_like(picture)
        for question in asked:
            leaf = picture.detach().requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                shown = {SOURCE: source, EDITED: self.vlm.features(leaf)}
                logits = self.vlm.logits(question, [shown[name] for name in question.pictures])
                loss = F.cross_entropy(scale * logits[None], _answer(question, logits.device))
            if differentiate:
                gradient += torch.autograd.grad(loss, leaf)[0] / len(asked)
            losses.append(loss.detach())
            right.append(logits.detach().softmax(0)[int(question.answer)])
        return torch.stack(losses).mean(), gradient, right

    @torch.no_grad()
    def source_features(self, picture: Tensor) -> Features:
        """A source (3, H, W) in [0, 1] inside the model, without a graph."""
        return self.vlm.features(picture)

    @torch.no_grad()
    def _sources_of(self, latents: Tensor) -> list[Features]:
        """Those of the sources (B, C, 1, h, w): seen once, for both questions and for later steps."""
        found = []
        for one in latents.detach().split(1):
            key = hashlib.sha256(one.cpu().float().contiguous().numpy().tobytes()).digest()
            features = self._sources.get(key)
            if features is None:
                features = self.source_features(self.decoder.pixels(one.to(self.vlm.device))[0])
                self._sources.put(key, features)
            found.append(features.to(self.vlm.device))
        return found


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0].to(gradient) * gradient, None, None


class _Kept:
    """Features of the sources that were seen last, in main memory."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[bytes, Features] = OrderedDict()

    def get(self, key: bytes) -> Features | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, features: Features) -> None:
        if self._most:
            self._kept[key] = features.to(torch.device("cpu"))
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _answer(question: Question, device: torch.device) -> Tensor:
    return torch.tensor([int(question.answer)], device=device)


def _metrics(asked: Sequence[Sequence[Question]], answers: Sequence[Sequence[Tensor]], device: torch.device) -> Metrics:
    """By question: the mean probability of the right answer, and the share in which it is the more probable one."""
    by_name: Mapping[str, list[Tensor]] = {question.name: [] for question in asked[0]}
    for its, right in zip(asked, answers, strict=True):
        for question, probability in zip(its, right, strict=True):
            by_name[question.name].append(probability)
    means = {name: torch.stack(values).float().to(device) for name, values in by_name.items()}
    return {f"vlm_{name}": values.mean() for name, values in means.items()} | {
        f"vlm_{name}_right": (values > 0.5).float().mean() for name, values in means.items()
    }
