"""What diffusers, ComfyUI and musubi-tuner would load of a LoRA file as it is, and whether edits then run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byg_plugin.families import SPECS
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats
from byg_plugin.lora.card import STOCHASTIC, LoraCard
from byg_plugin.lora.formats import FORMATS, Format, Lost
from byg_plugin.lora.layout import Layout, Module
from byg_plugin.lora.layouts import DEFAULT_FAMILY, layout_of


@dataclass(frozen=True)
class ToolReport:
    """What one tool would do with a file.

    Attributes:
        tool: `diffusers`, `comfyui` or `musubi`.
        loaded: names of the layers it would load, as they stand in the file.
        lost: what it would drop, or load with another strength.
        runtime: whether edits then run in the stock tool.
    """

    tool: Format
    loaded: tuple[str, ...]
    lost: tuple[Lost, ...]
    runtime: str


@dataclass(frozen=True)
class Report:
    """`check`'s answer.

    Attributes:
        format: as `formats.detect_format`; `mixed` for several.
        modules: number of layers the file adapts.
        strengths: (where alpha stands, alpha / rank, number of layers) of the layers.
        tools: one report for each tool asked about.
    """

    format: str
    modules: int
    strengths: tuple[tuple[str, float, int], ...]
    tools: tuple[ToolReport, ...]

    @property
    def loses(self) -> bool:
        return any(tool.lost for tool in self.tools)


def check(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tools: Iterable[Format] = FORMATS,
    *,
    outside: lora_files.OutsideAlpha | None = None,
) -> Report:
    """What each tool would load of these tensors as they are named, without converting.

    diffusers' own loader is asked. The rules of the others were observed on ComfyUI 0.3.64 and 0.29, musubi-tuner 0.3.4.

    Args:
        tensors: as stored.
        metadata: of the header.
        tools: to answer for.
        outside: alphas that no tensor tells; default: the header's.

    Raises:
        ValueError: the metadata's family is unknown, there is no LoRA of it in the tensors, a header is damaged, or
            diffusers is asked about and not installed.
    """
    card = LoraCard.from_metadata(metadata)
    name = formats.guess_family(tensors, metadata)
    layout = layout_of(name)
    outside = lora_files.header_alpha(tensors, metadata) if outside is None else outside
    modules, foreign = formats.parse(tensors, name)
    prefixes = {module.prefix for module in modules}
    found = formats.format_of(*prefixes) if len(prefixes) == 1 else "mixed"
    reports = []
    for tool in tools:
        reasons = [_TOOLS[tool](module, modules, layout) for module in modules]
        if tool == "diffusers":
            reasons = _asked_of_diffusers(modules, reasons, tensors, metadata, outside, layout)
        loaded, lost = [], list(foreign)
        for module, why in zip(modules, reasons, strict=True):
            if why is None and tool != "diffusers" and outside.alphas.get(module.name, module.rank) != module.rank:
                why = f"its alpha is in {outside.where} only, which {tool} ignores, so the strength would be wrong"
            if why is None:
                loaded.append(module.name)
            else:
                lost.append(Lost(module.name, why))
        reports.append(ToolReport(tool, tuple(loaded), tuple(lost), runtime(tool, card)))
    strengths = Counter(_strength(module, outside) for module in modules)
    counted = tuple((where, scale, count) for (where, scale), count in strengths.items())
    return Report(found, len(modules), counted, tuple(reports))


def _strength(module: Module, outside: lora_files.OutsideAlpha) -> tuple[str, float]:
    """(where its alpha stands, alpha / rank)."""
    if module.name in outside.alphas:
        return outside.where, outside.alphas[module.name] / module.rank
    return ("no alpha, which means the rank" if module.alpha is None else ".alpha"), module.scale


def _asked_of_diffusers(
    modules: Sequence[Module],
    known: Sequence[str | None],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    outside: lora_files.OutsideAlpha,
    layout: Layout,
) -> list[str | None]:
    """Of each module why diffusers would not load it as it was trained; where that is so, in the words of `known` if there are any."""
    from byg_plugin.lora import diffusers as lora_diffusers

    if lacking := lora_diffusers.missing():
        raise ValueError(f"what diffusers loads is asked of diffusers, and {lacking}; or name the other tools with --tools")
    shapes = {part: (1, 1) for linear in layout.linears() for part in linear.parts}
    for module in modules:
        shapes |= {part: (module.down.shape[1], rows) for part, rows in module.rows_of_parts().items()}
    try:
        applied = lora_diffusers.load(tensors, lora_files.header_config(metadata), shapes, layout.loader)
    except lora_diffusers.Refused as error:
        return [why or f"diffusers refuses the whole file: {error}" for why in known]
    rng = torch.Generator().manual_seed(0)
    answers: list[str | None] = []
    for module, why in zip(modules, known, strict=True):
        probe = torch.randn(module.down.shape[1], generator=rng)
        ours = _strength(module, outside)[1] * (module.up.float() @ (module.down.float() @ probe))
        if module.linear.swap and module.part is None:
            ours = formats.swap_halves(ours)
        rows = module.rows_of_parts()
        pieces = ours.split(list(rows.values()))
        found = (_difference(piece, applied.get(part), probe) for part, piece in zip(rows, pieces, strict=True))
        answer = next(filter(None, found), None)
        answers.append((why or answer) if answer else None)
    return answers


_ROUNDING = 0.02  # of a probe: a factor is multiplied into 16 bit matrices


def _difference(ours: Tensor, applied: tuple[Tensor, Tensor, float] | None, probe: Tensor) -> str | None:
    """How what diffusers applies to one layer differs from what the file means, seen on one input vector."""
    if applied is None:
        return "diffusers loads nothing of it, without an error" if ours.any() else None
    up, down, scaling = applied
    if (up.shape[0], down.shape[1]) != (len(ours), len(probe)):
        return f"diffusers would make it {down.shape[1]} -> {up.shape[0]}"
    theirs = scaling * (up.float() @ (down.float() @ probe))
    if (theirs - ours).norm() <= _ROUNDING * ours.norm():
        return None
    times = float(theirs @ ours / (ours @ ours).clamp_min(1e-30))
    if (theirs - times * ours).norm() <= _ROUNDING * theirs.norm():
        return f"diffusers would apply it at {times:.3g} times the strength it was trained at"
    return "diffusers would apply other values"


def _in_diffusers(module: Module, modules: Sequence[Module], layout: Layout) -> str | None:
    return layout.in_diffusers(module, modules)


def _in_comfyui(module: Module, modules: Sequence[Module], layout: Layout) -> str | None:
    if layout.parts_in_comfyui is not None and module.part is not None:
        return layout.parts_in_comfyui
    if module.prefix in ("", "base_model.model."):
        return "ComfyUI's key map has no such names (the bare ones only in releases of 2026)"
    if module.prefix == "lora_unet_" and layout.find_native(module.name.removeprefix("lora_unet_")) is None:
        return "ComfyUI has native names alone under this prefix: convert with --to comfyui"
    return None


def _in_musubi(module: Module, modules: Sequence[Module], layout: Layout) -> str | None:
    if module.prefix != "lora_unet_" or module.suffix != ".lora_down.weight":
        return "musubi-tuner reads lora_unet_….lora_down/lora_up only: convert with --to musubi"
    fused = module.part is None and len(module.linear.parts) > 1
    if fused and module.prefix in layout.part_prefixes:
        return "musubi-tuner has no fused layer here: convert with --to musubi"
    return formats.outside_network(module, "musubi", layout)


# Why a tool would not load a layer as it stands, by what is known of the tool.
_TOOLS: dict[Format, Callable[[Module, Sequence[Module], Layout], str | None]] = {
    "diffusers": _in_diffusers,
    "comfyui": _in_comfyui,
    "musubi": _in_musubi,
}


def _few_steps_runtime(tool: Format, card: LoraCard) -> str:
    if card.sampler != STOCHASTIC or card.steps is None:
        return f"unknown: byg.sampler is {card.sampler!r}, byg.steps {card.steps}; a later byg_plugin may know"
    if tool == "comfyui":
        return f"with the nodes of comfyui/, which make its {card.steps} steps: sampler lcm, cfg 1"
    if tool == "diffusers" and card.family in SPECS and not SPECS[card.family].solvers:
        return f"with byg_plugin.pipelines, which make its {card.steps} steps"
    return f"no: it edits in {card.steps} {card.sampler} steps, which byg_plugin's edit.py makes"


def runtime(tool: Format, card: LoraCard) -> str:
    """One sentence: whether a tool runs edits with this LoRA as it ships, by the position it was trained with."""
    if card.sampler is not None:
        return _few_steps_runtime(tool, card)
    if card.position is None:
        return "unknown: the file does not say how it was conditioned (no byg.position)"
    layout = layout_of(card.family if card.family in SPECS else DEFAULT_FAMILY)
    return layout.runtime.get((card.position, tool), f"unknown: byg.position is {card.position!r}")
