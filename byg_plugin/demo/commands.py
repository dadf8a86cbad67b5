"""What both demos do: cache, train and edit through the project's own commands, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byg_plugin import _cli, journal, shipped
from byg_plugin.config.extras import require_training_extras
from byg_plugin.config.loading import load_config
from byg_plugin.config.sections import Config

if TYPE_CHECKING:
    import torch


def write_data(out: Path, write_dataset: Callable[..., Path], suffix: str, sizes: Mapping[str, int]) -> None:
    """`out`/train and `out`/eval with as many tuples as `sizes` says, where they are not there yet.

    Args:
        out: the demo's folder.
        write_dataset: the world's.
        suffix: of its sources.
        sizes: tuples by split.

    Raises:
        ValueError: what is there is another demo's.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, tuples in sizes.items():
        path = out / split / "tuples.jsonl"
        if not path.exists():
            write_dataset(out / split, tuples, seed=0, split=split)
        found = [Path(record["source"]).suffix for record in journal.read_records(path)]
        if found != [suffix] * tuples:
            kinds = ", ".join(sorted(set(found)))
            raise ValueError(
                f"--out {out}: {path} holds {len(found)} tuples of {kinds}, and this demo's are {tuples} of {suffix}: delete the folder, "
                "or choose another one"
            )


def settings(out: Path, recipe: str, base: Path, overrides: Sequence[str]) -> tuple[list[str | Path], Config]:
    """The options of all commands, and the configuration that they make.

    Raises:
        ValueError: an override is wrong.
    """
    config = shipped.folder("configs") / recipe
    paths = {
        "model.path": base,
        "dataset.tuples": out / "train" / "tuples.jsonl",
        "dataset.cache_dir": out / "cache",
        "output.dir": out / "training",
    }
    # JSON strings are TOML strings: a Windows path's backslashes survive.
    every = [*(f"{key}={json.dumps(str(value))}" for key, value in paths.items()), *overrides]
    options: list[str | Path] = ["--config", config]
    for override in every:
        options += ["--set", override]
    return options, load_config(config, every)


def cache_train_edit(out: Path, recipe: str, base: Path, overrides: Sequence[str], edit_options: Sequence[str]) -> tuple[Path, float]:
    """Train on `out`/train and edit `out`/eval with it; what is done is not done again.

    Args:
        out: the demo's folder; has train/tuples.jsonl and eval/tuples.jsonl.
        recipe: file name of the configuration.
        base: diffusers folder of the frozen base.
        overrides: `section.key=value` for the configuration.
        edit_options: more of edit.py's command line.

    Returns:
        The folder of edits, and the seconds that all of it took.

    Raises:
        ValueError: the folder was trained with other settings.
    """
    from byg_plugin.lora.formats import expert_files  # torch: seconds

    _, asked = settings(out, recipe, base, overrides)
    trained = Path(asked.output.dir) / "config.json"
    options, resolved = settings(out, recipe, base, [*_precision(overrides, trained), *overrides])
    require_training_extras(resolved.train)  # the training's own check, before the caching
    suffix = "-ema" if resolved.objective.ema_decay else ""
    lora = Path(resolved.output.dir) / f"{resolved.output.name}{suffix}.safetensors"
    _refuse_other_settings(trained, resolved, out)
    started = time.perf_counter()
    run("-m", "byg_plugin.cache_latents", *options)
    run("-m", "byg_plugin.cache_text_encoder_outputs", *options)
    if not all(file.exists() for file in expert_files(lora).values()):
        resume = ["--resume", "latest"] if any((Path(resolved.output.dir) / "checkpoints").glob("step-*")) else []
        run("-m", "byg_plugin.train_network", *options, *resume)
    edits, tuples = out / "edits", out / "eval" / "tuples.jsonl"
    run("-m", "byg_plugin.edit", *options, "--lora", lora, "--tuples", tuples, "--out", edits, *edit_options)
    return edits, time.perf_counter() - started


def _precision(overrides: Sequence[str], trained: Path) -> list[str]:
    """float32 where the CPU has no instructions for bfloat16: a step takes ten times as long with it there.

    A training that is there, whose configuration is `trained`, goes on with what it has: another timing may end otherwise.
    """
    import torch  # not above: a wrong override is told without it

    if any(override.startswith("train.mixed_precision") for override in overrides):
        return []
    if trained.exists():
        return [f"train.mixed_precision={json.dumps(_read(trained)['train']['mixed_precision'])}"]
    # About 0.2 with instructions for it, 1.1 and 30 without.
    if _seconds_of_product(torch.bfloat16) < 0.6 * _seconds_of_product(torch.float32):
        return []
    print("This CPU computes bfloat16 slowly: training in float32, which takes longer and gives slightly other figures.")
    return ['train.mixed_precision="no"']


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Of one like those of the training, at its fastest, on one thread: two that others keep busy wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(seconds)


def edited_files(edits: Path, suffix: str) -> list[Path]:
    """The edits in the order of their tuples, without those beside their sources."""
    return sorted(path for path in edits.glob(f"*{suffix}") if not path.stem.endswith("_side_by_side"))


def run(*command: str | Path) -> None:
    """One of the project's commands in a process of its own; its failure is ours.

    Ctrl-C reaches both processes. The command ends by itself, once it has saved what is done, and this one waits for it, however long
    that takes (`subprocess.run` would kill it after a quarter of a second).

    Raises:
        KeyboardInterrupt: there was one while the command ran.
        SystemExit: the command failed.
    """
    words = [str(word) for word in command]
    print("\n$ " + shlex.join(["python", *words]), flush=True)
    process = subprocess.Popen([sys.executable, *words])
    interrupted, running = False, True
    while running:
        try:
            process.wait()
            running = False
        except KeyboardInterrupt:
            if interrupted:
                process.terminate()  # the second time: for a command that this Ctrl-C did not reach
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        raise SystemExit(process.returncode)


def _read(trained: Path) -> dict[str, Any]:
    """The configuration of a training.

    Raises:
        ValueError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(trained.read_text(encoding="utf-8"))
        found["train"]["mixed_precision"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{trained}: is damaged ({error}): delete its folder, and it is trained again") from error
    return found


def _refuse_other_settings(trained: Path, resolved: Config, out: Path) -> None:
    """What was trained with other settings must not be shown as the result of these."""
    if trained.exists() and _read(trained) != json.loads(resolved.to_json()):
        raise ValueError(f"--out {out} was trained with other settings: delete it, or choose another folder")


def with_critic(base: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides, with `critic.path` of the one that ships beside the base where they name none and it is there."""
    found = base.resolve().parent / "critic"
    if any(override.startswith("critic.path") for override in overrides) or not (found / "config.json").is_file():
        return list(overrides)
    return [f"critic.path={json.dumps(str(found))}", *overrides]


def parse(program: str, about: str, outs: Mapping[str, str], base: Path) -> argparse.Namespace:
    """The command line of a demo: `out`, `base`, `set` and `objective`.

    Args:
        program: how the command is called.
        about: its help.
        outs: the default of `out` by objective; the first one is the default's, and a single one is not asked for.
        base: the folder of the base that ships with a clone.

    Raises:
        ValueError: there is no base.
    """
    default, *others = outs
    parser = argparse.ArgumentParser(prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if others:
        parser.add_argument("--objective", choices=list(outs), default=default, help=f"how it is trained; default: {default}")
    else:
        parser.set_defaults(objective=default)
    folders = " or ".join(dict.fromkeys(outs.values()))
    parser.add_argument("--out", type=_cli.given_path, help=f"folder of everything that is made; default: {folders}")
    parser.add_argument(
        "--base", type=_cli.given_path, default=base, metavar="DIR", help="diffusers folder of the base; default: the clone's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the configuration; repeatable")
    args = parser.parse_args()
    args.out = args.out or Path(outs[args.objective])
    if not (args.base / "model_index.json").is_file():
        raise ValueError(
            f"--base {args.base}: no base there. Its weights ship in a clone and in the sdist, not in the wheel: run the demo there, "
            f"or name their byg_plugin/demo/{base.name} with --base"
        )
    return args
