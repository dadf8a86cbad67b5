"""Every engine on two and four gloo processes trains the weights of one process. SGD with momentum shows a factor that Adam hides.

CI runs what could differ; BYG_ALL_ENGINES=1 runs every engine with every kind of run on one, two and four processes.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from byg_plugin.config.sections import Config
from tests.support import tiny, wan_runs
from tests.support.engine_runs import case, difference, last, run_all
from tests.support.tiny_wan import A14B, T2V

ALL = bool(os.environ.get("BYG_ALL_ENGINES"))
pytestmark = pytest.mark.timeout(7200 if ALL else 900)  # on a busy machine
FAMILIES = ("flux", T2V, A14B)
SAME = 5e-6
JOINT = {"objective": {"graph": "joint"}, "model": {"gradient_checkpointing": False}}
FREE = {"objective": {"routing": False}}
CLIPPED = {"train": {"max_grad_norm": 0.05}}
ADAM = {"train": {"lr": 1e-3, "optimizer": "adamw", "max_grad_norm": 0.05}}
# kind -> sections; identity steps, edit steps and accumulation are in all of them.
KINDS: dict[str, dict[str, Any]] = {"sgd": {}, "adam": ADAM, "joint": JOINT, "free": FREE | CLIPPED}
# name -> (family, sections)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {f"{family}-{kind}": (family, KINDS[kind]) for family in FAMILIES for kind in KINDS}
RUNS["flux-fp8"] = ("flux", {"model": {"quantization": "fp8"}})
CHOSEN = [f"{family}-sgd" for family in FAMILIES] + ["flux-adam", "flux-joint", f"{A14B}-free"]
SHARDED = [("fsdp2", name) for name in [*CHOSEN, "flux-fp8"]] + [("zero3", name) for name in CHOSEN]
OFFLOADED = [(engine, "flux-sgd") for engine in ("zero2-cpu", "fsdp2-cpu", "zero3-cpu")]
# One process, whose blocks lie in main memory.
ON_ONE = [(1, "fsdp2-cpu", f"{family}-sgd") for family in FAMILIES]
ON_TWO = [("zero1", f"{A14B}-sgd"), *(("zero2", name) for name in ("flux-sgd", f"{A14B}-sgd", "flux-adam", "flux-joint"))]
ON_TWO += [*SHARDED, *OFFLOADED, *(("plain", name) for name in [*CHOSEN, "flux-fp8"])]
ON_FOUR = [(engine, "flux-sgd") for engine in ("plain", "fsdp2", "zero3")]
EVERY = [*ON_ONE, *((2, *each) for each in ON_TWO), *((4, *each) for each in ON_FOUR)]
if ALL:
    ENGINES = ("plain", "zero1", "zero2", "zero2-cpu", "fsdp2", "fsdp2-cpu", "zero3", "zero3-cpu")
    EVERY = [(n, engine, name) for n in (1, 2, 4) for engine in ENGINES for name in RUNS if (n, engine) != (1, "plain")]
    EVERY = [each for each in EVERY if not (each[1].startswith("zero3") and each[2] == "flux-fp8")]
HERE = [each for each in EVERY if find_spec("deepspeed") or not each[1].startswith("zero")]


def config(name: str, out: Path, **train: Any) -> Config:
    """Three steps, the first of the identity; on two processes each has two micro-steps."""
    family, sections = RUNS[name]
    steps = 8 if family == A14B else 2
    defaults: dict[str, dict[str, Any]] = {
        "objective": {"rollout_steps": steps, "identity_warmup_steps": 1, "identity_probability": 0.0, "ema_decay": 0.8},
        "train": {"steps": 3, "global_batch_size": 4, "save_every": 0, "lr_warmup_steps": 0, "lr_schedule": "constant", "lr": 0.1},
        "model": {"gradient_checkpointing": True},
    }
    for section, values in sections.items():
        defaults[section] = defaults.get(section, {}) | values
    defaults["train"] |= train
    return tiny.run_config(out, **defaults) if family == "flux" else wan_runs.run_config(out, family, **defaults)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: one launch of one, of two and of four processes."""
    root = tmp_path_factory.mktemp("engines")
    references = [(1, "plain", name) for name in sorted({name for _, _, name in HERE})]
    for processes in (1, 2, 4):
        wanted = [each for each in dict.fromkeys([*references, *HERE]) if each[0] == processes]
        made = [(config(name, root / f"{processes}-{engine}-{name}"), engine, name) for _, engine, name in wanted]
        cases = [case(each, engine, sgd=not name.endswith("-adam")) for each, engine, name in made]
        run_all(cases, processes, root / "logs", timeout=7000 if ALL else 600)
    return root


@pytest.mark.parametrize(("processes", "engine", "name"), EVERY)
def test_the_weights_are_those_of_one_process(runs: Path, processes: int, engine: str, name: str):
    if (processes, engine, name) not in HERE:
        pytest.skip('DeepSpeed is not installed: pip install -e ".[deepspeed]"')
    made, reference = runs / f"{processes}-{engine}-{name}", runs / f"1-plain-{name}"
    moved = last(reference)
    assert max(float(value.abs().max()) for key, value in moved.items() if key.startswith("optimizer")) > 1e-4
    sharded_alone = processes == 1 and engine.startswith("fsdp2")
    assert difference(made, reference) <= (0.0 if sharded_alone else SAME)


IN_SHARDS = [each for each in HERE if each[1][:5] in ("fsdp2", "zero3")]


@pytest.mark.parametrize(("processes", "engine", "name"), [each for each in IN_SHARDS if (each[0], "plain", each[2]) in HERE])
def test_shards_change_no_bit_of_what_as_many_plain_processes_save(runs: Path, processes: int, engine: str, name: str):
    assert difference(runs / f"{processes}-{engine}-{name}", runs / f"{processes}-plain-{name}") == 0.0


@pytest.mark.parametrize(("processes", "engine", "name"), IN_SHARDS)
def test_a_process_holds_its_share_of_the_base_and_one_block(runs: Path, processes: int, engine: str, name: str):
    """Between steps and at the peak of one. With one process it is the offload: what is gathered is what the device holds."""
    for rank in range(processes):
        said = json.loads((runs / f"{processes}-{engine}-{name}" / f"rank-{rank}.json").read_text(encoding="utf-8"))
        held, whole = said["held"]
        assert held <= said["share"] < whole / processes * 1.2, said
        most = said["block"] + said["own"]
        if engine.startswith("zero3") and name.endswith("-joint"):  # goes back through two passes at once: a block of each, and embedders
            most = 2 * said["block"] + said["outside"]
        assert 0 < said["peak"] - said["share"] <= most, said
