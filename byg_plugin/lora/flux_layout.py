"""LoRAs of FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from byg_plugin.lora import flux_names
from byg_plugin.lora.layout import Layout, Module, Network

_BLOCKS = ("double_blocks.", "single_blocks.")
_WIDTH = 3072


def network(double: int, single: int, width: int) -> Network:
    """A FLUX.1 of so many blocks of each kind, `width` wide."""
    times = {
        "attn.qkv": (1, 3),
        "attn.proj": (1, 1),
        "mlp.0": (1, 4),
        "mlp.2": (4, 1),
        "mod.lin": (1, 6),
        "linear1": (1, 7),
        "linear2": (5, 1),
        "modulation.lin": (1, 3),
    }
    shapes = {end: (inputs * width, outputs * width) for end, (inputs, outputs) in times.items()}
    return Network("FLUX.1", dict(zip(_BLOCKS, (double, single), strict=True)), shapes)


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    kohya = any(other.suffix == ".lora_down.weight" for other in modules)  # one such key switches the whole file's reader
    if module.prefix == "transformer.":
        if not kohya:
            return None if module.suffix == ".lora_A.weight" else f"diffusers does not read the suffix {module.suffix}"
        return None if module.scale == 1.0 else "diffusers ignores alpha in this naming, so the strength would be wrong"
    if module.prefix not in ("lora_unet_", "diffusion_model."):
        return "diffusers loads nothing under this naming, without an error"
    if module.suffix != ".lora_down.weight":
        return "diffusers reads native names only as lora_down/lora_up, and loads nothing of this without an error"
    return _in_converter(module)


def _in_converter(module: Module) -> str | None:
    linear = module.linear
    if not linear.native.startswith(_BLOCKS):
        return "diffusers' converter drops native layers outside the blocks"
    even = len(set(linear.widths)) == 1
    if not even and module.up.shape[0] != _WIDTH * sum(linear.widths):
        return f"diffusers' converter only splits it at the full width {_WIDTH}"
    return None


LAYOUT = Layout(
    name="flux",
    find_native=flux_names.find_native,
    find_part=flux_names.find_part,
    linears=partial(flux_names.linears, 19, 38, guidance=True),
    networks=(network(19, 38, _WIDTH),),
    blocks=_BLOCKS,
    in_diffusers=_in_diffusers,
    loader="FluxLoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: FluxBygPipeline (FluxKontextPipeline gives the source position 1)",
        ("same", "comfyui"): "needs a node: ByG Source (ReferenceLatent gives the source other positions)",
        ("same", "musubi"): "needs a patch: the FLUX Kontext script gives the source position 1",
        ("kontext", "diffusers"): "runs stock: FluxKontextPipeline",
        ("kontext", "comfyui"): "runs stock: ReferenceLatent",
        ("kontext", "musubi"): "runs stock: the FLUX Kontext script",
    },
)
