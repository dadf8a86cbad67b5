"""Progress bars: a terminal gets a bar, a log gets lines."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest

from byg_plugin import progress
from byg_plugin.models.files import from_folder
from byg_plugin.progress import Progress
from tests.support import ROOT
from tests.support.tiny import model_folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(file: io.StringIO, steps: int, **options: Any) -> str:
    with Progress(total=steps, desc="train", file=file, **options) as bar:
        for step in range(steps):
            bar.set_postfix(loss=step)
            bar.update(1)
    return file.getvalue()


def test_a_log_gets_the_first_and_the_last_line_of_a_short_run_however_many_steps():
    said = work(io.StringIO(), 5000)
    lines = said.splitlines()
    assert "\r" not in said and said.endswith("\n")
    assert len(lines) == 2
    assert "0/5000" in lines[0]
    assert "5000/5000" in lines[1] and "loss=4999" in lines[1]


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    file = io.StringIO()
    bar = Progress(total=600, desc="train", file=file)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0  # its first line is there already
    for _ in range(300):  # a step a second: five minutes
        now[0] += 1
        bar.update(1)
    bar.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[2].partition("/")[0] for line in lines] == ["0", "60", "120", "180", "240", "300"]
    assert progress._EVERY == 60


def test_an_interrupted_run_says_how_far_it_came():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(total=10, file=file) as bar:
        bar.update(3)
        raise KeyboardInterrupt
    assert "3/10" in file.getvalue().splitlines()[-1]


def test_a_terminal_keeps_its_bar():
    said = work(Terminal(), 50, mininterval=0)
    assert "\r" in said and "50/50" in said
    assert said.count("\n") == 1


def test_a_disabled_bar_says_nothing():
    assert work(io.StringIO(), 5, disable=True) == ""


def test_over_an_iterable():
    file = io.StringIO()
    assert list(Progress(range(4), file=file)) == [0, 1, 2, 3]
    assert "4/4" in file.getvalue().splitlines()[-1]


def test_a_word_in_between_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]):
    with Progress(total=2) as bar:
        bar.update(1)
        Progress.write("between", file=sys.stderr)
        Progress.write("aloud")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 3 and "0/2" in lines[0] and lines[1] == "between" and "1/2" in lines[2]
    assert said.out == "aloud\n" and "\r" not in said.err


def test_no_command_makes_bars_of_its_own():
    """A bar that is not `Progress` fills logs with carriage returns."""
    ours = [path for room in ("byg_plugin", "dataset_tools", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    assert len(ours) > 100
    assert [path.name for path in ours if re.search(r"(import|from) tqdm", path.read_text(encoding="utf-8"))] == ["progress.py"]


def test_libraries_load_without_bars_into_a_log_and_are_as_they_were_afterwards(capsys: pytest.CaptureFixture[str]):
    from transformers import T5EncoderModel
    from transformers.utils import logging

    before, folder = logging.is_progress_bar_enabled(), model_folder()
    capsys.readouterr()
    from_folder(T5EncoderModel, folder, "t5")
    assert "\r" not in capsys.readouterr().err and logging.is_progress_bar_enabled() == before
    with pytest.raises(KeyError), progress.quiet_loading():
        assert not logging.is_progress_bar_enabled()
        raise KeyError
    assert logging.is_progress_bar_enabled() == before
