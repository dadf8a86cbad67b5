"""The demo: data, caching, training, editing and measuring in the tiny world, through the project's own commands.

    python -m byg_plugin.demo --out demo_out

Every stage is a command that the user of a real model runs; each is printed before it runs. A stage that is done is not
done again: an interrupted demo goes on where it stopped. Delete the folder to start afresh.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from byg_plugin import _cli
from byg_plugin.demo import metrics, sheet, world
from byg_plugin.training.config import Config, load_config
from byg_plugin.training.extras import require_training_extras

TRAIN_TUPLES, EVAL_TUPLES = 512, 64


def _run(*command: str | Path) -> None:
    """One of the project's commands in a process of its own; its failure is ours."""
    words = [str(word) for word in command]
    print("\n$ " + shlex.join(["python", *words]), flush=True)
    done = subprocess.run([sys.executable, *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def run_demo(out: Path, overrides: list[str], train_tuples: int = TRAIN_TUPLES, eval_tuples: int = EVAL_TUPLES) -> dict[str, metrics.Table]:
    """All stages; returns the tables of figures by method and writes them and the contact sheet into `out`.

    Args:
        out: folder of everything that the demo makes.
        overrides: `section.key=value` for the training configuration.
        train_tuples: tuples in the training set.
        eval_tuples: held-out edits that are measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    config, base = _configs() / "demo.toml", Path(__file__).parent / "base"
    if not (out / "train" / "tuples.jsonl").exists():
        world.write_dataset(out / "train", train_tuples, seed=0, split="train")
    if not (out / "eval" / "tuples.jsonl").exists():
        world.write_dataset(out / "eval", eval_tuples, seed=0, split="eval")
    print(f"{train_tuples} training tuples (no targets) in {out / 'train'}, {eval_tuples} held-out edits in {out / 'eval'}")

    places = {
        "model.path": base,
        "dataset.tuples": out / "train" / "tuples.jsonl",
        "dataset.cache_dir": out / "cache",
        "output.dir": out / "training",
    }
    options: list[str | Path] = ["--config", config]
    for key, value in places.items():
        # JSON strings are TOML strings: a Windows path's backslashes survive.
        options += ["--set", f"{key}={_quoted(value)}"]
    for override in [*_precision(overrides), *overrides]:
        options += ["--set", override]
    resolved = load_config(config, [str(word) for word in options[2:] if word != "--set"])
    require_training_extras(resolved)  # the training's own check, before the caching
    suffix = "-ema" if resolved.objective.ema_decay else ""
    lora = Path(resolved.output.dir) / f"{resolved.output.name}{suffix}.safetensors"
    _refuse_other_settings(Path(resolved.output.dir) / "config.json", resolved, out)
    started = time.perf_counter()
    _run("-m", "byg_plugin.cache_latents", *options)
    _run("-m", "byg_plugin.cache_text_encoder_outputs", *options)
    if not lora.exists():
        resume = ["--resume", "latest"] if any((out / "training" / "checkpoints").glob("step-*")) else []
        _run("-m", "byg_plugin.train_network", *options, *resume)
    edits = out / "edits"
    _run("-m", "byg_plugin.edit", *options, "--lora", lora, "--tuples", out / "eval" / "tuples.jsonl", "--out", edits, "--batch-size", "16")
    seconds = time.perf_counter() - started

    truths = world.load_scenes(out / "eval")
    images = {
        edit.id: np.asarray(Image.open(path).convert("RGB"))
        for edit, path in zip(truths, sorted(p for p in edits.glob("*.png") if not p.stem.endswith("_side_by_side")), strict=True)
    }
    tables = {**metrics.baselines(truths), "edited without pairs": metrics.evaluate(images, truths)}
    metrics.write_tables(out, tables)
    sheet.contact_sheet(out / "contact_sheet.png", truths, images, columns=8, rows=2)
    print("\n" + metrics.markdown(tables))
    print(f"caching, training and editing took {seconds:.0f} s; look at {out / 'contact_sheet.png'}")
    return tables


def _precision(overrides: list[str]) -> list[str]:
    """float32 where the CPU has no instructions for bfloat16: a step takes ten times as long with it there."""
    if any(override.startswith("train.mixed_precision") for override in overrides):
        return []
    # About 0.2 with instructions for it, 1.1 and 30 without.
    if _seconds_of_product(torch.bfloat16) < 0.6 * _seconds_of_product(torch.float32):
        return []
    print("This CPU computes bfloat16 slowly: training in float32, which takes longer and gives slightly other figures.")
    return ['train.mixed_precision="no"']


def _seconds_of_product(dtype: torch.dtype) -> float:
    """Of one like those of the training, at its fastest."""
    left, right = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _refuse_other_settings(trained: Path, resolved: Config, out: Path) -> None:
    """What was trained with other settings must not be shown as the result of these."""
    if trained.exists() and json.loads(trained.read_text(encoding="utf-8")) != json.loads(resolved.to_json()):
        raise ValueError(f"--out {out} was trained with other settings: delete it, or choose another folder")


def _configs() -> Path:
    """The recipes: beside the package in a clone, inside it once installed."""
    beside = Path(__file__).resolve().parents[2] / "configs"
    return beside if (beside / "demo.toml").is_file() else Path(str(resources.files("byg_plugin.configs")))


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m byg_plugin.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of everything that is made")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override the configuration; repeatable")
    args = parser.parse_args()
    run_demo(args.out, args.set)


if __name__ == "__main__":
    _cli.run(main)
