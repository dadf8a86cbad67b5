"""The files of a run's edits, and their lines in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from byg_plugin.data.buckets import Size
from byg_plugin.data.clips import write_clip
from byg_plugin.editing import manifest
from byg_plugin.editing.editor import Editor
from byg_plugin.editing.jobs import Job, Sized
from byg_plugin.images import save_png, side_by_side


class Results:
    """Writes what `pipe` makes of jobs into the folder `out`."""

    def __init__(self, out: Path, pipe: Editor, *, steps: int, schedule: str | None):
        self._in_files, self._in_manifest = (dict(values) for values in pipe.settings(steps, schedule))
        self._out, self._card = out, pipe.card
        self._made_anew: set[str] = set()

    def start(self, jobs: Sequence[Job]) -> None:
        """Say what will be written: with the first of it, the lines of all those files go."""
        self._made_anew = {file.name for job in jobs for file in job.files(self._out)}

    def without_done(self, jobs: Sequence[Sized], *, first_seed: int, frames: Callable[[Path], int | None], since: float) -> list[Sized]:
        """The jobs that the folder has not. Of the others the manifest tells source, words, size, seed and settings, and files are there.

        Args:
            jobs: (size of the edit, index, job).
            first_seed: job i has this plus i.
            frames: of the edit of a source; None of an image.
            since: time (`st_mtime`) of the LoRA. What is older than it, or than its source, was made of others of these names.
        """
        if not (self._out / manifest.NAME).exists():
            return list(jobs)
        done = {edit.edit.name: edit for edit in manifest.read_manifest(self._out)}

        def made(size: Size, index: int, job: Job) -> bool:
            edit = done.get(job.files(self._out)[0].name)
            least = max(since, job.source.stat().st_mtime)
            if edit is None or not all(file.is_file() and file.stat().st_mtime >= least for file in (edit.edit, edit.side_by_side)):
                return False
            wanted = self._line(job, seed=first_seed + index, size=size, frames=frames(job.source), fps=edit.fps)
            return manifest.same(edit, wanted, self._out)

        return [one for one in jobs if not made(*one)]

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
            manifest.append(self._out, self._line(job, seed=seed, size=size, frames=frames, fps=fps))
        except OSError as error:
            raise ValueError(f"--out {self._out}: cannot write {job.name}: {error.strerror}; earlier edits are there") from error

    def _line(self, job: Job, *, seed: int, size: Size, frames: int | None, fps: float | None) -> manifest.Edit:
        edit_file, pair_file = job.files(self._out)
        return manifest.Edit(
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
