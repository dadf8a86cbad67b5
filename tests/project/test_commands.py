"""The commands as a user starts them: files run by path, errors as one line, nothing loaded that is not needed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin import _cli
from tests.support import ROOT
from tests.support.tiny import curve, in_child, model_folder, run_config, workspace, write_tuples

SCRIPTS = ("train_network", "cache_latents", "cache_text_encoder_outputs", "edit", "evaluate", "convert_lora")


def toml_of(raw: dict[str, dict[str, Any]]) -> str:
    """JSON's strings, numbers and booleans are TOML's."""
    lines = []
    for section, values in raw.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None)]
    return "\n".join(lines)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(toml_of(run_config(tmp_path / "out").model_dump(mode="json")), encoding="utf-8")
    return path


def run(script: str, *arguments: Any, log: Path, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """A command file in a forked child, as its own `__main__`: exit code, and what it printed."""
    log.unlink(missing_ok=True)
    path = ROOT / "byg_plugin" / f"{script}.py"

    def work() -> None:
        if before is not None:
            before()
        os.chdir(log.parent)
        sys.argv = [str(path), *map(str, arguments)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return in_child(work, log), log.read_text(encoding="utf-8")


def one_line_error(said: str) -> str:
    """The error line; a traceback is our defect."""
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")] or [f"no error line in: {said}"]
    return said[said.index(line) :]


# --- how a command ends ---


def ended(work: Callable[[], object], log: Path) -> tuple[int, str]:
    """`_cli.run(work)` in a child: exit code, and what it printed."""
    return in_child(lambda: _cli.run(work), log), log.read_text(encoding="utf-8")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_out_of_memory_names_what_needs_less(tmp_path: Path):
    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.99 GiB. Of the allocated memory 1 GiB "
        "is allocated by PyTorch.\nIf reserved"
    )
    code, said = ended(raising(torch.OutOfMemoryError(text)), tmp_path / "log")
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith("error: CUDA out of memory. Tried to allocate 20.00 GiB.") and "allocated by" not in line
    levers = ("model.quantization", "dataset.resolution", "objective.frozen_batch = 1", "model.gradient_checkpointing = true")
    assert all(lever in line for lever in (*levers, "--resolution", "--quantization", "--batch-size")), line
    assert one_line_error(said)


def test_another_runtime_error_keeps_its_traceback(tmp_path: Path):
    code, said = ended(raising(RuntimeError("shapes differ")), tmp_path / "log")
    assert code not in (0, 2) and "Traceback" in said and "RuntimeError: shapes differ" in said


def test_a_file_that_may_not_be_opened_is_named_with_the_reason(tmp_path: Path):
    code, said = ended(raising(PermissionError(13, "Permission denied", "photos/a.png")), tmp_path / "log")
    assert code == 2 and said == "error: photos/a.png: Permission denied\n"
    code, said = ended(lambda: (tmp_path / "none").read_bytes(), tmp_path / "log2")
    assert code == 2 and said == f"error: {tmp_path / 'none'}: No such file or directory\n"
    code, said = ended(raising(OSError("nobody knows which file")), tmp_path / "log3")
    assert code != 2 and "Traceback" in said


def test_a_full_disk_is_a_line_also_where_nobody_names_the_file(tmp_path: Path):
    code, said = ended(raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), tmp_path / "log")
    assert code == 2 and one_line_error(said) == "error: a file could not be written: No space left on device\n"


def test_a_value_error_of_another_library_keeps_its_traceback(tmp_path: Path):
    code, said = ended(lambda: json.loads("{"), tmp_path / "log")
    assert code not in (0, 2) and "Traceback" in said and "JSONDecodeError" in said
    code, said = ended(lambda: _cli.run(raising(ValueError("not ours"))), tmp_path / "log2")
    assert code not in (0, 2) and "ValueError: not ours" in said


def test_a_value_error_of_ours_is_a_line_also_where_a_library_raised_its_cause(tmp_path: Path):
    from byg_plugin.config.loading import load_config, parse_config

    code, said = ended(lambda: parse_config({"lora": {"rank": 0}}), tmp_path / "log")
    assert code == 2 and "lora.rank = 0" in one_line_error(said)
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    code, said = ended(lambda: load_config(tmp_path / "bad.toml"), tmp_path / "log2")
    assert code == 2 and "not valid TOML" in one_line_error(said)


class Broken(torch.utils.data.Dataset):
    def __init__(self, work: Callable[[], object]):
        self.work = work

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return self.work()


def test_a_value_error_from_a_loader_process_is_whose_it_is(tmp_path: Path):
    from byg_plugin.config.loading import load_config

    def load(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: list(torch.utils.data.DataLoader(Broken(work), num_workers=1))

    code, said = ended(load(lambda: load_config("none.toml")), tmp_path / "log")
    assert (code, said) == (2, "error: --config none.toml: no such file\n")
    code, said = ended(load(lambda: json.loads("{")), tmp_path / "log2")
    assert code not in (0, 2) and "Traceback" in said


def test_a_defect_exits_with_1_in_a_real_process(tmp_path: Path):
    code = "import json; from byg_plugin import _cli; _cli.run(lambda: json.loads('{'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_console_that_lacks_letters_does_not_end_a_run():
    code = "from byg_plugin import _cli; _cli.run(lambda: print('caption: \\u96ea'))"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == b"caption: \\u96ea"


# --- real processes ---


def test_help_of_every_command_by_path_from_another_folder(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    processes = {
        script: subprocess.Popen(
            [sys.executable, str(ROOT / "byg_plugin" / f"{script}.py"), "--help"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    }
    for script, process in processes.items():
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "usage:" in out, (script, error)
        assert "--lora" in out if script in ("edit",) else "--config" in out or script in ("convert_lora", "evaluate")


def test_a_command_started_from_the_clone_does_not_import_from_its_own_folder(tmp_path: Path, toml: Path):
    """`byg_plugin/data`, `byg_plugin/images.py`, ... must not shadow top-level modules."""
    code = (
        "import runpy, sys; sys.argv = ['byg_plugin/train_network.py', '--config', sys.argv[1], '--print-config'];"
        "sys.path[0] = 'byg_plugin'; runpy.run_path('byg_plugin/train_network.py', run_name='__main__');"
        "assert not [p for p in sys.path if p.rstrip('/').endswith('byg_plugin')], sys.path;"
        "heavy = {'torch', 'diffusers', 'transformers'} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(toml)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["steps"] == 6


# --- the whole way ---


def test_caching_training_and_editing_by_the_commands_alone(tmp_path: Path):
    write_tuples(tmp_path)
    config = run_config(tmp_path / "out", dataset={"tuples": str(tmp_path / "tuples.jsonl"), "cache_dir": str(tmp_path / "cache")})
    toml, log = tmp_path / "run.toml", tmp_path / "log"
    toml.write_text(toml_of(config.model_dump(mode="json")), encoding="utf-8")
    code, said = run("train_network", "--config", toml, log=log)
    assert code == 2
    error = one_line_error(said)
    assert re.search("run .*cache_latents", error) and re.search("run .*cache_text_encoder_outputs", error), error
    assert not (tmp_path / "out" / "log.jsonl").exists()
    for script, counted in (("cache_latents", "4 images encoded"), ("cache_text_encoder_outputs", "13 texts encoded")):
        code, said = run(script, "--config", toml, log=log)
        assert code == 0 and counted in said, said
    code, said = run("train_network", "--config", toml, "--set", "train.steps=3", log=log)
    assert code == 0 and "LoRA: " in said, said
    assert [line["step"] for line in curve(tmp_path / "out")] == [1, 2, 3]
    lora = tmp_path / "out" / "byg_lora-ema.safetensors"
    arguments = ["--source", tmp_path / "photo2.png", "--instruction", "add the snow", "--out", tmp_path / "edits", "--steps", 1]
    code, said = run("edit", "--config", toml, "--lora", lora, *arguments, log=log)
    assert code == 0 and "1 edits in" in said, said
    assert (tmp_path / "edits" / "photo2.png").is_file()
    code, said = run("train_network", "--config", toml, log=log)
    assert code == 2 and "already has checkpoints up to step-000003" in one_line_error(said)
    (tmp_path / "out/checkpoints/step-000003/state.json").write_text("[]", encoding="utf-8")
    code, said = run("train_network", "--config", toml, "--set", "train.steps=3", "--resume", "latest", log=log)
    advised = re.search(r"go on with --resume (\S+step-000002) --discard-later", one_line_error(said))
    assert code == 2 and advised, said
    again = ["--set", "train.steps=3", "--resume", advised[1], "--discard-later"]
    code, said = run("train_network", "--config", toml, *again, log=log)
    assert code == 0 and [line["step"] for line in curve(tmp_path / "out")] == [1, 2, 3], said


# --- looking without training ---


def test_print_config_is_resolved_and_loads_nothing(toml: Path, tmp_path: Path):
    code, said = run(
        "train_network", "--config", toml, "--print-config", "--set", "train.steps=7", "--set", "lora.rank=2", log=tmp_path / "log"
    )
    assert code == 0, said
    config = json.loads(said)
    assert config["train"]["steps"] == 7 and config["lora"]["rank"] == 2 and config["objective"]["lambda_id"] == 0.2
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_would_be_trained(toml: Path, tmp_path: Path):
    code, said = run("train_network", "--config", toml, "--dry-run", "--set", "dataset.validation_items=1", log=tmp_path / "log")
    assert code == 0, said
    assert "tuples: 3 to train, 2 held out" in said and "in bucket" in said
    # 2 double blocks of 12 and 2 single ones of 5; 2 x 16 image tokens and 8 of text.
    assert "rank 4, 34 modules" in said and "40 tokens" in said
    assert "[estimate" in said and "GiB  sum" in said and "LoRA gradients (float32)" in said
    assert "instruction: add the snow" in said
    assert (tmp_path / "out" / "dry_run_sample.png").is_file()
    assert not (tmp_path / "out" / "checkpoints").exists()


# --- errors ---


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["train.stepps=3"], ["unknown key train.stepps = 3", "did you mean train.steps?"]),
        (["train.learning_rate=3"], ["did you mean train.lr?"]),
        (["lora.rank=0"], ["lora.rank = 0"]),
        (['train.lr="fast"'], ["train.lr = 'fast'"]),
        (["objective.t_min=0.5", "objective.t_max=0.5"], ["the range of t is empty"]),
        (["train.global_batch_size=3", "train.batch_size=2"], ["not a multiple of train.batch_size"]),
        (["train.steps"], ["expected section.key=value"]),
        (["model.path=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["dataset.tuples=/nowhere.jsonl"], ["/nowhere.jsonl: no such file"]),
        (["lora.targets=nothing"], ["lora.targets = 'nothing' matches no module"]),
        (["model.attention=flash"], ['model.attention = "flash" cannot be used', 'Use model.attention = "native"']),
        (["dataset.resolution=48"], ["cache_latents", "are not cached as they are now"]),
    ],
)
def test_wrong_configurations(toml: Path, tmp_path: Path, overrides: list[str], messages: list[str]):
    flags = [part for override in overrides for part in ("--set", override)]
    code, said = run("train_network", "--config", toml, *flags, log=tmp_path / "log")
    assert code == 2, said
    error = one_line_error(said)
    assert not [message for message in messages if message not in error], error
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--print-config", "--dry-run"], "--print-config and --dry-run each do one thing"),
        (["--resume", ""], '--resume "": give latest or the folder of a checkpoint'),
        (["--resume", "latest", "--dry-run"], "--resume does nothing with --dry-run: leave it out"),
        (["--resume", "latest", "--print-config"], "--resume does nothing with --print-config: leave it out"),
        (["--discard-later"], "--discard-later goes with --resume FOLDER"),
        (["--resume", "latest", "--discard-later"], "--discard-later goes with --resume FOLDER"),
    ],
)
def test_options_that_would_not_be_honoured(toml: Path, tmp_path: Path, flags: list[str], message: str):
    code, said = run("train_network", "--config", toml, *flags, log=tmp_path / "log")
    assert code == 2 and message in one_line_error(said), said
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_config_files(tmp_path: Path):
    code, said = run("train_network", "--config", tmp_path / "none.toml", log=tmp_path / "log")
    assert code == 2 and "none.toml: no such file" in one_line_error(said)
    (tmp_path / "broken.toml").write_text("[train\nsteps = 1")
    code, said = run("train_network", "--config", tmp_path / "broken.toml", log=tmp_path / "log")
    assert code == 2 and "not valid TOML" in one_line_error(said)


TOOLS = ROOT / "dataset_tools"
_RULES = ["--backend", "rules"]


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("generate_edits", ["--images", "", "--out", "o.jsonl", *_RULES], "images = ''"),
        ("generate_edits", ["--images", ".", "--out", "", *_RULES], "out = ''"),
        ("generate_edits", ["--images", ".", "--out", ".", *_RULES], "out = .: is a folder"),
        ("prepare_captions", ["--clips", "", "--out", "o.jsonl"], "clips = ''"),
        ("render_videos", ["--captions", "c.jsonl", "--out", ""], "out = ''"),
        ("validate", [""], "is empty"),
        ("hold_out", [""], "is empty"),
        ("review", ["", "--export", "o.jsonl"], "is empty"),
        ("review", [".", "--export", "o.jsonl"], ".: no such file"),
        ("review", ["t.jsonl", "--root", "", "--export", "o.jsonl"], "is empty"),
        ("import_kontext", ["--targets", ".", "--controls", "", "--out", "o.jsonl"], "is empty"),
        ("import_kontext", ["--targets", ".", "--controls", ".", "--out", "."], "--out .: is a folder"),
    ],
)
def test_an_empty_place_is_not_the_folder_one_is_in(tmp_path: Path, tool: str, arguments: list[str], said: str):
    path = ROOT / "byg_plugin" / "data" / f"{tool}.py" if tool == "import_kontext" else TOOLS / f"{tool}.py"

    def work() -> None:
        os.chdir(tmp_path)
        sys.argv = [str(path), *arguments]
        runpy.run_path(str(path), run_name="__main__")

    assert in_child(work, tmp_path / "log") == 2
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert said in printed and "Traceback" not in printed
    assert os.listdir(tmp_path) == ["log"]


def test_a_configuration_in_another_encoding_is_named(tmp_path: Path):
    (tmp_path / "c.toml").write_text("[generate]\n", encoding="utf-16")
    for path in (ROOT / "byg_plugin" / "train_network.py", TOOLS / "generate_edits.py"):
        done = subprocess.run([sys.executable, path, "--config", "c.toml"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: --config c.toml: not valid TOML: UTF-16 text; save it as UTF-8\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["train_network", "cache_latents"])
def test_cuda_asked_and_absent(toml: Path, tmp_path: Path, script: str):
    code, said = run(script, "--config", toml, "--set", "model.device=cuda", log=tmp_path / "log")
    assert code == 2, said
    error = one_line_error(said)
    assert 'model.device = "cuda"' in error and 'set model.device = "cpu"' in error


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_output_that_cannot_be_written(toml: Path, tmp_path: Path, flag: list[str]):
    (tmp_path / "file").write_text("in the way")
    code, said = run("train_network", "--config", toml, "--set", f"output.dir={tmp_path}/file/out", *flag, log=tmp_path / "log")
    assert code == 2, said
    assert "output.dir = " in one_line_error(said) and "is not writable" in said


def hide(*packages: str) -> Callable[[], None]:
    """Make packages look not installed, to import and to `find_spec` alike."""

    def before() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            del sys.modules[name]

        class Hidden:
            def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
                if name.partition(".")[0] in packages:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Hidden())  # type: ignore[arg-type]
        original = importlib.util.find_spec
        extras = sys.modules["byg_plugin.config.extras"]
        extras.find_spec = lambda name: None if name in packages else original(name)  # type: ignore[attr-defined]

    return before


@pytest.mark.parametrize(
    ("script", "package", "override", "install"),
    [
        ("train_network", "tensorboard", "train.tracker=tensorboard", ".[diffusers]"),
        ("train_network", "wandb", "train.tracker=wandb", ".[wandb]"),
        ("train_network", "bitsandbytes", "train.optimizer=adamw8bit", ".[bnb]"),
        ("train_network", "diffusers", "train.steps=2", ".[diffusers]"),
        ("train_network", "peft", "train.steps=2", ".[diffusers]"),
    ],
)
def test_a_missing_extra_names_its_install_line(toml: Path, tmp_path: Path, script: str, package: str, override: str, install: str):
    code, said = run(script, "--config", toml, "--set", override, log=tmp_path / "log", before=hide(package))
    assert code == 2, said
    error = one_line_error(said)
    assert f"needs {package}, which is not installed" in error and f'pip install -e "{install}"' in error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_edit_without_diffusers_names_its_install_line(tmp_path: Path):
    from safetensors.torch import save_file

    from byg_plugin.lora.card import LoraCard

    metadata = LoraCard.of(run_config(tmp_path), 1, "live").to_metadata()
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(32, 4)}, tmp_path / "l.safetensors", metadata
    )
    arguments = ["--lora", tmp_path / "l.safetensors", "--model", model_folder(), "--source", workspace() / "photo0.png"]
    code, said = run("edit", *arguments, "--instruction", "add", log=tmp_path / "log", before=hide("diffusers"))
    assert code == 2, said
    assert 'pip install -e ".[diffusers]"' in one_line_error(said)


def test_the_shipped_recipes_are_valid(tmp_path: Path):
    from byg_plugin.config.loading import load_config

    for path in sorted((ROOT / "configs").glob("flux*.toml")):
        config = load_config(path)
        assert config.train.global_batch_size == 8 and config.lora.rank == 64, path
