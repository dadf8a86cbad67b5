"""The demo in motion: data, caching, training of both experts, editing and measuring of tiny clips.

    python -m byg_plugin.demo.video --out demo_video_out

The same commands as for images, with Wan in place of FLUX. Clips are measured as they lie in the .mp4 files that edit.py
writes; ground truth and copy go through such files too. An interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from byg_plugin import _cli
from byg_plugin.data.clips import read_clip, write_clip
from byg_plugin.demo import commands, metrics, sheet, video_metrics, video_world

TRAIN_TUPLES, EVAL_TUPLES = 384, 48
BASE = Path(__file__).parent / "video_base"


def run_demo(
    out: Path, overrides: list[str], train_tuples: int = TRAIN_TUPLES, eval_tuples: int = EVAL_TUPLES, base: Path = BASE
) -> dict[str, metrics.Table]:
    """All stages; returns the tables of figures by method and writes them, the contact sheet and the clips into `out`.

    Args:
        out: folder of everything that the demo makes.
        overrides: `section.key=value` for the training configuration.
        train_tuples: tuples in the training set.
        eval_tuples: held-out edits that are measured.
        base: diffusers folder of the frozen base.
    """
    commands.settings(out, "demo_video.toml", base, overrides)  # a wrong one is told before anything is made
    commands.write_data(out, video_world.write_dataset, ".mkv", {"train": train_tuples, "eval": eval_tuples})
    print(f"{train_tuples} training clips (no targets) in {out / 'train'}, {eval_tuples} held-out edits in {out / 'eval'}")
    # Wan's own native size is no clip's here.
    edits, seconds = commands.cache_train_edit(out, "demo_video.toml", base, overrides, ["--resolution", "64"])

    truths = video_world.load_scenes(out / "eval")
    files = commands.edited_files(edits, ".mp4")
    clips = {edit.id: _read(path) for edit, path in zip(truths, files, strict=True)}
    exact = {
        "ground truth": {edit.id: video_world.render(edit.after, edit.motion) for edit in truths},
        "copy the source": {edit.id: video_world.render(edit.before, edit.motion) for edit in truths},
    }
    tables = {name: video_metrics.evaluate(_through_mp4(made), truths) for name, made in exact.items()}
    tables["edited without pairs"] = video_metrics.evaluate(clips, truths)
    metrics.write_tables(out, tables)
    sheet.clip_contact_sheet(out / "contact_sheet.png", truths, clips)
    print("\n" + metrics.markdown(tables))
    print(f"caching, training and editing took {seconds:.0f} s; look at {out / 'contact_sheet.png'} and the clips in {edits}")
    return tables


def _read(path: Path) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in read_clip(path, video_world.FRAMES)])


def _through_mp4(clips: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Clips as they come back from files like those of the edits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        back = {}
        for name, clip in clips.items():
            write_clip(path, [Image.fromarray(frame) for frame in clip], video_world.FPS)
            back[name] = _read(path)
    return back


def main() -> None:
    """The command."""
    args = commands.parse("python -m byg_plugin.demo.video", __doc__ or "", {"unpaired_cycle": "demo_video_out"}, BASE)
    run_demo(args.out, args.set, base=args.base)


if __name__ == "__main__":
    _cli.run(main)
