"""What a checkpoint must be to be resumed: whole, finite, this run's; and the way back when it is not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from byg_plugin.hosts.diffusers import DiffusersHost, lora_layout
from byg_plugin.models import make_family
from byg_plugin.training import checkpoint, preview
from tests.support.checkpoint_damage import DAMAGE, LORA, SHORT, assert_refused, spoilt, state_changed, tensors_changed
from tests.support.tiny import curve, make_trainer, run_config
from tests.support.tiny_wan import tiny_wan, wan_config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with checkpoints after steps 2 and 4; nobody may write into it."""
    out = tmp_path_factory.mktemp("checkpoints") / "out"
    make_trainer(run_config(out, **SHORT)).run()
    return out


@pytest.fixture
def out(tmp_path: Path, reference: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "out"))


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_this_run_s_is_named_before_a_model_is_loaded(out: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    assert_refused(out, monkeypatch, case)


def test_the_way_back_that_is_advised_works(out: Path, reference: Path):
    """Word for word, and then the run is the uninterrupted one."""
    spoilt(f"lora/{LORA}", float("nan"))(out)
    with pytest.raises(ValueError, match="go on with --resume") as caught:
        make_trainer(run_config(out, **SHORT), "latest")
    advised = re.search(r"--resume (\S+) --discard-later$", str(caught.value))
    assert advised is not None, caught.value
    with pytest.raises(ValueError, match="has the later checkpoint step-000004.*add --discard-later"):
        make_trainer(run_config(out, **SHORT), advised[1])
    make_trainer(run_config(out, **SHORT), advised[1], discard_later=True).run()
    assert curve(out) == curve(reference)
    a, b = (load_file(folder / "byg_lora-ema.safetensors") for folder in (out, reference))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["discarded-step-000004", "step-000002", "step-000004"]


def test_the_way_back_passes_over_other_damaged_ones(tmp_path: Path):
    out = tmp_path / "out"
    make_trainer(run_config(out, train={"steps": 3, "save_every": 1})).run()
    tensors_changed(lambda tensors: tensors.clear(), step=3)(out)
    tensors_changed(lambda tensors: tensors.pop("optimizer/0/exp_avg"), step=2)(out)
    with pytest.raises(ValueError, match=r"--resume \S+step-000001 --discard-later"):
        make_trainer(run_config(out, train={"steps": 3}), "latest")
    spoilt_first = out / "checkpoints/step-000001" / checkpoint.TENSORS
    spoilt_first.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .* can be used: move that folder away and start without --resume"):
        make_trainer(run_config(out, train={"steps": 3}), "latest")
    with pytest.raises(ValueError, match="is not a checkpoint.*there is no checkpoint in"):
        checkpoint.load(tmp_path / "nowhere/step-000001")


def test_discarding_takes_previews_and_logs_along(tmp_path: Path):
    sections: dict[str, Any] = {
        "dataset": {"validation_items": 1},
        "train": {"steps": 4, "validate_every": 2},
        "sample": {"every": 2, "items": 1, "steps": 1},
    }
    config = run_config(tmp_path / "out", **sections)
    make_trainer(config).run()
    logs = [curve(tmp_path / "out", name) for name in ("log.jsonl", "validation.jsonl")]
    first = tmp_path / "out/checkpoints/step-000002"
    for number in ("", "-2"):
        trainer = make_trainer(config, str(first), discard_later=True)
        assert [line["step"] for line in curve(tmp_path / "out")] == [1, 2]
        assert [line["step"] for line in curve(tmp_path / "out", "validation.jsonl")] == [2]
        assert [path.name for path in checkpoint.checkpoints(first.parent)] == ["step-000002"]
        assert not preview.folder(config.output, 4).exists() and preview.folder(config.output, 2).exists()
        assert (first.parent / f"discarded-step-000004{number}/state.json").is_file()
        assert preview.folder(config.output, 4).with_name(f"discarded-step-000004{number}").is_dir()
        trainer.run()
        assert [curve(tmp_path / "out", name) for name in ("log.jsonl", "validation.jsonl")] == logs
        assert preview.is_whole(config, trainer.data, 4)


@pytest.mark.parametrize("resume", [None, "latest", "elsewhere"])
def test_discarding_needs_a_checkpoint_of_this_folder(out: Path, tmp_path: Path, reference: Path, resume: str | None):
    source = str(reference / "checkpoints/step-000002") if resume == "elsewhere" else resume
    with pytest.raises(ValueError, match="--discard-later goes with --resume FOLDER, and FOLDER must be a checkpoint in"):
        make_trainer(run_config(out, **SHORT), source, discard_later=True)
    if resume == "elsewhere":
        with pytest.raises(ValueError, match="has the other checkpoint step-000004.*overwritten: choose another output.dir"):
            make_trainer(run_config(out, **SHORT), source)
    assert [path.name for path in checkpoint.checkpoints(out / "checkpoints")] == ["step-000002", "step-000004"]


def test_an_empty_resume_is_no_fresh_start(tmp_path: Path):
    for empty in ("", " "):
        with pytest.raises(ValueError, match='--resume "": give latest or the folder'):
            make_trainer(run_config(tmp_path / "out"), empty)


def test_a_folder_that_is_not_there_is_named(out: Path, tmp_path: Path):
    missing = str(tmp_path / "step-000099")
    with pytest.raises(ValueError, match=f"^--resume {re.escape(missing)}: no such folder; the last good .*step-000004: .*--resume latest"):
        make_trainer(run_config(out, **SHORT), missing)
    with pytest.raises(ValueError, match=f"^--resume {re.escape(missing)}: no such folder; there is no checkpoint in"):
        make_trainer(run_config(tmp_path / "fresh"), missing)


def test_a_checkpoint_s_optimizer_options_are_not_taken_over(out: Path, reference: Path):
    """Another torch may write others, and a changed weight decay would be without effect."""
    state_changed(lambda r: r["optimizer"].update(param_groups=[{"params": r["optimizer"]["param_groups"][0]["params"]}]))(out)
    shutil.rmtree(out / "checkpoints/step-000002")
    longer = run_config(out, train={"steps": 5, "weight_decay": 0.25})
    trainer = make_trainer(longer, "latest")
    assert trainer.engine.optimizers["edit"].param_groups[0]["weight_decay"] == 0.25
    trainer.run()
    assert checkpoint.load(out / "checkpoints/step-000005").adapters["edit"].optimizer["param_groups"][0]["weight_decay"] == 0.25


def test_a_run_without_ema_goes_on_with_one_only_if_it_had_none(tmp_path: Path):
    """Its own configuration says so, not what is missing in the file."""
    out = tmp_path / "out"
    make_trainer(run_config(out, objective={"ema_decay": 0.0}, **SHORT)).run()
    trainer = make_trainer(run_config(out, **SHORT), "latest")
    assert all(torch.equal(value, trainer.host.parameters[n]) for n, value in trainer.host.ema_weights.state().items())
    tensors_changed(lambda tensors: tensors.update({f"ema/{LORA}": tensors[f"lora/{LORA}"].clone()}))(out)
    with pytest.raises(ValueError, match=f"ema/{LORA} is not part of this run"):
        make_trainer(run_config(out, **SHORT), "latest")


@pytest.mark.parametrize("lora", [{}, {"experts": "shared"}, {"experts": "low_noise"}, {"experts": "high_noise"}])
def test_the_layout_of_two_experts_is_the_host_s(tmp_path: Path, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.lora import start as start_lora

    lora = lora | ({"other_expert": "other.safetensors"} if "noise" in lora.get("experts", "") else {})
    config = wan_config(tmp_path, lora=lora)
    family: Any = make_family(config)
    assert len(family.experts) == 2
    monkeypatch.setattr(DiffusersHost, "_set", lambda self, parameters, tensors: None)
    monkeypatch.setattr(start_lora, "read_other_expert", lambda config: {})
    family.load_transformers = lambda dtype: ((name, tiny_wan().requires_grad_(False)) for name in family.experts)
    family.meta_transformers = lambda: {name: tiny_wan() for name in family.experts}
    host = DiffusersHost(config, family, torch.device("cpu"))
    assert lora_layout(config.lora, family) == {name: tuple(p.shape) for name, p in host.parameters.items()}
    assert list(lora_layout(config.lora, family)) == list(host.parameters)


def two_experts(steps: dict[str, int | None], step: int) -> str | None:
    """The complaint about a checkpoint of two parameters, one an expert, that have been trained so often (None: never)."""
    layout = checkpoint.AdapterLayout(
        lora=dict.fromkeys(steps, "float32 (1,)"), optimizer=dict.fromkeys(steps, {"step": "float32 ()"}), trained=lambda step: step
    )
    states = {i: {"step": torch.tensor(float(n))} for i, n in enumerate(steps.values()) if n is not None}
    adapter = checkpoint.AdapterState(
        lora={name: torch.zeros(1) for name in steps}, ema={}, optimizer={"param_groups": [{"params": [0, 1]}], "state": states}
    )
    state = checkpoint.TrainingState(step=step, adapters={"edit": adapter}, config={"objective": {"ema_decay": 0}})
    return checkpoint._difference(state, {"edit": layout})


@pytest.mark.parametrize(
    ("high", "low", "step", "good"),
    [(3, 1, 4, True), (4, None, 4, True), (None, 4, 4, True), (3, None, 4, False), (None, None, 4, False), (4, 4, 4, False)],
)
def test_an_expert_may_have_no_moments_only_if_the_other_had_every_step(high: int | None, low: int | None, step: int, good: bool):
    assert (two_experts({"transformer.a": high, "transformer_2.a": low}, step) is None) == good
