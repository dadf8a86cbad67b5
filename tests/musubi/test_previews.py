"""Inside the real musubi-tuner: previews are edits of their sources."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from byg_plugin import families
from byg_plugin.config.loading import load_config
from byg_plugin.musubi import host as musubi
from tests.support.musubi_host import A14B, needs_host, open_tiny, texts
from tests.support.musubi_newer import rename_seams
from tests.support.musubi_runs import rig, run_here, write_config, write_roles, write_work

pytestmark = needs_host


def test_preview_is_an_edit_of_its_source(tmp_path: Path):
    """The host's sampling calls our inference: from its prompt file to pixels, with a stand-in for the autoencoder."""
    it = rig("flux")

    class Vae:
        dtype = torch.float32

        def to(self, *_: Any) -> Any:
            return self

        def encode(self, pixels: Tensor) -> Tensor:
            assert pixels.shape[1:] == (3, 32, 48) and pixels.abs().max() <= 1
            return pixels.mean((1, 2, 3), keepdim=True).expand(-1, 16, 4, 6)

        def decode(self, x: Tensor) -> Tensor:
            return x[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    pictures = []
    for shade, live in ((0, True), (255, True), (255, False)):
        if not live:
            for parameter in it.network.parameters():
                parameter.data.zero_()
        Image.new("RGB", (60, 40), (shade, 30, 30)).save(tmp_path / "a.png")
        one = texts("flux", 1, 1)
        prompt = {"t5_vec": one["t5"], "clip_l_pooler": one["pooled"], "control_image_path": [str(tmp_path / "a.png")]}
        generator = torch.Generator().manual_seed(1)
        args = (it.accelerator, it.args, prompt, Vae(), None, it.transformer, 1.0, 2, 48, 32, 1, generator, False, 1.0, None)
        pictures.append(it.trainer.do_inference(*args, image_path=None, control_video_path=None))
    it.wake()
    assert pictures[0].shape == (1, 3, 1, 32, 48) and not torch.equal(*pictures[:2])
    assert torch.equal(*pictures[1:]), "the average edits, not the current weights"
    (tmp_path / "prompts.txt").write_text("make it snow\n", encoding="utf-8")
    with pytest.raises(ValueError, match="prompt 1 has no source; add --ci IMAGE"):
        it.trainer.process_sample_prompts(it.args, it.accelerator, str(tmp_path / "prompts.txt"))


class TinyVae:
    """Stands for the host's autoencoder: means of 8 x 8 pixels, every fourth frame."""

    dtype = torch.float32

    def __init__(self, family: str):
        self.family = family

    def to(self, *_: Any) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def requires_grad_(self, *_: Any) -> Any:
        return self

    def encode(self, pixels: Tensor) -> Any:
        pixels = pixels if pixels.ndim == 5 else pixels[:, :, None]
        small = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))[:, :, ::4].mean(1, keepdim=True).expand(-1, 16, -1, -1, -1)
        return small[:, :, 0] if self.family == "flux" else list(small)

    def decode(self, latents: Any) -> Any:
        x = latents if isinstance(latents, Tensor) else torch.stack(list(latents))
        big = x[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return big if self.family == "flux" else list(big.repeat_interleave(4, 2)[:, :, 3:])


@pytest.mark.parametrize(("family", "newer"), [(A14B, False), ("flux", False), ("flux", True)])
def test_previews_in_the_hosts_loop(tmp_path: Path, family: str, newer: bool, monkeypatch: pytest.MonkeyPatch):
    write_work(tmp_path, family)
    (tmp_path / "prompts.txt").write_text(
        f"make it snow --ci {tmp_path / 'photo0.png'} --w 48 --h 32 --s 2 --d 1 --f 1\n", encoding="utf-8"
    )
    host = open_tiny(family)
    called = rename_seams(monkeypatch) if newer else []

    def prompts(self: Any, args: Any, accelerator: Any, path: str) -> Any:
        found = host.trainer.load_prompts(path)
        for prompt in found:
            one = texts(family, 1, 1)
            prompt |= {"t5_vec": one["t5"], "clip_l_pooler": one["pooled"]} if family == "flux" else {"t5_embeds": one["umt5"][0, :5]}
        return found

    monkeypatch.setattr(host.trainer_class, "process_sample_prompts", prompts)
    monkeypatch.setattr(host.trainer_class, "load_vae", lambda self, *_, **__: TinyVae(family))
    base = importlib.import_module("musubi_tuner.training.trainer_base")
    saved: list[Tensor] = []

    def save(video: Tensor, *_: Any, **__: Any) -> list[str]:
        saved.append(video)
        return []

    monkeypatch.setattr(base, "save_images_grid", save)
    files = ("vae", *families.named(family).musubi.text_encoders)
    options = {
        **dict.fromkeys(files, str(tmp_path / "dit.safetensors")),
        "sample_prompts": str(tmp_path / "prompts.txt"),
        "sample_every_n_steps": 2,
        "sample_at_first": True,
    }
    config = write_config(tmp_path, family, max_train_steps=2, **options)
    write_roles(tmp_path, family, musubi._encoder_identity(load_config(config)))  # by the files that the previews need
    run_here(config)
    assert len(saved) >= 2 and all(video.shape == (1, 3, 1, 32, 48) for video in saved)
    assert not torch.equal(saved[0], saved[-1]), "the weights have changed in between"
    assert not newer or set(called) == {"prepare_sampling", "round_sample_frame_count", "item_extras"}
