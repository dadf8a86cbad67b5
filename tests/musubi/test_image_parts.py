"""Inside the real musubi-tuner: texts, autoencoders and previews of Qwen-Image, Krea 2 and Z-Image, and the options they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.models import make_family
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import trainer as musubi_trainer
from byg_plugin.musubi.family import musubi_family
from byg_plugin.texts import text_at
from tests.support.musubi_host import host_config, needs_host, open_tiny
from tests.support.musubi_images import IMAGES, KREA2, MASKED, QWEN, ZIMAGE
from tests.support.musubi_runs import rig
from tests.support.tiny import tiny_config

pytestmark = needs_host
TEXTS = [
    "make the sky blue",
    "a photo of a dog in the house beside the red car in the garden, with a cat, two birds and a boat",
]
TOKENS = 24  # the second text is longer


def folder_of(family: str) -> Path:
    from tests.support.tiny_qwen import krea2_folder, qwen_folder
    from tests.support.tiny_zimage import zimage_folder

    return {QWEN: qwen_folder, KREA2: krea2_folder, ZIMAGE: zimage_folder}[family]()


def embedded(folder: Path, family: str) -> Any:
    IMAGES[family].network()  # skips where there is no embedded host
    model = {"family": family, "path": str(folder_of(family))}
    return make_family(tiny_config(folder, model=model, conditioning={"max_text_tokens": TOKENS}))


# --- texts ---


def give_tiny_encoders(host: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The host's loader gives the embedded host's encoder; returns what its caching script takes of it."""
    from tests.support import tiny_flux2, tiny_qwen

    if family == KREA2:
        utils, encoder = host.module("krea2.krea2_utils"), host.module("krea2.krea2_encoder")

        def load(path: str, dtype: Any, device: Any, max_length: int) -> Any:
            tokenizer = tiny_qwen.qwen_tokenizer()
            return encoder.Qwen3VLConditioner(tiny_qwen.tiny_qwen3_vl(), tokenizer, tokenizer, max_length=max_length)

        monkeypatch.setattr(utils, "load_krea2_text_encoder", load)
        return [load("", None, None, TOKENS)]
    if family == QWEN:
        made = tiny_qwen.qwen_tokenizer(), tiny_qwen.tiny_language_model()
        monkeypatch.setattr(host.module("qwen_image.qwen_image_utils"), "load_qwen2_5_vl", lambda *_, **__: made)
    else:
        made = tiny_flux2.qwen3_tokenizer(), tiny_flux2.tiny_qwen3(layers=3)
        monkeypatch.setattr(host.module("zimage.zimage_utils"), "load_qwen3", lambda *_, **__: made)
    return list(made)


@pytest.mark.parametrize("family", MASKED)
def test_texts_are_the_embedded_hosts_and_the_hosts_own(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    ours = embedded(tmp_path, family)
    host = open_tiny(family)
    encoders = give_tiny_encoders(host, family, monkeypatch)
    config = host_config(tmp_path, family, musubi={"text_encoder": "x.safetensors"}, conditioning={"max_text_tokens": TOKENS})
    with torch.no_grad():
        encoder = musubi.load_text_encoder(host, config)
        found = {text: encoder.encode(text) for text in TEXTS}
    loaded = ours.load_text_encoders(torch.device("cpu"))
    for text in TEXTS:
        wanted = text_at(ours.encode_texts(loaded, [text]), 0)["qwen"]
        assert found[text]["qwen"].shape == wanted.shape and found[text]["qwen"].dtype == torch.bfloat16
        assert torch.allclose(found[text]["qwen"].float(), wanted, atol=2e-2, rtol=1e-2)
    assert len(found[TEXTS[1]]["qwen"]) == TOKENS > len(found[TEXTS[0]]["qwen"]) == encoder.length(TEXTS[0])
    assert [encoder.length(text) > TOKENS for text in TEXTS] == ours.longer_than_limit(loaded, TEXTS) == [False, True]
    if family == KREA2:
        return  # its script prints as it goes; it takes the same function
    script = {QWEN: "qwen_image_cache_text_encoder_outputs", ZIMAGE: "zimage_cache_text_encoder_outputs"}[family]
    rest = [None, None] if family == QWEN else []
    cached = own_cache(host, script, tmp_path, encoders, rest)
    for text, rows in zip(TEXTS, cached, strict=True):
        assert torch.allclose(found[text]["qwen"].float(), rows[:TOKENS].float(), atol=2e-2, rtol=1e-2)


def own_cache(host: Any, module: str, folder: Path, encoders: list[Any], rest: list[Any]) -> list[Tensor]:
    """The rows that the host's own text caching writes of `TEXTS`."""
    from musubi_tuner.dataset.image_video_dataset import ItemInfo
    from safetensors.torch import load_file

    items = [ItemInfo(str(index), text, (32, 32)) for index, text in enumerate(TEXTS)]
    for item in items:
        item.text_encoder_output_cache_path = str(folder / f"{item.item_key}_te.safetensors")
    script = host.module(module)
    for item in items:  # alone, in a batch 16-bit sums differ
        arguments = [*encoders, *rest, [item], torch.device("cpu")]
        script.encode_and_save_batch(*arguments, *([None] if rest else []))
    return [next(iter(load_file(item.text_encoder_output_cache_path).values())) for item in items]


# --- autoencoders ---


@torch.no_grad()
@pytest.mark.parametrize("family", [QWEN, ZIMAGE])
def test_pixels_and_latents_are_the_embedded_hosts(tmp_path: Path, family: str):
    ours, host = embedded(tmp_path, family), open_tiny(family)
    vae = ours.load_vae(torch.device("cpu"))
    module, name = {
        QWEN: ("qwen_image.qwen_image_autoencoder_kl", "AutoencoderKLQwenImage"),
        ZIMAGE: ("zimage.zimage_autoencoder", "AutoencoderKL"),
    }[family]
    kind = getattr(host.module(module), name)
    names = (
        ("base_dim", "z_dim", "dim_mult", "num_res_blocks")
        if family == QWEN
        else ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels", "use_quant_conv", "use_post_quant_conv")
    )
    theirs = kind(**{key: vae.config[key] for key in names})
    theirs.load_state_dict(in_their_layout(theirs, vae.state_dict(), family))
    pixels = torch.rand(1, 3, 1, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    adapter = musubi_family(family)
    latents = adapter.encode_pixels(theirs.eval(), pixels)
    torch.testing.assert_close(latents, ours.encode_pixels(vae, pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        adapter.decode_latents(theirs, latents).clamp(-1, 1), ours.decode_latents(vae, latents), rtol=1e-4, atol=1e-4
    )


def in_their_layout(theirs: Any, state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Names of the host's Qwen-Image VAE are diffusers'; those of its Z-Image VAE are asked for by their order and shape."""
    wanted = theirs.state_dict()
    if wanted.keys() <= state.keys():
        return {name: state[name].reshape(value.shape) for name, value in wanted.items()}
    raise AssertionError(sorted(wanted.keys() - state.keys())[:5])


# --- previews ---


class Vae:
    """Stands for both autoencoders."""

    dtype = torch.float32

    def to(self, *_: Any) -> Any:
        return self

    def encode_pixels_to_latents(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool3d(pixels, (1, 8, 8)).mean(1, keepdim=True).expand(-1, 16, -1, -1, -1)

    def decode_to_pixels(self, latents: Tensor) -> Tensor:
        return latents[:, :3, 0].repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1)

    def encode(self, pixels: Tensor) -> Any:
        latents = self.encode_pixels_to_latents(pixels[:, :, None])[:, :, 0]
        return type("Posterior", (), {"mode": lambda self: latents})()

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_to_pixels(latents[:, :, None]) * 2 - 1


def prompt_of(family: str, seed: int, kind: str) -> dict[str, Tensor]:
    """A prompt as the host has encoded it."""
    rows = torch.randn(5, *IMAGES[family].text, generator=torch.Generator().manual_seed(seed))
    if family == QWEN:
        return {f"{kind}vl_embed": rows[None]}
    if family == KREA2:
        return {f"{kind}krea2_vl_embed": rows}
    mask = torch.arange(9)[None] < 5
    return {f"{kind}cap_feats": torch.cat([rows, torch.ones(4, 16)])[None], f"{kind}cap_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("family", MASKED)
def test_previews_are_guided_by_the_hosts_scale(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    it = rig(family)
    seen: list[Any] = []
    plain = musubi_trainer.sampling.sample
    monkeypatch.setattr(musubi_trainer.sampling, "sample", lambda *inputs: (seen.append(inputs), plain(*inputs))[1])
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "a.png")
    prompt = {"control_image_path": [str(tmp_path / "a.png")], **prompt_of(family, 1, ""), **prompt_of(family, 2, "negative_")}
    generator = torch.Generator().manual_seed(1)
    args = (it.accelerator, it.args, prompt, Vae(), None, it.transformer, 1.0, 2, 48, 32, 1, generator, True, 1.0, 3.0)
    shown = it.trainer.do_inference(*args)
    assert shown.shape == (1, 3, 1, 32, 48) and 0 <= shown.min() <= shown.max() <= 1 and shown.std() > 0
    field, noise, words, source, _ = seen[0]
    t = torch.tensor([0.6])
    adapter = it.trainer.byg_checkout.family
    away = adapter.text_of_prompt(prompt, "negative_", 8)
    with it.fields.ema() as velocity:
        v, v_away = velocity(noise, t, words, source), velocity(noise, t, away, source)
        found = field(noise, t, words, source)
    # The host's own formulas: Z-Image's starts from the instruction, the others from the negative text.
    wanted = v + 3.0 * (v - v_away) if family == ZIMAGE else v_away + 3.0 * (v - v_away)
    if family == QWEN:
        from byg_plugin.models.tokens import pack, unpack

        tokens = pack(wanted)
        wanted = unpack(tokens * (pack(v).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)), *v.shape[-2:])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, v, atol=1e-2)


# --- options ---


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        (QWEN, {"mixed_precision": "no"}, "the host holds Qwen-Image in 16 bits, set 'bf16'"),
        (KREA2, {}, "the host holds Krea 2 in 16 bits, set 'bf16'"),
        (QWEN, {"flash_attn": True}, "musubi.flash_attn: a batch has texts of several lengths, for which it needs musubi.split_attn"),
        (ZIMAGE, {"xformers": True}, "musubi.xformers: a batch has texts of several lengths"),
        (KREA2, {"xformers": True}, "musubi.xformers: a batch has texts of several lengths"),
        ("flux", {"flash3": True}, "musubi.flash3: the host has it for Wan alone"),
        (ZIMAGE, {"flash3": True}, "musubi.flash3: the host has it for Wan alone"),
        (QWEN, {"fp8_base": True}, "set musubi.fp8_scaled too"),
        (KREA2, {"fp8_base": True}, "set musubi.fp8_scaled too"),
        (KREA2, {"turbo_dit": "turbo.safetensors"}, "musubi.turbo_dit: a preview is an edit by the base that is trained"),
        (KREA2, {"gradient_checkpointing_cpu_offload": True}, "keeps its activations on the device"),
        (ZIMAGE, {"use_32bit_attention": True, "flash_attn": True}, "flash_attn computes in 16 bits"),
    ],
)
def test_what_the_host_cannot_do_is_refused(family: str, options: dict[str, Any], says: str):
    precision = {} if "16 bits" in says else {"mixed_precision": "bf16"}
    with pytest.raises(ValueError, match=says):
        musubi_family(family).check(precision | options)
    good = {"split_attn": True, "flash_attn": True, "mixed_precision": "bf16", "fp8_base": True, "fp8_scaled": True}
    musubi_family(family).check(good)


def test_a_user_s_own_patterns_take_the_place_of_ours(tmp_path: Path):
    from byg_plugin.musubi import options as musubi_options

    parser = open_tiny(QWEN).parser()
    save_file({}, tmp_path / "dit.safetensors")
    (tmp_path / "dataset.toml").touch()
    of = lambda given: musubi_options.arguments(host_config(tmp_path, QWEN, musubi=given), parser).network_args  # noqa: E731
    assert "add_q_proj" in of({"num_layers": 4})[-1] and "blocks\\\\.3\\\\." in of({"num_layers": 4})[-1]
    assert of({"network_args": ["rank_dropout=0.1"]})[0] == "rank_dropout=0.1"
    assert of({"network_args": ["exclude_patterns=['x']"]}) == ["exclude_patterns=['x']"]
