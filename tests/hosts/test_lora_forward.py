"""`lora.forward = "merged"`: the same step with the LoRA multiplied into the weights of the differentiated passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from byg_plugin.hosts.diffusers import DiffusersHost, _is_lora_layer
from byg_plugin.hosts.merged import MergedLinear
from byg_plugin.objectives import make_objective
from tests.support.diffusers_host import backward, base_of, batch_of, gradients, host_config, live_of, relative_difference, without_lora
from tests.support.tiny import make_host, make_trainer, run_config


def host_of(tmp_path: Path, forward: str, **sections: dict[str, Any]) -> DiffusersHost:
    return make_host(host_config(tmp_path, **{**sections, "lora": {"rank": 4, "alpha": 2.0, "forward": forward}}))


def merged_layers(host: DiffusersHost) -> int:
    return sum(isinstance(module, MergedLinear) for network in host.networks.values() for module in network.modules())


def lora_layers(host: DiffusersHost) -> int:
    return sum(_is_lora_layer(module) for network in host.networks.values() for module in network.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [{}, {"graph": "joint"}, {"merge_identity": True, "rollout_weights": "merged"}])
def test_a_step_has_the_same_losses_and_gradients(tmp_path: Path, objective: dict[str, Any], checkpointing: bool):
    found = {}
    for forward in ("factors", "merged"):
        host = host_of(tmp_path, forward, objective=objective, model={"gradient_checkpointing": checkpointing})
        metrics = make_objective(host.config.objective).step(host, batch_of(), backward)
        found[forward] = ({name: value.double() for name, value in metrics.items()}, gradients(host))
    (loss_a, grad_a), (loss_b, grad_b) = found.values()
    assert relative_difference(loss_a, loss_b) < 1e-5
    assert len(grad_a) > 20 and all(g.any() for g in grad_a.values())
    assert relative_difference(grad_a, grad_b) < 1e-5


def test_it_is_really_another_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = host_of(tmp_path, "merged")
    layers = lora_layers(host)
    with host.edit():
        assert merged_layers(host) == layers > 0 and lora_layers(host) == 0
    assert merged_layers(host) == 0 and lora_layers(host) == layers
    other = host_of(tmp_path, "factors")
    with other.edit():
        assert merged_layers(other) == 0


def test_after_an_exception_the_lora_is_back(tmp_path: Path):
    host = host_of(tmp_path, "merged")
    before, layers, names = live_of(host, batch_of()), lora_layers(host), [*host.networks["transformer"].state_dict()]
    with pytest.raises(RuntimeError, match="stop"), host.edit():
        raise RuntimeError("stop")
    assert lora_layers(host) == layers and [*host.networks["transformer"].state_dict()] == names
    assert torch.equal(live_of(host, batch_of()), before)
    assert torch.equal(base_of(host, batch_of()), without_lora(batch_of()))


def test_the_frozen_weights_get_no_gradient(tmp_path: Path):
    host = host_of(tmp_path, "merged")
    make_objective(host.config.objective).step(host, batch_of(), backward)
    trained = {id(p) for p in host.parameters.values()}
    assert all(p.grad is None for n in host.networks.values() for p in n.parameters() if id(p) not in trained)


def test_a_run_trains_and_is_the_other_one_but_for_rounding(tmp_path: Path):
    runs = {}
    for forward in ("factors", "merged"):
        trainer = make_trainer(run_config(tmp_path / forward, lora={"forward": forward}))
        start = {name: p.detach().clone() for name, p in trainer.host.parameters.items()}
        trainer.run()
        runs[forward] = {name: p.detach() - start[name] for name, p in trainer.host.parameters.items()}
    assert relative_difference(runs["merged"], runs["factors"]) < 1e-2


def test_a_linear_without_bias_has_none():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(3, 2, bias=False)
            self.lora_A, self.lora_B = {"byg": nn.Linear(3, 1, bias=False)}, {"byg": nn.Linear(1, 2, bias=False)}
            self.scaling = {"byg": 0.5}

    layer = Layer()
    x = torch.randn(4, 3)
    expected = layer.base_layer(x) + 0.5 * layer.lora_B["byg"](layer.lora_A["byg"](x))
    merged = MergedLinear(layer, "byg")
    assert merged.bias is None and not list(merged.parameters())
    torch.testing.assert_close(merged(x), expected)
