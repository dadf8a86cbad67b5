"""The memory sum of `--dry-run`: what a step keeps on the device, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from byg_plugin.config.sections import Config, LoraConfig
from byg_plugin.critics.memory import CriticMemory
from byg_plugin.hosts.blocks import blocks_of, depth_of, linears_in_blocks
from byg_plugin.objectives import make_objective
from byg_plugin.training.launch import Launch

GIB = 2**30
_STORED_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: 4 bits and one float32 scale a 64-block


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """One line: `exact` is arithmetic on shapes, otherwise an estimate."""

    name: str
    bytes: float
    exact: bool


def memory_sum(
    config: Config,
    networks: dict[str, nn.Module],
    lora_shapes: Sequence[Sequence[int]],
    tokens: int,
    width: int,
    blocks: int,
    launch: Launch | None = None,
    processes: int = 1,
) -> list[MemoryLine]:
    """The parts, of one process.

    Args:
        config: the whole configuration.
        networks: the experts, on the meta device if you like: only shapes are read.
        lora_shapes: shapes of the LoRA tensors of one expert, each A before its B (`hosts.diffusers.lora_shapes`).
        tokens: tokens of the longest sequence of one sample (noisy + source + text).
        width: hidden width.
        blocks: transformer blocks.
        launch: what shards the base or the LoRA; None: nothing.
        processes: over which it is sharded.
    """
    launch = launch or Launch()
    dtype_bytes = torch.finfo(getattr(torch, config.model.dtype)).bits / 8
    stored = _STORED_BYTES.get(config.model.quantization, dtype_bytes)
    in_blocks = rest = 0
    # The experts are equally large.
    here = list(networks.values())[:1] if config.model.offload_inactive_expert else networks.values()
    for network in here:
        linears = {id(network.get_submodule(name).weight) for name in linears_in_blocks(network)}
        for parameter in network.parameters():
            if id(parameter) in linears:
                in_blocks += parameter.numel()
            else:
                rest += parameter.numel()
    lora = sum(prod(shape) for shape in lora_shapes) * 4.0
    held, trained = lora_copies(config.lora, len(networks))
    # A LoRA's shapes come in pairs, (rank, in) and (out, rank).
    adapted = sum(a[1] * b[0] for a, b in zip(lora_shapes[::2], lora_shapes[1::2], strict=True))
    ways = processes if launch.stage in (1, 2) else 1
    moments = {"adamw": 2.0, "muon": 1.0, "adamw8bit": 0.5}[config.train.optimizer] * lora * trained / ways
    activation_bytes = 2.0 if config.train.mixed_precision == "bf16" else 4.0
    inputs = config.train.batch_size * tokens * width * activation_bytes
    kept_by_block, at_peak = _block_tensors(next(iter(networks.values())), width)
    a_pass = inputs * blocks * (1 if config.model.gradient_checkpointing else kept_by_block)
    objective = make_objective(config.objective)
    graphs, rows, merged_weights = objective.memory
    passes = graphs * rows
    kept = passes * a_pass + (inputs * at_peak * rows if config.model.gradient_checkpointing else 0)
    storage = config.model.quantization if config.model.quantization != "none" else config.model.dtype
    exact = config.model.quantization in ("none", "fp8")
    whole = in_blocks * stored + rest * dtype_bytes
    if launch.sharding:
        one = next(iter(networks.values()))
        block = max(_stored_bytes(each, stored, dtype_bytes) for each in blocks_of(one))
        lines = [
            # One computes, the next one is on its way.
            MemoryLine(name=f"blocks gathered for their pass, at most 2 ({storage})", bytes=2 * block, exact=False),
        ]
        if launch.sharding.offload == "none":
            name = f"frozen weights ({storage}), in shards over {processes} process{'es' if processes > 1 else ''}"
            lines.insert(0, MemoryLine(name=name, bytes=whole / processes, exact=exact))
    else:
        lines = [MemoryLine(name=f"frozen weights ({storage})", bytes=whole, exact=exact)]
    sets = len(objective.adapters)
    two = f" of {' and '.join(objective.adapters)}" if sets > 1 else ""
    lines += [
        MemoryLine(name=f"LoRA weights{two} (float32)", bytes=lora * held * sets, exact=True),
        # A step trains one side of the experts' boundary, and one set of weights.
        MemoryLine(name="LoRA gradients (float32)", bytes=lora, exact=True),
        MemoryLine(
            name=f"optimizer moments{two} ({config.train.optimizer})", bytes=moments * sets, exact=config.train.optimizer != "adamw8bit"
        ),
    ]
    if launch.stage in (1, 2):
        lines.append(MemoryLine(name="DeepSpeed's copy of the LoRA (float32), in shards", bytes=lora * trained / ways, exact=True))
    if config.objective.ema_decay:
        lines.append(MemoryLine(name="EMA weights (float32)", bytes=lora * trained, exact=True))
    if merged_weights:
        merged = adapted * dtype_bytes * len(networks)
        lines.append(MemoryLine(name=f"merged weights of the rollout ({config.model.dtype})", bytes=merged, exact=True))
    what = "saved block inputs + one block recomputed" if config.model.gradient_checkpointing else "activations of all blocks"
    lines.append(MemoryLine(name=f"{what}, {passes} pass{'es' if passes > 1 else ''} at once ({tokens} tokens)", bytes=kept, exact=False))
    return lines


def with_critic(lines: Sequence[MemoryLine], critic: CriticMemory, *, elsewhere: bool) -> list[MemoryLine]:
    """The parts of a step that also asks a critic.

    Its graphs and the step's are never there at once: of the last line, the step's, and them the larger one counts.

    Args:
        lines: of `memory_sum`.
        critic: what the critic keeps.
        elsewhere: whether it has a device of its own, which then is not counted.
    """
    if elsewhere:
        return list(lines)
    *others, graph = lines
    parts = (("critic's weights", critic.model), ("weights of the critic's VAE (float32)", critic.vae))
    others += [MemoryLine(name=name, bytes=size, exact=True) for name, size in parts]
    name = f"{graph.name}; or, if larger, the critic's graph ({critic.graph / GIB:.2f} GiB)"
    return [*others, MemoryLine(name=name, bytes=max(graph.bytes, critic.graph), exact=False)]


def _stored_bytes(block: nn.Module, stored: float, dtype_bytes: float) -> float:
    linears = {id(module.weight) for module in block.modules() if isinstance(module, nn.Linear)}
    return sum(parameter.numel() * (stored if id(parameter) in linears else dtype_bytes) for parameter in block.parameters())


def lora_copies(lora: LoraConfig, networks: int) -> tuple[int, int]:
    """(LoRAs in memory, those that are trained), each of one expert's size."""
    held = 1 if lora.experts == "shared" else networks
    return held, 1 if lora.other_expert else held


def _block_tensors(network: nn.Module, width: int) -> tuple[float, float]:
    """Hidden-size tensors in 16 bits a token that one block (keeps for its backward, needs when it is recomputed and run backward).

    FLUX: about 34 (norms, q k v, attention out, a 4x MLP and its GELU). Wan computes norms and gates in float32 and has a feed-forward
    of its own width: counted at both published sizes on a CPU, under bfloat16 autocast, with a LoRA of rank 64.
    """
    feed_forward = getattr(network.config, "ffn_dim", None)
    if feed_forward is None:
        return 34.0, 34.0
    ratio = feed_forward / width
    return 25.0 + 2.0 * ratio, 30.0 + 4.5 * ratio


def report(lines: Sequence[MemoryLine]) -> str:
    """The sum as text; an unmeasured figure is called an estimate."""
    text = [f"  {line.bytes / GIB:8.2f} GiB  {line.name}{'' if line.exact else '  [estimate]'}" for line in lines]
    total = sum(line.bytes for line in lines)
    return "\n".join([*text, f"  {total / GIB:8.2f} GiB  sum  [estimate; the CUDA context and fragmentation add about 1 GiB]"])


def sizes(network: Any) -> tuple[int, int]:
    """(hidden width, transformer blocks) of a diffusers transformer."""
    config = network.config
    return int(config.get("dim") or config.num_attention_heads * config.attention_head_dim), depth_of(network)
