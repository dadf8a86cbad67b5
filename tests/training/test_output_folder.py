"""An output folder: one run's alone, whole after a kill, and a full disk that is told with what works."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from byg_plugin import folders, train_network
from byg_plugin.config.sections import Config
from byg_plugin.models.flux import FluxFamily
from byg_plugin.musubi import host as musubi
from byg_plugin.training import checkpoint, loop, preview
from tests.support import ROOT
from tests.support.tiny import curve, in_child, make_trainer, run_config

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and devices of a POSIX system")


def train(config: Config, resume: str | None = None, **options: Any) -> None:
    train_network.train(config, FluxFamily(config), torch.device("cpu"), resume, **options)


# --- one run's alone ---

HOLD = """
import sys, time
from pathlib import Path
from byg_plugin.folders import alone_in
with alone_in(Path(sys.argv[1]), "output.dir"):
    print("held", flush=True)
    time.sleep(60)
"""


ORPHAN = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(2)
"""


def hold(folder: Path, code: str = HOLD) -> subprocess.Popen[str]:
    """Another process that has the folder (or file)."""
    command = [sys.executable, "-c", code, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@needs_posix
def test_a_second_training_is_refused_with_the_first_one_s_process_and_host(tmp_path: Path):
    config = run_config(tmp_path / "out", train={"steps": 1})
    process = hold(tmp_path / "out")
    try:
        held = json.loads((tmp_path / "out" / folders.HOLDER).read_text())
        assert held["pid"] == process.pid and held["host"]
        with pytest.raises(
            ValueError, match=rf"output.dir = .*out is in use by another training \(process {process.pid} on {held['host']} since"
        ):
            train(config)
        assert not (tmp_path / "out/log.jsonl").exists() and not (tmp_path / "out/checkpoints").exists()
        assert json.loads((tmp_path / "out" / folders.HOLDER).read_text()) == held, "the holder's file is the holder's"
    finally:
        process.kill()
        process.wait()
    train(config)
    assert (tmp_path / "out/byg_lora.safetensors").is_file() and not (tmp_path / "out" / folders.HOLDER).exists()
    with folders.alone_in(tmp_path / "out", "output.dir"):
        pass  # given back by a run that has ended


@needs_posix
def test_a_killed_run_s_loader_process_is_waited_for(tmp_path: Path):
    """With some versions of filelock it shares the lock, and it looks for its parent only now and then."""
    gone = hold(tmp_path)
    gone.kill()
    gone.wait()
    assert json.loads((tmp_path / folders.HOLDER).read_text())["pid"] == gone.pid, "a kill leaves the holder's file"
    orphan = hold(tmp_path / folders.LOCK, ORPHAN)
    began = time.monotonic()
    with folders.alone_in(tmp_path, "output.dir"):
        assert time.monotonic() - began < 15
        assert json.loads((tmp_path / folders.HOLDER).read_text())["pid"] == os.getpid()
    assert orphan.wait() == 0


@needs_posix
def test_one_process_cannot_have_a_folder_twice_and_an_error_gives_it_back(tmp_path: Path):
    with pytest.raises(KeyError), folders.alone_in(tmp_path, "output.dir"):
        with (
            pytest.raises(ValueError, match=f"in use by another training .process {os.getpid()} on"),
            folders.alone_in(tmp_path, "output.dir"),
        ):
            raise AssertionError("twice")
        raise KeyError
    with folders.alone_in(tmp_path, "output.dir"):
        (tmp_path / folders.HOLDER).write_text("[" * 100_000)  # a holder's file that cannot be read is no reason to fall over
        with (
            pytest.raises(ValueError, match="in use by another training .see training.lock there"),
            folders.alone_in(tmp_path, "output.dir"),
        ):
            raise AssertionError("twice")


@needs_posix
@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: str
):
    import errno
    import fcntl

    def none(*args: Any) -> None:
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), folders.alone_in(tmp_path / "out", "output.dir"):
        assert "this file system has no locks; a second training in it would not be noticed" in caplog.text
    assert not any((tmp_path / "out").iterdir())


@needs_posix
def test_the_musubi_host_s_folder_is_one_run_s_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), output_name="tiny")
    monkeypatch.setattr(musubi, "prepare", lambda config, resume: (None, args, 1, None))
    trainer = SimpleNamespace(train=lambda _: seen.append((tmp_path / "out" / folders.HOLDER).exists()))
    monkeypatch.setattr(musubi, "make_trainer", lambda host, config, launch: trainer)
    config = run_config(tmp_path / "unused_config")
    musubi.train(config)
    process = hold(tmp_path / "out")
    try:
        with pytest.raises(ValueError, match="musubi.output_dir = .* is in use by another training"):
            musubi.train(config)
        monkeypatch.setenv("RANK", "1")
        musubi.train(config)
    finally:
        process.kill()
        process.wait()
    assert seen == [True, True]


# --- left behind ---


def killed_after_step(config: Config, step: int) -> None:
    def work() -> None:
        trainer = make_trainer(config)
        trainer.on_step = lambda t: os.kill(os.getpid(), signal.SIGKILL) if t.step == step else None
        trainer.run()

    assert in_child(work) == -signal.SIGKILL


def test_a_second_start_before_the_first_checkpoint_begins_the_logs_anew(tmp_path: Path):
    config = run_config(
        tmp_path / "out",
        dataset={"validation_items": 1},
        train={"steps": 4, "save_every": 0, "validate_every": 1},
        sample={"every": 4, "steps": 1},
    )
    killed_after_step(config, 3)
    assert [line["step"] for line in curve(tmp_path / "out")] == [1, 2, 3]
    (tmp_path / "out/previews/step-000000/000.png").write_bytes(b"of the first start")
    make_trainer(config).run()
    for name in ("log.jsonl", "validation.jsonl"):
        assert [line["step"] for line in curve(tmp_path / "out", name)] == [1, 2, 3, 4]
    assert (tmp_path / "out/previews/step-000000/000.png").read_bytes() != b"of the first start"


FOREIGN = ["no JSON", "[1, 2]", '{"loss": 1}', '{"step": "3"}', '{"step": true}', "[" * 100_000, "caf\udce9", "null"]


@pytest.mark.parametrize("name", ["log.jsonl", "validation.jsonl"])
def test_lines_of_others_in_a_log_stay_where_they_are(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    config = run_config(tmp_path / "out", dataset={"validation_items": 1}, train={"steps": 4, "validate_every": 1})
    make_trainer(config).run()
    path = tmp_path / "out" / name
    ours = path.read_text().splitlines()
    mixed = [*ours[:2], *FOREIGN, *ours[2:]]
    path.write_text("\n".join(mixed) + '\n{"step": 2, "cut', encoding="utf-8", errors="surrogateescape")
    shutil.rmtree(tmp_path / "out/checkpoints/step-000004")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(config, "latest")
    assert f"{name}: 8 lines are not a record of a step and are left as they are, e.g. 'no JSON'" in caplog.text
    trainer.run()
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    assert lines[: 2 + len(FOREIGN)] == [*ours[:2], *FOREIGN]
    assert [json.loads(line)["step"] for line in lines[2 + len(FOREIGN) :]] == [3, 4]


PREVIEWED: dict[str, Any] = {"train": {"steps": 2, "save_every": 2}, "sample": {"every": 2, "items": 2, "steps": 1}}


@pytest.mark.parametrize("left", ["partial_file", "one_of_two", "partial_folder"])
def test_a_preview_that_a_kill_cut_off_is_made(tmp_path: Path, left: str):
    """The first two are what an earlier version leaves behind."""
    config = run_config(tmp_path / "out", **PREVIEWED)
    make_trainer(config).run()
    previews = preview.folder(config.output, 2)
    wanted = {path.name: path.read_bytes() for path in previews.iterdir()}
    if left == "partial_folder":
        previews.rename(previews.with_name(f".partial-{previews.name}-1"))
        (previews.parent / ".partial-file").touch()
    else:
        (previews / "001.png").unlink()
    if left == "partial_file":
        (previews / "000.png").rename(previews / ".partial-000.png")
    make_trainer(config, "latest").run()
    assert {path.name: path.read_bytes() for path in previews.iterdir()} == wanted
    assert not list(previews.parent.glob(".partial*"))


def test_a_whole_preview_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = run_config(tmp_path / "out", **PREVIEWED)
    make_trainer(config).run()
    monkeypatch.setattr(preview, "_edits", lambda *args: pytest.fail("made again"))
    monkeypatch.setattr(preview.logger, "warning", lambda *args: pytest.fail(str(args)))
    make_trainer(config, "latest").run()


@needs_posix
def test_a_kill_while_a_preview_is_written_leaves_no_folder_of_its_name(tmp_path: Path):
    config = run_config(tmp_path / "out", **PREVIEWED)

    def work() -> None:
        original = preview.save_png

        def save(image: Any, path: Path, settings: dict[str, Any]) -> None:
            original(image, path, settings)
            if settings["step"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        preview.save_png = save
        make_trainer(config).run()

    assert in_child(work) == -signal.SIGKILL
    assert not preview.folder(config.output, 2).exists()
    make_trainer(config, "latest").run()
    assert sorted(path.name for path in preview.folder(config.output, 2).iterdir()) == ["000.png", "001.png"]
    assert sorted(path.name for path in preview.folder(config.output, 2).parent.iterdir()) == ["step-000000", "step-000002"]


# --- a full disk ---

AGAIN = "Make room, then run the same command again: there is no checkpoint to go on from yet"
LATEST = r"Make room, then go on with --resume latest; or go on in another output.dir with --resume .*step-000002"


@needs_posix
@pytest.mark.parametrize("name", ["config.json", "run.json", "log.jsonl"])
def test_a_full_disk_at_the_start(tmp_path: Path, name: str):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    config = run_config(tmp_path / "out", train={"steps": 2})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text("someone's\n")
    (tmp_path / "out" / f".partial-{name}").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"cannot write .*{name}: No space left on device. {AGAIN}"):
        train(config)
    train(config)
    lines = (tmp_path / "out/log.jsonl").read_text().splitlines()
    assert lines[0] == "someone's" and [json.loads(line)["step"] for line in lines[1:]] == [1, 2]


@needs_posix
@pytest.mark.parametrize(("name", "step", "remedy"), [("log.jsonl", 1, AGAIN), ("log.jsonl", 3, LATEST), ("validation.jsonl", 3, LATEST)])
def test_a_full_disk_at_a_line_of_a_log(tmp_path: Path, name: str, step: int, remedy: str):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    config = run_config(tmp_path / "out", dataset={"validation_items": 1}, train={"steps": 4, "validate_every": 1})
    trainer = make_trainer(config)
    original = trainer._optimizer_step

    def work(micro_batches: Any) -> Any:
        if trainer.step == step - 1:
            (tmp_path / "out" / name).unlink(missing_ok=True)
            (tmp_path / "out" / name).symlink_to("/dev/full")
        return original(micro_batches)

    trainer._optimizer_step = work  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"cannot write .*{name}: No space left on device. {remedy}$"):
        trainer.run()
    (tmp_path / "out" / name).unlink()
    make_trainer(config, "latest" if remedy == LATEST else None).run()


@needs_posix
def test_no_byte_can_be_written_any_more(tmp_path: Path):
    """By the system's own limit on the size of files, whatever is written next: a line, and no traceback."""
    import resource

    config = run_config(tmp_path / "out", train={"steps": 6, "save_every": 2, "log_every": 100})

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer = make_trainer(config)
        trainer.on_step = lambda t: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)) if t.step == 3 else None
        try:
            trainer.run()
        except ValueError as error:
            os.write(pipe, str(error).encode())  # a pipe has no size
            raise SystemExit(2) from error

    reader, pipe = os.pipe()
    assert in_child(work) == 2
    os.close(pipe)
    message = os.read(reader, 4096).decode()
    os.close(reader)
    assert "cannot write" in message and "step-000004" in message and "go on with --resume latest" in message
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000002"]
    make_trainer(config, "latest").run()


def test_a_tracker_that_cannot_write_ends_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TensorBoard's writer raises what happened in its thread, again when it is closed."""
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    config = run_config(tmp_path / "out", train={"steps": 2, "tracker": "tensorboard"})
    monkeypatch.setattr(SummaryWriter, "flush", full)
    monkeypatch.setattr(TensorBoardTracker, "finish", full)
    with pytest.raises(ValueError, match=rf"cannot write .*out \(train.tracker\): No space left on device. {AGAIN}"):
        train(config)
    monkeypatch.undo()
    monkeypatch.setattr(SummaryWriter, "__init__", full)
    with pytest.raises(ValueError, match="train.tracker = 'tensorboard' cannot write into output.dir"):
        train(config)


def test_curves_of_a_killed_start_are_hidden(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(tmp_path / "out", train={"steps": 4, "tracker": "tensorboard"})
    train(config)
    train(config, str(tmp_path / "out/checkpoints/step-000002"), discard_later=True)
    reader = EventAccumulator(str(tmp_path / "out/byg"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("loss")] == [1, 2, 3, 4]


def test_only_the_first_process_clears(tmp_path: Path):
    """The others would rename under its hands."""
    config = run_config(tmp_path / "out", train={"steps": 1})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text('{"step": 1}\n')
    trainer = SimpleNamespace(accelerator=SimpleNamespace(wait_for_everyone=lambda: None, is_main_process=False), config=config)
    loop.Trainer._clear_later(trainer)  # type: ignore[arg-type]
    assert (tmp_path / "out/log.jsonl").read_text() == '{"step": 1}\n'
