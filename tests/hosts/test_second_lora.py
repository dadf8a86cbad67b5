"""Two LoRAs over one frozen base: who computes what, who gets gradient, and what an exception leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.hosts import adapter_shapes
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models import make_family
from byg_plugin.objectives.base import EDIT, FAKE, Batch
from tests.support.diffusers_host import base_of, batch_of, ema_of, host_config, live_of, relative_difference, without_lora
from tests.support.tiny import wake


def two(config: Any) -> DiffusersHost:
    """Both LoRAs awake: no B is zero."""
    host = DiffusersHost(config, make_family(config), torch.device("cpu"), adapters=(EDIT, FAKE))
    wake(host)
    rng = torch.Generator().manual_seed(8)
    for parameter in host.adapters[FAKE].parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.2
    return host


def fake_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with torch.no_grad(), host.fake() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


FIELDS: tuple[Callable[[DiffusersHost, Batch], Tensor], ...] = (base_of, live_of, ema_of, fake_of)


def test_the_four_fields_are_four_functions_and_base_is_the_bare_model(tmp_path: Path):
    host, batch = two(host_config(tmp_path)), batch_of()
    values = [field(host, batch) for field in FIELDS]
    assert torch.equal(values[0], without_lora(batch))
    assert all((a - b).norm() > 1e-2 for i, a in enumerate(values) for b in values[i + 1 :])
    with host.edit(), host.fake(), host.ema():
        assert torch.equal(base_of(host, batch), values[0])
    assert all(torch.equal(field(host, batch), value) for field, value in zip(FIELDS, values, strict=True))


def test_a_fresh_fake_score_is_the_base_and_its_start_is_not_the_editor_s(tmp_path: Path):
    config, batch = host_config(tmp_path), batch_of()
    host = DiffusersHost(config, make_family(config), torch.device("cpu"), adapters=(EDIT, FAKE))
    assert torch.equal(fake_of(host, batch), without_lora(batch))
    edit, fake = (host.adapters[name].parameters for name in (EDIT, FAKE))
    assert not any(torch.equal(edit[name], fake[name]) for name in edit if ".lora_A." in name)
    alone = DiffusersHost(config, make_family(config), torch.device("cpu"))
    assert all(torch.equal(alone.parameters[name], edit[name]) for name in edit), "the editor starts as it does without the other"


def test_its_parameters_have_the_editor_s_names_and_are_not_the_network_s(tmp_path: Path):
    config = host_config(tmp_path)
    host = two(config)
    shapes = adapter_shapes(config, host.family, (EDIT, FAKE))
    for name in (EDIT, FAKE):
        assert {key: tuple(value.shape) for key, value in host.adapters[name].parameters.items()} == shapes[name]
        assert list(host.adapters[name].parameters) == list(shapes[name]), "the order of the optimizer"
    own = {id(parameter) for parameter in host.networks["transformer"].parameters()}
    assert not any(id(parameter) in own for parameter in host.adapters[FAKE].parameters.values())
    assert host.adapters[FAKE].ema.decay == 0.0 and host.adapters[EDIT].ema.decay > 0


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"quantization": "fp8"}},
        {"lora": {"forward": "merged"}},
        {"train": {"mixed_precision": "bf16"}},
    ],
    ids=["plain", "recomputed", "fp8", "merged", "bf16"],
)
def test_each_field_differentiates_its_own_lora_alone(tmp_path: Path, sections: dict[str, Any]):
    """The fake score's gradient is that of the same weights as an editor's LoRA, on the same inputs."""
    host, batch = two(host_config(tmp_path, **sections)), batch_of()

    def gradients_of(field: Any, trained: str, other: str) -> dict[str, Tensor]:
        with field() as velocity:
            velocity(batch.noise, batch.t, batch.src_caption, None).square().mean().backward()
        assert all(p.grad is None for p in host.adapters[other].parameters.values())
        found = {name: p.grad.clone() for name, p in host.adapters[trained].parameters.items()}
        for parameter in host.adapters[trained].parameters.values():
            parameter.grad = None
        assert all(value.any() for value in found.values())
        return found

    fake = gradients_of(host.fake, FAKE, EDIT)
    for name, parameter in host.adapters[EDIT].parameters.items():
        parameter.data.copy_(host.adapters[FAKE].parameters[name])
    edit = gradients_of(host.edit, EDIT, FAKE)
    assert relative_difference(fake, edit) < 1e-6
    assert not any(p.requires_grad for n, p in host.networks["transformer"].named_parameters() if ".lora_" not in n)


def test_a_step_of_one_leaves_the_other_and_the_base_to_the_last_bit(tmp_path: Path):
    host, batch = two(host_config(tmp_path)), batch_of()
    for name, field, other, still in ((FAKE, host.fake, EDIT, live_of), (EDIT, host.edit, FAKE, fake_of)):
        before, base = still(host, batch), base_of(host, batch)
        weights = {key: value.detach().clone() for key, value in host.adapters[other].parameters.items()}
        optimizers = {each: torch.optim.AdamW(a.parameters.values(), lr=0.1, weight_decay=0.3) for each, a in host.adapters.items()}
        with field() as velocity:
            velocity(batch.noise, batch.t, batch.src_caption, None).square().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert torch.equal(still(host, batch), before) and torch.equal(base_of(host, batch), base)
        assert all(torch.equal(value, host.adapters[other].parameters[key]) for key, value in weights.items()), name


def test_the_fake_score_has_no_source(tmp_path: Path):
    host, batch = two(host_config(tmp_path)), batch_of()
    with host.fake() as velocity, pytest.raises(AssertionError, match="no source tokens"):
        velocity(batch.noise, batch.t, batch.src_caption, batch.source)


@pytest.mark.parametrize("outer", ["edit", "ema", "base", "fake"])
def test_an_exception_inside_a_field_leaves_all_as_they_were(tmp_path: Path, outer: str):
    host, batch = two(host_config(tmp_path)), batch_of()
    before = [field(host, batch) for field in FIELDS]
    with pytest.raises(RuntimeError, match="inside"), getattr(host, outer)(), host.fake():
        raise RuntimeError("inside")
    assert all(torch.equal(field(host, batch), value) for field, value in zip(FIELDS, before, strict=True))
    assert torch.is_grad_enabled() and all(p.requires_grad for a in host.adapters.values() for p in a.parameters.values())


def test_a_host_without_it_says_so(tmp_path: Path):
    config = host_config(tmp_path)
    host = DiffusersHost(config, make_family(config), torch.device("cpu"))
    assert list(host.adapters) == [EDIT]
    with pytest.raises(AssertionError, match="asked for the adapter"), host.fake():
        pass
