"""Words mean one thing: the names of things that several rooms share, and the four roles of texts, listed once."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from byg_plugin.data.rules import ROLES
from byg_plugin.objectives.base import Batch
from tests.support import ROOT

VAGUE = {"told", "against", "place", "mine", "there"}
ONE_MEANING = {"Family": "models/base.py", "Host": "hosts/__init__.py", "Part": "models/files.py", "Text": "objectives/base.py"}


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 50
    return found


def names_in(node: ast.AST) -> Iterator[str]:
    """What a node calls a variable, an argument, an attribute, a function or a class."""
    for field in ("id", "arg", "attr", "name", "asname", "rest"):
        if isinstance(name := getattr(node, field, None), str):
            yield name


def defined(statement: ast.stmt) -> list[str]:
    """Classes and aliases that a statement of a module defines."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [statement.name] if isinstance(statement, ast.ClassDef) else [one.id for one in targets if isinstance(one, ast.Name)]


def is_list_of_roles(node: ast.AST) -> bool:
    elements = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else []
    values = [one.value for one in elements if isinstance(one, ast.Constant)]
    return len(values) == len(elements) and (tuple(values) == ROLES or (isinstance(node, ast.Set) and set(values) == set(ROLES)))


def test_names_are_words_that_a_reader_expects():
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {name}"
        for path in files("byg_plugin", "dataset_tools")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in names_in(node)
        if name.strip("_").lower() in VAGUE
    ]
    assert not found


def test_a_family_a_host_a_part_and_a_text_are_defined_once():
    found = [
        (name.strip("_"), path.relative_to(ROOT / "byg_plugin").as_posix())
        for path in files("byg_plugin")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        for name in defined(statement)
        if name.strip("_") in ONE_MEANING
    ]
    assert sorted(found) == sorted(ONE_MEANING.items())


def test_the_roles_of_texts_are_listed_once():
    found = Counter(
        path.relative_to(ROOT).as_posix()
        for path in files("byg_plugin", "dataset_tools", "benchmarks", "patches", "tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_list_of_roles(node)
    )
    assert found == {"byg_plugin/data/rules.py": 1}
    assert tuple(field.name for field in fields(Batch) if field.type == "Text") == ROLES
