"""What the method and each of its parts is worth on clips, measured in the moving tiny world on two CPU cores.

    python -m benchmarks.video_world                       the reported study: every run, 3 seeds, table and plot
    python -m benchmarks.video_world --stage screen        the same on other data and shorter: what settings are chosen on
    python -m benchmarks.video_world --list                runs, what each changes, and what is done
    python -m benchmarks.video_world --table --plot        table and plot again, from the results alone

The runs, options and promises of benchmarks/tiny_world.py over configs/demo_video.toml: two experts, a LoRA each.
"""

from __future__ import annotations

from benchmarks import tiny_world
from benchmarks import tiny_world_report as report
from benchmarks import tiny_world_run as runs
from benchmarks.provenance import ROOT
from benchmarks.tiny_world import Stage, Subject
from byg_plugin import _cli
from byg_plugin.demo import video_world

# The committed rows' recipe, which was the demo's until it had smaller batches of a cheaper step.
EVERY_TERM = (
    "objective.lambda_prior=0.3",
    "objective.alpha=4.0",
    "objective.ema_decay=0.98",
    "objective.identity_warmup_steps=250",
    "objective.identity_rate=1.0",
    "train.steps=700",
    "train.batch_size=32",
    "train.global_batch_size=32",
    "train.lr=8e-3",
    'train.mixed_precision="bf16"',
)

SUBJECT = Subject(
    name="video_world",
    world=runs.CLIPS,
    worlds={"recolour": video_world.DEFAULT_TYPES, "six": video_world.EDIT_TYPES},
    # The demo's own data have seed 0.
    stages={
        "screen": Stage(split="tune", data_seed=1, eval_edits=48, curve_edits=48, scale=0.4, minutes=3),
        "report": Stage(split="report", data_seed=2, eval_edits=128, curve_edits=64, scale=1.0, minutes=8),
    },
    edits_per_type=192,
    config=ROOT / "configs" / "demo_video.toml",
    base=ROOT / "byg_plugin" / "demo" / "video_base",
    page=report.CLIPS,
    groups=("six_",),
    settings=EVERY_TERM,
)


def main(words: list[str] | None = None) -> None:
    """The command; see the module."""
    tiny_world.main(words, SUBJECT, __doc__)


if __name__ == "__main__":
    _cli.run(main)
