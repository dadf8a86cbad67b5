"""One HTML file that holds all it shows: source, edit and scores of every item, sortable, the worst first."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from byg_plugin.evaluation.frames import look
from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.scores import Row
from byg_plugin.images import side_by_side
from byg_plugin.journal import replacing

_SIDE = 192  # pixels of a picture's longer side
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 16px; color: #1c1e21; background: #fff; }
table { border-collapse: collapse; } th, td { border: 1px solid #ddd; padding: 6px; vertical-align: top; text-align: left; }
th { position: sticky; top: 0; background: #f2f3f5; }
th button { font: inherit; font-weight: 600; border: 0; background: none; cursor: pointer; }
td.score { text-align: right; font-variant-numeric: tabular-nums; } img { display: block; }
td.words { max-width: 260px; overflow-wrap: anywhere; }
"""
_SCRIPT = """
const body = document.querySelector("tbody");
for (const [place, button] of document.querySelectorAll("th button").entries()) {
  let down = false;
  button.addEventListener("click", () => {
    down = !down;
    const cell = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
    const order = (a, b) => {
      if (cell(a) === "" || cell(b) === "") return (cell(a) === "") - (cell(b) === "");
      const numbers = [cell(a), cell(b)].map(Number);
      const found = numbers.some(Number.isNaN) ? cell(a).localeCompare(cell(b)) : numbers[0] - numbers[1];
      return down ? found : -found;
    };
    body.append(...[...body.rows].sort(order));
  });
}
"""


def write_page(path: Path, title: str, items: Sequence[Item], rows: Sequence[Row], sort_by: str, higher_is_better: bool) -> None:
    """Write the page; of pictures one item's are in memory at a time.

    Args:
        path: of the file.
        title: its heading.
        items: in any order.
        rows: of each, in the same order.
        sort_by: the column whose worst come first; items without a value come last.
        higher_is_better: of that column.

    Raises:
        ValueError: a picture cannot be read, or the page not be written.
    """
    columns = list(dict.fromkeys(column for row in rows for column, value in row.scores.items() if value is not None))

    def badness(pair: tuple[Item, Row]) -> tuple[bool, float]:
        value = pair[1].scores.get(sort_by)
        return (True, 0.0) if value is None else (False, value if higher_is_better else -value)

    with replacing(path) as file:
        file.write(_head(title, columns).encode())
        for item, row in sorted(zip(items, rows, strict=True), key=badness):
            file.write(_row(item, row, columns).encode())
        file.write(f"</tbody></table><script>{_SCRIPT}</script></body></html>\n".encode())


def _head(title: str, columns: Sequence[str]) -> str:
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # Captions are others' texts: what of them became markup could neither run nor call anywhere.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    heads = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in ("id", "pictures", "instruction", "type", *columns))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        "<p>Pictures: source, edit and, where there is one, ground truth; of clips the first, middle and last frame. "
        "A column's head sorts by it.</p>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n"
    )


def _row(item: Item, row: Row, columns: Sequence[str]) -> str:
    scores = "".join(
        '<td class="score"></td>' if value is None else f'<td class="score" data-value="{value!r}">{value:.4g}</td>'
        for value in (row.scores.get(column) for column in columns)
    )
    words = (item.instruction or item.tgt_caption or "", item.edit_type or "")
    texts = "".join(f'<td class="words">{html.escape(text)}</td>' for text in words)
    pictures = "".join(f'<img alt="" src="data:image/jpeg;base64,{jpeg}">' for jpeg in _jpegs(item))
    return f'<tr><td class="words">{html.escape(item.id)}</td><td>{pictures}</td>{texts}{scores}</tr>\n'


def _jpegs(item: Item) -> Iterator[str]:
    """A picture a frame that is shown: source, edit and ground truth in a row."""
    seen = look(item)
    for index in sorted({0, len(seen.edit) // 2, len(seen.edit) - 1}):
        shown = [frames[index] for frames in (seen.source, seen.edit, seen.reference) if frames is not None]
        buffer = io.BytesIO()
        side_by_side(*map(_small, shown)).save(buffer, "JPEG", quality=85)
        yield base64.b64encode(buffer.getvalue()).decode()


def _small(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    scale = _SIDE / max(image.size)
    # Of the tiny world's size and smaller: whole pixels, seen as such.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))), how)
