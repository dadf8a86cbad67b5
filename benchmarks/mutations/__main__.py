"""Whether the tests can fail: each mutation of the *.toml beside this file is put into a copy of the tree and its tests are run.

python -m benchmarks.mutations [--only PART_OF_A_FILE_NAME] [--workers 2]

A mutation that no test notices, or whose `old` does not stand exactly once in its file, ends the command with 1. Outside CI:
a mutation costs as much as its tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from byg_plugin.documents import toml_table

ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "*_cache", "__pycache__", "demo_out", "demo_video_out", "out", "cache", "results")


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A change that makes the code wrong, and the tests that are there to notice."""

    table: str
    file: str
    old: str
    new: str
    tests: list[str]

    def __str__(self) -> str:
        line = self.old.strip().splitlines()[0]
        return f"{self.table}: {self.file}: {line if len(line) < 70 else line[:67] + '...'}"


def read_tables(folder: Path) -> list[Mutation]:
    """The mutations of all tables in a folder."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for entry in toml_table(path.read_text(encoding="utf-8"))["mutation"]:
            found.append(Mutation(table=path.stem, **entry))
    return found


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """A copy of the tree that may be spoilt."""
    with tempfile.TemporaryDirectory(prefix="byg-mutations-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT)
        yield copy


def verdict(mutation: Mutation, tree: Path) -> str:
    """`red` (as it must be), or what is wrong."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        return f"STALE: `old` stands {count} times in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return "GREEN: no test noticed"
    return "red" if done.returncode == 1 else f"NOT RUN: pytest ended with {done.returncode}: {done.stdout[-500:]}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tables or files whose names contain this")
    parser.add_argument("--workers", type=int, default=2, help="mutations tried at once (default 2)")
    options = parser.parse_args()
    chosen = [m for m in read_tables(Path(__file__).parent) if options.only in f"{m.table} {m.file}"]
    shares = [chosen[start :: options.workers] for start in range(options.workers)]

    def work(share: list[Mutation]) -> int:
        missed = 0
        with scratch_copy() as tree:
            for mutation in share:
                said = verdict(mutation, tree)
                missed += said != "red"
                print(f"{said:5}  {mutation}", flush=True)
        return missed

    with ThreadPoolExecutor(options.workers) as pool:
        missed = sum(pool.map(work, shares))
    print(f"{len(chosen) - missed} of {len(chosen)} mutations turned a test red")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
