"""The networks and inputs that `benchmarks.step` measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.provenance import ROOT
from byg_plugin.config.loading import load_config
from byg_plugin.config.objective import ObjectiveConfig
from byg_plugin.config.sections import Config
from byg_plugin.models import files, flux_files, networks

DEMO = "configs/demo.toml"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network and its inputs."""

    transformer: dict[str, Any]
    """Arguments of diffusers' FluxTransformer2DModel or WanTransformer3DModel."""
    side: int
    """Height and width of the latents; noisy tokens, and source tokens, are a quarter of its square a frame."""
    family: str = "flux"
    frames: int = 1
    """Of the latents."""
    t: tuple[float, float] = (0.4, 0.7)
    """What a step's times lie between: of two experts, they choose the one that is trained."""
    text_tokens: int
    rank: int
    batch: int = 1
    targets: str | None = None
    dtype: str = "float32"
    mixed_precision: str = "no"
    rollout_steps: tuple[int, int] = (10, 5)
    """Of the ladder, and of the shorter rollout beside it."""
    checkpointing: tuple[bool, ...] = (False, True)
    preset: str = "configs/flux_image_fast.toml"
    """Recipe, from the repository's root, whose `[objective]` is the row `FAST`."""


def shape_named(name: str) -> Shape:
    """A shape of SHAPES.

    `cpu` keeps FLUX.1-dev's proportions at 512 px (double to single blocks, tokens to width, text to image tokens, rank to
    width) at a size where matrix products dominate a CPU's step. `demo` is the tiny world's base under configs/demo.toml. `wan-high`
    and `wan-low` train one or the other of two Wan experts; the rollout runs through both.
    """
    if name == "cpu":
        return Shape(transformer=_flux(2, 4, heads=3, head=128, text=512, pooled=96), side=22, text_tokens=60, rank=8)
    if name == "tiny":
        transformer = _flux(1, 2, heads=2, head=16, text=24, pooled=20) | {"axes_dims_rope": (4, 6, 6)}
        return Shape(transformer=transformer, side=8, text_tokens=6, rank=4, batch=2, rollout_steps=(4, 2))
    if name == "demo":
        demo = _recipe(DEMO)
        folder = ROOT / "byg_plugin/demo/base"
        base = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
        return Shape(
            transformer=_arguments(base),
            side=demo.dataset.resolution // networks.vae_downsampling(flux_files.VAE, folder / "vae"),
            text_tokens=demo.conditioning.max_text_tokens,
            rank=demo.lora.rank,
            batch=demo.train.batch_size,
            targets=demo.lora.targets,
            checkpointing=(False,),
            preset=DEMO,
        )
    if name in ("wan-high", "wan-low"):
        return Shape(
            transformer=_wan(4, heads=3, head=128, ffn=1024, text=128), side=16, frames=3, text_tokens=64, rank=8, **WAN_SIDES[name[4:]]
        )
    if name == "wan-tiny":
        transformer = _wan(2, heads=2, head=12, ffn=32, text=24)
        return Shape(transformer=transformer, side=4, frames=2, text_tokens=6, rank=4, batch=2, rollout_steps=(4, 2), **WAN_SIDES["low"])
    if name == "wan2.2-t2v-a14b":
        return Shape(
            transformer=_arguments(files.shipped_config("wan/transformer")),
            side=64,
            frames=9,
            text_tokens=512,
            rank=64,
            dtype="bfloat16",
            mixed_precision="bf16",
            checkpointing=(True,),
            **WAN_SIDES["low"],
        )
    assert name == "flux.1-dev", name
    return Shape(
        transformer=_arguments(files.shipped_config("flux_dev/transformer")),
        side=64,
        text_tokens=512,
        rank=64,
        dtype="bfloat16",
        mixed_precision="bf16",
        checkpointing=(True,),
    )


SHAPES = ("cpu", "demo", "flux.1-dev", "tiny", "wan-high", "wan-low", "wan-tiny", "wan2.2-t2v-a14b")
_WAN = {"family": "wan2.2-t2v-a14b", "preset": "configs/wan22_video_fast.toml"}
WAN_SIDES: dict[str, dict[str, Any]] = {"high": {**_WAN, "t": (0.9, 0.97)}, "low": {**_WAN, "t": (0.4, 0.7)}}


def _flux(double: int, single: int, *, heads: int, head: int, text: int, pooled: int) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "guidance_embeds": True,
    }


def _wan(layers: int, *, heads: int, head: int, ffn: int, text: int) -> dict[str, Any]:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head, "ffn_dim": ffn, "text_dim": text}
    return {"in_channels": 16, "out_channels": 16, "freq_dim": 64, **sizes}


def preset_of(shape: Shape) -> ObjectiveConfig:
    """The `[objective]` of the shape's recipe."""
    return _recipe(shape.preset).objective


def _recipe(path: str) -> Config:
    """A recipe of the repository; no file that it names need be there."""
    unused = [f"{key}=unused" for key in ("dataset.tuples", "dataset.cache_dir", "output.dir", "model.path")]
    return load_config(ROOT / path, unused)


def _arguments(saved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if not key.startswith("_")}
