"""The tables of mutations stay true: what they change is there, and so are the tests that they name."""

from __future__ import annotations

import re

import pytest

from benchmarks.mutations.__main__ import Mutation, read_tables
from tests.support import ROOT

CONTRACTS = re.compile(r"^from (tests\.\S+\.contract) import", re.MULTILINE)
MUTATIONS = read_tables(ROOT / "benchmarks" / "mutations")


@pytest.mark.parametrize("table", sorted({mutation.table for mutation in MUTATIONS}))
def test_mutations_are_of_this_code(table: str):
    stale = [f"{mutation}: {why}" for mutation in MUTATIONS if mutation.table == table for why in _stale(mutation)]
    assert not stale, "\n".join(stale)


def _stale(mutation: Mutation) -> list[str]:
    found = []
    if (count := (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)) != 1:
        found.append(f"`old` stands {count} times in {mutation.file}")
    for test in filter(lambda argument: ".py" in argument, mutation.tests):  # others are options of pytest
        file, _, name = test.partition("::")
        path, function = ROOT / file, name.rpartition("::")[2].partition("[")[0]
        said = path.read_text(encoding="utf-8") if path.is_file() else ""
        if "::" in name:  # of a class, whose tests may be those of a contract
            said += "".join((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8") for module in CONTRACTS.findall(said))
        if not said or (function and f"def {function}(" not in said):
            found.append(f"no test {test}")
    return found
