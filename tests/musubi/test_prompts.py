"""Prompts of previews are looked at before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byg_plugin.config.loading import load_config
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi.prompts import check_prompts, source_frames
from tests.support.musubi_host import T2V, needs_host, open_tiny
from tests.support.musubi_runs import rig, write_config, write_roles, write_work

pytestmark = needs_host


def no_clip(*_: Any) -> list[Any]:
    raise AssertionError("a clip is asked for")


def write(folder: Path, text: str, name: str = "prompts.txt") -> str:
    """A file of prompts: `{f}` in it is the folder, which has a picture, a broken one and a broken clip."""
    Image.new("RGB", (20, 40), (200, 30, 30)).save(folder / "ok.png")
    for broken in ("bad.png", "bad.mp4"):
        (folder / broken).write_bytes(b"nope")
    (folder / name).write_text(text.replace("{f}", folder.as_posix()), encoding="utf-8")
    return str(folder / name)


GOOD = "make it snow --ci {f}/ok.png"
WRONG = {
    "no source": ("make it snow --w 64\n", "prompt 1 has no source; add --ci IMAGE"),
    "missing": (f"{GOOD}\nmake it snow --ci {{f}}/none.png\n", r"prompt 2 has the source \S*none.png, which is no file; add --ci"),
    "no image": ("make it snow --ci {f}/bad.png\n", r"prompt 1 has a source that cannot be used: \S*bad.png"),
    "a clip as an image": ("make it snow --ci {f}/bad.mp4\n", r"has the clip \S*bad.mp4 as an image: name it with --cn"),
    "no clip": ("make it snow --cn {f}/bad.mp4\n", r"cannot be used: \S*bad.mp4: no readable clip .*; replace it$"),
    "empty": ("", "no prompt in it: add lines like"),
    "comments": ("# make it snow\n\n", "no prompt in it: add lines like"),
    "too small": (f"{GOOD} --w 8 --h 8\n", "prompt 1 has width = 8: give --w as a whole number, 16 or more"),
    "guidance": (f"{GOOD} --g 4\n", r"has guidance_scale = 4.0: --g does nothing here: .*conditioning.guidance, .*--l"),
    "shift": (f"{GOOD} --fs 3\n", "has discrete_flow_shift = 3.0: --fs does nothing here, .*: leave it out"),
    "no frames": (f"{GOOD} --f 0\n", "has frame_count = 0: give --f"),
}


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_what_a_preview_would_stop_at_is_told(tmp_path: Path, text: str, says: str):
    host, path = open_tiny("flux"), write(tmp_path, text)
    with pytest.raises(ValueError, match=says) as caught:
        host.check_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"musubi.sample_prompts = {path}: ") and "\n" not in message and "remove its tuples" not in message


OTHER_FILES = {
    "p.json": ("{", "no prompts as the host reads them .JSONDecodeError"),
    "list.json": ('["make it snow", 5]', "no prompts as the host reads them .AssertionError"),
    "text.json": ('[{"prompt": "a", "control_image_path": ["{f}/ok.png"], "width": "64"}]', "has width = '64': give --w"),
    "p.toml": ("[prompt", "no prompts as the host reads them .TomlDecodeError"),
    "other.toml": ("a = 1", "no prompts as the host reads them .KeyError"),
    "p.jsonl": (GOOD, "the host reads .txt .a prompt each line., .toml and .json: rename it"),
    "p": (GOOD, "rename it"),
}


@pytest.mark.parametrize(("name", "text", "says"), [(name, *row) for name, row in OTHER_FILES.items()], ids=OTHER_FILES)
def test_files_that_the_host_does_not_read_are_told(tmp_path: Path, name: str, text: str, says: str):
    with pytest.raises(ValueError, match=says):
        open_tiny("flux").check_prompts(write(tmp_path, text, name))


def test_what_the_host_reads_is_taken(tmp_path: Path):
    host = open_tiny("flux")
    picture = (tmp_path / "ok.png").as_posix()
    lines = ("# a comment", f"{GOOD} --w 64 --h 48 --f 1 --d 3 --s 0 --l 4 --n ugly", "make it snow --i {f}/ok.png", "")
    host.check_prompts(write(tmp_path, "\n".join(lines)))
    host.check_prompts(write(tmp_path, json.dumps([{"prompt": "snow", "control_image_path": picture}, f"snow --ci {picture}"]), "p.json"))
    host.check_prompts(write(tmp_path, f'[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "snow"\nimage_path = "{picture}"\n', "p.toml"))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match="no prompts as the host reads them .UnicodeDecodeError"):
        check_prompts(str(tmp_path / "p.txt"), lambda path: b"\xff".decode(), no_clip)


def test_a_clip_without_frames_is_told(tmp_path: Path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="no frame can be decoded from it; replace it"):
        source_frames({"control_video_path": str(tmp_path / "a.mp4")}, 5, lambda *_: [])


def test_a_source_smaller_than_its_preview_is_scaled_up(tmp_path: Path):
    trainer = rig("flux").trainer
    write(tmp_path, "")
    pixels = trainer._source_pixels({"control_image_path": [str(tmp_path / "ok.png")]}, (48, 32), 1)
    assert pixels.shape == (1, 3, 1, 32, 48) and torch.allclose(pixels[0, 0], torch.tensor(200 / 127.5 - 1))
    with pytest.raises(ValueError, match=r"a prompt has a source that cannot be used: \S*bad.mp4.*go on with --resume"):
        rig(T2V).trainer._source_pixels({"control_video_path": str(tmp_path / "bad.mp4")}, (48, 32), 5)


def test_the_dry_run_looks_at_the_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_work(tmp_path, "flux")
    file = str(tmp_path / "dit.safetensors")
    options = {**dict.fromkeys(("vae", "text_encoder1", "text_encoder2"), file), "sample_prompts": write(tmp_path, "make it snow\n")}
    config = load_config(write_config(tmp_path, "flux", **options))
    write_roles(tmp_path, "flux", musubi._encoder_identity(config))
    open_tiny("flux")
    with pytest.raises(ValueError, match="prompt 1 has no source"):
        musubi.dry_run(config)
    write(tmp_path, GOOD)
    musubi.dry_run(config)
    assert "items with latents and texts: 3" in capsys.readouterr().out
