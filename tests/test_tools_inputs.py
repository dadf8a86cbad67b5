"""What is read from folders and tables: each file once, each row whole or an error."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from dataset_tools.inputs import files_below, table_images


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "photos/.hidden.png"):
        (tmp_path / name).touch()
    try:
        os.symlink("..", tmp_path / "photos" / "sub" / "up")
        os.symlink("../elsewhere", tmp_path / "photos" / "other")
        os.symlink("itself", tmp_path / "photos" / "itself")
    except OSError:
        pytest.skip("this system lets nobody make links")
    others: Counter[str] = Counter()
    found = sorted(path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path / "photos", (".png",), others))
    assert found == ["photos/a.png", "photos/other/c.png", "photos/sub/b.png"] and others == {"": 1, "hidden": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,caption\na.png,a red car, parked\n", r"t\.csv: line 2 has more fields .* in double quotes"),
        ("file,caption\na.png,a car\n", r"no column 'image' .* it has file, caption"),
    ],
)
def test_tables_that_would_lose_a_text(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        list(table_images(tmp_path / "t.csv", tmp_path, root=None, image="image", caption="caption", style="style"))
