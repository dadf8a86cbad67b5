"""Who reads one section is given that section: no function takes the whole configuration for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from byg_plugin.config.sections import Config

ROOT = Path(__file__).parents[2]
SECTIONS = set(Config.model_fields)
# Properties and methods of `Config`, by the sections that they read.
DERIVED = {"fps": {"dataset", "model"}, "cfg_at": {"model", "sample"}, "negative": {"model", "sample"}, "accumulation": {"train"}}


def takers(source: str) -> Iterator[tuple[str, int, set[str], bool]]:
    """(name, line, sections read, whether it hands the whole on or keeps it) of each function with a parameter `Config`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        for argument in (*node.args.args, *node.args.kwonlyargs):
            kind = "" if argument.annotation is None else ast.unparse(argument.annotation).strip("'\"")
            if kind not in ("Config", "Config | None"):
                continue
            read: set[str] = set()
            other_uses = 0
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == argument.arg]
            attributes = {id(n.value): n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            for use in uses:
                name = attributes.get(id(use))
                if name in SECTIONS:
                    read.add(name)
                elif name in DERIVED:
                    read |= DERIVED[name]
                else:
                    other_uses += 1
            yield node.name, node.lineno, read, bool(other_uses)


def needless(source: str) -> list[str]:
    return [f"{name} (line {line}) reads {sorted(read)} alone" for name, line, read, whole in takers(source) if len(read) < 2 and not whole]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return config.train.steps", True),
        ("return config.train.steps + config.lora.rank", False),
        ("return g(config) + config.train.steps", False),
        ("self.config = config", False),
        ("return config.fps", False),
        ("return config.accumulation(2)", True),
        ("return 1", True),
    ],
)
def test_a_needless_whole_is_seen(body: str, found: bool):
    assert bool(needless(f"def f(self, config: Config):\n    {body}")) is found


def test_nobody_takes_the_whole_for_one_section():
    found = {
        path.relative_to(ROOT).as_posix(): names
        for folder in ("byg_plugin", "dataset_tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (names := needless(path.read_text(encoding="utf-8")))
    }
    assert not found, found
