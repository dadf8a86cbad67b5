"""Tuples from the layout that paired Kontext-style trainers read: targets, controls and instructions in files of one name.

    python -m byg_plugin.data.import_kontext --targets DIR --controls DIR --out tuples.jsonl

    targets/0001.png       the edited image         -> `target` (only the paired baseline looks at it)
    targets/0001.txt       the instruction          -> `instruction`
    controls/0001.jpg      the image before         -> `source`
    targets/0001.src.txt   a caption of the source  -> `src_caption`            these three are not part of that layout;
    targets/0001.tgt.txt   a caption of the edit    -> `tgt_caption`            training from unpaired data needs them
    targets/0001.rev.txt   the way back             -> `reverse_instruction`

Nothing is made up. Items that lack a text go to `<out stem>.incomplete.jsonl`, each with the missing fields in a list
`missing`, and the exit code is 1: write the texts into the files named above and run the command again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin import _cli
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import IMAGE_SUFFIXES, unwritable
from byg_plugin.documents import utf8
from byg_plugin.user_files import base_of, files_in, hidden_in, listed, name_below

SUFFIXES = {"instruction": ".txt", "src_caption": ".src.txt", "tgt_caption": ".tgt.txt", "reverse_instruction": ".rev.txt"}
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote."""

    complete: int
    incomplete: int
    out: Path
    incomplete_out: Path


def import_kontext(targets: Path, controls: Path, out: Path) -> Imported:
    """Write `out` and, where texts are missing, `<out stem>.incomplete.jsonl` beside it.

    Paths in both files are relative to the folder of `out` where the images lie below it, absolute otherwise. Both files
    are replaced; an incomplete one that is no longer needed is removed. Without a complete tuple `out` stays as it is.

    Raises:
        ValueError: a folder is missing or holds no image, images have no partner, or a text cannot be read; nothing is written.
    """
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name the JSONL file to write")
    incomplete_out = out.with_name(f"{out.stem}.incomplete.jsonl")
    problems: list[str] = []
    pairs = _pairs(_images(targets, "--targets", problems), _images(controls, "--controls", problems), controls, targets, problems)
    base = base_of(out)
    complete: list[Mapping[str, Any]] = []
    incomplete: list[Mapping[str, Any]] = []
    for target, control in pairs:
        texts = {role: _text(target.with_name(target.stem + SUFFIXES[role]), problems) for role in ROLES}
        record = {
            "source": name_below(control, base),
            **{role: text for role, text in texts.items() if text},
            "target": name_below(target, base),
        }
        problems += [f"{path}: {why}" for path in (control, target) if (why := unwritable(name_below(path, base)))]
        if missing := [role for role, text in texts.items() if not text]:
            incomplete.append({**record, "missing": missing})
        else:
            complete.append(record)
    if problems:
        raise ValueError(f"{len(problems)} problem(s), nothing was written:\n{listed(problems, _SHOWN)}")
    if complete:
        _write(out, complete)
    if incomplete:
        _write(incomplete_out, incomplete)
    else:
        _remove(incomplete_out)
    return Imported(complete=len(complete), incomplete=len(incomplete), out=out, incomplete_out=incomplete_out)


def _images(folder: Path, option: str, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    found: dict[str, Path] = {}
    for path in files_in(folder, IMAGE_SUFFIXES):
        if path.stem in found:
            problems.append(f"{option}: {found[path.stem].name} and {path.name} have one name; rename or remove one")
        found.setdefault(path.stem, path)
    if not found:
        searched = f"{', '.join(IMAGE_SUFFIXES)}; folders inside it are not searched{hidden_in(folder, IMAGE_SUFFIXES)}"
        raise ValueError(f"{option} {folder}: no image in it ({searched})")
    return found


def _pairs(
    targets: Mapping[str, Path], controls: Mapping[str, Path], controls_folder: Path, targets_folder: Path, problems: list[str]
) -> list[tuple[Path, Path]]:
    for here, other, folder in ((targets, controls, controls_folder), (controls, targets, targets_folder)):
        alone = [path for stem, path in here.items() if stem not in other]
        problems += [f"{path}: no image named {path.stem} in {folder}; add it or remove this one" for path in alone]
    return [(path, controls[stem]) for stem, path in targets.items() if stem in controls]


def _text(path: Path, problems: list[str]) -> str | None:
    """The file's text without blanks at its ends; None where there is no file or nothing in it."""
    if not path.is_file():
        return None
    try:
        return utf8(path.read_bytes()).strip() or None
    except (ValueError, OSError) as error:
        problems.append(f"{path}: {error}")
        return None


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL whole or not at all."""
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            partial.write_text("".join(lines), encoding="utf-8", newline="\n")
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be written: {error.strerror or error}; make room or choose another place") from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {path} is no longer true and cannot be removed: {error.strerror or error}; remove it") from error


def _said(done: Imported) -> str:
    if done.complete:
        return f"{done.complete} tuples in {done.out}"
    return f"no complete tuple, {done.out} is {'left as it was' if done.out.exists() else 'not written'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m byg_plugin.data.import_kontext",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--targets", required=True, type=_cli.given_path, metavar="DIR", help="edited images, with their texts beside them")
    parser.add_argument("--controls", required=True, type=_cli.given_path, metavar="DIR", help="images before the edit, of the same names")
    parser.add_argument("--out", required=True, type=_cli.given_path, metavar="FILE", help="JSONL to write")
    args = parser.parse_args(arguments)
    done = import_kontext(args.targets, args.controls, args.out)
    _cli.say(_said(done))
    if done.incomplete:
        names = ", ".join(f"NAME{SUFFIXES[role]} ({role})" for role in ROLES)
        _cli.say(
            f"{done.incomplete} items lack texts and are in {done.incomplete_out}, which names them in `missing`.\n"
            f"Write them beside the targets as {names}, and run this command again."
        )
        raise SystemExit(1)


if __name__ == "__main__":
    _cli.run(main)
