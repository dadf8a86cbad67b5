"""`edits.jsonl`: what lies in a folder of edits, one line an edit. What judges edits reads this and not the command line.

A line stands there once its files are whole. Before a run writes its first file it takes out the lines of all files that it will
write anew, so that no line describes another run's file; those that an interrupted run has not reached stay out. Lines are ASCII
JSON; paths have forward slashes. The source's starts from the folder of the edits (on another drive of Windows it is absolute).
Keys of later versions are passed over.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from byg_plugin.documents import json_value, utf8
from byg_plugin.folders import write_text
from byg_plugin.lora.card import LoraCard

NAME = "edits.jsonl"
OF_TUPLE = ("src_caption", "tgt_caption", "reverse_instruction", "edit_type", "id")
"""Fields of `Edit` that a tuple has; None for an edit that was asked for without one."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit on disk.

    Attributes:
        source: what was edited, as it was given. The edit shows what `data.buckets.crop_to_bucket` keeps of it at `size`.
        edit: the edited image or clip.
        side_by_side: source and edit in a row.
        instruction: what was asked for.
        src_caption, tgt_caption, reverse_instruction, edit_type, id: see `OF_TUPLE`.
        seed: of the noise.
        size: (width, height) in pixels.
        frames: of a clip; None for an image.
        fps: frames a second of a clip.
        settings: of the sampler and the base: method, lora (file name), strength, steps, schedule, solver, guidance (embedding),
            cfg_high_noise, cfg_low_noise, negative (None: the published), base (name), dtype, quantization, version; None is what the
            family has not.
        card: of the LoRA; empty without one.
    """

    source: Path
    edit: Path
    side_by_side: Path
    instruction: str
    src_caption: str | None = None
    tgt_caption: str | None = None
    reverse_instruction: str | None = None
    edit_type: str | None = None
    id: str | None = None
    seed: int
    size: tuple[int, int]
    frames: int | None = None
    fps: float | None = None
    settings: Mapping[str, Any]
    card: LoraCard


# What a line must hold; None among the kinds: it may be missing.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("source", "edit", "side_by_side", "instruction"), str),
    **dict.fromkeys(OF_TUPLE, str | None),
    "seed": int,
    "size": list,
    "frames": int | None,
    "fps": float | int | None,
    "settings": dict,
    "card": dict,
}


def read_manifest(folder: str | Path) -> list[Edit]:
    """The edits that a folder's manifest tells of. Whether the files still lie there is not looked at.

    Raises:
        ValueError: there is no manifest, or a line is not one of ours; names file and line.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        raise ValueError(f"{folder / NAME}: no such file; byg_plugin/edit.py writes it beside its edits")
    return [edit for _, edit in _lines(folder)]


def take_out(folder: Path, names: Collection[str]) -> None:
    """Remove the lines of these files, edits or side-by-sides, before they are written anew.

    Afterwards there is a manifest, though it may be empty: it marks the files beside it as edits, also those of an interrupted run.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    path = folder / NAME
    if not path.exists():
        path.touch()
    lines = list(_lines(folder))
    kept = [line for line, edit in lines if edit.edit.name not in names and edit.side_by_side.name not in names]
    if len(kept) < len(lines) or (kept and not path.read_bytes().endswith(b"\n")):  # where nothing goes, another run may be adding
        write_text(path, "".join(f"{line}\n" for line in kept))


def append(folder: Path, edit: Edit) -> None:
    """Add an edit whose files are whole.

    Raises:
        OSError: the line cannot be written; then nothing of it is there.
    """
    line = _text(edit, folder).encode("ascii") + b"\n"
    with (folder / NAME).open("ab", buffering=0) as file:
        start = file.tell()
        if file.write(line) < len(line):  # the disk is full
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / NAME))


def same(one: Edit, other: Edit, folder: Path) -> bool:
    """Whether two edits have the same line in a folder's manifest."""
    return _text(one, folder) == _text(other, folder)


def _text(edit: Edit, folder: Path) -> str:
    paths = {"source": _relative(edit.source, folder), "edit": edit.edit.name, "side_by_side": edit.side_by_side.name}
    return json.dumps(asdict(edit) | paths | {"card": edit.card.to_metadata()})


def _relative(source: Path, folder: Path) -> str:
    # Links of folders are followed, or `..` would lead elsewhere; the file's own name stays as it was given.
    path = source.parent.resolve() / source.name
    try:
        return Path(os.path.relpath(path, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path.as_posix()


def _lines(folder: Path) -> Iterator[tuple[str, Edit]]:
    """(line as it is, edit) of each."""
    path = folder / NAME
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                text = utf8(line.strip())
                yield text, _edit(json_value(text, unique_keys=True), folder)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; no whole line of edit.py's: remove it, or move the file away") from error


def _edit(record: Any, folder: Path) -> Edit:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, not {type(record).__name__}")
    values = {name: record.get(name) for name in _KINDS}
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} = {str(values[name])[:80]!r} is damaged" if name in record else f"{name} is missing")
    size, card = values["size"], values["card"]
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"size = {str(size)[:80]} is not a width and a height")
    if not all(isinstance(value, str) for value in card.values()):
        raise ValueError("card has values that are no texts")
    source = Path(os.path.normpath(folder.resolve() / values["source"]))
    paths = {"source": source, "edit": folder / values["edit"], "side_by_side": folder / values["side_by_side"]}
    return Edit(**values | paths | {"size": tuple(size), "card": LoraCard.from_metadata(card)})
