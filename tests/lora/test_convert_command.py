"""The command that converts and checks LoRA files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from byg_plugin import convert_lora
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from tests.support.lora_files import METADATA, kohya, peft_lora, status


def test_the_command_converts_keeps_metadata_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors, _ = peft_lora()
    source, out = tmp_path / "lora.safetensors", tmp_path / "musubi.safetensors"
    lora_files.write_lora(source, tensors, METADATA)
    assert status(str(source), "--to", "musubi", "--out", str(out)) == 0
    converted, metadata = lora_files.read_lora(out)
    assert metadata == METADATA
    assert lora_formats.detect_format(converted) == "musubi"
    before = out.read_bytes()
    for name in ("x.bin", "x"):
        assert status(str(source), "--to", "comfyui", "--out", str(tmp_path / name)) == 2
        assert "a LoRA is a .safetensors file" in capsys.readouterr().err and not (tmp_path / name).exists()
    assert status(str(source), "--to", "comfyui", "--out", str(out)) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert status(str(source), "--to", "comfyui", "--out", str(out), "--overwrite") == 0
    assert status(str(source), "--to", "comfyui") == 2
    assert status(str(tmp_path / "no.safetensors"), "--check") == 2


def test_the_users_folder_is_no_way_around_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """bash leaves the `~` of `--out=~/x`, and Windows' shells leave every one."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    lora_files.write_lora(tmp_path / "lora.safetensors", peft_lora()[0], METADATA)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    assert status("~/lora.safetensors", "--to", "musubi", "--out=~/mine.safetensors") == 2
    assert "mine.safetensors exists" in capsys.readouterr().err
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    assert status("~/lora.safetensors", "--to", "musubi", "--out=~/other.safetensors") == 0
    assert (tmp_path / "other.safetensors").is_file()


def test_the_command_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = tmp_path / "lora.safetensors"
    lora_files.write_lora(source, peft_lora()[0], METADATA)
    assert status(str(source), "--check", "--tools", "diffusers", "comfyui") == 0
    assert status(str(source), "--check", "--modules") == 1
    shown = capsys.readouterr().out
    assert "musubi: loads 0, loses 39" in shown
    assert "needs a node" in shown
    assert "loaded  transformer.single_transformer_blocks.2.proj_out" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--check", "--out", "x", "--overwrite", "--allow-loss"), "--check has no use for --out, --overwrite, --allow-loss: leave it out"),
        (
            ("--to", "musubi", "--out", "x.safetensors", "--tools", "musubi", "--modules"),
            "--to has no use for --tools, --modules: leave it out",
        ),
    ],
)
def test_options_of_the_other_mode_are_refused(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    assert status("none.safetensors", *words) == 2 and says in capsys.readouterr().err


def test_the_command_runs_as_a_file_from_anywhere(tmp_path: Path):
    lora_files.write_lora(tmp_path / "lora.safetensors", kohya(), METADATA)
    script = Path(convert_lora.__file__).resolve()
    command = [sys.executable, str(script), "lora.safetensors", "--check", "--tools", "comfyui"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "comfyui: loads 29, loses 0" in done.stdout
