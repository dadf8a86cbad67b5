"""One paired step of FLUX on the embedded host and inside musubi-tuner, in turn: seconds and peak memory as ratios.

Both have the same weights, LoRA, batch and loss in float32. Inside musubi-tuner the network, its attention, the LoRA and the
recomputation are the host's own classes, called as its trainer calls them.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step_meters as meters
from benchmarks.step_host import StepHost, inputs, make_batch, make_host, random_network, rollout_nodes
from benchmarks.step_rows import PAIRED
from benchmarks.step_shapes import Shape
from byg_plugin.lora import formats
from byg_plugin.lora.layouts import layout_of
from byg_plugin.models import flux_files
from byg_plugin.musubi.checkout import host_module, put_on_path
from byg_plugin.musubi.flux import FluxOnMusubi
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Velocity

VARIABLE = "MUSUBI_TUNER"
TOLERANCE = 1e-4
"""Largest relative difference of losses and LoRA gradients between two hosts that compute the same in float32."""
SIDES = ("embedded", "peer")
PAIRS = 3
"""Steps of each side in a repetition."""


def checkout() -> Path | None:
    """The checkout that the environment names; None: it names none.

    Raises:
        ValueError: none is there.
    """
    named = os.environ.get(VARIABLE, "")
    if not named:
        return None
    if not (Path(named) / "src/musubi_tuner").is_dir():
        raise ValueError(f"{VARIABLE} = {named}: no checkout of musubi-tuner there (no src/musubi_tuner in it)")
    return Path(named)


# --- the same LoRA on both sides ---


def shared_lora(shapes: Mapping[str, torch.Size], family: str, std: float, seed: int) -> dict[str, Tensor]:
    """A random LoRA in our names that musubi-tuner's fused layers can hold: the parts of one layer share `down`."""
    rng = torch.Generator().manual_seed(seed)
    downs: dict[str, Tensor] = {}
    out = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=rng) * std
        if name.endswith(".lora_A.weight"):
            value = downs.setdefault(_native_of(name, family).native, value).clone()
        out[name] = value
    return out


def in_host_names(lora: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our names -> the tensors of musubi-tuner's LoRA file."""
    ours = {f"transformer.{name.partition('.')[2]}": value for name, value in lora.items()}
    return formats.convert(ours, "musubi", family=family)


def fused_gradients(gradients: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Gradients by our names -> by musubi-tuner's: `down` is one for all parts of a layer, so theirs add up; rows of `up` are stacked.

    Where its network has our layers apart, nothing is added up.
    """
    if "lora_unet_" in layout_of(family).part_prefixes:
        return {name: value for name, value in in_host_names(gradients, family).items() if not name.endswith(".alpha")}
    out: dict[str, Tensor] = {}
    for name in gradients:
        linear, expert = _native_of(name, family), name.partition(".")[0]
        base = f"lora_unet_{linear.native.replace('.', '_')}"
        downs, ups = ([gradients[f"{expert}.{part}.lora_{kind}.weight"] for part in linear.parts] for kind in "AB")
        out[f"{base}.lora_down.weight"], out[f"{base}.lora_up.weight"] = torch.stack(downs).sum(0), torch.cat(ups)
    return out


def _native_of(name: str, family: str) -> Any:
    layer = name.partition(".")[2].removesuffix(".weight").rpartition(".lora_")[0]
    found = layout_of(family).find_part(layer)
    assert found is not None, layer
    return found[0]


def worst_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest relative difference of a tensor, by norms."""
    assert found.keys() == wanted.keys()
    assert min(value.norm() for value in wanted.values()) > 1e-6, "a comparison with nothing shows nothing"
    return max(((found[name] - value).norm() / value.norm()).item() for name, value in wanted.items())


# --- the two sides ---


class PeerFields:
    """musubi-tuner's network with its LoRA as the field `edit`, which is all that a paired step asks for."""

    def __init__(self, host: StepHost):
        self.network = _host_network(host)
        lora = host_module("networks.lora_flux")
        rank = host.config.lora.rank
        self.lora = lora.create_arch_network(1.0, rank, rank, None, None, self.network)
        self.lora.apply_to(None, self.network, apply_text_encoder=False, apply_unet=True)
        self.lora.prepare_grad_etc(self.network)
        self.network.train()  # without it the host recomputes nothing
        self._velocity = FluxOnMusubi().call(host_module, SimpleNamespace(autocast=nullcontext), self.network, host.config.conditioning)

    def choose(self, checkpointing: bool) -> None:
        """Recompute activations or keep them."""
        with _words_to_stderr():
            self.network.enable_gradient_checkpointing() if checkpointing else self.network.disable_gradient_checkpointing()

    @contextmanager
    def edit(self) -> Iterator[Velocity]:
        yield self._velocity


def _host_network(host: StepHost) -> Any:
    """The host's class with the weights of the embedded network."""
    models = host_module("flux.flux_models")
    from diffusers import FluxTransformer2DModel

    config: Any = host.networks["transformer"].config
    width = config.num_attention_heads * config.attention_head_dim
    params = models.FluxParams(
        in_channels=config.in_channels,
        vec_in_dim=config.pooled_projection_dim,
        context_in_dim=config.joint_attention_dim,
        hidden_size=width,
        mlp_ratio=4.0,
        num_heads=config.num_attention_heads,
        depth=config.num_layers,
        depth_single_blocks=config.num_single_layers,
        axes_dim=list(config.axes_dims_rope),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=config.guidance_embeds,
    )
    network = models.Flux(params, attn_mode="torch")
    fresh = random_network(FluxTransformer2DModel, dict(config), torch.float32, torch.device("cpu"))
    network.load_state_dict(flux_files.to_native_layout(fresh.state_dict()))
    return network.requires_grad_(False)


@contextmanager
def _words_to_stderr() -> Iterator[None]:
    """musubi-tuner prints what it does; the results are what stdout is for."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class Peer:
    """Both sides with the same weights, LoRA and batch, on the CPU."""

    def __init__(self, shape: Shape, folder: Path):
        assert shape.family == "flux" and shape.dtype == "float32" and shape.mixed_precision == "no"
        put_on_path(str(folder))
        self.host = make_host(shape, torch.device("cpu"))
        with _words_to_stderr():
            self.fields = PeerFields(self.host)
        lora = shared_lora({name: p.shape for name, p in self.host.parameters.items()}, "flux", std=0.05, seed=5)
        for name, parameter in self.host.parameters.items():
            parameter.data.copy_(lora[name])
        self.fields.lora.load_state_dict(in_host_names(lora, "flux"))
        self.host.choose(PAIRED, False)
        self.objective = make_objective(self.host.config.objective)
        nodes = rollout_nodes(shape, self.host.config.objective, self.host.family)
        self.batch: Batch = make_batch(shape, PAIRED.kind, nodes, self.host.device)

    def choose(self, checkpointing: bool) -> None:
        """Of the next steps of both sides."""
        self.host.choose(PAIRED, checkpointing)
        self.fields.choose(checkpointing)

    def step(self, side: str) -> Tensor:
        """One step without optimizer; adds to the gradients and gives the loss."""

        def backward(loss: Tensor, *, last: bool) -> float:
            loss.backward()
            return 1.0

        fields: Any = self.host if side == "embedded" else self.fields
        return self.objective.step(fields, self.batch, backward)["loss"]

    def difference(self) -> float:
        """The largest relative difference of loss and LoRA gradients; leaves the gradients of one step."""
        trained = {"embedded": self.host.parameters, "peer": dict(self.fields.lora.named_parameters())}
        for parameters in trained.values():
            for parameter in parameters.values():
                parameter.grad = None
        ours, theirs = (self.step(side).item() for side in SIDES)
        gradients: dict[str, Any] = {side: {name: p.grad for name, p in trained[side].items()} for side in SIDES}
        return max(abs(ours / theirs - 1), worst_difference(fused_gradients(gradients["embedded"], "flux"), gradients["peer"]))

    def seconds(self, side: str, read: Callable[[], float]) -> float:
        begin = read()
        self.step(side)
        return read() - begin

    def peaks(self, side: str) -> dict[str, int]:
        """Bytes that the graph saves, and of all tensors alive, without what lives anyway."""
        modules: list[nn.Module] = [*self.host.networks.values()] if side == "embedded" else [self.fields.network, self.fields.lora]
        held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        held += [p.grad for module in modules for p in module.parameters() if p.grad is not None] + inputs(self.batch)
        with meters.SavedBytes(held) as saved, meters.AliveBytes(held) as alive:
            self.step(side)
        return {"saved": saved.peak, "alive": alive.peak}


# --- measuring ---


def compare(shape: Shape, folder: Path, repeats: int, clock: str) -> list[dict[str, Any]]:
    """A record for each setting of checkpointing: the sides in turn, which of them goes first in turn too."""
    peer = Peer(shape, folder)
    read = meters.clock(torch.device("cpu"), clock).read
    records = []
    for setting in (False, True):
        peer.choose(setting)
        difference = peer.difference()
        assert difference < TOLERANCE, f"the hosts do not compute the same: {difference}"
        records.append(
            {
                "checkpointing": setting,
                "difference": difference,
                "bytes": {side: peer.peaks(side) for side in SIDES},
                "seconds": {side: [] for side in SIDES},
            }
        )
    for repetition in range(repeats * PAIRS):
        for record in records:
            peer.choose(record["checkpointing"])
            for side in SIDES if repetition % 2 else SIDES[::-1]:
                record["seconds"][side].append(peer.seconds(side, read))
    return records


def seconds_ratio(record: Mapping[str, Any]) -> float:
    """Median over the repetitions of embedded over peer."""
    return statistics.median(ours / theirs for ours, theirs in zip(*(record["seconds"][side] for side in SIDES), strict=True))


def peak_ratio(record: Mapping[str, Any], kind: str) -> float:
    return record["bytes"]["embedded"][kind] / record["bytes"]["peer"][kind]


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """The worse of both settings, of memory also of both meters."""
    return {
        "peer_seconds": max(map(seconds_ratio, records)),
        "peer_peak": max(peak_ratio(record, kind) for record in records for kind in ("saved", "alive")),
    }


def table(records: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| paired step of FLUX, embedded over peer | its seconds | seconds | saved for backward | all tensors alive | results differ |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        title = f"activations {'recomputed' if record['checkpointing'] else 'kept'}"
        lines.append(
            f"| {title} | {statistics.median(record['seconds']['embedded']):.3g} | {seconds_ratio(record):.3f} "
            f"| {peak_ratio(record, 'saved'):.3f} | {peak_ratio(record, 'alive'):.3f} | {record['difference']:.0e} |"
        )
    return "\n".join(lines)
