"""Folders of which something is missing, or whose config.json is another's: refused by name, never filled up with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from byg_plugin.models import files, make_family
from tests.support.flux_files import F32
from tests.support.tiny import model_folder, tiny_config
from tests.support.tiny_wan import wan_config, write_wan

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(), tmp_path / "model"))


def change_tensors(part: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (path,) = part.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        gone = [name for name in tensors if any(word in name for word in names)]
        assert gone
        for name in gone:
            del tensors[name]

    return change


def configured(part: Path, **values: Any) -> None:
    path = part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def encoders(folder: Path, tmp_path: Path) -> object:
    return make_family(tiny_config(tmp_path, model={"path": str(folder)})).load_text_encoders(CPU)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("text_encoder", "layers.0.mlp.fc1.weight"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.v.weight"),
        ("text_encoder_2", "shared.weight"),
    ],
)
def test_a_text_encoder_is_not_filled_up_with_random_weights(folder: Path, tmp_path: Path, part: str, tensor: str):
    encoders(folder, tmp_path)
    # The embedding has two names, of which either will do.
    change_tensors(folder / part, without(*(["shared.", "embed_tokens."] if tensor.startswith("shared") else [tensor])))
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(folder / part))}: . tensors are missing, such as .*{tensor}.*download this part"
    ):
        encoders(folder, tmp_path)


def test_a_text_encoder_of_more_layers_than_its_file_has_or_of_another_width(folder: Path, tmp_path: Path):
    configured(folder / "text_encoder_2", num_layers=2)
    with pytest.raises(ValueError, match=r"text_encoder_2: \d+ tensors are missing, such as encoder\.block\.1\."):
        encoders(folder, tmp_path)
    configured(folder / "text_encoder_2", num_layers=1, d_ff=32)
    with pytest.raises(
        ValueError, match=r"text_encoder_2: 3 tensors have another shape than its config.json says, such as encoder.block.0"
    ):
        encoders(folder, tmp_path)


def test_what_no_text_is_encoded_with_may_be_missing():
    """A language model's head, and its eyes; and a weight that is tied to one that is there."""
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(2, 2), "visual": torch.nn.Linear(2, 2), "a": torch.nn.Linear(2, 2)})
    model["b"] = model["a"]
    found: dict[str, Any] = {"missing_keys": {"lm_head.weight", "visual.bias", "b.weight"}, "mismatched_keys": []}
    files._refuse_incomplete(model, found, "x")
    with pytest.raises(ValueError, match="^x: 2 tensors are missing, such as a.weight, b.weight;"):
        files._refuse_incomplete(model, found | {"missing_keys": {"a.weight", "b.weight"}}, "x")
    for each in ("a.weight", ("a.weight", (2, 2), (3, 3))):  # transformers 4 and 5
        with pytest.raises(ValueError, match="1 tensors have another shape than its config.json says, such as a.weight;"):
            files._refuse_incomplete(model, {"missing_keys": [], "mismatched_keys": [each]}, "x")


def test_t5_and_umt5_folders_are_told_apart(folder: Path, tmp_path: Path):
    sizes = {"vocab_size": 30, "d_model": 24, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(tmp_path / "umt5")
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'umt5'))}: holds a umt5, not FLUX.1's t5; use t5xxl"):
        make_family(tiny_config(tmp_path, model={"path": str(folder), "t5": str(tmp_path / "umt5")})).load_text_encoders(CPU)
    wan = write_wan(tmp_path / "wan", 1)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 't5'))}: holds a t5, not Wan's text encoder"):
        make_family(wan_config(tmp_path, "wan2.1-t2v-1.3b", model={"path": str(wan), "t5": str(tmp_path / "t5")})).load_text_encoders(CPU)


BLOCK = r"\.1\."
CHANGED_NETWORKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor less": (
        lambda part: change_tensors(part, without("transformer_blocks.0.attn.to_k.weight")),
        r"2 tensors are missing, such as (single_)?transformer_blocks.0.attn.to_k.weight",
    ),
    "a tensor more": (
        lambda part: change_tensors(part, lambda tensors: tensors.update({"foo.weight": torch.zeros(2)})),
        "1 tensors belong to no layer of its config.json, such as foo.weight",
    ),
    "a layer less in the file": (lambda part: configured(part, num_layers=3), r"tensors are missing, such as transformer_blocks\.2\."),
    "a layer more in the file": (lambda part: configured(part, num_layers=1), rf"belong to no layer .*transformer_blocks{BLOCK}"),
    "another shape": (
        lambda part: change_tensors(part, lambda tensors: tensors.update({"x_embedder.bias": torch.zeros(3)})),
        "1 tensors have another shape than its config.json says, such as x_embedder.bias",
    ),
}


@pytest.mark.parametrize("what", CHANGED_NETWORKS)
def test_a_transformer_that_is_not_what_its_configuration_says(folder: Path, tmp_path: Path, what: str):
    """Before its weights are read, which is also what a dry run does."""
    change, message = CHANGED_NETWORKS[what]
    family = make_family(tiny_config(tmp_path, model={"path": str(folder)}))
    family.meta_transformers()
    change(folder / "transformer")
    for load in (family.meta_transformers, lambda: dict(family.load_transformers(F32))):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder / 'transformer'))}: .*{message}.*; download this part again"):
            load()


def test_a_vae_that_is_not_whole_or_has_no_scale(folder: Path, tmp_path: Path):
    family = make_family(tiny_config(tmp_path, model={"path": str(folder)}))
    family.load_vae(CPU)
    configured(folder / "vae", shift_factor=None)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(folder))}: the vae's shift_factor is None, no number, so it is not FLUX.1's; use"
    ):
        family.load_vae(CPU)
    configured(folder / "vae", shift_factor=0, latent_channels="x")
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: its config.json describes no AutoencoderKL .*download it again"):
        family.load_vae(CPU)
    shutil.copy(model_folder() / "vae/config.json", folder / "vae/config.json")
    change_tensors(folder / "vae", without("decoder.conv_out"))
    with pytest.raises(ValueError, match="vae: 2 tensors are missing, such as decoder.conv_out.weight, decoder.conv_out.bias;"):
        family.load_vae(CPU)


def test_only_the_files_that_the_library_reads_are_looked_at(folder: Path, tmp_path: Path):
    """The author's own layout, or a LoRA, may lie beside the weights."""
    family = make_family(tiny_config(tmp_path, model={"path": str(folder)}))
    for name in ("ae.safetensors", "zz.safetensors"):
        save_file({"foo.weight": torch.zeros(2), "x_embedder.bias": torch.zeros(3)}, folder / "transformer" / name)
    family.meta_transformers()
    dict(family.load_transformers(F32))
    part = folder / "transformer"
    (whole,) = part.glob("diffusion*.safetensors")
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, part / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, some in shards.items() for name in some}}
    whole.unlink()
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    family.meta_transformers()
    dict(family.load_transformers(F32))
    configured(part, num_layers=3)
    with pytest.raises(ValueError, match=r"tensors are missing, such as transformer_blocks\.2\."):
        family.meta_transformers()


def test_what_loading_passes_over_is_not_missed(tmp_path: Path):
    class Model(torch.nn.Module):
        _keys_to_ignore_on_load_unexpected = ("norm_added_q",)

        def __init__(self) -> None:
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(2)

    model = Model()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(tensors | {"norm_added_q.weight": torch.zeros(2)}, path)
    files.check_tensors(model, tmp_path)
    save_file(tensors | {"other.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="1 tensors belong to no layer of its config.json, such as other.weight"):
        files.check_tensors(model, tmp_path)


def test_an_autoencoder_of_old_names_is_left_to_the_library(tmp_path: Path):
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2)})
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file({"a.query.weight": torch.zeros(2, 2), "a.query.bias": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    files.check_tensors(model, tmp_path)
    save_file({"q.weight": torch.zeros(2, 2), "q.bias": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="2 tensors are missing, such as to_q.weight, to_q.bias; 2 tensors belong to no layer"):
        files.check_tensors(model, tmp_path)


def test_a_tokenizer_of_another_json(folder: Path, tmp_path: Path):
    (folder / "tokenizer_2/tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder / 'tokenizer_2'))}: its tokenizer cannot be loaded"):
        encoders(folder, tmp_path)
