"""What the method and each of its parts is worth, measured in the tiny world on two CPU cores.

    python -m benchmarks.tiny_world                        the reported study: every run, 3 seeds, table and plot
    python -m benchmarks.tiny_world --stage screen         the same on other data and shorter: what settings are chosen on
    python -m benchmarks.tiny_world --list                 runs, what each changes, and what is done
    python -m benchmarks.tiny_world --table --plot         table and plot again, from the results alone
    python -m benchmarks.tiny_world --stage screen --only full --try lr2 --set train.lr=2e-3      one setting beside the recipe's

Run it from the repository's root. Every run goes through configs/demo.toml and the project's own trainer. A finished run is
one JSON and is not made again; one that was interrupted goes on from its checkpoint; one whose configuration, data or base
has changed since is told and made again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import tiny_world_report as report
from benchmarks import tiny_world_run as runs
from benchmarks.provenance import ROOT
from benchmarks.tiny_world_run import Plan
from byg_plugin import _cli
from byg_plugin.config.loading import parse_config, read_config
from byg_plugin.config.objective import DEFAULT
from byg_plugin.config.sections import SECTIONS_OF_OBJECTIVES, Config
from byg_plugin.demo import world
from byg_plugin.progress import Progress
from byg_plugin.training.loop import Interrupted

TRAIN_EDITS_PER_TYPE = 256


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the study over configs/demo.toml."""

    title: str
    overrides: tuple[str, ...] = ()
    kind: str = "train"
    """Or a row without training: `truth`, `copy`, `base`."""
    world: str = "recolour"
    """Key of `Subject.worlds`."""
    as_long_as: tuple[str, str] | None = None
    """(run whose CPU seconds it gets, run whose seconds a step say how many steps those are)."""

    @property
    def random(self) -> bool:
        """Whether seeds differ."""
        return self.kind not in ("truth", "copy")

    @property
    def targets(self) -> bool:
        """Whether its training tuples have targets on the disk; only the paired baseline's do."""
        return self.overrides[: len(PAIRED)] == PAIRED


WORLDS = {"recolour": world.DEFAULT_TYPES, "three": (*world.DEFAULT_TYPES, "remove"), "six": tuple(world.EDIT_TYPES)}
PAIRED = ('objective.name="paired"',)
# Few-step editors are all sampled in as many steps.
FAST = ('train.mixed_precision="no"', 'lora.forward="merged"')  # what a CPU without bfloat16 instructions is fast with
FOUR = ("sample.steps=4", *FAST)
CRITIC = ROOT / "byg_plugin" / "demo" / "critic"
ASKED = (
    f"critic.path={json.dumps(str(CRITIC))}",
    'critic.dtype="float32"',
    "critic.image_size=64",
    "critic.gradient_checkpointing=false",
    "critic.scale_steps=200",
)
UPDATES, COPIES = 800, 100  # of the editor, in about the full method's time, and steps before them
NP_EDIT = (
    'objective.name="np_edit"',
    "objective.guidance=1.0",  # the base is distilled from a guided model
    "objective.strong_types=[]",
    "objective.fake_updates=2",
    "objective.lambda_vlm=0.05",
    "objective.t_shift=1.0",
    *FOUR,
    'sample.solver="stochastic"',
    'sample.schedule="shifted"',
    f"objective.identity_warmup_steps={COPIES}",
    "objective.ema_decay=0.985",
    "train.batch_size=4",
    "train.global_batch_size=4",
    "train.lr=5e-3",
)
# The full method's terms at less cost, in smaller batches: as many CPU seconds as the recipe took before its step was cheaper.
CHEAPER = (
    *FAST,
    "objective.merge_identity=true",
    "objective.identity_rate=0.25",
    'objective.rollout_solver="ab2"',
    'objective.rollout_schedule="shifted"',
    "objective.ema_decay=0.99",
    "objective.identity_warmup_steps=150",
    "train.batch_size=2",
    "train.global_batch_size=2",
    "train.lr=4e-3",
    "train.steps=4400",
)
BY_TURNS = (f"train.steps={COPIES + 3 * UPDATES}",)  # the fake score's two steps and one of the editor
RUNS: dict[str, Run] = {
    "truth": Run(title="ground truth", kind="truth"),
    "copy": Run(title="copy the source", kind="copy"),
    "base": Run(title="base, target caption", kind="base"),
    "full": Run(title="full method"),
    "no_routing": Run(title="w/o gradient routing", overrides=("objective.routing=false",)),
    "no_cycle": Run(title="w/o cycle", overrides=("objective.cycle=false",)),
    "no_directional": Run(title="w/o directional term", overrides=("objective.directional=false",)),
    "no_bootstrap": Run(title="w/o bootstrapping", overrides=("objective.bootstrap=false",)),
    "no_prior": Run(title="w/o prior", overrides=("objective.prior=false",)),
    "no_identity": Run(title="w/o identity steps", overrides=("objective.identity_probability=0.0",)),
    "paired_steps": Run(title="paired, equal steps", overrides=PAIRED),
    "paired_time": Run(title="paired, equal time", overrides=PAIRED, as_long_as=("full", "paired_steps")),
    "four_full": Run(title="full method", overrides=FOUR),
    "four_paired_steps": Run(title="paired, equal steps", overrides=(*PAIRED, *FOUR)),
    "four_np_edit": Run(title="NP-Edit", overrides=(*NP_EDIT, *BY_TURNS, *ASKED)),
    "four_no_dmd": Run(title="NP-Edit w/o DMD", overrides=(*NP_EDIT, f"train.steps={COPIES + UPDATES}", *ASKED, "objective.dmd=false")),
    "four_no_vlm": Run(title="NP-Edit w/o critic", overrides=(*NP_EDIT, *BY_TURNS, "objective.vlm=false")),
    "four_no_question": Run(
        title="NP-Edit w/o identity question", overrides=(*NP_EDIT, *BY_TURNS, *ASKED, "objective.identity_question=false")
    ),
    "three_full": Run(title="full method", overrides=FOUR, world="three"),
    "three_guided": Run(
        title="full method, removals guided by 3", overrides=(*FOUR, "objective.prior_guidance={remove=3.0}"), world="three"
    ),
    "three_critic": Run(
        title="full method + critic on removals",
        overrides=(*FOUR, *ASKED, 'objective.critique_types=["remove"]'),
        world="three",
    ),
    "fast_full": Run(title="full method", overrides=CHEAPER),
    "fast_no_routing": Run(title="w/o gradient routing", overrides=(*CHEAPER, "objective.routing=false")),
    "fast_no_cycle": Run(title="w/o cycle", overrides=(*CHEAPER, "objective.cycle=false")),
    "fast_no_directional": Run(title="w/o directional term", overrides=(*CHEAPER, "objective.directional=false")),
    "fast_no_bootstrap": Run(title="w/o bootstrapping", overrides=(*CHEAPER, "objective.bootstrap=false")),
    "fast_no_prior": Run(title="w/o prior", overrides=(*CHEAPER, "objective.prior=false")),
    "fast_no_identity": Run(title="w/o identity steps", overrides=(*CHEAPER, "objective.identity_probability=0.0")),
    "fast_paired_steps": Run(title="paired, equal steps", overrides=(*PAIRED, *CHEAPER)),
    "six_truth": Run(title="ground truth", kind="truth", world="six"),
    "six_copy": Run(title="copy the source", kind="copy", world="six"),
    "six_base": Run(title="base, target caption", kind="base", world="six"),
    "six_full": Run(title="full method", world="six"),
    "six_paired_steps": Run(title="paired, equal steps", overrides=PAIRED, world="six"),
    "six_paired_time": Run(title="paired, equal time", overrides=PAIRED, world="six", as_long_as=("six_full", "six_paired_steps")),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a study is about; everything else is the same for all of them."""

    name: str
    """Of its module in benchmarks/, and of its folders of results and of work."""
    world: runs.World
    worlds: Mapping[str, tuple[str, ...]]
    """Types of edits by the key of `Run.world`."""
    stages: Mapping[str, Stage]
    edits_per_type: int
    """Of the training data."""
    config: Path
    base: Path
    page: report.Page
    groups: tuple[str, ...] = tuple(report.GROUPS)
    """Whose runs it has beside the main ones: a critic looks at pictures, and NP-Edit unrolls one network."""
    settings: tuple[str, ...] = ()
    """Beside `SETTINGS`."""

    @property
    def runs(self) -> list[str]:
        """Names of the runs that it can have."""
        return [name for name in RUNS if not name.startswith(tuple(report.GROUPS.keys() - set(self.groups)))]

    @property
    def out(self) -> Path:
        return ROOT / "benchmarks" / "results" / self.name


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Its own training data and evaluation edits (`data_seed`, `split`), length and limit."""

    split: str
    data_seed: int
    eval_edits: int
    curve_edits: int
    scale: float
    """Of the recipe's steps (warm-ups too)."""
    minutes: float
    """The most that training may take on two cores."""


# The demo's own data have seed 0.
STAGES = {
    "screen": Stage(split="tune", data_seed=1, eval_edits=64, curve_edits=64, scale=0.4, minutes=2),
    "report": Stage(split="report", data_seed=2, eval_edits=192, curve_edits=96, scale=1.0, minutes=5),
}
# What the study decides for every run: nothing that a loss depends on, except that no tuples are held out and the prior is whole.
SETTINGS = (
    "dataset.validation_items=0",
    # The same but for rounding, in more time: as the committed results had it.
    "objective.merge_identity=false",
    'lora.forward="factors"',
    "objective.reverse_prior=true",  # Algorithm 1 as printed
    "train.validate_every=0",
    "train.keep_last=1",
    'train.tracker="none"',
    "sample.every=0",
    'output.name="editor"',
)


def pictures() -> Subject:
    """The study of the image world."""
    return Subject(
        name="tiny_world",
        world=runs.PICTURES,
        worlds=WORLDS,
        stages=STAGES,
        edits_per_type=TRAIN_EDITS_PER_TYPE,
        config=ROOT / "configs" / "demo.toml",
        base=ROOT / "byg_plugin" / "demo" / "base",
        page=report.PICTURES,
    )


class Study:
    """The options of one command line, and what they make of RUNS."""

    def __init__(self, options: argparse.Namespace, subject: Subject | None = None):
        self.options, self.subject = options, subject or pictures()
        self.stage = self.subject.stages[options.stage]
        self.results = options.out / options.stage

    def names(self) -> list[str]:
        """The selected runs in the table's order."""
        return [name for name in RUNS if name in self.options.only]

    def tasks(self) -> list[tuple[str, int]]:
        """(run, seed), whole seeds one after another; rows that have no randomness once."""
        once = [(name, 0) for name in self.names() if not RUNS[name].random]
        return once + [(name, seed) for seed in self.options.seeds for name in self.names() if RUNS[name].random]

    def label(self, name: str) -> str:
        """A run's name in files: with `--try`, its own."""
        return f"{name}+{self.options.attempt}" if self.options.attempt else name

    def result(self, name: str, seed: int) -> Path:
        """Where a run's JSON lies."""
        return self.results / f"{name}-{seed}.json"

    def lacks(self, name: str, seed: int) -> list[str]:
        """Runs whose time must be known first and is not."""
        return [other for other in RUNS[name].as_long_as or () if not self.result(other, seed).is_file()]

    def plan(self, name: str, seed: int) -> Plan:
        """Everything about one run that lacks nothing."""
        run = RUNS[name]
        steps = self._equal_steps(run, seed) if run.as_long_as else None
        recipe = self._train_recipe(run)
        of = self.subject.world
        train_edits = tuple(of.sample_split(recipe["n"], recipe["seed"], recipe["split"], recipe["edit_types"]))
        given = (*([f"train.steps={steps}"] if steps else []), *self.options.set)
        label = self.label(name)
        eval_types = self.subject.worlds[run.world]
        return Plan(
            world=of,
            name=label,
            title=run.title + (f", {self.options.attempt}" if self.options.attempt else ""),
            kind=run.kind,
            seed=seed,
            stage=self.options.stage,
            overrides=(*run.overrides, *given),
            config=self._config(run, label, seed, given),
            train_edits=train_edits,
            train_recipe=recipe,
            eval_edits=runs.eval_edits(self.stage.eval_edits, self.stage.data_seed, self.stage.split, eval_types, of),
            curve_edits=self.stage.curve_edits,
            result=self.result(label, seed),
        )

    def _train_recipe(self, run: Run) -> dict[str, Any]:
        types = self.subject.worlds[run.world]
        n = self.subject.edits_per_type * len(types)
        return {"n": n, "seed": self.stage.data_seed, "split": "train", "edit_types": types, "with_targets": run.targets}

    def _equal_steps(self, run: Run, seed: int) -> int:
        """Steps that take as long as another run of this seed did, in CPU seconds."""
        assert run.as_long_as is not None
        like, pace = (runs.read_json(self.result(name, seed)) for name in run.as_long_as)
        return max(1, round(like["cpu_seconds"] / pace["seconds_per_step"]))

    def _config(self, run: Run, label: str, seed: int, given: tuple[str, ...]) -> Config:
        """A run's recipe, its lengths (not those that are `given`) scaled as the stage's are."""
        work = self.options.work
        data = work / "data" / f"{self.options.stage}-{run.world}{'-targets' if run.targets else ''}-{self._world_digest()}"
        paths = {
            "model.path": self.options.base,
            "dataset.tuples": data / "tuples.jsonl",
            "dataset.cache_dir": work / "cache",
            "output.dir": work / self.options.stage / f"{label}-{seed}",
        }
        fixed = [f"{key}={_toml(value)}" for key, value in paths.items()] + [*SETTINGS, *self.subject.settings, f"train.seed={seed}"]
        recipe = _recipe_of(self.options.config, [*fixed, *run.overrides])
        scale = self.stage.scale * self.options.steps
        lengths = {
            "train.steps": recipe.train.steps,
            "train.lr_warmup_steps": recipe.train.lr_warmup_steps,
            "objective.identity_warmup_steps": getattr(recipe.objective, "identity_warmup_steps", 0),
        }
        scaled = [f"{key}={max(1, round(value * scale)) if value else 0}" for key, value in lengths.items()]
        wanted = [*fixed, *run.overrides, *scaled, *given]
        steps = _recipe_of(self.options.config, wanted).train.steps
        rhythm = [f"train.save_every={max(1, steps // 10)}", f"train.log_every={max(1, min(10, steps // 50))}"]
        return _recipe_of(self.options.config, [*wanted, *rhythm])

    def _world_digest(self) -> str:
        """Names the data folders: a world that is drawn otherwise gets other ones."""
        of = self.subject.world
        return runs.digest_edits(tuple(of.sample_split(64, 0, "digest", tuple(world.EDIT_TYPES))), 64, of)[:8]

    def state(self, plan: Plan) -> str:
        """`done`, `todo`, or `stale (what changed)`."""
        record = runs.read_json(plan.result)
        if record is None:
            return "todo"
        changed = runs.changes(record, plan)
        return f"stale ({'; '.join(changed)})" if changed else "done"


def _recipe_of(path: Path, overrides: list[str]) -> Config:
    """A row's configuration. The recipe is the full method's: of a row with another objective, what that one does not know is left out."""
    raw = read_config(path, overrides)
    section = raw.get("objective", {})
    known = SECTIONS_OF_OBJECTIVES[section.get("name", DEFAULT)].model_fields
    return parse_config({**raw, "objective": {key: value for key, value in section.items() if key in known}}, origin=str(path))


def _toml(value: str | Path) -> str:
    """A JSON string is a TOML string: a Windows path's backslashes survive."""
    return json.dumps(str(value))


# --- the processes ---


class _Child:
    """One run in a process of its own."""

    def __init__(self, study: Study, name: str, seed: int):
        self.plan = study.plan(name, seed)
        self.total = effort(self.plan)
        self.log = self.plan.folder.with_name(f"{self.plan.folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "30", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", f"benchmarks.{study.subject.name}", *_arguments(study.options), "--one", f"{name}:{seed}"]
        with open(self.log, "wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __str__(self) -> str:
        return f"{self.plan.name} seed {self.plan.seed}"

    def step(self) -> int:
        """The last step that it reported."""
        lines = runs.read_lines(self.plan.folder / "clock.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    def last_words(self) -> str:
        """The end of what it printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return "\n".join(text.strip().splitlines()[-12:])


def effort(plan: Plan, step: int | None = None) -> float:
    """Rough work of a run's first steps (default: of all), in steps of the baseline: the time left is reckoned with it."""
    if plan.kind != "train":
        return 20.0
    config = plan.config
    step = config.train.steps if step is None else step
    warmup = getattr(config.objective, "identity_warmup_steps", step)
    return min(step, warmup) + 6.0 * max(0, step - warmup)


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line again, for a child."""
    words = ["--stage", options.stage, "--out", options.out, "--work", options.work, "--config", options.config, "--base", options.base]
    words += ["--steps", options.steps]
    for override in options.set:
        words += ["--set", override]
    if options.attempt:
        words += ["--try", options.attempt]
    return [str(word) for word in words]


def run_all(study: Study) -> list[str]:
    """Make what is selected and not done, `--jobs` at once; returns the failures."""
    independent = [task for task in study.tasks() if not RUNS[task[0]].as_long_as]
    failures = _run(study, independent)
    for task in study.tasks():
        if RUNS[task[0]].as_long_as:
            lacking = study.lacks(*task)
            if lacking:
                failures.append(f"{task[0]} seed {task[1]} gets the time of {' and '.join(lacking)}, which is not known: run those too")
            else:
                failures += _run(study, [task])
    return failures


def _run(study: Study, tasks: list[tuple[str, int]]) -> list[str]:
    """See `run_all`; of tasks that wait for nothing."""
    waiting = [task for task in tasks if _is_open(study, *task)]
    for data in {study.plan(*task).config.dataset.tuples: task for task in waiting}.values():
        plan = study.plan(*data)
        if plan.kind == "train":
            runs.prepare(plan)  # here, once: not by several at a time
    failures: list[str] = []
    running: list[_Child] = []
    finished, total = 0.0, sum(effort(study.plan(*task)) for task in waiting)
    every = 1 if sys.stderr.isatty() else 60
    shape = "{desc} {percentage:3.0f} % {elapsed} gone, {remaining} left{postfix}"
    bar = Progress(total=total, desc=study.options.stage, bar_format=shape, mininterval=every, smoothing=0, disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < study.options.jobs:
                running.append(_Child(study, *waiting.pop(0)))
            time.sleep(0.5)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                finished += child.total
                failures += _report_end(study, child)
            bar.set_postfix_str("; ".join(f"{child} step {child.step()}" for child in running), refresh=False)
            bar.update(finished + sum(effort(child.plan, child.step()) for child in running) - bar.n)
    except KeyboardInterrupt:
        _stop(running)
        raise
    finally:
        bar.close()
    return failures


def _is_open(study: Study, name: str, seed: int) -> bool:
    """Whether a run is to be made; says so when its result is stale."""
    state = study.state(study.plan(name, seed))
    if state.startswith("stale"):
        Progress.write(f"{name} seed {seed} is {state}; it is made again")
    return state != "done"


def _report_end(study: Study, child: _Child) -> list[str]:
    record = runs.read_json(child.plan.result)
    if child.process.returncode or record is None:
        Progress.write(f"{child} failed:\n{child.last_words()}\n")
        return [f"{child} failed; its output is {child.log}"]
    figures = ", ".join(f"{name} {100 * record['table']['all'][name]:.0f} %" for name in ("joint", "edit", "preserved"))
    Progress.write(f"{child}: {figures}{_time_of(record, study.stage.minutes)}")
    return []


def _time_of(record: dict[str, Any], limit: float) -> str:
    """Training time of a result, with a warning when it is beyond the stage's limit."""
    if "cpu_seconds" not in record:
        return ""
    minutes = record["cpu_seconds"] / report.CORES / 60
    over = f" WARNING: over the limit of {limit:.0f} minutes" if minutes > limit else ""
    return f"; {record['steps']} steps in {record['cpu_seconds']:.0f} CPU s = {minutes:.1f} minutes on {report.CORES} cores{over}"


def _stop(running: list[_Child]) -> None:
    """Pass Ctrl-C on; each run saves after its step. A second Ctrl-C ends them at once."""
    Progress.write("stopping: every run saves after its step; the same command goes on from there (Ctrl-C again: at once)")
    for child in running:
        child.process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    try:
        for child in running:
            child.process.wait()
    except KeyboardInterrupt:
        for child in running:
            child.process.kill()


# --- the command ---


def _parser(subject: Subject, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{subject.name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=list(subject.stages), default="report", help="which data, length and limit (default: report)")
    parser.add_argument("--only", help="names of runs, comma-separated (default: all; see --list)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on every run's steps, for a look at the machinery (default: 1)")
    parser.add_argument("--out", type=Path, default=subject.out, help="folder of results, table and plot")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / subject.name, help="folder of data, caches and checkpoints")
    parser.add_argument("--config", type=Path, default=subject.config, help="the recipe")
    parser.add_argument("--base", type=Path, default=subject.base, help="the frozen base")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="with --try: change a key; repeatable")
    parser.add_argument("--try", dest="attempt", metavar="NAME", help="make the runs of --only with --set, as rows of their own")
    parser.add_argument("--list", action="store_true", help="show the runs and what is done, and stop")
    parser.add_argument("--table", action="store_true", help="write the table from the results alone, and stop")
    parser.add_argument("--plot", action="store_true", help="draw the plot from the results alone, and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def parse(words: list[str] | None = None, subject: Subject | None = None, about: str | None = __doc__) -> argparse.Namespace:
    """Options, checked."""
    subject = subject or pictures()
    parser = _parser(subject, about or "")
    options = parser.parse_args(words)
    options.only = options.only.split(",") if options.only else ["full"] if options.attempt else subject.runs
    unknown = [name for name in options.only if name not in subject.runs]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: no such run; there are {', '.join(subject.runs)}")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        parser.error(f"--seeds {options.seeds}: give whole numbers, e.g. 0,1,2")
    options.seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    if not 0 < options.steps <= 1:
        parser.error(f"--steps {options.steps}: a factor above 0 and at most 1")
    options.out, options.work, options.config, options.base = (
        path.resolve() for path in (options.out, options.work, options.config, options.base)
    )
    for name in ("config", "base"):
        if not getattr(options, name).exists():
            parser.error(f"--{name} {getattr(options, name)}: no such file or folder")
    if options.steps != 1 and options.out == subject.out:
        parser.error("--steps other than 1 makes no result of the study: give another --out")
    if bool(options.set) != bool(options.attempt):
        parser.error("--try NAME and --set KEY=VALUE belong together: a changed run is a row of its own")
    if options.attempt and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*", options.attempt):
        parser.error(f"--try {options.attempt}: letters, digits, dots and underscores")
    if options.attempt and any(RUNS[name].kind != "train" or RUNS[name].as_long_as for name in options.only):
        parser.error("--try is for runs that train for a given number of steps: choose them with --only")
    return options


def show_list(study: Study) -> None:
    """Every selected run, what it changes and what is done."""
    for name in study.names():
        states = []
        for seed in [seed for task, seed in study.tasks() if task == name]:
            lacking = study.lacks(name, seed)
            states.append(f"{seed}: " + (f"waits for {' and '.join(lacking)}" if lacking else study.state(study.plan(name, seed))))
        run = RUNS[name]
        changes = " ".join((*run.overrides, *study.options.set)) or ("the recipe" if run.kind == "train" else "no training")
        print(f"{study.label(name):16} {run.title:26} {changes:36} {'; '.join(states)}")


def write_reports(study: Study, *, table: bool, plot: bool) -> None:
    """Table and plot from the JSONs of the stage."""
    results = report.read_results(study.results)
    if not results:
        print(f"there are no results in {study.results}")
        return
    prefix = "" if study.options.stage == "report" else f"{study.options.stage}_"
    if table:
        path = study.options.out / f"{prefix}table.md"
        path.write_text(report.table(results, study.stage.minutes, study.subject.page), encoding="utf-8")
        print(path)
    if plot:
        path = study.options.out / f"{prefix}tradeoff.png"
        if report.plot(results, path, study.subject.page):
            print(path)
        else:
            print("no run has a curve yet: nothing to plot")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does; so does SIGINT where it is ignored, as in a shell's background job."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(words: list[str] | None = None, subject: Subject | None = None, about: str | None = __doc__) -> None:
    """The command of a study; see the module."""
    options = parse(words, subject, about)
    study = Study(options, subject)
    if options.one:
        name, _, seed = options.one.partition(":")
        torch.set_num_threads(1)
        try:
            runs.run(study.plan(name, int(seed)))
        except Interrupted as stop:
            raise KeyboardInterrupt from stop
        return
    if options.list:
        show_list(study)
        return
    if options.table or options.plot:
        write_reports(study, table=options.table, plot=options.plot)
        return
    torch.set_num_threads(1)
    with _interruptible():
        failures = run_all(study)
    write_reports(study, table=True, plot=True)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    _cli.run(main)
