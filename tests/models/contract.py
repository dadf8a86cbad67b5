"""What every image family must do: subclass `FamilyContract`, name the family, and build its pipeline and tiny parts.

Each test compares with diffusers' own code or with the family itself; nothing is written down twice.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from byg_plugin import EditPipeline, families, sampling
from byg_plugin.config.sections import Config
from byg_plugin.data.dataset import CachedTuples, collate
from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.diffusers import matched_linears
from byg_plugin.hosts.quantize import Fp8Linear
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.check import check
from byg_plugin.lora.files import read_lora, write_lora
from byg_plugin.models import make_family
from byg_plugin.models.base import Family
from tests.support.comfyui import comfyui, detected, needs_comfyui
from tests.support.tiny import fill_caches, make_host, make_trainer, tiny_config, write_tuples

CPU = torch.device("cpu")
T = torch.tensor([0.77, 0.3301])  # neither is a multiple of 1/1024, which bfloat16 would keep
# Of other lengths; the second is cut.
PROMPTS = ["add snow", "remove the blue dog in the house of the red cat and make a photo of the sky of the mountain"]


class FamilyContract:
    """Conventions and promises of one image family on tiny random parts of the real classes.

    Attributes:
        name: of the family.
        channels, height, width: of the latents that the network is called with, of a picture of 32 x 48 pixels.
        patch: side of the square of latents that is a token.
        text_tokens: that a text is cut to; of the two prompts, the second is longer.
        head: module of the network whose output holds the tokens of both halves, noisy ones first.
        sinusoids: module that takes the times.
        moved: a position at which noisy and source tokens are not exchangeable; None: there is only `same`.
        full_size: parameters of the published network, and its linears that get a LoRA.
    """

    name: ClassVar[str]
    channels: ClassVar[int] = 16
    height: ClassVar[int] = 4
    width: ClassVar[int] = 6
    patch: ClassVar[int] = 2
    text_tokens: ClassVar[int] = 8
    head: ClassVar[str]
    sinusoids: ClassVar[str]
    moved: ClassVar[str | None]
    full_size: ClassVar[tuple[int, int]]

    # --- what a family supplies ---

    def folder(self) -> Path:
        """A diffusers folder with every part, tiny and random; the head is not zero, modulation is alive."""
        raise NotImplementedError

    def pipeline(self, family: Family, network: nn.Module) -> DiffusionPipeline:
        """diffusers' own pipeline of the folder's parts around `network`."""
        raise NotImplementedError

    def run(self, pipe: Any, **options: Any) -> Tensor:
        """Call the pipeline with prompt, steps, latents (B, C, 1, h, w) as our sampler takes them, output_type `latent` or `pt`.

        Returns latents of the same form, or pixels (B, 3, H, W) in [0, 1].
        """
        raise NotImplementedError

    def full_network(self) -> nn.Module:
        """The published network on the meta device."""
        raise NotImplementedError

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of diffusers in the layout of ComfyUI's files."""
        raise NotImplementedError

    def entering(self, t: Tensor) -> Tensor:
        """What enters `sinusoids` for t, exactly."""
        return t * 1000

    def halves(self, output: Tensor, length: int) -> Tensor:
        """(B, 2 length, D): the tokens of noisy and source in the output of `head`."""
        return output[:, -2 * length :]

    def plain(self, pixels: Tensor) -> Tensor:
        """(B, 3, 1, H, W) as its VAE takes and gives them."""
        return pixels[:, :, 0]

    # --- what tests share ---

    def config(self, root: Path, **sections: dict[str, Any]) -> Config:
        model = {"family": self.name, "path": str(self.folder())} | sections.pop("model", {})
        conditioning = {"max_text_tokens": self.text_tokens} | sections.pop("conditioning", {})
        return tiny_config(root, model=model, conditioning=conditioning, **sections)

    def family(self, position: str = "same", **sections: dict[str, Any]) -> Family:
        return make_family(self.config(Path("unused"), conditioning={"position": position}, **sections))

    def network(self, dtype: torch.dtype = torch.float32) -> Any:
        return next(iter(self.family().load_transformers(dtype)))[1]

    def latents(self, seed: int, batch: int = 2) -> Tensor:
        return torch.randn(batch, self.channels, 1, self.height, self.width, generator=torch.Generator().manual_seed(seed))

    def texts(self, prompts: list[str] | None = None) -> dict[str, Tensor]:
        return dict(_encoded(type(self), tuple(prompts or PROMPTS)))

    # --- the velocity ---

    @torch.no_grad()
    def test_four_steps_are_the_pipelines(self):
        """Sign, times, order of tokens, positions, texts, guidance, shift and the VAE's units, all at once."""
        family, network, noise = self.family(), self.network(), self.latents(0)
        config = self.config(Path("unused"))
        negative = None if config.negative is None else self.texts([config.negative])
        ours = sampling.sample_as_configured(
            config,
            family,
            lambda *call: family.velocity(network, *call),
            noise,
            self.texts(),
            None,
            steps=4,
            schedule="shifted",
            negative=negative,
        )
        pipe = self.pipeline(family, network)
        pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"prompt": PROMPTS, "steps": 4, "latents": noise}
        theirs = self.run(pipe, output_type="latent", **options)
        assert theirs.shape == ours.shape and (ours - noise).abs().max() > 0.1
        assert (ours - theirs).abs().max() <= 1e-4
        pixels = family.decode_latents(family.load_vae(CPU), ours)
        assert (pixels[:, :, 0] / 2 + 0.5 - self.run(pipe, output_type="pt", **options)).abs().max() <= 1e-4

    @torch.no_grad()
    def test_what_enters_the_network_matters(self):
        family, network, texts = self.family(), self.network(), self.texts()
        usual = family.velocity(network, self.latents(0), T, texts, self.latents(1))
        assert usual.shape == self.latents(0).shape and usual.dtype == torch.float32
        others = self.texts([PROMPTS[0], "make a photo of the sky"])
        changed = {
            "noisy": family.velocity(network, self.latents(2), T, texts, self.latents(1)),
            "source": family.velocity(network, self.latents(0), T, texts, self.latents(2)),
            "no source": family.velocity(network, self.latents(0), T, texts, None),
            "t": family.velocity(network, self.latents(0), T.flip(0), texts, self.latents(1)),
            "text": family.velocity(network, self.latents(0), T, others, self.latents(1)),
        }
        for name, value in changed.items():
            assert (value - usual)[1].abs().max() > 1e-3, name

    @torch.no_grad()
    def test_the_velocity_is_of_the_noisy_half(self):
        """The other half is what swapping the two would give."""
        family, network, texts = self.family(), self.network(), self.texts()
        t = torch.tensor([0.4, 0.7])
        seen: list[Tensor] = []
        network.get_submodule(self.head).register_forward_hook(lambda module, args, output: seen.append(output))
        v = family.velocity(network, self.latents(0), t, texts, self.latents(1))
        length = self.height * self.width // self.patch**2
        noisy, source = self.halves(seen[0], length).split(length, dim=1)
        # Tokens are latents in another order: sums of squares tell the halves apart.
        assert (v.square().sum() / noisy.square().sum() - 1).abs() < 1e-4 < (v.square().sum() / source.square().sum() - 1).abs()

    @torch.no_grad()
    def test_a_sample_does_not_depend_on_its_neighbours(self):
        family, network = self.family(), self.network()
        together = family.velocity(network, self.latents(0), T, self.texts(), self.latents(1))
        for index, prompt in enumerate(PROMPTS):
            own = slice(index, index + 1)
            alone = family.velocity(network, self.latents(0)[own], T[own], self.texts([prompt]), self.latents(1)[own])
            assert (alone - together[own]).abs().max() <= 1e-4

    @pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
    def test_times_are_exact_in_16_bit(self, dtype: torch.dtype, autocast: bool):
        network, seen = self.network(dtype), []
        handle = network.get_submodule(self.sinusoids).register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
        texts = self.texts()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
            self.family().velocity(network, self.latents(0), T, texts, self.latents(1))
        handle.remove()
        assert seen[0].dtype == torch.float32 and torch.equal(seen[0], self.entering(T))

    def test_hooks_leave_after_a_call_and_after_an_error(self):
        network, family = self.network(), self.family()
        before = self.hooks(network)
        family.velocity(network, self.latents(0), T, self.texts(), self.latents(1))
        assert self.hooks(network) == before
        broken = {name: torch.cat([value, value], dim=-1) for name, value in self.texts().items()}
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            family.velocity(network, self.latents(0), T, broken, self.latents(1))
        assert self.hooks(network) == before

    def hooks(self, network: nn.Module) -> list[tuple[str, int, list[str]]]:
        """By module: how many hooks, and what hides a method of its class."""
        return [
            (name, len(m._forward_hooks) + len(m._forward_pre_hooks), [key for key in vars(m) if callable(getattr(type(m), key, None))])
            for name, m in network.named_modules()
        ]

    # --- the source ---

    @torch.no_grad()
    def test_same_positions_make_noisy_and_source_tokens_exchangeable(self):
        """Attention knows a token by content and position: swapping the two halves swaps their outputs."""
        one, two = self.both_orders("same")
        same = (one - two).abs().max() / one.abs().max()
        assert same <= 1e-5
        if self.moved is not None:
            one, two = self.both_orders(self.moved)
            assert (one - two).abs().max() / one.abs().max() > 30 * same

    def both_orders(self, position: str) -> tuple[Tensor, Tensor]:
        """Outputs for (noisy, source), and for (source, noisy) with the halves put back."""
        network, texts, seen = self.network(), self.texts(), []
        network.get_submodule(self.head).register_forward_hook(lambda module, args, output: seen.append(output))
        for pair in ((self.latents(0), self.latents(1)), (self.latents(1), self.latents(0))):
            self.family(position).velocity(network, pair[0], torch.tensor([0.4, 0.7]), texts, pair[1])
        length = self.height * self.width // self.patch**2
        one, two = (self.halves(output, length) for output in seen)
        assert one.shape[1] == 2 * length and (one[:, :length] - one[:, length:]).abs().max() > 1e-2
        return one, torch.cat([two[:, length:], two[:, :length]], dim=1)

    def test_gradients_reach_the_source_with_and_without_checkpointing(self):
        family, network, texts, gradients = self.family(), self.network(), self.texts(), []
        for recompute in (False, True):
            if recompute:
                network.enable_gradient_checkpointing()
            source = self.latents(1).requires_grad_()
            family.velocity(network, self.latents(0), T, texts, source).square().sum().backward()
            gradients.append(source.grad)
        assert gradients[0].abs().max() > 1e-3
        assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()

    def test_a_source_of_another_shape_is_refused(self):
        texts = self.texts()
        with pytest.raises(ValueError, match="must have one shape"):
            self.family().velocity(self.network(), self.latents(0), T, texts, self.latents(1)[..., :2])

    # --- pixels and texts ---

    @torch.no_grad()
    def test_pixels_come_back_from_latents(self):
        family = self.family()
        vae: Any = family.load_vae(CPU)
        pixels = torch.rand(2, 3, 1, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        encoded = family.encode_pixels(vae, pixels)
        assert encoded.shape == (2, self.channels, 1, self.height, self.width) and encoded.dtype == torch.float32
        assert torch.equal(encoded, family.encode_pixels(vae, pixels)), "the posterior is not sampled"
        decoded = family.decode_latents(vae, encoded)
        raw = vae.decode(vae.encode(self.plain(pixels)).latent_dist.mode()).sample
        assert decoded.shape == pixels.shape and (self.plain(decoded) - raw.clamp(-1, 1)).abs().max() <= 1e-4
        assert family.decode_latents(vae, encoded * 1e3).abs().max() <= 1
        assert 32 % family.pixel_multiple() == 0 and 8 % family.pixel_multiple() == 8

    def test_texts_that_are_cut_are_known(self):
        family, encoders = _encoders(type(self))
        assert family.longer_than_limit(encoders, PROMPTS) == [False, True]
        for name, value in self.texts([PROMPTS[1], PROMPTS[1] + " dog"]).items():
            assert torch.equal(value[0], value[1]), f"{name}: what is past the limit is read after all"

    def test_caches_give_back_what_was_encoded(self, tmp_path: Path):
        write_tuples(tmp_path, [(64, 64)])
        config = self.config(tmp_path)
        fill_caches(config)
        family, data = make_family(config), CachedTuples(config, make_family(config))
        vae, batch = family.load_vae(CPU), collate([data[0], data[1]])
        assert batch["source"].shape[:2] == (2, self.channels) and torch.isfinite(batch["source"]).all()
        assert family.decode_latents(vae, batch["source"]).shape == (2, 3, 1, 64, 64)
        network, noisy = self.network(), torch.randn(batch["source"].shape, generator=torch.Generator().manual_seed(3))
        for role in ROLES:
            prompts = [getattr(item, role) for item in data.tuples[:2]]
            with torch.no_grad():
                ours, wanted = (family.velocity(network, noisy, T, text, batch["source"]) for text in (batch[role], self.texts(prompts)))
            assert (ours - wanted).abs().max() <= 1e-5, role

    # --- LoRA ---

    def test_base_is_the_network_without_lora(self, tmp_path: Path):
        host, texts = make_host(self.config(tmp_path)), self.texts()
        with torch.no_grad():
            # Frozen as in the host: a kernel may be chosen by whether a weight needs a gradient.
            wanted = self.family().velocity(self.network(), self.latents(0), T, texts, None)
        with host.live() as velocity:
            assert not torch.allclose(velocity(self.latents(0), T, texts, None), wanted, atol=1e-3), "the LoRA is asleep"
        with host.base() as velocity:
            assert torch.equal(velocity(self.latents(0), T, texts, None), wanted)

    def test_frozen_linears_of_the_blocks_are_stored_in_fp8(self, tmp_path: Path):
        texts, call = self.texts(), (self.latents(0), T)
        host = make_host(self.config(tmp_path, model={"quantization": "fp8"}))
        stored = {name for name, module in host.networks["transformer"].named_modules() if isinstance(module, Fp8Linear)}
        targets = matched_linears(self.network(), self.family().default_lora_targets)
        assert stored >= {f"{name}.base_layer" for name in targets}
        with host.base() as velocity, torch.no_grad():
            exact = self.family().velocity(self.network(), *call, texts, None)
            off = (velocity(*call, texts, None) - exact).abs().max() / exact.abs().max()
        assert 1e-4 < off < 0.3

    def test_every_lora_layer_gets_a_gradient(self, tmp_path: Path):
        host, texts = make_host(self.config(tmp_path)), self.texts()
        with host.edit() as velocity:
            velocity(self.latents(0), T, texts, self.latents(1)).square().sum().backward()
        idle = [name for name, parameter in host.parameters.items() if parameter.grad is None or not parameter.grad.any()]
        assert not idle, idle

    @torch.no_grad()
    def test_the_file_loads_in_diffusers_and_does_the_same(self, tmp_path: Path):
        host, texts = make_host(self.config(tmp_path, lora={"alpha": 2.0})), self.texts()
        (tensors,) = host.lora_files(host.parameters).values()
        path = tmp_path / "lora.safetensors"
        metadata = {"format": "pt", "byg.family": self.name, "byg.position": "same"}
        write_lora(path, tensors, metadata)
        network = self.network()
        call = (self.latents(0), T, texts, self.latents(1))
        without = self.family().velocity(network, *call)
        pipe: Any = self.pipeline(self.family(), network)
        pipe.load_lora_weights(str(path))
        with host.live() as velocity:
            ours = velocity(*call)
        assert (ours - without).abs().max() > 1e-2
        assert (ours - self.family().velocity(network, *call)).abs().max() <= 1e-4
        tools = [tool for tool in families.LORA_FORMATS if tool != "musubi" or families.named(self.name).musubi]
        for report in check(tensors, metadata, tools).tools:
            assert not report.lost or report.tool == "musubi", report

    def test_the_published_size_and_what_a_lora_of_it_is_taken_for(self):
        network = self.full_network()
        linears = matched_linears(network, self.family().default_lora_targets)
        assert (sum(p.numel() for p in network.parameters()), len(linears)) == self.full_size
        guessed = families.named(lora_formats.guess_family(self.full_lora(network), {}))
        assert guessed.lora_layout == families.named(self.name).lora_layout

    def full_lora(self, network: nn.Module) -> dict[str, Tensor]:
        """A file of the default layers at rank 1, on the meta device."""
        tensors: dict[str, Tensor] = {}
        for name in matched_linears(network, self.family().default_lora_targets):
            linear: Any = network.get_submodule(name)
            tensors[f"transformer.{name}.lora_A.weight"] = torch.empty(1, linear.in_features, device="meta")
            tensors[f"transformer.{name}.lora_B.weight"] = torch.empty(linear.out_features, 1, device="meta")
        return tensors

    @needs_comfyui
    def test_comfyui_detects_the_network_and_loads_every_layer(self, caplog: pytest.LogCaptureFixture):
        network = self.full_network()
        tensors = self.full_lora(network)
        with comfyui() as comfy:
            found = detected(comfy, self.native(network.state_dict()))
            patches = found.lora.load_lora(tensors, found.key_map)
        assert 2 * len(patches) == len(tensors)
        assert not [record for record in caplog.records if "not loaded" in record.message]

    def test_a_lora_of_attention_alone_is_taken_for_its_own(self):
        """Several networks call these layers the same; which one has this many blocks tells."""
        some = {
            key: tensor for key, tensor in self.full_lora(self.full_network()).items() if re.search(r"(attn|attention)\.to_[qkv]\.", key)
        }
        assert some
        guessed = families.named(lora_formats.guess_family(some, {}))
        assert guessed.lora_layout == families.named(self.name).lora_layout

    # --- bad input ---

    def test_texts_of_another_width_are_refused(self):
        if self.family().network.text_width is None:
            pytest.skip("texts of several encoders, of one size each")
        texts = {**self.texts(), "qwen": torch.cat([self.texts()["qwen"]] * 2, dim=-1)}
        with pytest.raises(ValueError, match=r"encoded texts are \d+ wide, the network takes \d+: model.transformer and model.qwen"):
            self.family().velocity(self.network(), self.latents(0), T, texts, None)

    def test_a_lora_of_other_layers_is_refused(self, tmp_path: Path):
        host = make_host(self.config(tmp_path))
        foreign = {name.replace("transformer.", "transformer.other."): p.detach() for name, p in host.parameters.items()}
        with pytest.raises(ValueError, match="does not fit the model and lora.targets"):
            host.load_lora(foreign)

    def test_another_network_is_named(self, tmp_path: Path):
        shutil.copytree(self.folder(), tmp_path / "model")
        config = tmp_path / "model" / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "OtherTransformer2DModel"}), encoding="utf-8")
        family = make_family(self.config(tmp_path, model={"path": str(tmp_path / "model")}))
        for look in (family.meta_transformers, lambda: next(iter(family.load_transformers(torch.float32)))):
            with pytest.raises(ValueError, match="holds a OtherTransformer2DModel, not a "):
                look()

    def test_a_missing_text_encoder_is_named(self, tmp_path: Path):
        shutil.copytree(self.folder(), tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder*"))
        family = make_family(self.config(tmp_path, model={"path": str(tmp_path / "model")}))
        for look in (lambda: family.load_text_encoders(CPU), lambda: family.fingerprint("text")):
            with pytest.raises(ValueError, match=r"has no text_encoder\S*/config.json"):
                look()

    # --- all of it ---

    def test_a_photo_becomes_an_edit(self, tmp_path: Path):
        """Cache, three steps, previews, the file that training writes, an edit with it."""
        skimage = pytest.importorskip("skimage", reason="scikit-image brings the photo")
        write_tuples(tmp_path, [(64, 64)])
        with Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png") as photo:
            photo.convert("RGB").save(tmp_path / "photo0.png")
        config = self.config(
            tmp_path,
            train={"steps": 3, "save_every": 0},
            objective={"rollout_steps": 2, "identity_warmup_steps": 1, "ema_decay": 0.9},
            sample={"every": 3, "items": 1, "steps": 2},
        )
        fill_caches(config)
        trainer = make_trainer(config)
        path = trainer.run()
        _, metadata = read_lora(path)
        assert metadata["byg.family"] == self.name
        assert any((tmp_path / "out" / "previews").rglob("*.png"))
        pipe = EditPipeline.from_lora(path, model=str(self.folder()), dtype="float32", device="cpu")
        edit = pipe(tmp_path / "photo0.png", "add the snow", steps=2)
        assert edit.size[0] > edit.size[1]


@lru_cache
def _encoders(contract: type[FamilyContract]) -> tuple[Family, Any]:
    family = contract().family()
    return family, family.load_text_encoders(CPU)


@lru_cache
def _encoded(contract: type[FamilyContract], prompts: tuple[str, ...]) -> dict[str, Tensor]:
    family, encoders = _encoders(contract)
    return family.encode_texts(encoders, list(prompts))
