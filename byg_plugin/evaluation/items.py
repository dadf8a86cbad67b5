"""What is judged: edits with their sources, texts and, where they exist, ground truths and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from byg_plugin.data.clips import is_clip
from byg_plugin.data.tuples import IMAGE_SUFFIXES, MEDIA_SUFFIXES, read_tuples_file
from byg_plugin.editing.manifest import NAME, read_manifest
from byg_plugin.user_files import files_in, hidden_in, listed

_SHOWN = 20
_SIDE_BY_SIDE = "_side_by_side"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One edit to judge.

    Attributes:
        id: names it in files of scores; of two runs on the same tuples it is the same.
        source: what was edited.
        edit: the result.
        instruction, src_caption, tgt_caption, edit_type: as of a tuple; None where it is not known.
        reference: the exact edit, where there is one.
        mask: an image of the source's frame or the edit's, where there is one; what is lighter than mid-grey may change.
        size: (width, height) of the edit as its manifest says it; None: as its file says.
    """

    id: str
    source: Path
    edit: Path
    instruction: str | None = None
    src_caption: str | None = None
    tgt_caption: str | None = None
    edit_type: str | None = None
    reference: Path | None = None
    mask: Path | None = None
    size: tuple[int, int] | None = None


WAYS = ("edits", "tuples", "sources", "results")
"""Options by which a command line names what is judged."""


def items_of(given: Mapping[str, Path | None]) -> list[Item]:
    """What a command line asks to judge.

    Args:
        given: by option, `WAYS` and "references" and "masks"; others are passed over.

    Raises:
        ValueError: nothing, too much, or something missing.
    """
    ways: dict[tuple[str, ...], Callable[..., list[Item]]] = {
        ("edits",): from_manifest,
        ("edits", "tuples"): from_manifest,
        ("tuples", "results"): from_tuples,
        ("sources", "results"): from_folders,
    }
    paths = {name: path for name in WAYS if (path := given.get(name)) is not None}
    if tuple(paths) not in ways:
        raise ValueError("give --edits DIR, or --tuples FILE --results DIR, or --sources DIR --results DIR")
    items = ways[tuple(paths)](*paths.values())
    for option, role in (("references", "reference"), ("masks", "mask")):
        if (folder := given.get(option)) is not None:
            items = with_files(items, folder, role)
    return items


def from_manifest(path: Path, tuples: Path | None = None) -> list[Item]:
    """The edits of a folder that edit.py has written, or of its `edits.jsonl`; targets of `tuples` are references, by id.

    Raises:
        ValueError: there is no manifest, it is empty or damaged, or the tuples are none, or have no target of an edit here.
    """
    folder = path.parent if path.name == NAME else path
    edits = read_manifest(folder)
    if not edits:
        raise ValueError(f"{folder / NAME}: no edits in it; make some with byg_plugin/edit.py")
    targets = {} if tuples is None else _targets(tuples, [edit.id or edit.edit.stem for edit in edits])
    names = [edit.id or edit.edit.stem for edit in edits]
    if len({*names}) < len(names):  # a tuple edited with several seeds
        names = [edit.edit.stem for edit in edits]
    return _unique(
        Item(
            id=name,
            source=edit.source,
            edit=edit.edit,
            instruction=edit.instruction,
            src_caption=edit.src_caption,
            tgt_caption=edit.tgt_caption,
            edit_type=edit.edit_type,
            reference=targets.get(edit.id or ""),
            size=edit.size,
        )
        for name, edit in zip(names, edits, strict=True)
    )


def _targets(tuples: Path, edited: Sequence[str]) -> dict[str, Path]:
    """By id, at least one of them of an edit; `edited` are the edits' ids."""
    targets = {one.id: one.target for one in read_tuples_file(tuples, rules="warn") if one.target is not None}
    if not targets:
        raise ValueError(f"--tuples {tuples}: no tuple in it has a target, and beside --edits it is read for these alone: leave it out")
    if not targets.keys() & {*edited}:
        ids = f"their ids are such as {next(iter(targets))}, the edits' such as {edited[0]}"
        raise ValueError(
            f"--tuples {tuples}: none of its targets is of one of these edits ({ids}): give the tuples that were edited, or leave it out"
        )
    return targets


def from_tuples(tuples: Path, results: Path) -> list[Item]:
    """The tuples of a file whose edits lie in a folder, each named by the tuple's id or as edit.py names it; targets are references.

    Raises:
        ValueError: tuples without an edit (the first 20 by name), or the tuples are none.
    """
    by_stem = _by_stem(results, "--results")
    items, missing = [], []
    for index, one in enumerate(read_tuples_file(tuples, rules="warn")):
        found = next((by_stem[name] for name in (one.id, f"{index:05d}_{one.source.stem}") if name in by_stem), None)
        if found is None:
            missing.append(one.id)
            continue
        texts = {name: getattr(one, name) for name in ("instruction", "src_caption", "tgt_caption", "edit_type")}
        items.append(Item(id=one.id, source=one.source, edit=found, reference=one.target, **texts))
    if missing:
        raise ValueError(f"--results {results}: {len(missing)} tuple(s) of {tuples} have no edit named by their id: {_listed(missing)}")
    return items


def from_folders(sources: Path, results: Path) -> list[Item]:
    """Sources and edits of the same stem in two folders; of texts nothing is known.

    Raises:
        ValueError: a folder is not there or has none, or an edit has no source (the first 20 by name).
    """
    known, edits = _by_stem(sources, "--sources"), _by_stem(results, "--results")
    if missing := [stem for stem in edits if stem not in known]:
        raise ValueError(f"--sources {sources}: {len(missing)} edit(s) of {results} have no source of their name: {_listed(missing)}")
    return [Item(id=stem, source=known[stem], edit=edit) for stem, edit in edits.items()]


def with_files(items: Sequence[Item], folder: Path, role: str) -> list[Item]:
    """Items with the references (`role` = "reference") or masks ("mask") of a folder, named by the item's id or the edit's stem.

    Raises:
        ValueError: the folder is not there, or has none of any item.
    """
    found = _by_stem(folder, f"--{role}s", IMAGE_SUFFIXES if role == "mask" else MEDIA_SUFFIXES)
    files = [found.get(item.id) or found.get(item.edit.stem) for item in items]
    if not any(files):
        raise ValueError(f"--{role}s {folder}: no file in it is named by an item's id (such as {items[0].id}) or its edit's name")
    return [item if file is None else replace(item, **{role: file}) for item, file in zip(items, files, strict=True)]


def missing_files(items: Iterable[Item]) -> list[str]:
    """Problems: files that items name and that are gone."""
    return [
        f"{item.id}: {role}: no such file {path}"
        for item in items
        for role in ("source", "edit", "reference", "mask")
        if (path := getattr(item, role)) is not None and not path.is_file()
    ]


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise where there are problems, the first 20 in words.

    Raises:
        ValueError: there is one.
    """
    if problems:
        raise ValueError(f"{what}: {len(problems)} problem(s), nothing was scored:\n{listed(problems, _SHOWN)}")


def _unique(items: Iterable[Item]) -> list[Item]:
    every = list(items)
    twice = [name for name, count in Counter(item.id for item in every).items() if count > 1]
    refuse([f"{name}: two edits have this name, an image and a clip; rename one" for name in twice], "the edits")
    return every


def _by_stem(folder: Path, option: str, suffixes: Sequence[str] = MEDIA_SUFFIXES) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{option} {folder}: no such folder")
    files = [path for path in files_in(folder, suffixes) if not path.stem.endswith(_SIDE_BY_SIDE)]
    if not files:
        raise ValueError(f"{option} {folder}: no image or clip in it{hidden_in(folder, suffixes)}")
    twice = [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]
    if twice:
        raise ValueError(f"{option} {folder}: several files are named {_listed(twice)}; keep one of each name")
    return {path.stem: path for path in files}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def kind(path: Path) -> str:
    """image or clip, by its name."""
    return "clip" if is_clip(path) else "image"
