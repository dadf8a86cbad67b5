"""Inside the real musubi-tuner, on a CPU with tiny weights: the three fields, and the embedded host's losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step_peer
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models import make_family
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from tests.support.musubi_host import A14B, T2V, Rig, embedded_config, embedded_networks, latents, needs_host, texts
from tests.support.musubi_images import IMAGES
from tests.support.musubi_runs import FAMILIES, one_batch, rig

pytestmark = needs_host


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_the_bare_model_bit_for_bit(family: str):
    it = rig(family)
    noisy, t, text = latents(family, 2, 1), torch.tensor([0.3, 0.6]), texts(family, 2, 3)
    with it.fields.base() as velocity:
        found = velocity(noisy, t, text, None)
    bare = it._load() if family != A14B else None
    if bare is None:  # the trainer keeps the experts: a second load would exchange them
        it.network.set_multiplier(0.0)
        with it.fields.live() as velocity:
            expected = velocity(noisy, t, text, None)
        it.network.set_multiplier(1.0)
    else:
        with torch.no_grad():
            expected = it.call(bare)(noisy, t, text, None)
    with it.fields.live() as velocity:
        live = velocity(noisy, t, text, None)
    assert torch.equal(found, expected) and not torch.allclose(live, expected, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ema_is_restored_after_an_exception(family: str):
    it = rig(family)
    before = {name: p.detach().clone() for name, p in it.network.named_parameters()}
    pointers = [p.data_ptr() for p in it.network.parameters()]
    noisy, t, text = latents(family, 1, 1), torch.tensor([0.3]), texts(family, 1, 3)
    with pytest.raises(RuntimeError, match="in the middle"), it.fields.ema() as velocity:
        assert not torch.equal(next(iter(it.network.parameters())), next(iter(before.values())))
        velocity(noisy, t, text, noisy)
        raise RuntimeError("in the middle")
    assert [p.data_ptr() for p in it.network.parameters()] == pointers
    assert all(torch.equal(p, before[name]) for name, p in it.network.named_parameters())


@pytest.mark.parametrize("family", [T2V, "flux", *IMAGES])
def test_source_tokens_have_the_targets_positions(family: str):
    """Then noisy and source tokens change places without a trace but for which half is read."""
    it = rig(family)
    a, b, t, text = latents(family, 1, 1), latents(family, 1, 2), torch.tensor([0.4]), texts(family, 1, 3)
    whole: list[Tensor] = []
    head = IMAGES[family].head if family in IMAGES else {T2V: "head", "flux": "final_layer"}[family]
    handle = it.transformer.get_submodule(head).register_forward_hook(lambda m, i, out: whole.append(out))
    with it.fields.live() as velocity:
        velocity(a, t, text, b)
        velocity(b, t, text, a)
    handle.remove()
    half = {T2V: 12}.get(family, 6)
    first, second = (out[:, : 2 * half] for out in whole)  # some have the text after them
    swapped = torch.cat([second[:, half:], second[:, :half]], dim=1)
    assert (first - swapped).abs().max() < 1e-5 < (first - second).abs().max()


def embedded_step(folder: Path, family: str, lora: dict[str, Tensor], ema: dict[str, Tensor], batch: Batch, **objective: Any) -> Any:
    """Losses and gradients (by the names of a LoRA file) of the embedded host with the same LoRA."""
    config = embedded_config(folder, family, objective=objective)
    networks = embedded_networks(family)
    made = make_family(config)
    made.load_transformers = lambda dtype: ((name, net.requires_grad_(False)) for name, net in networks.items())  # type: ignore[method-assign]
    host = DiffusersHost(config, made, torch.device("cpu"))
    assert host.parameters.keys() == lora.keys()
    for name, parameter in host.parameters.items():
        parameter.data = lora[name].clone()
    host.ema_weights.load(ema)

    def backward(loss: Tensor, *, last: bool) -> float:
        loss.backward()
        return 1.0

    metrics = make_objective(config.objective).step(host, batch, backward)
    return metrics, {name: p.grad for name, p in host.parameters.items()}


def random_lora(folder: Path, family: str, seed: int) -> dict[str, Tensor]:
    """A LoRA in our names that the host's fused layers can hold."""
    config = embedded_config(folder, family)
    host = DiffusersHost(config, _family_of_tiny(config, family), torch.device("cpu"))
    return step_peer.shared_lora({name: p.shape for name, p in host.parameters.items()}, family, std=0.2, seed=seed)


def _family_of_tiny(config: Any, family: str) -> Any:
    made = make_family(config)
    networks = embedded_networks(family)
    made.load_transformers = lambda dtype: ((name, net.requires_grad_(False)) for name, net in networks.items())  # type: ignore[method-assign]
    return made


def parity(tmp_path: Path, family: str, recompute: bool) -> dict[str, float]:
    """Largest relative differences of losses and gradients between the hosts."""
    (tmp_path / "embedded").mkdir()
    (tmp_path / "host").mkdir()
    embedded_networks(family)  # skips where there is no embedded host
    lora, ema = (random_lora(tmp_path / "embedded", family, seed) for seed in (5, 6))
    batch = one_batch(family)
    expected, gradients = embedded_step(tmp_path / "embedded", family, lora, ema, batch)
    it = Rig(tmp_path / "host", family, musubi={"gradient_checkpointing": recompute})
    names = {name for name, _ in it.network.named_parameters()}
    for tensors, load in ((lora, it.network.load_state_dict), (ema, it.fields.ema_weights.load)):
        converted = step_peer.in_host_names(tensors, family)
        assert names <= converted.keys()
        load({name: value for name, value in converted.items() if name in names or load == it.network.load_state_dict})
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    found = it.trainer.byg_objective.step(it.fields, batch, backward)
    assert found.keys() == expected.keys()
    # A cosine near 0 is compared with 1, what it can be.
    losses = {
        name: abs(found[name] - value).item() / (1.0 if name.startswith("cosine") else max(abs(value.item()), 1e-3))
        for name, value in expected.items()
    }
    ours: dict[str, Any] = {name: p.grad for name, p in it.network.named_parameters()}
    grads = step_peer.worst_difference(ours, step_peer.fused_gradients(gradients, family))
    return {"losses": max(losses.values()), "gradients": grads, "terms": len(expected), "tensors": len(ours)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_hosts_give_the_same_losses_and_gradients(tmp_path: Path, family: str, recompute: bool, record_property: Any):
    worst = parity(tmp_path, family, recompute)
    record_property("parity", worst)
    print(f"parity {family} recompute={recompute}: {worst}")
    assert worst["terms"] >= 10 and worst["tensors"] >= 20
    assert worst["losses"] < 1e-4 and worst["gradients"] < 1e-4


@pytest.mark.parametrize("module", ["networks.loha", "networks.lokr"])
def test_other_networks_of_the_host_train_too(tmp_path: Path, module: str):
    it = Rig(tmp_path, T2V, musubi={"network_module": module})
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    with torch.no_grad():
        for parameter in it.network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    it.trainer.byg_objective.step(it.fields, one_batch(T2V), backward)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in it.network.parameters())
