"""A family is known by its specification: nobody but its own files asks for its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from byg_plugin import families

ROOT = Path(__file__).parents[2]
NAMES = {*families.SPECS, *(spec.lora_layout for spec in families.SPECS.values())}
ASKING = {"startswith", "endswith", "removeprefix", "get", "fullmatch"}


def asks_for_a_name(source: str) -> list[int]:
    """Lines that compare something with a family's name, look it up, or match its beginning."""

    def is_name(node: ast.AST) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(is_name, node.elts))
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES

    found = []
    for node in ast.walk(ast.parse(source)):
        compares = isinstance(node, ast.Compare) and any(map(is_name, (node.left, *node.comparators)))
        calls = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ASKING
            and any(map(is_name, node.args))
        )
        indexes = isinstance(node, ast.Subscript) and is_name(node.slice)
        matches = isinstance(node, ast.MatchValue) and is_name(node.value)
        keys = isinstance(node, ast.Dict) and any(is_name(key) for key in node.keys if key is not None)
        if compares or calls or indexes or matches or keys:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "family == 'flux'",
        "'wan2.1-t2v-14b' != family",
        "family in ('wan', 'x')",
        "name.startswith('wan')",
        "TABLE['flux']",
        "{'wan': 1}[family]",
        "match family:\n    case 'flux':\n        pass",
    ],
)
def test_asking_is_seen(line: str):
    assert asks_for_a_name(line)


def test_reading_a_specification_is_no_asking():
    assert not asks_for_a_name("spec.guidance == 'embedding'\nfamily: str = 'flux'\nf('flux')")


LAYOUTS = {spec.lora_layout for spec in families.SPECS.values()}
OWN = ("families/", "demo/", *(f"{room}/{name}" for room in ("models", "lora", "musubi") for name in LAYOUTS))
REGISTRIES = {"lora/layouts.py"}  # a line each


def test_only_a_familys_own_files_ask_for_its_name():
    package = ROOT / "byg_plugin"
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    asking = {
        name: lines
        for name, path in files.items()
        if not name.startswith(OWN) and name not in REGISTRIES and (lines := asks_for_a_name(path.read_text(encoding="utf-8")))
    }
    assert not asking, asking
