"""The frozen base read once and cut into shards: types, bytes, and what a process holds while it loads."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.fsdp2 import Fsdp2Shards
from byg_plugin.hosts.sharding import agree_on_types, bytes_held, read_on_first
from tests.support.engine_runs import in_processes
from tests.support.tiny import tiny_flux

CPU = torch.device("cpu")


def network(kind: str) -> nn.Module:
    """bfloat16 with one float32 weight, as some files have it; on the meta device of the config's own type."""
    if kind == "meta":
        with torch.device("meta"):
            return tiny_flux()
    made = tiny_flux().to(torch.bfloat16)
    made.proj_out.weight.data = made.proj_out.weight.data.float()
    return made.requires_grad_(False)


def cut() -> None:
    rank = Accelerator(cpu=True).process_index
    found = read_on_first(iter([("transformer", network("whole"))]), {"transformer": network("meta")})
    ((_, made),) = found
    assert all(p.is_meta for p in made.parameters()) == bool(rank)
    agree_on_types(made)
    biggest: list[int] = []
    whole = sum(p.numel() * p.element_size() for p in network("whole").parameters())
    shards = Fsdp2Shards(CPU, offload=False)
    seen_by(made, biggest)
    shards.cut(made)
    held, all_of_it = bytes_held([made])
    assert all_of_it == whole and held <= whole / 2 * 1.1, (held, whole)
    dtypes = {name: p.dtype for name, p in made.named_parameters()}
    assert dtypes["proj_out.weight"] == torch.float32 and dtypes["proj_out.bias"] == torch.bfloat16
    expected = network("whole").state_dict()
    for name, value in made.state_dict().items():
        assert torch.equal(value.full_tensor(), expected[name]), name
    if rank:
        block = max(sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks_of(network("whole")))
        assert max(biggest) <= held + block, "a process that does not read holds its shards and one piece"


def seen_by(made: nn.Module, biggest: list[int]) -> None:
    """Bytes with storage in the network, after each block is cut."""
    from torch.distributed import fsdp

    plain = fsdp.fully_shard

    def counted(unit: nn.Module, **options: Any) -> Any:
        biggest.append(sum(_bytes(p) for p in made.parameters()))
        return plain(unit, **options)

    fsdp.fully_shard = counted


def _bytes(parameter: torch.Tensor) -> int:
    if parameter.is_meta:
        return 0
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


def test_the_base_is_read_once_and_handed_on_in_its_types(tmp_path: Path):
    in_processes(2, cut, tmp_path)


class Linears(nn.Module):
    """Of 4 MiB each: DeepSpeed leaves pieces of less than 1 MiB in main memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def gradient(network: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2048).view(2, 1024).requires_grad_()
    network(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


def on_disk(folder: Path) -> None:
    from byg_plugin.config.sections import TrainConfig
    from byg_plugin.hosts.zero3 import Zero3Shards
    from byg_plugin.training.deepspeed_settings import Terms, resolved

    Accelerator(cpu=True)
    offload = {"device": "nvme", "nvme_path": str(folder), "buffer_size": 2**20}
    settings = resolved({"zero_optimization": {"stage": 3, "offload_param": offload}}, "test", Terms.of(TrainConfig(steps=1), 1))
    made = Linears().requires_grad_(False)
    expected = gradient(made)
    shards = Zero3Shards(CPU, settings)
    shards.cut(made)
    for _ in range(2):
        assert torch.equal(gradient(made), expected)
        shards.after_backward()
    held, whole = bytes_held([made])
    assert whole == 3 * 4 * (2**20 + 1024) and held == 3 * 4 * (1024 / 2 + 1), "the biases, and a number for each weight"


@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("BYG_ALL_ENGINES"), reason="DeepSpeed compiles its reader for minutes: set BYG_ALL_ENGINES=1")
def test_a_base_on_a_disk_computes_the_same(tmp_path: Path):
    pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"')
    from byg_plugin.hosts.deepspeed import can_use_nvme

    if not can_use_nvme():
        pytest.skip("DeepSpeed cannot compile its reader here: apt install g++ ninja-build libaio-dev")
    (tmp_path / "disk").mkdir()
    in_processes(2, partial(on_disk, tmp_path / "disk"), tmp_path / "logs")
    assert sum(path.stat().st_size for path in (tmp_path / "disk").rglob("*.swp")) == 3 * 4 * 2**20
