"""Check tuples files before anything is cached: what the trainer checks, and what only a look at every file tells.

    python dataset_tools/validate.py data/tuples.jsonl [more.jsonl ...] [--root IMAGES] [--strict]

Schema; files exist and decode whole; the rules of Appendix D.1; duplicates; equal captions or instructions; lengths
against the limits of the text encoders. Prints a table by reason with line numbers. Exit code 0: the trainer takes the
file; 1: it does not (with --strict also: there is a warning); 2: the command could not be carried out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import argparse
import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from byg_plugin import _cli
from byg_plugin.data import clips, media
from byg_plugin.data.rules import EDIT_TYPES, RULES, Finding
from byg_plugin.data.tuples import EditTuple, Inspected, inspect_tuples

from .token_limits import TooLong

_LINES = 12
_MOST_JOBS = 1000
_EXPLAIN = {
    "schema": "the line is no tuple: fields, types, JSON",
    "file": "a file is missing",
    "decode": "a file cannot be read",
    "duplicate": "the same tuple, or the same id, again",
    "same_edit": "the same instruction for the same source again",
    "same_image": "the same picture under two names",
    "edit_type": f"edit_type is none of {', '.join(EDIT_TYPES)}",
    "too_long_t5": "more tokens than T5 is given (conditioning.max_text_tokens): the rest is cut",
    "too_long_umt5": "more tokens than UMT5 is given (conditioning.max_text_tokens): the rest is cut",
    "too_long_clip": "more tokens than CLIP takes (77): its pooled vector does not see the rest",
    "split": "a source is on both sides of the split",
    **RULES,
}


@dataclass
class Report:
    """What was found in one or several files.

    Attributes:
        records: lines with a record or a finding.
        usable: tuples without a hard finding.
        by_reason: places and their messages by reason.
        hard: reasons with a hard finding.
        edit_types: usable tuples by type.
    """

    records: int = 0
    usable: int = 0
    by_reason: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    hard: set[str] = field(default_factory=set)
    edit_types: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def table(self, shown: int = _LINES) -> str:
        """Reasons with counts, places and one example each; hard ones first."""
        lines = [f"{self.records} records, {self.usable} usable tuples"]
        if self.edit_types:
            lines.append("edit types: " + ", ".join(f"{name} {count}" for name, count in self.edit_types.most_common()))
        for reason, found in sorted(self.by_reason.items(), key=lambda item: (item[0] not in self.hard, -len(item[1]))):
            kind = "error  " if reason in self.hard else "warning"
            named = ", ".join(dict.fromkeys(where for where, _ in found[:shown])) + (", ..." if len(found) > shown else "")
            lines += [
                f"{kind} {len(found):6d}  {reason:22s} {named}",
                f"          {_EXPLAIN.get(reason, '')}",
                f"          e.g. {found[0][1]}",
            ]
        return "\n".join([*lines, *self.notes])


def validate(
    paths: Sequence[Path], root: Path | None = None, *, decode: bool = True, thorough: bool = False, jobs: int = 4, max_tokens: int = 512
) -> Report:
    """Inspect every record of the files.

    Args:
        paths: JSONL files or folders, as dataset.tuples takes them.
        root: what relative paths start from; default: each file's folder.
        decode: decode every source and target whole (of clips the first frame and the length).
        thorough: decode every frame of clips too.
        jobs: threads that decode.
        max_tokens: conditioning.max_text_tokens.

    Raises:
        ValueError: a file is missing.
    """
    report, memory = Report(), _Memory()
    too_long = TooLong(max_tokens)
    report.notes += too_long.notes
    names = Counter(path.name for path in paths)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path}: no such file or folder")
            prefix = "" if len(paths) == 1 else f"{path} " if names[path.name] > 1 else f"{path.name} "
            work = _inspected(pool, path, root, decode, thorough, jobs)
            for seen, files in work:
                report.records += 1
                where = prefix + seen.where
                findings = [*seen.findings, *memory.across(where, seen.item, files)]
                if seen.item is not None:
                    findings += [Finding(reason="decode", message=problem) for problem in files.problems]
                    findings += _edit_type(seen.item.edit_type)
                    findings += too_long.findings(seen.item)
                for finding in findings:
                    report.by_reason[finding.reason].append((where, finding.message))
                    if finding.hard:
                        report.hard.add(finding.reason)
                if seen.item is not None and not any(finding.hard for finding in findings):
                    report.usable += 1
                    report.edit_types[seen.item.edit_type or "(none)"] += 1
    return report


@dataclass(frozen=True)
class _Files:
    digest: str | None = None
    problems: tuple[str, ...] = ()


def _inspected(
    pool: ThreadPoolExecutor, path: Path, root: Path | None, decode: bool, thorough: bool, jobs: int
) -> Iterator[tuple[Inspected, _Files]]:
    """Records in order with what decoding their files said; a few are decoded ahead."""
    ahead: deque[tuple[Inspected, Future[_Files]]] = deque()
    for seen in inspect_tuples(path, root):
        ahead.append((seen, pool.submit(_look, seen.item if decode else None, thorough)))
        if len(ahead) > 4 * jobs:
            first, future = ahead.popleft()
            yield first, future.result()
    for first, future in ahead:
        yield first, future.result()


def _look(item: EditTuple | None, thorough: bool) -> _Files:
    if item is None:
        return _Files()
    problems = []
    for path in (item.source, item.target):
        if path is None:
            continue
        try:
            if clips.is_clip(path):
                length = clips.clip_info(path).frames
                for _ in clips.read_clip(path, length) if thorough else ():
                    pass
            else:
                media.load_image(path)
        except ValueError as error:
            problems.append(str(error))
    digest = hashlib.sha256()
    try:
        with item.source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return _Files(None, (*problems, f"{item.source}: {error.strerror}"))
    return _Files(digest.hexdigest(), tuple(problems))


def _edit_type(name: str | None) -> Iterator[Finding]:
    if name is not None and name not in EDIT_TYPES:
        yield Finding(reason="edit_type", message=f"edit_type = {name!r}", hard=False)


class _Memory:
    """What one record can only be compared with if the others are remembered."""

    def __init__(self) -> None:
        self._edits: dict[tuple[str, str], str] = {}
        self._pictures: dict[str, str] = {}
        self._split: dict[str, bool] = {}

    def across(self, where: str, item: EditTuple | None, files: _Files) -> Iterator[Finding]:
        """Findings of this record beside the earlier ones, of all files."""
        if item is None:
            return
        source = str(item.source)
        first = self._edits.setdefault((source, item.instruction.casefold()), where)
        if first != where:
            yield Finding(reason="same_edit", message=f"{item.instruction!r} as in {first}", hard=False)
        held_out = item.split == "validation"
        if self._split.setdefault(source, held_out) != held_out:
            yield Finding(reason="split", message=f"{source} is in training and in validation")
        if files.digest and (other := self._pictures.setdefault(files.digest, source)) != source:
            yield Finding(reason="same_image", message=f"{source} has the contents of {other}", hard=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "tuples", nargs="+", type=_cli.given_path, metavar="FILE", help="JSONL files, or folders of images with same-stem .json"
    )
    parser.add_argument("--root", type=_cli.given_path, metavar="DIR", help="what relative paths start from (dataset.image_root)")
    parser.add_argument("--max-tokens", type=int, default=512, help="conditioning.max_text_tokens (default 512)")
    parser.add_argument("--no-decode", action="store_true", help="do not open images and clips")
    parser.add_argument("--thorough", action="store_true", help="decode every frame of clips")
    parser.add_argument("--jobs", type=int, default=4, help="threads that decode (default 4)")
    parser.add_argument("--lines", type=int, default=_LINES, help=f"places named a reason (default {_LINES})")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings too")
    args = parser.parse_args(arguments)
    if args.root is not None and not args.root.is_dir():
        raise ValueError(f"--root {args.root}: no such folder")
    for name in ("jobs", "lines", "max_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{_cli.option(name)} {getattr(args, name)}: at least 1")
    if args.jobs > _MOST_JOBS:
        raise ValueError(f"--jobs {args.jobs}: at most {_MOST_JOBS}; each is a thread")
    report = validate(args.tuples, args.root, decode=not args.no_decode, thorough=args.thorough, jobs=args.jobs, max_tokens=args.max_tokens)
    _cli.say(report.table(args.lines))
    if not report.records:
        raise ValueError(f"{args.tuples[0]}: no tuples in it")
    if report.hard or (args.strict and report.by_reason):
        raise SystemExit(1)


if __name__ == "__main__":
    _cli.run(main)
