"""Sets of trainable weights by name: in checkpoints, in those of earlier versions, and two of them in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from byg_plugin.hosts.diffusers import DiffusersHost, lora_layout
from byg_plugin.hosts.ema import Adapter, EmaWeights
from byg_plugin.objectives.base import EDIT, Backward, Batch, Metrics, Plan, StepMemory
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from byg_plugin.training import checkpoint, loop, resume
from tests.support.checkpoint_damage import DAMAGE, SHORT, assert_refused
from tests.support.tiny import curve, make_trainer, run_config
from tests.support.training_runs import assert_same_run

CRITIC = "transformer.critic.lora_A.weight"


def as_before_adapters(path: Path) -> None:
    """A checkpoint as it was written before adapters had names."""
    tensors = load_file(path / checkpoint.TENSORS)
    assert tensors and all(name.startswith("edit/") for name in tensors)
    save_file({name.removeprefix("edit/"): value for name, value in tensors.items()}, path / checkpoint.TENSORS)
    record = json.loads((path / checkpoint.STATE).read_text(encoding="utf-8"))
    record["optimizer"] = record.pop("optimizers")["edit"]
    (path / checkpoint.STATE).write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("adapters") / "out"
    make_trainer(run_config(out, **SHORT)).run()
    return out


@pytest.fixture
def before(tmp_path: Path, whole: Path) -> Path:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for path in checkpoint.checkpoints(out / "checkpoints"):
        as_before_adapters(path)
    return out


def test_an_earlier_version_s_checkpoint_goes_on_as_if_nothing_had_been(before: Path, whole: Path):
    shutil.rmtree(before / "checkpoints/step-000004")
    make_trainer(run_config(before, **SHORT), "latest").run()
    assert_same_run(before, whole)
    new, reference = (load_file(out / "checkpoints/step-000004/training.safetensors") for out in (before, whole))
    assert new.keys() == reference.keys() and all(torch.equal(value, reference[name]) for name, value in new.items())


@pytest.mark.parametrize("case", DAMAGE)
def test_an_earlier_version_s_damage_is_named_as_it_stands_in_the_file(before: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    assert_refused(before, monkeypatch, case)
    with pytest.raises(ValueError) as caught:
        make_trainer(run_config(before, **SHORT), "latest")
    assert "edit/" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ([], "optimizers = a list is no object by adapter"),
        ({"edit": 5}, "optimizers.edit = 5 is not an optimizer's state"),
        ({}, "is neither lora, ema nor optimizer of"),
    ],
)
def test_adapters_that_are_none(tmp_path: Path, whole: Path, optimizers: Any, message: str):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    state = out / "checkpoints/step-000004/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"optimizers": optimizers}))
    with pytest.raises(ValueError, match=f"is damaged: .*{message}"):
        make_trainer(run_config(out, **SHORT), "latest")


# --- two adapters ---


class Alternating:
    """Trains the editor, and every third step a critic that learns the mean of what it would be shown."""

    adapters = averaged = (EDIT, "critic")
    memory = StepMemory()

    def __init__(self, config: Any):
        pass

    def plan(self, step: int, seed: int) -> Plan:
        return Plan("critic", ("critic",)) if step % 3 == 2 else Plan()

    def step(self, fields: Any, batch: Batch, backward: Backward | None) -> Metrics:
        with torch.set_grad_enabled(backward is not None), fields.edit() as velocity:
            if batch.kind == "critic":
                loss = (fields.critic - batch.noise.mean()).square().mean()
            else:
                loss = velocity(batch.noise, batch.t, batch.instruction, batch.source).square().mean()
            if backward is not None:
                backward(loss, last=True)
        return {"loss": loss.detach()}


class TwoSets(DiffusersHost):
    """The tiny FLUX with its LoRA, and a critic of one weight."""

    def __init__(self, config: Any, family: Any, device: torch.device, *, fresh: bool = True, adapters: Any = (), sharding: Any = None):
        assert adapters == Alternating.adapters
        super().__init__(config, family, device, fresh=fresh)
        self.critic = nn.Parameter(torch.ones(2, 3))
        self._critic_ema = EmaWeights({CRITIC: self.critic}, config.objective.ema_decay)

    @property
    def adapters(self) -> dict[str, Adapter]:
        return super().adapters | {"critic": Adapter({CRITIC: self.critic}, self._critic_ema)}


@pytest.fixture
def alternating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnpairedCycleConfig, "implementation", f"{__name__}:Alternating")
    monkeypatch.setattr(loop, "make_host", TwoSets)
    shapes = lambda config, family, adapters: {EDIT: lora_layout(config.lora, family), "critic": {CRITIC: (2, 3)}}  # noqa: E731
    monkeypatch.setattr(resume, "adapter_shapes", shapes)


def weights(trainer: loop.Trainer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: p.detach().clone() for key, p in adapter.parameters.items()}
        | {f"ema/{key}": value.clone() for key, value in adapter.ema.state().items()}
        for name, adapter in trainer.host.adapters.items()
    }


@pytest.mark.usefixtures("alternating")
def test_a_step_trains_the_adapters_of_its_plan_alone(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", train={"weight_decay": 0.1}))
    seen = [weights(trainer)]
    trainer.on_step = lambda it: seen.append(weights(it))
    trainer.run()
    for step, (one, other) in enumerate(zip(seen, seen[1:], strict=False)):
        moved = {name for name in one if any(not torch.equal(one[name][key], other[name][key]) for key in one[name])}
        assert moved == set(trainer.objective.plan(step, 0).adapters), step
    assert [bool(line["grad_norm/critic"]) for line in curve(tmp_path / "out")] == [False, False, True] * 2
    assert [bool(line["grad_norm"]) for line in curve(tmp_path / "out")] == [True, True, False] * 2


@pytest.mark.usefixtures("alternating")
def test_two_adapters_are_saved_and_resumed_by_name(tmp_path: Path):
    config = run_config(tmp_path / "out", train={"save_every": 3})
    make_trainer(config).run()
    last = tmp_path / "out/checkpoints/step-000006"
    reference = load_file(last / checkpoint.TENSORS)
    assert {f"critic/lora/{CRITIC}", f"critic/ema/{CRITIC}", "critic/optimizer/0/exp_avg", "edit/optimizer/0/exp_avg"} <= reference.keys()
    assert reference["critic/optimizer/0/step"] == 2 and reference["edit/optimizer/0/step"] == 4
    assert not [name for name in load_file(last / "byg_lora.safetensors") if "critic" in name]
    shutil.rmtree(last)
    make_trainer(config, "latest").run()
    found = load_file(last / checkpoint.TENSORS)
    assert found.keys() == reference.keys() and all(torch.equal(value, reference[name]) for name, value in found.items())


@pytest.mark.usefixtures("alternating")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"critic/ema/{CRITIC}"), f"critic/ema/{CRITIC} is missing"),
        (lambda t: t["critic/optimizer/0/step"].fill_(4), "has counted other steps than the run's 2"),
        (lambda t: t.pop("critic/optimizer/0/exp_avg"), r"exp_avg is missing \(critic/optimizer/0\)"),
        (lambda t: t[f"critic/lora/{CRITIC}"].fill_(float("nan")), f"tensor critic/lora/{CRITIC} holds NaN"),
        (lambda t: t.update({"other/lora/a": torch.zeros(1)}), "other/lora/a is neither lora, ema nor optimizer of edit, critic"),
    ],
)
def test_damage_of_the_second_adapter_is_named(tmp_path: Path, change: Any, message: str):
    config = run_config(tmp_path / "out")
    make_trainer(config).run()
    path = tmp_path / "out/checkpoints/step-000006" / checkpoint.TENSORS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        make_trainer(config, "latest")


def test_a_host_without_the_second_adapter_says_so_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(UnpairedCycleConfig, "implementation", f"{__name__}:Alternating")
    monkeypatch.setattr(DiffusersHost, "__init__", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match='trains the weights critic too, and model.host = "diffusers" has edit and fake alone'):
        make_trainer(run_config(tmp_path / "out"))
