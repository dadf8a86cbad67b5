"""DeepSpeed ZeRO over the LoRA: what it does in silence and a run must not, on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.deepspeed_settings import Terms, resolved
from byg_plugin.training.engines.plain import PlainEngine
from tests.support.engine_runs import ZERO, in_processes

CPU = torch.device("cpu")


def weights() -> dict[str, nn.Parameter]:
    """Two experts' LoRA of two matrices each; sizes that two processes do not divide."""
    rng = torch.Generator().manual_seed(1)
    return {
        f"{expert}.{name}": nn.Parameter(torch.randn(shape, generator=rng))
        for expert in ("transformer", "transformer_2")
        for name, shape in (("lora_A.weight", (3, 5)), ("lora_B.weight", (7, 3)))
    }


def engine_of(kind: str, trained: dict[str, nn.Parameter], stage: int = 2) -> Any:
    train = TrainConfig(steps=9, optimizer="adamw", weight_decay=0.1, max_grad_norm=0.5, global_batch_size=2, mixed_precision="no")
    if kind == "plain":
        return PlainEngine(train, {"edit": trained}, 2, CPU)
    from byg_plugin.training.engines.zero import ZeroEngine

    settings = resolved({"zero_optimization": {"stage": stage, **ZERO}}, "test", Terms.of(train, 2))
    return ZeroEngine(train, {"edit": trained}, 2, CPU, settings)


def one_step(engine: Any, trained: dict[str, nn.Parameter], expert: str, factor: float = 1.0) -> float:
    """Two micro-steps of two backward passes each, over one expert."""
    engine.begin([("edit", expert)])
    for micro in range(2):
        for last in (False, True):
            some = [value for name, value in trained.items() if name.startswith(expert + ".")]
            loss = sum((value * value.detach().cos() * (micro + 1 + last)).sum() for value in some)
            assert engine.backward(loss * factor, last=last) == 0.5
    return float(engine.step(0.01, lambda norms: None)["edit"])


def compare(stage: int) -> None:
    """Steps of both experts, beside the plain engine."""
    one, other = weights(), weights()
    plain, zero = engine_of("plain", one), engine_of("zero", other, stage)
    for expert in ("transformer", "transformer", "transformer_2", "transformer"):
        idle = "transformer_2" if expert == "transformer" else "transformer"
        before = {name: value.detach().clone() for name, value in other.items()}
        norms = one_step(plain, one, expert), one_step(zero, other, expert)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=0)
            assert torch.equal(other[name], before[name]) == name.startswith(idle + "."), name
    same_state(plain.state()["edit"], zero.state()["edit"])
    # A run goes on with another engine: weights into the parameters, then the state.
    third = weights()
    resumed = engine_of("zero", third, stage)
    for name, value in one.items():
        third[name].data.copy_(value.detach())
    resumed.load_state(plain.state())
    same_state(plain.state()["edit"], resumed.state()["edit"])
    one_step(plain, one, "transformer_2"), one_step(resumed, third, "transformer_2")
    for name in one:
        torch.testing.assert_close(third[name], one[name], atol=1e-6, rtol=0)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"][0]["params"] == other["param_groups"][0]["params"]
    assert one["state"].keys() == other["state"].keys()
    for index, values in one["state"].items():
        assert values.keys() == other["state"][index].keys()
        for key, value in values.items():
            torch.testing.assert_close(other["state"][index][key], value, atol=1e-6, rtol=1e-6)


def refuse() -> None:
    """What is not finite shows, a step that is stopped leaves all as it was, and a weight without a gradient is not moved in silence."""
    trained = weights()
    engine = engine_of("zero", trained)
    before = {name: value.detach().clone() for name, value in trained.items()}
    seen: list[float] = []

    def check(norms: dict[str, torch.Tensor]) -> None:
        seen.append(float(norms["edit"]))
        raise FloatingPointError("stop")

    engine.begin([("edit", "transformer")])
    for micro in range(2):
        some = [value for name, value in trained.items() if name.startswith("transformer.")]
        engine.backward(sum((value * (float("nan") if micro else 1.0)).sum() for value in some), last=True)
    with pytest.raises(FloatingPointError, match="stop"):
        engine.step(0.01, check)
    assert seen == [float("inf")], "DeepSpeed calls it -1"
    assert all(torch.equal(value, before[name]) for name, value in trained.items())
    assert one_step(engine, trained, "transformer") < 1e3, "nothing of the step before is left"

    engine.begin([("edit", "transformer")])
    for _ in range(2):
        engine.backward(trained["transformer.lora_A.weight"].sum(), last=True)
    with pytest.raises(ValueError, match=r"transformer.lora_B.weight has no gradient, and DeepSpeed ZeRO-1/2 would move it"):
        engine.step(0.01, lambda norms: None)


def everything() -> None:
    torch.distributed.init_process_group("gloo")
    compare(1)
    compare(2)
    refuse()
    torch.distributed.barrier()


def test_two_processes_step_as_the_plain_engine_does(tmp_path: Path):
    pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"')
    in_processes(2, everything, tmp_path)
