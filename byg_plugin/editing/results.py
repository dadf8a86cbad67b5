"""The files of a run's edits, and their lines in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from byg_plugin.data.buckets import Size
from byg_plugin.data.clips import write_clip
from byg_plugin.editing import manifest
from byg_plugin.editing.editor import Editor
from byg_plugin.editing.jobs import Job
from byg_plugin.images import save_png, side_by_side


class Results:
    """Writes what `pipe` makes of the jobs of one run into the folder `out`."""

    def __init__(self, out: Path, jobs: Sequence[Job], pipe: Editor, *, steps: int, schedule: str | None):
        self._in_files, self._in_manifest = (dict(values) for values in pipe.settings(steps, schedule))
        self._out, self._card = out, pipe.card
        self._made_anew = {file.name for job in jobs for file in job.files(out)}

    def save(self, job: Job, columns: Sequence[Sequence[Image.Image]], fps: float | None, *, seed: int, size: Size) -> None:
        """Write an edit, what was edited beside it, and its line.

        Args:
            job: what was asked for.
            columns: frames of source, edit and, where it was asked for, edit without guidance.
            fps: frames a second; None for an image.
            seed: of the noise.
            size: (width, height) of the edit.

        Raises:
            ValueError: a file cannot be written.
        """
        edit_file, pair_file = job.files(self._out)
        frames = None if fps is None else len(columns[0])
        asked = {"instruction": job.instruction, "seed": seed, "size": [*size] if frames is None else [*size, frames]}
        beside = [side_by_side(*images) for images in zip(*columns, strict=True)]
        try:
            if self._made_anew:
                manifest.take_out(self._out, self._made_anew)
                self._made_anew = set()
            for file, images in ((edit_file, columns[1]), (pair_file, beside)):
                if fps is None:
                    save_png(images[0], file, self._in_files | asked)
                else:
                    write_clip(file, images, fps, self._in_files | asked)
            edit = manifest.Edit(
                source=job.source,
                edit=edit_file,
                side_by_side=pair_file,
                instruction=job.instruction,
                **{name: getattr(job.item, name, None) for name in manifest.OF_TUPLE},
                seed=seed,
                size=size,
                frames=frames,
                fps=fps,
                settings=self._in_manifest,
                card=self._card,
            )
            manifest.append(self._out, edit)
        except OSError as error:
            raise ValueError(f"--out {self._out}: cannot write {job.name}: {error.strerror}; earlier edits are there") from error
