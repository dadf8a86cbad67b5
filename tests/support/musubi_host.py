"""The real musubi-tuner with tiny weights, the same as the embedded host's, in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.lora import wan_names
from byg_plugin.models import flux_files
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi.checkout import Checkout
from tests.support import GOLDEN
from tests.support.musubi_images import IMAGES, MASKED, TEXT_TOKENS
from tests.support.tiny import tiny_config, tiny_flux, tiny_texts

CHECKOUT = os.environ.get("MUSUBI_TUNER", "")
needs_host = [
    pytest.mark.musubi,
    pytest.mark.skipif(not CHECKOUT, reason="set MUSUBI_TUNER to the folder of a musubi-tuner checkout to run it"),
]
SITE = Path(__file__).parent / "musubi_site"
WAN_TEXT = 4096  # the host knows no other width
BLOCKS = 4  # of the tiny Wan: enough to swap some
A14B, T2V = "wan2.2-t2v-a14b", "wan2.1-t2v-1.3b"


def open_tiny(family: str) -> Checkout:
    """The host on a CPU, its names meaning tiny models."""
    if "musubi_stubs" not in sys.modules:
        sys.path.append(str(SITE))
        import musubi_stubs

        musubi_stubs.look_first()
        musubi_stubs.install()
    import musubi_stubs

    host = musubi.open_checkout(host_config(Path("."), family).model)
    musubi_stubs.shrink()
    if family in (A14B, T2V):
        _attention_in_float32(host)
    return host


def _attention_in_float32(host: Checkout) -> None:
    """The host's Wan rounds q, k and v to 16 bit whatever the model is; equality is tested in float32."""

    def attention(qkv: list[Tensor], k_lens: Any = None, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        qkv.clear()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    host.module("wan.modules.model").flash_attention = attention


def host_config(folder: Path, family: str, **sections: dict[str, Any]) -> Config:
    """A configuration of this host; sections are merged in."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"family": family, "host": "musubi", "device": "cpu", **({"host_path": CHECKOUT} if CHECKOUT else {})},
        "dataset": {"tuples": str(folder / "tuples.jsonl")},
        "conditioning": {"max_text_tokens": TEXT_TOKENS},
        "objective": {"rollout_steps": 4, "identity_warmup_steps": 0, "identity_probability": 0.0, "ema_decay": 0.9},
        "musubi": {
            "dit": str(folder / "dit.safetensors"),
            "dataset_config": str(folder / "dataset.toml"),
            "output_dir": str(folder / "out"),
            "output_name": "tiny",
            "network_dim": 4,
            "network_alpha": 4,
            "learning_rate": 1e-2,
            "optimizer_type": "AdamW",
            "max_train_steps": 4,
            "mixed_precision": "no",
            "max_data_loader_n_workers": 0,
            "sdpa": True,
        },
    }
    if family in IMAGES:
        raw["musubi"] |= IMAGES[family].options
    if family == A14B:
        raw["musubi"]["dit_high_noise"] = str(folder / "high.safetensors")
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


# --- the same weights in both hosts ---


def random_wan(seed: int) -> dict[str, Tensor]:
    """A tiny Wan of the host's own class: its pinned diffusers has none. No weight is zero."""
    model = open_tiny(T2V).module("wan.modules.model")
    import musubi_stubs

    torch.manual_seed(seed)
    network = model.WanModel(**musubi_stubs.TINY_WAN)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network.state_dict()


def write_weights(folder: Path, family: str) -> None:
    """The host's files of tiny models."""
    if family == "flux":
        state = flux_files.to_native_layout(tiny_flux().state_dict())
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "dit.safetensors")
    elif family in IMAGES:
        save_file(IMAGES[family].state(), folder / "dit.safetensors")
    else:
        save_file(random_wan(0), folder / "dit.safetensors")
    if family == A14B:
        save_file(random_wan(7), folder / "high.safetensors")


def embedded_networks(family: str) -> dict[str, torch.nn.Module]:
    """The networks of the embedded host with the same weights."""
    if family == "flux":
        return {"transformer": tiny_flux()}
    if family in IMAGES:
        return {"transformer": IMAGES[family].network()}
    import diffusers

    if not hasattr(diffusers, "WanTransformer3DModel"):
        pytest.skip(f"diffusers {diffusers.__version__}, which musubi-tuner pins, has no Wan: nothing to compare with")
    from tests.support.tiny_wan import tiny_wan

    networks: dict[str, torch.nn.Module] = {}
    for name, seed in {"transformer": 7, "transformer_2": 0}.items() if family == A14B else {"transformer": 0}.items():
        state = random_wan(seed)
        networks[name] = tiny_wan(text_dim=WAN_TEXT, num_layers=BLOCKS)
        networks[name].load_state_dict({ours: state[native] for native, ours in wan_names.tensors(BLOCKS)})
    return networks


def embedded_config(folder: Path, family: str, **sections: dict[str, Any]) -> Config:
    """The embedded host's configuration that says the same."""
    objective = {"rollout_steps": 4, "identity_warmup_steps": 0, "identity_probability": 0.0, "ema_decay": 0.9}
    if family == "flux":
        return tiny_config(folder, objective=objective | sections.get("objective", {}))
    if family in IMAGES:
        network: Any = IMAGES[family].network()
        network.save_config(folder / "model" / "transformer")  # the layers of a LoRA may depend on it
        objective |= sections.pop("objective", {})
        return tiny_config(folder, model={"family": family}, objective=objective, **sections)
    from tests.support.tiny_wan import wan_config

    shared = {"lora": {"experts": "shared"}} if family == A14B else {}
    return wan_config(folder, family, objective=objective | sections.get("objective", {}), **shared)


# --- the host's trainer, set up as its train() does, without its loop ---


class Rig:
    """A trainer of the host with model, LoRA and fields, and a LoRA that is awake."""

    def __init__(self, folder: Path, family: str, **sections: dict[str, Any]):
        self.folder, self.family = folder, family
        write_weights(folder, family)
        (folder / "dataset.toml").write_text('[general]\nresolution = [32, 32]\n[[datasets]]\nimage_directory = "."\n', encoding="utf-8")
        self.host = open_tiny(family)
        self.config = host_config(folder, family, **sections)
        from byg_plugin.musubi import options as musubi_options

        self.args = musubi_options.arguments(self.config, self.host.parser())
        reset_accelerate()
        self.trainer = musubi.make_trainer(self.host, self.config)
        self.trainer.handle_model_specific_args(self.args)
        self.accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=self.args.gradient_accumulation_steps)
        self.transformer = self._load()
        network = self.trainer._build_network(self.args, self.accelerator, self.transformer, None, torch.float32)
        network.prepare_optimizer_params(unet_lr=1e-2)
        self.trainer.extra_trainable_params(self.args, self.accelerator, network, self.transformer, [])
        self.network = network
        if self.args.gradient_checkpointing:
            self.transformer.train()
        network.prepare_grad_etc(self.transformer)
        self.trainer.on_train_start(self.args, self.accelerator, network, self.transformer, None)
        self.fields = self.trainer.byg_fields

    def call(self, transformer: Any) -> Any:
        """The family's call of a transformer."""
        checkout = self.trainer.byg_checkout
        return checkout.family.call(checkout.module, self.accelerator, transformer, self.trainer.byg_config.conditioning)

    def _load(self) -> Any:
        trainer, args = self.trainer, self.args
        trainer.blocks_to_swap = 0
        dtype = trainer.dit_dtype if self.family in (A14B, T2V) else torch.float32
        return trainer._load_dit_and_swap(args, self.accelerator, dtype)

    def wake(self, seed: int = 5) -> None:
        """Random live and EMA weights, all different."""
        rng = torch.Generator().manual_seed(seed)
        for parameter in self.network.parameters():
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.2
        ema = self.fields.ema_weights
        ema.load({name: torch.randn(p.shape, generator=rng) * 0.2 for name, p in ema.state().items()})


def reset_accelerate() -> None:
    """As in a fresh process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def texts(family: str, batch: int, seed: int) -> dict[str, Tensor]:
    """Random encodings of the tiny model's widths."""
    if family == "flux":
        return tiny_texts(batch, seed)
    if family in IMAGES:
        return IMAGES[family].texts(batch, seed)
    return {"umt5": torch.randn(batch, TEXT_TOKENS, WAN_TEXT, generator=torch.Generator().manual_seed(seed)) * 0.1}


def latents(family: str, batch: int, seed: int) -> Tensor:
    """Random latents: an image for FLUX, a clip of two latent frames for Wan."""
    if family in IMAGES:
        return IMAGES[family].latents(batch, seed)
    frames = 1 if family == "flux" else 2
    return torch.randn(batch, 16, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def record_surfaces(path: Path) -> None:
    """Write down what the host's parsers take, for tests without the host."""
    import json

    from byg_plugin.musubi import options as musubi_options

    families = {"wan": T2V, "flux": "flux", **{family: family for family in MASKED}}
    found = {
        name: musubi_options.surface_to_json(musubi_options.surface_of(open_tiny(family).parser())) for name, family in families.items()
    }
    first, *others = found.values()
    shared = {name: option for name, option in first.items() if all(other.get(name) == option for other in others)}
    own = {family: {name: option for name, option in every.items() if name not in shared} for family, every in found.items()}
    path.write_text(json.dumps({"shared": shared, **own}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def recorded_surface(family: str) -> Any:
    """What `record_surfaces` wrote of a family."""
    import json

    from byg_plugin.musubi import options as musubi_options

    recorded = json.loads((GOLDEN / "musubi_surfaces.json").read_text(encoding="utf-8"))
    return musubi_options.surface_from_json(recorded["shared"] | recorded[family if family in recorded else "wan"])


if __name__ == "__main__":
    record_surfaces(GOLDEN / "musubi_surfaces.json")
