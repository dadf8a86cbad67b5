"""The roles are encoded as musubi-tuner encodes its own captions: its encoders, tiny, and its own caching beside ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin import caching
from byg_plugin.musubi import host as musubi
from tests.support.musubi_host import T2V, host_config, needs_host, open_tiny
from tests.support.musubi_images import KLEIN
from tests.support.musubi_runs import write_work
from tests.support.tiny import _tokenizer

pytestmark = needs_host
HOSTS = {"max_text_tokens": 512}
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


@torch.no_grad()
def encodings(host: Any, config: Any, lengths: list[int]) -> dict[str, Any]:
    """Of `TEXTS`, which have so many tokens."""
    encoder = musubi.load_text_encoder(host, config)
    assert [encoder.length(text) for text in TEXTS] == lengths
    return {text: encoder.encode(text) for text in TEXTS}


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
    config = host_config(tmp_path, T2V, musubi={"t5": str(path)}, conditioning=HOSTS)
    found = encodings(host, config, [1 + len(text.split()) for text in TEXTS])
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
    own = {"text_encoder1": "t5.safetensors", "text_encoder2": "clip.safetensors"}
    config = host_config(tmp_path, "flux", musubi=own, conditioning=HOSTS)
    found = encodings(host, config, [1 + len(text) for text in TEXTS])
    assert asked == [("t5.safetensors", torch.bfloat16), ("clip.safetensors", torch.bfloat16)]
    encoders = [*utils.load_t5xxl("", torch.bfloat16, "cpu", True), *utils.load_clip_l("", torch.bfloat16, "cpu", True)]
    for text, own in zip(TEXTS, host_cache(host, "flux_kontext_cache_text_encoder_outputs", tmp_path, *encoders, []), strict=True):
        # Alone or in a batch, 16-bit sums differ in their last digit.
        assert found[text]["t5"].shape == own["t5_vec"].shape == (512, 24)
        assert torch.allclose(found[text]["t5"].float(), own["t5_vec"].float(), atol=2e-2)
        assert torch.allclose(found[text]["pooled"][0].float(), own["clip_l_pooler"].float(), atol=2e-2)
    assert (found[TEXTS[0]]["t5"] - found[TEXTS[1]]["t5"]).abs().max() > 0.1


def count_encodings(host: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often FLUX's encoders are loaded and called; at call number `stop` they are interrupted."""
    utils, counts = host.module("flux.flux_utils"), {"loaded": 0, "encoded": 0, "stop": 0}
    plain = utils.load_clip_l

    def load(*args: Any, **options: Any) -> Any:
        tokenizer, clip = plain(*args, **options)
        counts["loaded"] += 1

        def encode(*inputs: Any) -> Any:
            counts["encoded"] += 1
            if counts["encoded"] == counts["stop"]:
                raise KeyboardInterrupt
            return clip(*inputs)

        return tokenizer, encode

    monkeypatch.setattr(utils, "load_clip_l", load)
    return counts


def uncached(folder: Path, shared: str | None = None) -> Any:
    """A work folder of three items without texts; `shared`: the instruction of all."""
    write_work(folder, "flux")
    for path in (folder / "cache").glob("*_te.safetensors"):
        path.unlink()
    if shared is not None:
        lines = (folder / "tuples.jsonl").read_text(encoding="utf-8").splitlines()
        lines = [line.replace(f'"instruction {index}"', f'"{shared}"') for index, line in enumerate(lines)]
        (folder / "tuples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("t5", "clip"):
        (folder / f"{name}.safetensors").touch()
    encoders = {"text_encoder1": str(folder / "t5.safetensors"), "text_encoder2": str(folder / "clip.safetensors")}
    return host_config(folder, "flux", musubi=encoders, conditioning=HOSTS)


def test_caching_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    config = uncached(tmp_path)
    counts = count_encodings(open_tiny("flux"), monkeypatch)
    counts["stop"] = 11  # four texts an item: in the third
    with pytest.raises(KeyboardInterrupt):
        musubi.cache_texts(config)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*_te.safetensors")}
    assert sorted(written) == ["photo0_fk_te.safetensors", "photo1_fk_te.safetensors"] and counts["loaded"] == 1
    assert "encode texts" in capsys.readouterr().err
    counts["stop"] = 0
    musubi.cache_texts(config)
    assert counts == {"loaded": 2, "encoded": 11 + 4, "stop": 0}
    assert all((tmp_path / "cache" / name).stat().st_mtime_ns == when for name, when in written.items())
    musubi.cache_texts(config)
    assert counts["loaded"] == 2, "nothing is left to do, and nothing is loaded"
    assert "0 items' texts cached, 3 were current" in capsys.readouterr().out


def test_a_text_that_comes_again_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = uncached(tmp_path, shared="make it snow")
    counts = count_encodings(open_tiny("flux"), monkeypatch)
    musubi.cache_texts(config)
    assert counts["encoded"] == 12 - 2
    rows = [load_file(path)["varlen_byg_instruction_t5_bfloat16"] for path in (tmp_path / "cache").glob("*_te.safetensors")]
    assert len(rows) == 3 and torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_texts_that_are_cut_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = uncached(tmp_path, shared="make it snow " * 60)
    open_tiny("flux")
    caching._in_musubi("texts", config, prune=False)
    said = capsys.readouterr().out
    assert "note: 1 texts are longer than conditioning.max_text_tokens = 512 tokens and were cut, e.g. 'make it snow make" in said
    caching._in_musubi("texts", config, prune=False)
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(("family", "encoders"), [(T2V, ["t5"]), ("flux", ["text_encoder1", "text_encoder2"]), (KLEIN, ["text_encoder"])])
def test_a_length_that_the_host_has_not_is_told_before_an_encoder_is_loaded(tmp_path: Path, family: str, encoders: list[str]):
    config = host_config(tmp_path, family, musubi=dict.fromkeys(encoders, "nowhere.safetensors"))
    with pytest.raises(ValueError, match=r"conditioning.max_text_tokens = 8: musubi-tuner's (Wan|FLUX|FLUX.2) takes texts of 512 tokens"):
        musubi.load_text_encoder(open_tiny(family), config)
