"""Images, captions and rows from folders and tables, one after another: nothing is held whole."""

from __future__ import annotations

import csv
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin.config.extras import require
from byg_plugin.data.tuples import IMAGE_SUFFIXES, is_file, is_unicode, path_words, unwritable
from byg_plugin.documents import json_value, other_encoding, utf8
from byg_plugin.journal import numbered_records
from byg_plugin.user_files import is_hidden, name_below

HIDDEN = "hidden"  # counted beside suffixes
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """One image to make a tuple of.

    Attributes:
        source: as it will stand in the tuple; also the input's name.
        path: of the file.
        caption: what somebody said of it.
        style: what metadata says of how it is made.
        problem: why it cannot be used.
    """

    source: str
    path: Path
    caption: str | None = None
    style: str | None = None
    problem: str | None = None


def is_table(path: Path) -> bool:
    """Whether a place is read as a table, by its name."""
    return path.suffix.lower() in TABLES


def source_name(path: Path, base: Path) -> str:
    """A path as tuples in the folder `base` name it: relative below it, absolute otherwise."""
    return name_below(path, base).encode(errors="backslashreplace").decode()


def name_now(name: str, base: Path) -> str:
    """What `source_name` calls a recorded source: versions before this one named those below an `out` with `..` in full."""
    return source_name(Path(name), base) if os.path.isabs(name) else name


def folder_images(folder: Path, base: Path, style: str | None, others: Counter[str]) -> Iterator[ImageInput]:
    """All images below a folder; a .txt of the same name is the caption, a .json there may hold `caption` and `style`.

    Other files are counted in `others` by suffix.
    """
    for path in files_below(folder, IMAGE_SUFFIXES, others):
        caption, said = None, {}
        problem = unwritable(name_below(path, base))
        try:
            if (beside := path.with_suffix(".txt")).is_file():
                caption = utf8(beside.read_bytes()).strip() or None
            if (beside := path.with_suffix(".json")).is_file():
                value = json_value(utf8(beside.read_bytes()))
                said = value if isinstance(value, dict) else {}
        except (ValueError, OSError) as error:
            problem = problem or f"{beside.name} beside it cannot be read: {error}"
        texts = {"caption": _text(said.get("caption")) or caption, "style": _text(said.get("style")) or style}
        yield ImageInput(source=source_name(path, base), path=path, **texts, problem=problem or _broken(texts))


def files_below(folder: Path, suffixes: Sequence[str], others: Counter[str]) -> Iterator[Path]:
    """Files with these suffixes, in the file system's order: a folder of millions is not held; hidden ones are passed over.

    Files with other suffixes are counted in `others`, and as `HIDDEN` hidden ones with these.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                if entry.name.lower().endswith(tuple(suffixes)):
                    others[HIDDEN] += 1
                continue
            if os.path.isdir(entry.path):
                # A link to a folder that it lies in would be followed forever.
                if not (entry.is_symlink() and folder.resolve().is_relative_to(os.path.realpath(entry.path))):
                    yield from files_below(folder / entry.name, suffixes, others)
            elif (suffix := Path(entry.name).suffix.lower()) in suffixes:
                yield folder / entry.name
            else:
                others[suffix] += 1


def passed_over(others: Mapping[str, int]) -> str:
    """Files that were not read for what their names say, in words; empty if there are none but captions."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()) if suffix not in (".txt", ".json"))


def table_images(
    path: Path, base: Path, *, root: Path | None, image: str, caption: str, style: str, default_style: str | None = None
) -> Iterator[ImageInput]:
    """The images of a table's rows.

    Raises:
        ValueError: no such column, or the table cannot be read.
    """
    root = root or path.parent
    first = True
    for number, row in table_rows(path):
        columns = _columns(row)
        if first and _folded(image) not in columns:
            raise ValueError(f"{path}: no column {image!r} (--image-column); it has {', '.join(row)}")
        first = False
        name = _text(columns.get(_folded(image)))
        if name is None:
            yield ImageInput(source=f"{path.name}#{number}", path=path, problem=f"row {number} names no image")
            continue
        texts = {"caption": _text(columns.get(_folded(caption))), "style": _text(columns.get(_folded(style))) or default_style}
        image_path = Path(name) if Path(name).is_absolute() else root / name.replace("\\", "/")
        yield ImageInput(
            source=source_name(image_path, base),
            path=image_path,
            **texts,
            problem=unwritable(name_below(image_path, base))
            or (None if is_file(image_path) else f"no such file {path_words(name, root)}")
            or _broken(texts),
        )


def _broken(texts: Mapping[str, str | None]) -> str | None:
    """What keeps an image's texts out of a tuple; None for nothing."""
    return next((f"its {name} holds a broken character: {text!r}" for name, text in texts.items() if text and not is_unicode(text)), None)


def table_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, row) of a JSONL, CSV, TSV or Parquet file.

    Raises:
        ValueError: no such file, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif suffix in (".csv", ".tsv"):
        yield from enumerate(_csv_rows(path, "\t" if suffix == ".tsv" else ","), start=1)
    elif suffix == ".jsonl":
        yield from numbered_records(path)
    else:
        raise ValueError(f"{path}: no table; one of {', '.join(TABLES)}")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open("rb") as bytes_:
            if other := other_encoding(bytes_.read(4)):
                raise ValueError(f"{path}: {other} text; save it as UTF-8")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter)
            for row in rows:
                if None in row:
                    raise ValueError(
                        f"{path}: line {rows.line_num} has more fields than the first line: put texts with {delimiter!r} in double quotes"
                    )
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    require("pyarrow", f"{path.name}: reading Parquet", "parquet", "turn the table into .jsonl or .csv")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except Exception as error:  # whatever the reader raises is said of the file
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from error


def column(row: Mapping[str, Any], name: str) -> Any:
    """A row's value by column, whatever case and separators; None where there is none."""
    return _columns(row).get(_folded(name))


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether an input belongs to a shard (number, how many)."""
    return zlib.crc32(name.encode(errors="surrogateescape")) % shard[1] == shard[0]


def shard_file(out: Path, shard: tuple[int, int]) -> Path:
    """The output file of a shard: the whole run's own, or one with the shard in its name."""
    return out if shard[1] == 1 else out.with_name(f"{out.stem}.{shard[0] + 1}of{shard[1]}{out.suffix}")


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {_folded(str(name)): value for name, value in row.items()}


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None
