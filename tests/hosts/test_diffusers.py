"""The embedded host on a tiny random FLUX: three velocity fields over one set of weights, gradients, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models.flux import FluxFamily
from byg_plugin.objectives import make_objective
from tests.support.diffusers_host import (
    backward,
    base_of,
    batch_of,
    ema_of,
    gradients,
    host_config,
    live_of,
    relative_difference,
    step_gradients,
    without_lora,
)
from tests.support.tiny import make_host

# --- base, edit, ema ---


def test_base_is_the_model_without_lora_before_inside_and_after_a_step(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    wanted = without_lora(batch)
    live, ema = live_of(host, batch), ema_of(host, batch)
    assert not torch.equal(live, wanted) and not torch.equal(ema, wanted) and not torch.equal(live, ema), "the LoRA is asleep"
    assert torch.equal(base_of(host, batch), wanted)
    with host.edit(), host.ema():
        assert torch.equal(base_of(host, batch), wanted)
    make_objective(host.config.objective).step(host, batch, backward)
    torch.optim.AdamW(host.parameters.values(), lr=0.1).step()
    host.ema_weights.update(1)
    assert torch.equal(base_of(host, batch), wanted)
    assert not torch.equal(live_of(host, batch), live), "the step moved nothing"


@pytest.mark.parametrize("phase", ["ema", "base", "edit"])
@pytest.mark.parametrize("call", [0, 1])
def test_an_exception_inside_a_phase_leaves_all_fields_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, call: int):
    host, batch = make_host(host_config(tmp_path, lora={"dropout": 0.3})), batch_of()
    before = [f(host, batch) for f in (base_of, live_of, ema_of)]
    weights = {n: p.detach().clone() for n, p in host.parameters.items()}
    original: Callable[..., Any] = getattr(host, phase)
    seen = []

    @contextmanager
    def failing() -> Iterator[Any]:
        with original() as velocity:

            def broken(*args: Any) -> Tensor:
                seen.append(1)
                if len(seen) > call:
                    raise RuntimeError("inside the phase")
                return velocity(*args)

            yield broken

    monkeypatch.setattr(host, phase, failing)
    with pytest.raises(RuntimeError, match="inside the phase"):
        make_objective(host.config.objective).step(host, batch, backward)
    monkeypatch.undo()
    assert len(seen) == call + 1
    for f, wanted in zip((base_of, live_of, ema_of), before, strict=True):
        assert torch.equal(f(host, batch), wanted)
    assert torch.equal(before[0], without_lora(batch))
    assert all(torch.equal(p, weights[n]) and p.requires_grad for n, p in host.parameters.items())
    assert not any(m.training for m in host._dropouts)


def test_contexts_restore_what_they_found_when_nested(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    wanted = without_lora(batch)
    with host.base():
        with host.base():
            pass
        # The inner exit must not switch the LoRA on again.
        assert torch.equal(live_of(host, batch), wanted)
    assert not torch.equal(live_of(host, batch), wanted)


def test_ema_swaps_pointers_and_puts_the_live_weights_back(tmp_path: Path):
    host = make_host(host_config(tmp_path))
    name, parameter = next(iter(host.parameters.items()))
    address, shadow = parameter.data_ptr(), host.ema_weights.state()[name].clone()
    assert not torch.equal(parameter, shadow)
    with host.ema():
        assert torch.equal(parameter, shadow)
        assert not torch.is_grad_enabled()
    assert parameter.data_ptr() == address and torch.is_grad_enabled()


def test_ema_with_decay_0_is_the_live_lora(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, objective={"ema_decay": 0.0})), batch_of()
    assert torch.equal(ema_of(host, batch), live_of(host, batch))


def test_ema_follows_with_its_ramp(tmp_path: Path):
    host = make_host(host_config(tmp_path, objective={"ema_decay": 0.9}))
    name, parameter = next(iter(host.parameters.items()))
    old = host.ema_weights.state()[name].clone()
    host.ema_weights.update(1)
    decay = 2 / 11  # below 0.9: the ramp (1 + 1) / (10 + 1)
    torch.testing.assert_close(host.ema_weights.state()[name], decay * old + (1 - decay) * parameter.detach())
    old = host.ema_weights.state()[name].clone()
    host.ema_weights.update(10_000)
    torch.testing.assert_close(host.ema_weights.state()[name], 0.9 * old + 0.1 * parameter.detach())


def test_dropout_is_active_in_edit_alone_and_only_with_gradient(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, lora={"dropout": 0.5})), batch_of()

    def differs(velocity: Any) -> bool:
        a, b = (velocity(batch.noise, batch.t, batch.instruction, batch.source) for _ in range(2))
        return not torch.equal(a, b)

    with host.edit() as velocity:
        assert differs(velocity)
    with host.ema() as velocity:
        assert not differs(velocity)
    with host.live() as velocity:
        assert not differs(velocity)
    with torch.no_grad(), host.edit() as velocity:  # a validation
        assert not differs(velocity)
    assert torch.equal(base_of(host, batch), without_lora(batch))


def test_only_the_lora_is_trained_and_in_float32(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"})), batch_of()
    lora = {id(p) for p in host.parameters.values()}
    every = list(host.networks["transformer"].named_parameters())
    assert {id(p) for _, p in every if p.requires_grad} == lora
    make_objective(host.config.objective).step(host, batch, backward)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in host.parameters.values())
    frozen = [p for _, p in every if id(p) not in lora]
    assert frozen and all(p.grad is None and p.dtype == torch.bfloat16 and not p.requires_grad for p in frozen)


def test_a_cpu_in_bfloat16_takes_plain_attention_where_a_gradient_is_wanted_alone(tmp_path: Path, monkeypatch):
    host, batch = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"})), batch_of()
    made, fused = type(host.family).velocity, []

    def velocity(*args):
        fused.append(torch.backends.cuda.flash_sdp_enabled())  # of a CPU's fused attention too
        return made(*args)

    monkeypatch.setattr(type(host.family), "velocity", velocity)
    for context in (host.edit, host.live):
        with context() as field:
            field(batch.noise, batch.t, batch.instruction, batch.source)
    assert fused == [False, True] and torch.backends.cuda.flash_sdp_enabled()


def test_the_base_takes_no_source(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    with host.base() as velocity, pytest.raises(AssertionError, match="no source tokens"):
        velocity(batch.noise, batch.t, batch.instruction, batch.source)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("switches", [{}, {"merge_identity": True}, {"routing": False}], ids=["plain", "merged", "unrouted"])
def test_sequential_is_joint(tmp_path: Path, accumulation: int, switches: dict[str, bool]):
    host = make_host(host_config(tmp_path))
    sequential = step_gradients(host, {"graph": "sequential", **switches}, accumulation)
    joint = step_gradients(host, {"graph": "joint", **switches} | {"merge_identity": False}, accumulation)
    assert relative_difference(sequential, joint) <= 1e-5
    # The term that joins the passes is large enough to be missed.
    no_cycle = step_gradients(host, {"graph": "joint", "lambda_cycle": 0.0}, accumulation)
    assert relative_difference(no_cycle, joint) > 1e-2


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path):
    plain = make_host(host_config(tmp_path))
    recomputed = make_host(host_config(tmp_path, model={"gradient_checkpointing": True}))
    calls = []
    recomputed.networks["transformer"].transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    wanted, got = step_gradients(plain, {}), step_gradients(recomputed, {})
    assert relative_difference(got, wanted) <= 1e-6
    assert sum(calls) == 6, "3 passes with gradient, each computed twice"


@pytest.mark.parametrize("storage", ["none", "fp8"])
def test_checkpointing_with_dropout_recomputes_the_same_masks(tmp_path: Path, storage: str):
    both = []
    for checkpointing in (False, True):
        model = {"gradient_checkpointing": checkpointing, "quantization": storage}
        host = make_host(host_config(tmp_path, model=model, lora={"dropout": 0.4}))
        torch.manual_seed(3)
        both.append(step_gradients(host, {}))
    assert relative_difference(*both) <= 1e-6


# --- attention ---


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_unusable_attention_is_refused_with_the_reason_before_a_model_is_loaded(tmp_path: Path, backend: str):
    config = host_config(tmp_path, model={"attention": backend, "path": str(tmp_path / "never read")})
    with pytest.raises(ValueError, match=f'model.attention = "{backend}".*(not usable|not installed).*model.attention = "native"'):
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))


def test_a_step_under_another_batch_size_is_the_mean(tmp_path: Path):
    """Every loss is a mean over samples: a batch of two is two of one accumulated."""
    host, batch = make_host(host_config(tmp_path)), batch_of(2)
    objective = make_objective(host.config.objective)
    objective.step(host, batch, backward)
    together = gradients(host)
    for i in (0, 1):
        pick = slice(i, i + 1)
        texts = {role: {n: v[pick] for n, v in getattr(batch, role).items()} for role in ROLES}
        one = replace(batch, source=batch.source[pick], noise=batch.noise[pick], t=batch.t[pick], **texts)
        objective.step(host, one, lambda loss, last: (loss / 2).backward() or 0.5)
    assert relative_difference(gradients(host), together) <= 1e-4
