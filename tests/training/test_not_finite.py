"""A run that leaves the finite numbers: where that came from is said, and nothing of it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byg_plugin import finite
from byg_plugin.training import checkpoint, loop
from byg_plugin.training.loop import Trainer
from tests.support.tiny import curve, make_trainer, run_config

LORA = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


def poison(value: torch.Tensor) -> None:
    value.view(-1)[-1] = math.nan


def poisoned_data(monkeypatch: pytest.MonkeyPatch, role: str, index: int) -> None:
    """One cached entry of one tuple is not finite."""
    original = loop.collate

    def collate(items: Any) -> dict[str, Any]:
        batch = original(items)
        for row, found in enumerate(batch["index"]):
            if found == index:
                value = batch[role]["t5"] if isinstance(batch[role], Mapping) else batch[role]
                poison(value[row])
        return batch

    monkeypatch.setattr(loop, "collate", collate)


@pytest.mark.parametrize(("role", "named"), [("source", "source"), ("src_caption", r"src_caption \(t5\)")])
@pytest.mark.parametrize("index", [0, 3])
def test_data_are_named_by_their_tuple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, named: str, index: int):
    poisoned_data(monkeypatch, role, index)
    trainer = make_trainer(run_config(tmp_path / "out", train={"global_batch_size": 5}, objective={"identity_warmup_steps": 0}))
    item = trainer.data.tuples[index]
    with pytest.raises(FloatingPointError) as caught:
        for _ in trainer._loader():
            trainer._optimizer_step(_)
    said = str(caught.value)
    assert f"The data are the reason: the cached {named.replace(chr(92), '')} of tuple {item.id} ({item.source}) holds NaN" in said
    assert "train.lr" not in said and "the weights were not changed" in said
    others = [other.id for other in trainer.data.tuples if other.id != item.id]
    assert not [other for other in others if f"tuple {other} " in said]


@pytest.mark.parametrize(("which", "named"), [("lora", f"the LoRA's {LORA}"), ("ema", f"the EMA's {LORA}"), ("base", "transformer's ")])
def test_weights_are_named(tmp_path: Path, which: str, named: str):
    trainer = make_trainer(run_config(tmp_path / "out", objective={"identity_warmup_steps": 0, "identity_probability": 0.0}))
    tensors = {
        "lora": trainer.host.parameters[LORA].data,
        "ema": trainer.host.ema_weights.state()[LORA],
        "base": next(p for n, p in trainer.host.networks["transformer"].named_parameters() if "base_layer.weight" in n).data,
    }
    poison(tensors[which])
    with pytest.raises(FloatingPointError, match=f"The weights are the reason: {named}") as caught:
        trainer.run()
    assert "train.lr" not in str(caught.value) and "There is no checkpoint" in str(caught.value)


def test_the_rate_is_blamed_when_data_and_weights_are_clean(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out"))
    original = trainer.objective.step

    def step(*args: Any) -> Any:
        return original(*args) | ({"identity": torch.tensor(math.inf)} if trainer.step == 2 else {})

    trainer.objective.step = step  # type: ignore[method-assign]
    with pytest.raises(
        FloatingPointError, match=r"identity is not finite at step 3; .*Data \(tuples: .*photo.*\) and weights are finite"
    ) as caught:
        trainer.run()
    assert "try a lower train.lr" in str(caught.value)
    assert f"The last good checkpoint is {tmp_path / 'out/checkpoints/step-000002'}: go on with --resume latest" in str(caught.value)


def spoil_after_step(trainer: Trainer, step: int, value: float) -> None:
    """As a weight decay of 1e308 does: the gradients are finite, the weights are not."""
    original = trainer.engine.optimizers["edit"].step

    def optimize(*args: Any) -> None:
        original(*args)
        if trainer.step == step - 1:
            trainer.host.parameters[LORA].data.view(-1)[1] = value

    trainer.engine.optimizers["edit"].step = optimize  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_are_looked_at_after_the_optimizer_and_before_anything_is_saved(tmp_path: Path, value: float):
    out = tmp_path / "out"
    trainer = make_trainer(run_config(out, train={"lr": 0.125, "weight_decay": 0.5}))
    spoil_after_step(trainer, 4, value)
    ema = {}

    def remember(it: Trainer) -> None:
        ema.update({name: tensor.clone() for name, tensor in it.host.ema_weights.state().items()})

    trainer.on_step = remember
    with pytest.raises(
        FloatingPointError, match=f"{LORA} is not finite after step 4, although its gradient was; nothing of this step is saved"
    ) as caught:
        trainer.run()
    assert "train.lr (0.125) or train.weight_decay (0.5)" in str(caught.value) and "--resume latest" in str(caught.value)
    assert [path.name for path in checkpoint.checkpoints(out / "checkpoints")] == ["step-000002"]
    assert [line["step"] for line in curve(out)] == [1, 2, 3] and not (out / "byg_lora.safetensors").exists()
    assert all(torch.equal(tensor, ema[name]) for name, tensor in trainer.host.ema_weights.state().items())


def test_large_finite_weights_are_no_reason_to_stop(tmp_path: Path):
    """Their sum and their squares overflow float32."""
    trainer = make_trainer(run_config(tmp_path / "out"))
    trainer.host.parameters[LORA].data.fill_(3e38)
    trainer.diagnosis.after_step(1)


@pytest.mark.parametrize("what", ["the EMA's", "optimizer/0/exp_avg", "the LoRA's"])
def test_nothing_that_is_not_finite_is_ever_saved(tmp_path: Path, what: str):
    out = tmp_path / "out"
    trainer = make_trainer(run_config(out))
    original = trainer._save

    def save() -> None:
        if trainer.step == 4:
            tensors = {
                "the EMA's": trainer.host.ema_weights.state()[LORA],
                "optimizer/0/exp_avg": trainer.engine.optimizers["edit"].state[next(iter(trainer.host.parameters.values()))]["exp_avg"],
                "the LoRA's": trainer.host.parameters[LORA].data,
            }
            poison(tensors[what])
        original()

    trainer._save = save  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=f"{what}.* is not finite after step 4; nothing of it is saved.*--resume latest"):
        trainer.run()
    assert [path.name for path in checkpoint.checkpoints(out / "checkpoints")] == ["step-000002"]


def test_a_checkpoint_that_is_not_finite_is_not_recommended(tmp_path: Path):
    """An earlier version may have saved one."""
    out = tmp_path / "out"
    trainer = make_trainer(run_config(out, train={"save_every": 1}))
    spoil_after_step(trainer, 4, math.nan)

    def poison_newest(it: Trainer) -> None:
        if it.step == 3:
            path = out / "checkpoints/step-000003" / checkpoint.TENSORS
            tensors = load_file(path)
            poison(tensors[f"edit/ema/{LORA}"])
            save_file(tensors, path)

    trainer.on_step = poison_newest
    with pytest.raises(FloatingPointError, match=r"go on with --resume \S+step-000002 --discard-later$"):
        trainer.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_fused_look_is_that_at_each_tensor(dtype: torch.dtype):
    largest = torch.finfo(dtype).max
    good = [torch.full((3, 5), largest, dtype=dtype), torch.zeros(2, dtype=dtype), torch.full((1,), -largest, dtype=dtype)]
    assert finite.all_finite([]) and finite.all_finite(good)
    for value in (math.nan, math.inf, -math.inf):
        for index in range(3):
            bad = [tensor.clone() for tensor in good]
            bad[index].view(-1)[-1] = value
            assert not finite.all_finite(bad), (value, index)


def test_the_fused_look_takes_several_types_at_once():
    mixed = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(0), torch.full((2,), 1e300, dtype=torch.float64)]
    assert finite.all_finite(mixed)
    assert not finite.all_finite([*mixed, torch.tensor([math.inf], dtype=torch.float16)])
