"""Code that comes with a model is never run, nor is anybody asked whether it may."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from byg_plugin.models import flux_files, wan_files
from dataset_tools import render_videos
from dataset_tools.backend_transformers import load_model
from dataset_tools.settings import BackendSettings, RenderSettings
from tests.support import ROOT
from tests.support.tiny import write_model
from tests.support.tiny_vlm import write_vlm
from tests.support.tiny_wan import write_pipeline, write_wan

PACKAGES = ("byg_plugin", "dataset_tools", "benchmarks")
# transformers' classes that choose another class, which may be one of the folder's own; not Autoencoder...
_CHOOSES = re.compile(r"Auto[A-Z]\w*")
_WITHOUT_WEIGHTS = re.compile(r"Auto(Config|Tokenizer|Processor|ImageProcessor|FeatureExtractor)|\w*(Tokenizer\w*|Scheduler|Config)")


def needed(name: str) -> dict[str, bool]:
    """What a call of `name.from_pretrained` has to say."""
    said = {}
    if _CHOOSES.fullmatch(name) or name.endswith("Pipeline"):
        said["trust_remote_code"] = False
    if not _WITHOUT_WEIGHTS.fullmatch(name):  # also a class in a variable
        said["use_safetensors"] = True
    return said


def faults(source: str) -> Iterator[str]:
    """What is wrong with the calls of `from_pretrained` in a module."""
    tree = ast.parse(source)
    called = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "from_pretrained":
            yield f"line {node.lineno}: from_pretrained by its name"
        if not isinstance(node, ast.Attribute) or node.attr != "from_pretrained":
            continue
        if node not in called:
            yield f"line {node.lineno}: from_pretrained that is not called here"
            continue
        name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        # **options cannot say otherwise: a keyword given twice is an error.
        said = {keyword.arg: getattr(keyword.value, "value", None) for keyword in called[node].keywords if keyword.arg}
        for option, value in needed(name).items():
            if said.get(option) is not value:
                yield f"line {node.lineno}: {name}.from_pretrained without {option}={value}"


def test_every_call_that_loads_says_so() -> None:
    modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = [f"{path.relative_to(ROOT)}: {fault}" for path in modules for fault in faults(path.read_text(encoding="utf-8"))]
    assert found == []
    calls = sum(path.read_text(encoding="utf-8").count(".from_pretrained(") for path in modules)
    assert calls >= 14  # or the walk has lost them


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("AutoModel.from_pretrained(x, trust_remote_code=False, use_safetensors=True, **more)", 0),
        ("transformers.AutoModel.from_pretrained(x, trust_remote_code=True, use_safetensors=True)", 1),
        ("AutoModelForCausalLM.from_pretrained(x)", 2),
        ("AutoModel.from_pretrained(x, **options)", 2),
        ("AutoTokenizer.from_pretrained(x)", 1),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=trust)", 1),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=False)", 0),
        ("AutoencoderKL.from_pretrained(x, use_safetensors=True)", 0),
        ("CLIPTextModel.from_pretrained(x)", 1),
        ("kind.from_pretrained(x, use_safetensors=False)", 1),
        ("classes[0].from_pretrained(x)", 1),
        ("WanPipeline.from_pretrained(x, use_safetensors=True)", 1),
        ("load = AutoModel.from_pretrained", 1),
        ("getattr(AutoModel, 'from_pretrained')(x)", 1),
        ("CLIPTokenizer.from_pretrained(x)", 0),
    ],
)
def test_the_walk_sees(source: str, count: int) -> None:
    assert len(list(faults(source))) == count


# --- a harmless marker ---

OWN = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"), "own_code.Own")}
TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own_code.Own", "own_code.Own"]}}


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Give a folder code of its own and make its configuration name it; at the end nothing of that has run, nobody was asked."""
    asked: list[object] = []
    marker = tmp_path / "it ran"
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def mark(file: Path, changes: dict[str, object]) -> None:
        code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('')\nclass Own:\n    from_pretrained = None\n"
        for folder in (file.parent, file.parent.parent):
            (folder / "own_code.py").write_text(code, encoding="utf-8")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(config | changes), encoding="utf-8")
        monkeypatch.syspath_prepend(str(file.parent))

    yield mark
    assert not marker.exists() and not asked


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], str]] = {
    "flux transformer": (write_model, lambda p: flux_files.TRANSFORMER.load(p, dtype=torch.float32), "transformer/config.json"),
    "flux shapes": (write_model, flux_files.TRANSFORMER.on_meta, "transformer/config.json"),
    "vae": (write_model, lambda p: flux_files.VAE.load(p, dtype=torch.float32), "vae/config.json"),
    "clip": (write_model, lambda p: flux_files.load_clip_l(p, dtype=torch.float32), "text_encoder/config.json"),
    "t5": (write_model, lambda p: flux_files.load_t5(p, dtype=torch.float32), "text_encoder_2/config.json"),
    "wan transformer": (
        write_wan,
        lambda p: wan_files.TRANSFORMER.load(p, dtype=torch.float32),
        "transformer/config.json",
    ),
    "umt5": (write_wan, lambda p: wan_files.load_umt5(p, dtype=torch.float32), "text_encoder/config.json"),
    "vision-language model": (
        write_vlm,
        lambda p: load_model(BackendSettings(backend="transformers", model=str(p), device_map="cpu", dtype="float32")),
        "config.json",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_known_model_loads_and_its_code_is_left_alone(name: str, tmp_path: Path, marked: Callable[..., None]) -> None:
    write, load, config = LOADERS[name]
    folder = write(tmp_path / "model")
    marked(folder / config, OWN)
    assert load(folder) is not None


@pytest.mark.parametrize(
    ("name", "config", "changes"),
    [
        ("clip", "tokenizer/tokenizer_config.json", TOKENIZER),
        ("t5", "tokenizer_2/tokenizer_config.json", TOKENIZER),
        ("umt5", "tokenizer/tokenizer_config.json", TOKENIZER),
        ("vision-language model", "config.json", {**OWN, "model_type": "own"}),
        ("vision-language model", "processor_config.json", {**OWN, "processor_class": "Own"}),
        ("vision-language model", "tokenizer_config.json", TOKENIZER),
        ("vision-language model", "preprocessor_config.json", {**OWN, "image_processor_type": "Own"}),
    ],
)
def test_what_only_its_own_code_could_load_is_refused_or_loaded_without(
    name: str, config: str, changes: dict[str, object], tmp_path: Path, marked: Callable[..., None]
) -> None:
    write, load, _ = LOADERS[name]
    folder = write(tmp_path / "model")
    for other in ("tokenizer.json",) if "tokenizer_config" in config else ():
        (folder / config).with_name(other).unlink()  # or it is loaded from that
    marked(folder / config, changes)
    try:
        load(folder)
    except ValueError as error:
        assert str(tmp_path / "model") in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "changes", [{"vae": ["own_code", "Own"]}, {"_class_name": ["own_code", "Own"]}, {"scheduler": ["own_code", "Own"]}]
)
def test_a_pipeline_with_code_of_its_own_is_refused(changes: dict[str, object], tmp_path: Path, marked: Callable[..., None]) -> None:
    folder = tmp_path / "pipeline"
    write_pipeline(folder)
    settings = RenderSettings(captions="c", out="o", model=str(folder))
    assert render_videos.load_pipeline(settings, torch.device("cpu")) is not None
    for part in ("vae", "scheduler"):
        marked(folder / part / "config.json", {})
    marked(folder / "model_index.json", changes)
    shutil.copy(folder / "own_code.py", folder / "pipeline.py")
    with pytest.raises(ValueError, match=r"cannot be loaded as a Wan pipeline: model_index.json: .* is code of its own"):
        render_videos.load_pipeline(settings, torch.device("cpu"))
