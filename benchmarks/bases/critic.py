"""Train the tiny world's critic: a Qwen3-VL of less than a million weights that answers `critics/questions.py` about rendered edits.

python -m benchmarks.bases.critic --out FOLDER --work FOLDER [--steps 4500] [--threads 2]

Every pair is rendered anew, so nothing is seen twice. A right answer needs the instruction: a pair whose edit is another one, or is
made and something else changed too, is among the wrong ones. Half of the pictures are shown as an editor in training makes them: noisy,
blurred, or with the change half way. Held out are clean scenes of another random stream; `figures.json` has the accuracy on them, by
question, edit type and answer. A killed run goes on from what is in --work.

One bit an answer is little to learn seeing from, so two linear heads, which are thrown away, ask for more: what each cell of the pictures
holds, and, where the answer stands, the colour of every shape in both and after the edit that is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.bases.common import rate_factor, save_tokenizer, word_tokenizer
from benchmarks.bases.resumable import Training, curve_log
from byg_plugin.config.critic import CriticConfig
from byg_plugin.critics import vlm
from byg_plugin.critics.probe import EDITS
from byg_plugin.critics.questions import EDITED, SOURCE, Question, kept, made
from byg_plugin.demo import world
from byg_plugin.training.muon import Muon

PATCH, MERGE, WIDTH = 8, 2, 128
CELL = PATCH * MERGE  # pixels of a side that a token of the language model stands for
SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image|>", "<|vision_end|>", "<|video|>", "<|unknown|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
)
TYPES = tuple(world.EDIT_TYPES)
WHOLE = 0.1  # share of the edits that are those of the whole picture, which the probe asks about
SPOILT = 0.5  # share of the pictures that are shown as a generator makes them: noisy
TARGET = 0.97


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about two pictures, uint8 (64, 64, 3)."""

    question: Question
    source: np.ndarray
    edited: np.ndarray
    kind: str
    scenes: tuple[world.Scene, world.Scene | None, world.Scene | None]
    """What the two pictures show, and what the edit should make; None: no scene of the world."""
    towards: tuple[world.Scene, float, float] | None = None
    """In training the edited picture may be blended with this scene, by a share of it between these: the answer stays right."""


def _other_edit(rng: np.random.Generator, edit: world.Edit) -> world.Scene:
    """The scene after another edit, which does not make this one too."""
    possible = [name for name in TYPES if len(edit.before.things) in world._OBJECTS_BEFORE.get(name, (1, 2))]
    while True:
        after, instruction, _ = world.EDIT_TYPES[world.pick(rng, possible)](rng, edit.before)
        # A circle that is replaced by a red square was turned into a square too.
        if instruction != edit.instruction and (edit.edit_type != "change_shape" or _shapes(after) != _shapes(edit.after)):
            return after


def _shapes(scene: world.Scene) -> list[str]:
    return sorted(thing.shape for thing in scene.things)


def _spoilt(rng: np.random.Generator, edit: world.Edit) -> world.Scene:
    """The scene after the edit with something changed that the instruction does not ask for."""
    after = edit.after
    ways = ["pebble", "scene"]
    bystanders = [thing for thing in edit.before.things if thing in after.things]
    colours = [after.background, *(thing.colour for thing in after.things)]
    if edit.edit_type != "recolour_background":
        ways += ["background", "background"]
    if bystanders:
        ways += ["colour", "gone"]
    way = world.pick(rng, ways)
    if way == "pebble":
        return replace(after, pebble=world.pick(rng, world.PEBBLES, [after.pebble]))
    if way == "scene":
        return world.sample_scene(rng, len(after.things))
    if way == "background":
        return replace(after, background=world.pick(rng, world.COLOURS, colours))
    others = tuple(thing for thing in after.things if thing != bystanders[0])
    if way == "gone":
        return replace(after, things=others)
    return replace(after, things=(*others, replace(bystanders[0], colour=world.pick(rng, world.COLOURS, colours))))


def asked(rng: np.random.Generator) -> Asked:
    """A random question; Yes and No are right as often."""
    if rng.random() < WHOLE:
        return _asked_of_the_whole(rng)
    edit = world.sample_edit(rng, "x", TYPES)
    right = rng.random() < 0.5
    if rng.random() < 0.5:
        question, shown, towards = made(edit.instruction, edit.edit_type), *_made_or_not(rng, edit, right)
    else:
        question, shown, towards = kept(edit.instruction, edit.edit_type), *_kept_or_not(rng, edit, right)
    return Asked(
        question=_answered(question, right),
        source=world.render(edit.before),
        edited=world.render(shown),
        kind=edit.edit_type,
        scenes=(edit.before, shown, edit.after),
        towards=towards,
    )


_Shown = tuple[world.Scene, tuple[world.Scene, float, float] | None]


def _made_or_not(rng: np.random.Generator, edit: world.Edit, right: bool) -> _Shown:
    """A scene in which the edit is made, or is not."""
    if right:
        return edit.after, (edit.before, 0.0, 0.15)
    # Another edit may have taken away what was to be removed, too.
    if edit.edit_type == "remove" or rng.random() < 0.5:
        return edit.before, (edit.after, 0.0, 0.35)
    return _other_edit(rng, edit), None


def _kept_or_not(rng: np.random.Generator, edit: world.Edit, right: bool) -> _Shown:
    """A scene in which the rest is preserved, whether the edit is made or not, or is not preserved."""
    if right:
        scenes = (edit.after, edit.before) if rng.random() < 0.7 else (edit.before, edit.after)
        return scenes[0], (scenes[1], 0.0, 0.5)
    return _spoilt(rng, edit), (edit.after, 0.0, 0.35)


def _asked_of_the_whole(rng: np.random.Generator) -> Asked:
    scene, other = (world.sample_scene(rng, int(rng.integers(1, 3))) for _ in range(2))
    before = world.render(scene)
    instruction, change = EDITS[int(rng.integers(len(EDITS)))]
    right = rng.random() < 0.5
    if rng.random() < 0.5:
        changed = change(_tensor(before)).permute(1, 2, 0).mul(255).round().byte().numpy()
        question, edited, shown = made(instruction), changed if right else before, None if right else scene
    else:
        shown = scene if right else other
        question, edited = kept(instruction), world.render(shown)
    return Asked(question=_answered(question, right), source=before, edited=edited, kind="whole", scenes=(scene, shown, None))


def _answered(question: Question, right: bool) -> Question:
    """The question whose right answer is its own if the edit is as it should be."""
    return question if right else replace(question, answer=not question.answer)


# --- the model ---


def _words() -> list[str]:
    """Every piece of every question about the world."""
    split = pre_tokenizers.Whitespace()
    rng = np.random.default_rng(0)
    texts = ["user assistant Yes No", *world.vocabulary()]
    for instruction in [edit for edit, _ in EDITS] + [world.sample_edit(rng, "x", TYPES).instruction for _ in range(200)]:
        texts += [ask(instruction, kind).text for ask in (made, kept) for kind in (None, "remove")]
    return sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})


def write_untrained(folder: Path, seed: int) -> None:
    """Model, processor, tokenizer and template."""
    torch.manual_seed(seed)
    words = _words()
    tokenizer = word_tokenizer(list(SPECIALS), "<|unknown|>", "$A", words, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS[1:7])})
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=1, merge_size=MERGE, size={"shortest_edge": 4096, "longest_edge": 4096}
    ).save_pretrained(folder)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 1000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": MERGE,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=SPECIALS.index("<|image|>"),
        video_token_id=SPECIALS.index("<|video|>"),
        vision_start_token_id=SPECIALS.index("<|vision_start|>"),
        vision_end_token_id=SPECIALS.index("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the model is called with, and what is right.

    Attributes:
        inputs: of the model.
        answers: (B, 2) ids of No and Yes.
        labels: (B,) 1 where Yes is right.
    """

    inputs: dict[str, Tensor]
    answers: Tensor
    labels: Tensor


class Batches:
    """Questions as the model takes them, all at once: what `Vlm` does one by one."""

    def __init__(self, described: vlm.Described):
        self._view, self._dialogue, self._config = described.view, described.dialogue, described.config
        self._prompts: dict[tuple[str, int], Any] = {}

    def __call__(self, several: Sequence[Asked], rng: torch.Generator | None) -> Batch:
        """With `rng`, pictures are spoilt."""
        patches, grids, prompts = [], [], []
        for one in several:
            shown = {SOURCE: _tensor(one.source), EDITED: _tensor(one.edited)}
            if rng is not None:
                shown = _as_an_editor_makes_it(one, shown, rng)
            for name in one.question.pictures:
                seen = self._view.see(shown[name])
                patches.append(seen.inputs["pixel_values"])
                grids.append(seen.grid)
            prompts.append(self._prompt(one.question, seen.tokens))
        length = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), length), SPECIALS.index("<|pad|>"))
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left: the answer is at the end
            ids[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, length - len(prompt.ids) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}
        inputs["mm_token_type_ids"] = (ids == self._config.image_token_id).int()
        answers = torch.tensor([[prompt.no, prompt.yes] for prompt in prompts])
        return Batch(inputs=inputs, answers=answers, labels=torch.tensor([int(one.question.answer) for one in several]))

    def _prompt(self, question: Question, tokens: int) -> Any:
        key = (question.text, len(question.pictures))
        if key not in self._prompts:
            self._prompts[key] = self._dialogue.prompt(question, [tokens] * len(question.pictures))
        return self._prompts[key]


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def _as_an_editor_makes_it(one: Asked, shown: dict[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """The edited picture with its change half way, both blurred or noisy: each by chance."""
    chance = torch.rand(6, generator=rng).tolist()
    if one.towards is not None and chance[0] < SPOILT:
        scene, least, most = one.towards
        share = least + (most - least) * chance[1]
        shown = {**shown, EDITED: torch.lerp(shown[EDITED], _tensor(world.render(scene)), share)}
    if chance[2] < SPOILT / 2:  # both alike: sharpness is no edit
        small = {name: F.avg_pool2d(picture[None], 2) for name, picture in shown.items()}
        shown = {
            name: torch.lerp(picture, F.interpolate(small[name], scale_factor=2, mode="bilinear")[0], chance[3])
            for name, picture in shown.items()
        }
    if chance[4] < SPOILT:
        noise = torch.randn(shown[EDITED].shape, generator=rng)
        shown = {**shown, EDITED: (shown[EDITED] + 0.08 * chance[5] * noise).clamp(0, 1)}
    return shown


# --- what the heads ask for besides ---

NOTHING = len(world.LABELS)
"""The colour of a shape that is not there."""
UNKNOWN = -100  # what a cross-entropy leaves out
ENTITIES = 2 + len(world.SHAPES)


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """What is to be seen in the pictures of a batch.

    Attributes:
        cells: (N, 11) shares of each cell of every picture that is shown: eight colours, and three shapes; NaN where it is no scene.
        colours: (B, 3, 5) colour in the source, in the edited picture and after the edit of the background, pebble, circle, square and
            triangle; UNKNOWN where the picture is not shown or is no scene, and of the edit where the source is not shown.
    """

    cells: Tensor
    colours: Tensor


def seeing(several: Sequence[Asked]) -> Seeing:
    """The truth about a batch."""
    cells, colours = [], []
    for one in several:
        source, edited, wanted = one.scenes
        scenes, both = {SOURCE: source, EDITED: edited}, SOURCE in one.question.pictures
        cells += [_cells(scenes[name]) for name in one.question.pictures]
        colours.append([_colours(scene) for scene in (source if both else None, edited, wanted if both else None)])
    return Seeing(cells=torch.tensor(np.concatenate(cells), dtype=torch.float32), colours=torch.tensor(colours))


def _cells(scene: world.Scene | None) -> np.ndarray:
    side, kinds = world.SIZE // CELL, len(world.LABELS) + len(world.SHAPES)
    if scene is None:
        return np.full((side * side, kinds), np.nan)
    labels, where = world.true_labels(scene), world.regions(scene)
    masks = [labels == index for index in range(len(world.LABELS))]
    for shape in world.SHAPES:
        numbers = [world.FIRST_OBJECT + i for i, thing in enumerate(scene.things) if thing.shape == shape]
        masks.append(np.isin(where, numbers))
    shares = np.stack(masks).reshape(kinds, side, CELL, side, CELL).mean((2, 4))
    return shares.reshape(kinds, side * side).T


def _colours(scene: world.Scene | None) -> list[int]:
    if scene is None:
        return [UNKNOWN] * ENTITIES
    of = {thing.shape: world.LABELS.index(thing.colour) for thing in scene.things}
    return [
        *(world.LABELS.index(colour) for colour in (scene.background, scene.pebble)),
        *(of.get(shape, NOTHING) for shape in world.SHAPES),
    ]


class Heads(nn.Module):
    """Linear readings of the language model's states: `cells` at the pictures' tokens, `colours` where the answer stands."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Linear(WIDTH, len(world.LABELS) + len(world.SHAPES))
        self.colours = nn.Linear(WIDTH, 3 * ENTITIES * (NOTHING + 1))

    def loss(self, at_pictures: Tensor, at_answer: Tensor, seen: Seeing) -> Tensor:
        """Of both, about as large as the answer's.

        Args:
            at_pictures: (N, width) states half way up, of the pictures' tokens in order.
            at_answer: (B, width) last states.
            seen: what is right.
        """
        known = ~seen.cells.isnan().any(1)
        cells = F.binary_cross_entropy_with_logits(self.cells(at_pictures[known]), seen.cells[known])
        colours = F.cross_entropy(self.colours(at_answer).view(-1, NOTHING + 1), seen.colours.view(-1))
        return cells + 0.5 * colours


def _logits(model: Any, batch: Batch) -> Tensor:
    """(B, 2): of No and Yes."""
    return model(**batch.inputs, logits_to_keep=1, use_cache=False).logits[:, -1].gather(1, batch.answers)


def _losses(model: Any, heads: Heads, batch: Batch, seen: Seeing) -> tuple[Tensor, Tensor]:
    """Of the answers, and of the heads."""
    out = model(**batch.inputs, logits_to_keep=1, use_cache=False, output_hidden_states=True)
    states, pictures = out.hidden_states, batch.inputs["mm_token_type_ids"].bool()
    answer = F.cross_entropy(out.logits[:, -1].gather(1, batch.answers), batch.labels)
    return answer, heads.loss(states[len(states) // 2][pictures], states[-1][:, -1], seen)


@torch.no_grad()
def accuracy(model: Any, batches: Batches, count: int, batch: int) -> dict[str, float]:
    """Share of right answers about held-out scenes: of all, and by question, edit type and right answer."""
    rng = np.random.default_rng([7, *b"held out"])
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(math.ceil(count / batch)):
        several = [asked(rng) for _ in range(batch)]
        shown = batches(several, None)
        for one, yes in zip(several, (_logits(model, shown).argmax(1) == shown.labels).tolist(), strict=True):
            answer = "yes" if one.question.answer else "no"
            for name in ("accuracy", f"accuracy_{one.question.name}", f"accuracy_{one.kind}", f"accuracy_{answer}"):
                right[name].append(yes)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def train(
    out: Path, work: Path, *, seed: int, steps: int, batch: int, rate: float, held_out: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train in `out`; yields what is measured on the way."""
    if not (out / "config.json").is_file():
        write_untrained(out, seed)
    config = CriticConfig(path=str(out), dtype="float32", device="cpu", image_size=world.SIZE, gradient_checkpointing=False)
    described = vlm.describe(config)
    model = Qwen3VLForConditionalGeneration.from_pretrained(out, use_safetensors=True).train()
    batches, heads = Batches(described), Heads()
    both = nn.ModuleDict({"critic": model, "heads": heads})
    optimizers = _optimizers(both, rate)
    settings = {"seed": seed, "steps": steps, "batch": batch, "rate": rate}
    state = Training(work / "critic.safetensors", settings, minutes=3)
    done, losses = state.load(both, optimizers, None), []
    for step in range(done, steps):
        several = [asked(np.random.default_rng([seed, step, index])) for index in range(batch)]
        shown = batches(several, torch.Generator().manual_seed(seed * 10**9 + step))
        loss, besides = _losses(model, heads, shown, seeing(several))
        both.zero_grad()
        (loss + besides).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(step, steps, 100)
            optimizer.step()
        losses.append([loss.item(), besides.item()])
        last = step + 1 == steps
        if (step + 1) % 100 == 0 or last:
            found = accuracy(model.eval(), batches, held_out if last else 256, batch)
            means = dict(zip(("loss", "heads"), np.mean(losses[-100:], 0).tolist(), strict=True))
            yield step + 1, {**means, **found, "cpu_seconds": state.cpu_seconds()}
            model.train()
        state.save(step + 1, both, optimizers, None, now=last)
        if last:
            model.save_pretrained(out)


def _optimizers(both: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for what is looked up, norms and heads."""
    inside = [(".layers." in name or ".blocks." in name) and p.ndim == 2 for name, p in both.named_parameters()]
    parameters = list(both.parameters())
    return [
        Muon([p for p, muon in zip(parameters, inside, strict=True) if muon], lr=rate, weight_decay=0.01),
        torch.optim.AdamW(
            [p for p, muon in zip(parameters, inside, strict=True) if not muon], lr=rate, betas=(0.9, 0.98), weight_decay=0.01
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.bases.critic", description="Train the tiny world's critic.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the critic to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the curve, and for what a killed run goes on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=32, help="questions a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--held-out", type=int, default=2048, help="questions of the last figures")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    log = curve_log(args.work / "curve.jsonl")
    found: dict[str, float] = {}
    settings = {name: getattr(args, name) for name in ("seed", "steps", "batch", "rate", "held_out")}
    for step, found in train(args.out, args.work, **settings):
        log("critic", step, found)
    figures = {**found, "target": TARGET, **settings}
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
