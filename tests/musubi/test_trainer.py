"""The seams' own pieces, without the host: what it hands in is played."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byg_plugin import families, sampling
from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.ema import EmaWeights
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import trainer as musubi_trainer
from byg_plugin.musubi.trainer import UnpairedCycleTrainer
from byg_plugin.musubi.wan import WanOnMusubi
from byg_plugin.objectives.draws import share_of_high_noise
from byg_plugin.training.launch import Launch
from tests.support.musubi_host import A14B, T2V, host_config


class Fields:
    """What a trainer asks of `MusubiFields`."""

    def __init__(self) -> None:
        self.network = nn.Linear(2, 2, bias=False)
        self.waiting = 0

    def backward_done(self) -> None:
        self.waiting += 1


class Accelerator:
    """Scales a loss as accelerate does."""

    def __init__(self, accumulation: int = 1, scale: float | None = None, kind: str = "NO"):
        self.gradient_accumulation_steps = accumulation
        self.scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
        self.distributed_type = SimpleNamespace(value=kind)

    def backward(self, loss: Tensor) -> None:
        factor = 1.0 if self.scaler is None else self.scaler.get_scale()
        (loss * factor / self.gradient_accumulation_steps).backward()


def trainer(folder: Path, family: str = T2V, **sections: dict[str, Any]) -> Any:
    config = host_config(folder, family, **sections)
    made: Any = type(
        "Played",
        (UnpairedCycleTrainer,),
        {"byg_config": config, "byg_checkout": SimpleNamespace(family=WanOnMusubi()), "byg_launch": Launch()},
    )()
    made.byg_fields = Fields()
    made.byg_high_share = None
    return made


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_backward_gives_the_factor_that_the_gradient_has(tmp_path: Path, scale: float | None):
    it, weight = trainer(tmp_path), torch.tensor(3.0, requires_grad=True)
    factor = it._backward(Accelerator(4, scale), weight * 5, last=False)
    assert weight.grad is not None and weight.grad / factor == 5 and factor == (scale or 1.0) / 4
    assert it.byg_fields.waiting == 1


def test_what_is_not_finite_stops_the_run_and_is_named(tmp_path: Path):
    it = trainer(tmp_path)
    good = {"loss": torch.ones(()), "cycle": torch.ones(())}
    it._stop_if_not_finite(Accelerator(), good)
    with pytest.raises(FloatingPointError, match="^cycle is not finite at step 1; the weights were not changed"):
        it._stop_if_not_finite(Accelerator(), good | {"cycle": torch.tensor(torch.nan)})
    it.byg_fields.network.weight.grad = torch.full((2, 2), torch.inf)
    with pytest.raises(FloatingPointError, match="^gradient is not finite"):
        it._stop_if_not_finite(Accelerator(), good)
    it._stop_if_not_finite(Accelerator(scale=8.0), good)  # the scaler skips such a step itself


def test_a_step_is_on_one_side_of_the_boundary_and_the_sides_have_their_share(tmp_path: Path):
    it = trainer(tmp_path, A14B)
    it.byg_high_share = share_of_high_noise(it.byg_config, 0.875)
    high = [batches[0].t >= 0.875 for batches in drawn(it, 400, 1, 1, size=3)]
    assert all(one.all() or not one.any() for one in high)
    share = sum(bool(one[0]) for one in high) / 400
    assert 0.55 < it.byg_high_share < 0.95, "the sides' shares must differ, or an exchange of them would not be seen"
    assert abs(share - it.byg_high_share) < 0.07


def drawn(it: Any, steps: int, accumulation: int, ranks: int, size: int = 1) -> list[list[Any]]:
    """What each batch of a run is given, by steps: ranks beside each other."""
    rows = {f"byg_{role}_{part}": [value] for role in ROLES for part, value in (("umt5", torch.ones(3, 2)), ("lengths", torch.tensor([3])))}
    rows = {name: values * size for name, values in rows.items()}
    found: list[list[Any]] = []
    it.byg_objective.step = lambda fields, batch, backward: found[-1].append(batch) or {"loss": torch.ones(())}
    it._byg_proved = True
    it.byg_fields.ema_weights = EmaWeights({}, 0.0)
    args = SimpleNamespace(gradient_accumulation_steps=accumulation)
    for _ in range(steps):
        found.append([])
        for micro in range(accumulation):
            for rank in range(ranks):
                it.byg_progress.micro = micro
                accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=ranks, process_index=rank, scaler=None)
                it.process_batch(args, accelerator, None, None, rows, torch.zeros(size, 4, 1, 2, 2))
            assert it.byg_progress.micro == micro + 1
            it.on_post_optimizer_step(args, None, None, None, micro == accumulation - 1, 0)
        assert it.byg_progress.micro == 0
    return found


def test_every_batch_of_every_rank_draws_its_own(tmp_path: Path):
    objective = {"identity_probability": 0.5}
    accumulated = drawn(trainer(tmp_path, objective=objective), 12, 4, 1)
    noises = {tuple(batch.noise.flatten().tolist()) for step in accumulated for batch in step}
    assert len(noises) == len({batch.t.item() for step in accumulated for batch in step}) == 48
    for ranks in (2, 4):  # N ranks draw together what one draws with N times the accumulation
        beside = drawn(trainer(tmp_path, objective=objective), 12, 4 // ranks, ranks)
        assert all(
            torch.equal(a.noise, b.noise) and a.t == b.t and a.identity_step == b.identity_step
            for one, other in zip(accumulated, beside, strict=True)
            for a, b in zip(one, other, strict=True)
        )
    coins = [{batch.identity_step for batch in step} for step in accumulated]
    assert all(len(coin) == 1 for coin in coins) and {True} in coins and {False} in coins


def test_step_and_ema_follow_optimizer_steps_alone(tmp_path: Path):
    it, weight = trainer(tmp_path), nn.Parameter(torch.zeros(2))
    it.byg_fields.ema_weights = ema = EmaWeights({"a": weight}, 0.9)
    weight.data += 1
    it.byg_progress.micro = 1
    it.on_post_optimizer_step(None, None, None, None, False, 0)
    assert (it.byg_progress.step, it.byg_progress.micro) == (0, 1) and not ema.state()["a"].any()
    it.on_post_optimizer_step(None, None, None, None, True, 0)
    assert (it.byg_progress.step, it.byg_progress.micro) == (1, 0)
    assert torch.allclose(ema.state()["a"], torch.full((2,), 1 - ema.decay_at(1)))


def test_guidance_leads_away_from_the_other_text_and_both_have_the_source():
    seen = []

    def velocity(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
        seen.append(source)
        return text["umt5"]

    text, negative, source = {"umt5": torch.full((1, 2), 3.0)}, {"umt5": torch.full((1, 2), 1.0)}, torch.ones(1)
    geometry = SpecGeometry(families.named(A14B))
    for scale, expected in ((1.0, 3.0), (0.0, 1.0), (4.0, 9.0)):
        guided = sampling.guided(velocity, negative, lambda t, scale=scale: scale, geometry)
        assert (guided(source, source, text, source) == expected).all()
    assert all(one is source for one in seen) and len(seen) == 5  # at scale 1 there is no second branch


def test_a_model_that_takes_other_texts_is_refused(tmp_path: Path):
    it = trainer(tmp_path)

    def loaded(**attributes: int) -> None:
        network = torch.nn.Linear(1, 1)
        for name, value in attributes.items():
            setattr(network, name, value)
        it.on_transformer_loaded(None, SimpleNamespace(process_index=0), network)

    loaded(text_len=8)
    loaded()  # FLUX has no such number
    with pytest.raises(ValueError, match="conditioning.max_text_tokens = 8: this model takes 512"):
        loaded(text_len=512)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_engines_are_refused_once_more_where_they_show(tmp_path: Path, kind: str):
    with pytest.raises(ValueError, match=f"asks for {kind}"):
        trainer(tmp_path).extra_trainable_params(None, Accelerator(kind=kind), None, None, [])


def test_companions_of_files_that_the_host_removed_are_removed(tmp_path: Path):
    it = trainer(tmp_path)
    kept, gone = tmp_path / "tiny-step2.safetensors", tmp_path / "tiny-step1.safetensors"
    for path in (kept, kept.with_name("tiny-step2-ema.safetensors"), gone.with_name("tiny-step1-ema.safetensors")):
        path.touch()
    it._byg_companions = [gone, kept]
    it._drop_orphans()
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-step2.safetensors", "tiny-step2-ema.safetensors"}
    assert it._byg_companions == [kept]


def test_the_average_is_uploaded_where_the_host_uploads(tmp_path: Path):
    it, sent = trainer(tmp_path, musubi={"output_dir": str(tmp_path)}), []
    (tmp_path / "dataset.toml").write_text("[[datasets]]\n", encoding="utf-8")
    upload = lambda args, path, name, force_sync_upload: sent.append((Path(path).is_file(), name, force_sync_upload))  # noqa: E731
    it.byg_checkout.module = lambda name: SimpleNamespace(upload=upload)
    it.byg_fields.ema_weights = EmaWeights({}, 0.9)
    it.byg_fields.network.save_weights = lambda path, dtype, metadata: Path(path).touch()
    args = SimpleNamespace(output_dir=str(tmp_path), dataset_config=tmp_path / "dataset.toml", dit="dit", network_alpha=4)
    for repository in (None, "someone/somewhere"):
        args.huggingface_repo_id = repository
        it.on_post_save(args, None, None, None, "tiny.safetensors", None, {}, True)
    assert sent == [(True, "/tiny-ema.safetensors", True)]


DAMAGED = ["{", "[]", '{"step": 2}', '{"step": "2", "config": {}}', '{"step": -1}', "{}", '{"step": true, "config": {}}', "[" * 100_000]


@pytest.mark.parametrize("written", [None, *DAMAGED, '{"step": 2, "config": {"musubi": []}}', '{"step": 2, "config": {}, "x": "\udce9"}'])
def test_a_damaged_state_is_told(tmp_path: Path, written: str | None):
    if written is not None:
        (tmp_path / musubi_trainer.STATE).write_text(written, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="(no state of this plugin there|is damaged)"):
        musubi_trainer.read_state(tmp_path)


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny-step00000500.safetensors", "tiny-from000500.safetensors"])
def test_what_an_earlier_run_has_written_is_not_written_over(tmp_path: Path, name: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny_other.safetensors").touch()
    config, args = host_config(tmp_path, T2V), SimpleNamespace(output_dir=str(tmp_path / "out"), output_name="tiny", resume=None)
    musubi._resume_from(config, None, args)
    (tmp_path / "out" / name).touch()
    with pytest.raises(ValueError, match=f"already has {name}: go on with --resume"):
        musubi._resume_from(config, None, args)


def resumable(out: Path) -> SimpleNamespace:
    """What `_resume_from` reads of the host's arguments."""
    return SimpleNamespace(output_dir=str(out), output_name="tiny", resume=None, max_train_steps=4, max_train_epochs=None)


def test_what_a_state_holds_cannot_change_with_it(tmp_path: Path):
    config, args = host_config(tmp_path, T2V), resumable(tmp_path / "out")
    (tmp_path / musubi_trainer.STATE).write_text(json.dumps({"step": 2, "config": config.model_dump(mode="json")}), encoding="utf-8")
    with pytest.raises(ValueError, match="it was not written to its end"):
        musubi._resume_from(config, str(tmp_path), args)
    (tmp_path / "random_states_0.pkl").touch()
    musubi._resume_from(config, str(tmp_path), args)
    assert args.resume == str(tmp_path)
    for key, value in (("network_dim", 8), ("network_alpha", 1), ("network_module", "networks.loha"), ("optimizer_type", "Muon")):
        with pytest.raises(ValueError, match=rf"trained with musubi\.{key} = .*, now it is {value!r}"):
            musubi._resume_from(host_config(tmp_path, T2V, musubi={key: value}), str(tmp_path), args)


@pytest.mark.parametrize("name", ["tiny-from000002.safetensors", "tiny-from000002-step00000001-state"])
def test_what_an_earlier_part_has_written_is_not_written_over(tmp_path: Path, name: str):
    out = tmp_path / "out"
    config, args = host_config(tmp_path, T2V), resumable(out)
    state = out / "tiny-step00000002-state"
    state.mkdir(parents=True)
    (state / musubi_trainer.STATE).write_text(json.dumps({"step": 2, "config": config.model_dump(mode="json")}), encoding="utf-8")
    (state / "random_states_0.pkl").touch()
    for other in ("tiny-from000003.safetensors", "tiny-from0000020.safetensors", "other-from000002.safetensors"):
        (out / other).touch()
    musubi._resume_from(config, str(state), args)
    args.max_train_steps = 2
    with pytest.raises(ValueError, match="nothing is left to do"):
        musubi._resume_from(config, str(state), args)
    args.max_train_epochs = 1
    (out / name).touch()
    with pytest.raises(ValueError, match=f"{name} is of an earlier run that went on from this state, .*set another musubi.output_name"):
        musubi._resume_from(config, str(state), args)
    args.output_name = "again"
    musubi._resume_from(config, str(state), args)


def test_a_damaged_ema_is_told(tmp_path: Path):
    (tmp_path / musubi_trainer.STATE_TENSORS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="byg_state.safetensors cannot be read"):
        musubi_trainer._read_ema(tmp_path)


def test_an_ema_that_is_not_finite_is_told(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"a": torch.tensor([1.0, torch.inf])}, tmp_path / musubi_trainer.STATE_TENSORS)
    with pytest.raises(ValueError, match="byg_state.safetensors: tensor a holds NaN or infinite values; take another state"):
        musubi_trainer._read_ema(tmp_path)


def test_a_damaged_state_among_others_does_not_hide_them(tmp_path: Path):
    whole = '{"step": %d, "config": {}}'
    for name, written in (("a", "["), ("b", whole % 4), ("c", whole % 2), ("d", whole % 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / musubi_trainer.STATE).write_text(written, encoding="utf-8")
        if name != "d":  # killed before accelerate had written weights and optimizer
            (tmp_path / name / "random_states_0.pkl").touch()
    found = [path.name for path in musubi_trainer.states(tmp_path)]
    assert found[2:] == ["c", "b"] and set(found[:2]) == {"a", "d"}


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        ({}, r"weight is missing, in this run it has shape \(2, 2\)"),
        ({"weight": torch.ones(1, 2)}, r"weight has shape \(1, 2\), in this run it has shape \(2, 2\)"),
        ({"weight": torch.ones(2, 2), "other": torch.ones(1)}, "other has shape .1,., in this run it is missing"),
        ({"weight": torch.ones(2, 2)}, None),
    ],
)
def test_an_ema_of_another_lora_is_told(tmp_path: Path, ema: dict[str, Tensor], message: str | None):
    it = trainer(tmp_path)
    it.byg_progress.ema = ema
    if message is None:
        it._check_state(tmp_path, dict(it.byg_fields.network.named_parameters()))
        return
    with pytest.raises(ValueError, match=f"byg_state.safetensors: {message}; take another state"):
        it._check_state(tmp_path, dict(it.byg_fields.network.named_parameters()))


def test_a_host_s_lora_that_is_not_finite_is_told(tmp_path: Path):
    it = trainer(tmp_path)
    it.byg_fields.network.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the host's LoRA: tensor weight holds NaN"):
        it._check_state(tmp_path, dict(it.byg_fields.network.named_parameters()))


def test_data_and_weights_are_looked_at_before_the_rate_is_blamed(tmp_path: Path):
    from safetensors.torch import save_file

    from byg_plugin.objectives.base import Batch

    it = trainer(tmp_path)
    bad = {"loss": torch.tensor(torch.nan)}
    texts = {role: {"umt5": torch.ones(1, 2, 3)} for role in ROLES}
    latents = torch.ones(1, 4, 1, 2, 2)

    def batch(source: Tensor) -> Batch:
        return Batch(source=source, noise=latents, t=torch.ones(1), nodes=torch.ones(2), **texts)

    (tmp_path / "dataset.toml").write_text(f'[[datasets]]\ncache_directory = "{tmp_path}/caches"\n', encoding="utf-8")
    (tmp_path / "caches").mkdir()
    save_file({"good": torch.ones(2)}, tmp_path / "caches/a.safetensors")
    (tmp_path / "caches/b.safetensors").write_bytes(b"damaged")
    save_file({"latents": torch.full((2,), torch.nan)}, tmp_path / "caches/c.safetensors")
    args = SimpleNamespace(dataset_config=tmp_path / "dataset.toml")
    with pytest.raises(FloatingPointError, match="Data and weights are finite: try a lower musubi.learning_rate"):
        it._stop_if_not_finite(Accelerator(), bad, args, batch(latents))
    with pytest.raises(FloatingPointError, match=r"cached latents of this batch .*remove .*c.safetensors \(tensor latents\)") as caught:
        it._stop_if_not_finite(Accelerator(), bad, args, batch(latents * torch.inf))
    assert "learning_rate" not in str(caught.value)
    texts[ROLES[0]] = {"umt5": torch.full((1, 2, 3), torch.nan)}
    with pytest.raises(FloatingPointError, match=rf"cached {ROLES[0]} \(umt5\) of this batch"):
        it._stop_if_not_finite(Accelerator(), bad, args, batch(latents))
    it.byg_fields.network.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="The weights are the reason: weight holds NaN"):
        it._stop_if_not_finite(Accelerator(), bad)


def test_weights_are_looked_at_after_the_optimizer(tmp_path: Path):
    it = trainer(tmp_path)
    it.byg_fields.ema_weights = EmaWeights({}, 0.0)
    it.on_post_optimizer_step(None, None, None, None, True, 0)
    it.byg_fields.network.weight.data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="weight is not finite after step 2; nothing of this step is saved"):
        it.on_post_optimizer_step(None, None, None, None, True, 0)
    assert it.byg_progress.step == 1


def test_a_full_disk_at_a_state_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors import SafetensorError

    def full(*args: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    it = trainer(tmp_path)
    it.byg_fields.ema_weights = EmaWeights({}, 0.0)
    monkeypatch.setattr(musubi_trainer, "save_file", full)
    with pytest.raises(ValueError, match="cannot write .*No space left on device.*Make room, then go on with --resume of an earlier state"):
        it._save_state(None, None, str(tmp_path))


def test_a_state_is_read_into_the_run(tmp_path: Path):
    from safetensors.torch import save_file

    it = trainer(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / musubi_trainer.STATE_TENSORS)
    (tmp_path / musubi_trainer.STATE).write_text(json.dumps({"step": 7, "config": {}}), encoding="utf-8")
    (tmp_path / "random_states_0.pkl").touch()
    it._load_state([], str(tmp_path))
    assert it.byg_progress.step == 7 and torch.equal(it.byg_progress.ema["a"], torch.ones(2))
    args = SimpleNamespace(max_train_steps=10, output_name="tiny")
    it._continue(args)
    assert (args.max_train_steps, args.output_name) == (3, "tiny-from000007")
