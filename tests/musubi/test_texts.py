"""The roles are encoded as musubi-tuner encodes its own captions: its encoders, tiny, and its own caching beside ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.musubi import host as musubi
from tests.support.musubi_host import T2V, host_config, needs_host, open_tiny
from tests.support.tiny import _tokenizer

pytestmark = needs_host
TEXTS = ["make the sky blue", "a photo of a dog in the house"]


def host_cache(host: Any, module: str, folder: Path, *encoders: Any) -> list[dict[str, Tensor]]:
    """What the host's own text caching writes of `TEXTS`, by the names without dtype."""
    script = host.module(module)
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    items = [ItemInfo(str(index), text, (32, 32)) for index, text in enumerate(TEXTS)]
    for item in items:
        item.text_encoder_output_cache_path = str(folder / f"{item.item_key}_te.safetensors")
    script.encode_and_save_batch(*encoders[:-1], items, torch.device("cpu"), *encoders[-1])
    found = [load_file(item.text_encoder_output_cache_path) for item in items]
    return [{name.removesuffix("_bfloat16").removeprefix("varlen_"): value for name, value in one.items()} for one in found]


def test_wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = open_tiny(T2V)
    t5, tokenizers = host.module("wan.modules.t5"), host.module("wan.modules.tokenizers")
    tokenizer = _tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", 8, eos_token="</s>", pad_token="<pad>")
    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    size = {"vocab_size": len(tokenizer), "dim": 24, "dim_attn": 16, "dim_ffn": 32, "num_heads": 2, "encoder_layers": 2}
    monkeypatch.setattr(t5, "umt5_xxl", partial(t5.umt5_xxl, **size))
    torch.manual_seed(0)
    path = tmp_path / "t5.safetensors"
    save_file(t5.umt5_xxl(encoder_only=True).state_dict(), path)
    found = musubi.encode_texts(host, host_config(tmp_path, T2V, musubi={"t5": str(path)}), TEXTS)
    encoder = t5.T5EncoderModel(text_len=512, dtype=torch.bfloat16, device=torch.device("cpu"), weight_path=str(path))
    for text, own in zip(TEXTS, host_cache(host, "wan_cache_text_encoder_outputs", tmp_path, encoder, [None]), strict=True):
        assert torch.equal(found[text]["umt5"], own["t5"]) and len(own["t5"]) == 1 + len(text.split())
    assert not torch.equal(found[TEXTS[0]]["umt5"][0], found[TEXTS[1]]["umt5"][0])


def test_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = open_tiny("flux")
    utils = host.module("flux.flux_utils")
    asked: list[Any] = []
    for name, tiny in (("load_t5xxl", utils.load_t5xxl), ("load_clip_l", utils.load_clip_l)):

        def load(path: str, dtype: Any, device: Any, disable_mmap: bool, tiny: Any = tiny) -> Any:
            asked.append((path, dtype))
            return tiny(path, dtype, device)

        monkeypatch.setattr(utils, name, load)
    config = host_config(tmp_path, "flux", musubi={"text_encoder1": "t5.safetensors", "text_encoder2": "clip.safetensors"})
    found = musubi.encode_texts(host, config, TEXTS)
    assert asked == [("t5.safetensors", torch.bfloat16), ("clip.safetensors", torch.bfloat16)]
    encoders = [*utils.load_t5xxl("", torch.bfloat16, "cpu", True), *utils.load_clip_l("", torch.bfloat16, "cpu", True)]
    for text, own in zip(TEXTS, host_cache(host, "flux_kontext_cache_text_encoder_outputs", tmp_path, *encoders, []), strict=True):
        # Alone or in a batch, 16-bit sums differ in their last digit.
        assert found[text]["t5"].shape == own["t5_vec"].shape == (512, 24)
        assert torch.allclose(found[text]["t5"].float(), own["t5_vec"].float(), atol=2e-2)
        assert torch.allclose(found[text]["pooled"][0].float(), own["clip_l_pooler"].float(), atol=2e-2)
    assert (found[TEXTS[0]]["t5"] - found[TEXTS[1]]["t5"]).abs().max() > 0.1
