"""The demo: data, caching, training, editing and measuring in the tiny world, through the project's own commands.

    python -m byg_plugin.demo --out demo_out
    python -m byg_plugin.demo --objective np_edit      an editor of four steps, taught by a tiny vision-language model

Every stage is a command that the user of a real model runs; each is printed before it runs. A stage that is done is not
done again: an interrupted demo goes on where it stopped. Delete the folder to start afresh.

The base and the critic ship in a clone and in the sdist. A wheel has none: --base names a folder of it, the critic lies beside it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from byg_plugin import _cli
from byg_plugin.critics import check_critic
from byg_plugin.demo import commands, metrics, sheet, world

TRAIN_TUPLES, EVAL_TUPLES = 512, 64
BASE = Path(__file__).parent / "base"
RECIPES = {"unpaired_cycle": "demo.toml", "np_edit": "demo_np_edit.toml"}


def run_demo(
    out: Path,
    overrides: list[str],
    train_tuples: int = TRAIN_TUPLES,
    eval_tuples: int = EVAL_TUPLES,
    base: Path = BASE,
    objective: str = "unpaired_cycle",
) -> dict[str, metrics.Table]:
    """All stages; returns the tables of figures by method and writes them and the contact sheet into `out`.

    Args:
        out: folder of everything that the demo makes.
        overrides: `section.key=value` for the training configuration.
        train_tuples: tuples in the training set.
        eval_tuples: held-out edits that are measured.
        base: diffusers folder of the frozen base.
        objective: a key of `RECIPES`.

    Raises:
        ValueError: an override is wrong, the folder was trained with other settings, or there is no critic where one is asked.
    """
    recipe = RECIPES[objective]
    if objective == "np_edit":
        overrides = commands.with_critic(base, overrides)
    _, resolved = commands.settings(out, recipe, base, overrides)  # what is wrong is told before anything is made
    if resolved.objective.criticised:
        check_critic(resolved)
    commands.write_data(out, world.write_dataset, ".png", {"train": train_tuples, "eval": eval_tuples})
    print(f"{train_tuples} training tuples (no targets) in {out / 'train'}, {eval_tuples} held-out edits in {out / 'eval'}")
    edits, seconds = commands.cache_train_edit(out, recipe, base, overrides, ["--batch-size", "16"])

    truths = world.load_scenes(out / "eval")
    files = commands.edited_files(edits, ".png")
    images = {edit.id: np.asarray(Image.open(path).convert("RGB")) for edit, path in zip(truths, files, strict=True)}
    tables = {**metrics.baselines(truths), "edited without pairs": metrics.evaluate(images, truths)}
    metrics.write_tables(out, tables)
    sheet.contact_sheet(out / "contact_sheet.png", truths, images, columns=8, rows=2)
    print("\n" + metrics.markdown(tables))
    report = write_report(out, edits)
    print(f"caching, training and editing took {seconds:.0f} s; look at {out / 'contact_sheet.png'} and, in a browser, at {report}")
    return tables


def write_report(out: Path, edits: Path) -> Path:
    """The page of all held-out edits with their scores, by a reader of colours and shapes in CLIP's stead, the worst first."""
    from byg_plugin.demo.reader import Reader
    from byg_plugin.evaluation import page, scores
    from byg_plugin.evaluation.items import from_manifest, with_files
    from byg_plugin.evaluation.metrics.base import Metric, Options
    from byg_plugin.evaluation.metrics.error import Error

    items = with_files(from_manifest(edits), out / "eval" / "truth", "reference")
    items = with_files(items, out / "eval" / "mask", "mask")
    made: dict[str, Metric] = {"read": Reader(), "error": Error(Options())}
    rows, _ = scores.score(items, made, out / "scores")
    report = out / "report.html"
    page.write_page(report, f"{len(items)} held-out edits of the tiny world", items, rows, "read_directional", True)
    return report


def main() -> None:
    """The command."""
    outs = {"unpaired_cycle": "demo_out", "np_edit": "demo_np_edit_out"}
    args = commands.parse("python -m byg_plugin.demo", __doc__ or "", outs, BASE)
    run_demo(args.out, args.set, base=args.base, objective=args.objective)


if __name__ == "__main__":
    _cli.run(main)
