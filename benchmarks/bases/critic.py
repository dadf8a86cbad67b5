"""Train the tiny world's critic: a Qwen3-VL of half a million weights that answers `critics/questions.py` about rendered edits.

python -m benchmarks.bases.critic --out FOLDER --work FOLDER [--steps 20000] [--threads 2]

Every pair is rendered anew, so nothing is seen twice. A right answer needs the instruction: a pair whose edit is another one, or is
made and something else changed too, is among the wrong ones. Held out are scenes of another random stream; `figures.json` has the
accuracy on them, by question, edit type and answer. A killed run goes on from what is in --work.
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
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.bases.common import save_tokenizer, word_tokenizer
from benchmarks.bases.resumable import Training, curve_log
from byg_plugin.config.critic import CriticConfig
from byg_plugin.critics import vlm
from byg_plugin.critics.probe import EDITS
from byg_plugin.critics.questions import EDITED, SOURCE, Question, kept, made
from byg_plugin.demo import world

PATCH, MERGE = 8, 2
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
    before, after = world.render(edit.before), world.render(edit.after)
    is_made, is_kept = made(edit.instruction, edit.edit_type), kept(edit.instruction, edit.edit_type)
    right = rng.random() < 0.5
    if rng.random() < 0.5:  # is it made?
        if right:
            shown = after
        else:
            shown = before if rng.random() < 0.5 else world.render(_other_edit(rng, edit))
            if edit.edit_type == "remove":
                shown = before  # another edit may have taken it away too
        return Asked(question=_answered(is_made, right), source=before, edited=shown, kind=edit.edit_type)
    unspoilt = after if rng.random() < 0.7 else before
    shown = unspoilt if right else world.render(_spoilt(rng, edit))
    return Asked(question=_answered(is_kept, right), source=before, edited=shown, kind=edit.edit_type)


def _asked_of_the_whole(rng: np.random.Generator) -> Asked:
    before = world.render(world.sample_scene(rng, int(rng.integers(1, 3))))
    instruction, change = EDITS[int(rng.integers(len(EDITS)))]
    changed = change(torch.from_numpy(before).permute(2, 0, 1) / 255).permute(1, 2, 0).mul(255).round().byte().numpy()
    right = rng.random() < 0.5
    if rng.random() < 0.5:
        return Asked(question=_answered(made(instruction), right), source=before, edited=changed if right else before, kind="whole")
    other = world.render(world.sample_scene(rng, int(rng.integers(1, 3))))
    return Asked(question=_answered(kept(instruction), right), source=before, edited=before if right else other, kind="whole")


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
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
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
            "out_hidden_size": 96,
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


class Batches:
    """Questions as the model takes them, all at once: what `Vlm` does one by one."""

    def __init__(self, described: vlm.Described):
        self._view, self._dialogue, self._config = described.view, described.dialogue, described.config
        self._prompts: dict[tuple[str, int], Any] = {}

    def __call__(self, several: Sequence[Asked], rng: torch.Generator | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(inputs, (B, 2) ids of No and Yes, (B,) right answers); with `rng`, pictures are spoilt."""
        patches, grids, prompts = [], [], []
        for one in several:
            shown = {SOURCE: one.source, EDITED: one.edited}
            for name in one.question.pictures:
                picture = torch.from_numpy(shown[name]).permute(2, 0, 1).float() / 255
                if rng is not None and torch.rand((), generator=rng) < SPOILT:
                    picture = (picture + 0.06 * torch.rand((), generator=rng) * torch.randn(picture.shape, generator=rng)).clamp(0, 1)
                seen = self._view.see(picture)
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
        return inputs, answers, torch.tensor([int(one.question.answer) for one in several])

    def _prompt(self, question: Question, tokens: int) -> Any:
        key = (question.text, len(question.pictures))
        if key not in self._prompts:
            self._prompts[key] = self._dialogue.prompt(question, [tokens] * len(question.pictures))
        return self._prompts[key]


def _logits(model: Any, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].gather(1, answers)


@torch.no_grad()
def accuracy(model: Any, batches: Batches, count: int, batch: int) -> dict[str, float]:
    """Share of right answers about held-out scenes: of all, and by question, edit type and right answer."""
    rng = np.random.default_rng([7, *b"held out"])
    right: dict[str, list[bool]] = defaultdict(list)
    for _ in range(math.ceil(count / batch)):
        several = [asked(rng) for _ in range(batch)]
        inputs, answers, labels = batches(several, None)
        for one, yes in zip(several, (_logits(model, inputs, answers).argmax(1) == labels).tolist(), strict=True):
            answer = "yes" if one.question.answer else "no"
            for name in ("accuracy", f"accuracy_{one.question.name}", f"accuracy_{one.kind}", f"accuracy_{answer}"):
                right[name].append(yes)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def _rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def train(
    out: Path, work: Path, *, seed: int, steps: int, batch: int, rate: float, held_out: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train in `out`; yields what is measured on the way."""
    if not (out / "config.json").is_file():
        write_untrained(out, seed)
    config = CriticConfig(path=str(out), dtype="float32", device="cpu", image_size=world.SIZE, gradient_checkpointing=False)
    described = vlm.describe(config)
    model = Qwen3VLForConditionalGeneration.from_pretrained(out, use_safetensors=True).train()
    batches = Batches(described)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    settings = {"seed": seed, "steps": steps, "batch": batch, "rate": rate}
    state = Training(work / "critic.safetensors", settings, minutes=3)
    done, losses = state.load(model, [optimizer], None), []
    for step in range(done, steps):
        several = [asked(np.random.default_rng([seed, step, index])) for index in range(batch)]
        inputs, answers, labels = batches(several, torch.Generator().manual_seed(seed * 10**9 + step))
        loss = F.cross_entropy(_logits(model, inputs, answers), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        optimizer.step()
        losses.append(loss.item())
        last = step + 1 == steps
        if (step + 1) % 100 == 0 or last:
            found = accuracy(model.eval(), batches, held_out if last else 256, batch)
            yield step + 1, {"loss": sum(losses[-100:]) / len(losses[-100:]), **found, "cpu_seconds": state.cpu_seconds()}
            model.train()
        state.save(step + 1, model, [optimizer], None, now=last)
        if last:
            model.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.bases.critic", description="Train the tiny world's critic.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the critic to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the curve, and for what a killed run goes on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64, help="questions a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
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
