"""Ways in which a checkpoint is damaged, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byg_plugin.training import checkpoint, loop
from tests.support.tiny import make_trainer, run_config

Tensors = dict[str, torch.Tensor]
LORA = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
SHORT = {"train": {"steps": 4}}


def tensors_changed(change: Callable[[Tensors], object], step: int = 4) -> Callable[[Path], None]:
    """Rewrite training.safetensors of a checkpoint."""

    def work(out: Path) -> None:
        path = out / f"checkpoints/step-{step:06d}" / checkpoint.TENSORS
        found = load_file(path)
        prefix = "edit/" if any(name.startswith("edit/") for name in found) else ""
        tensors = {name.removeprefix(prefix): value for name, value in found.items()}
        change(tensors)
        save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path)

    return work


def state_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def work(out: Path) -> None:
        path = out / "checkpoints/step-000004/state.json"
        record = json.loads(path.read_text())
        named = record.pop("optimizers", {})
        change(record := record | ({"optimizer": named["edit"]} if named else {}))
        path.write_text(json.dumps(record | ({"optimizers": {"edit": record.pop("optimizer")}} if named else {})))

    return work


def state_written(content: str | bytes) -> Callable[[Path], None]:
    def work(out: Path) -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        (out / "checkpoints/step-000004/state.json").write_bytes(raw)

    return work


def dropped(prefix: str) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        names = [name for name in tensors if name.startswith(prefix)]
        assert names, prefix
        for name in names:
            del tensors[name]

    return tensors_changed(change)


def first_row(name: str) -> Callable[[Path], None]:
    """(1, n), which `copy_` would broadcast into (r, n)."""
    return tensors_changed(lambda tensors: tensors.update({name: tensors[name][:1]}))


def added(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return tensors_changed(lambda found: found.update({name.replace("__", "/"): value for name, value in tensors.items()}))


def spoilt(name: str, value: float) -> Callable[[Path], None]:
    return tensors_changed(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def every_step(value: float) -> Callable[[Path], None]:
    return tensors_changed(lambda tensors: [t.fill_(value) for name, t in tensors.items() if name.endswith("/step")])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "lora_broadcast": (first_row(f"lora/{LORA}"), rf"lora/{LORA} is float32 \(1, 32\), here it is float32 \(4, 32\)"),
    "lora_missing": (dropped(f"lora/{LORA}"), f"lora/{LORA} is missing"),
    "lora_extra": (added(lora__other=torch.zeros(4, 32)), "lora/other is not part of this run"),
    "lora_dtype": (
        tensors_changed(lambda tensors: tensors.update({f"lora/{LORA}": tensors[f"lora/{LORA}"].bfloat16()})),
        rf"lora/{LORA} is bfloat16 \(4, 32\)",
    ),
    "ema_all_missing": (dropped("ema/"), r"ema/transformer\..* is missing"),
    "ema_missing": (dropped(f"ema/{LORA}"), f"ema/{LORA} is missing"),
    "ema_broadcast": (first_row(f"ema/{LORA}"), rf"ema/{LORA} is float32 \(1, 32\)"),
    "ema_extra": (added(ema__other=torch.zeros(4, 32)), "ema/other is not part of this run"),
    "moment_missing": (dropped("optimizer/3/exp_avg_sq"), r"exp_avg_sq is missing \((edit/)?optimizer/3\)"),
    "moments_of_one_missing": (
        dropped("optimizer/3/"),
        r"(step|exp_avg) is missing \((edit/)?optimizer/3\)",
    ),
    "moments_all_missing": (dropped("optimizer/"), r"is missing \((edit/)?optimizer/0\)"),
    "moment_broadcast": (first_row("optimizer/0/exp_avg"), r"exp_avg is float32 \(1, 32\).*\((edit/)?optimizer/0\)"),
    "moment_extra": (added(optimizer__0__max_exp_avg_sq=torch.zeros(4, 32)), "max_exp_avg_sq is not part of this run"),
    "parameter_extra": (added(optimizer__999__step=torch.zeros(())), "optimizer/999 is not part of this run"),
    "parameter_no_number": (added(optimizer__x__step=torch.zeros(())), "optimizer/x is no parameter's number"),
    "group_unknown": (added(other__x=torch.zeros(1)), "other/x is neither lora, ema nor optimizer"),
    "count_of_one": (tensors_changed(lambda tensors: tensors["optimizer/0/step"].fill_(3)), "has counted other steps than the run's 4"),
    "counts": (every_step(7), r"has counted other steps than the run's 4: transformer \[7.0\]"),
    "parameters_fewer": (state_changed(lambda r: r["optimizer"]["param_groups"][0]["params"].pop()), "param_groups does not hold"),
    "groups_missing": (state_changed(lambda r: r["optimizer"].pop("param_groups")), "param_groups does not hold"),
    "groups_of_text": (state_changed(lambda r: r["optimizer"].update(param_groups=["x"])), "param_groups does not hold"),
    "scalar_extra": (state_changed(lambda r: r["optimizer"]["state"]["0"].update(beta=1)), "beta is not part of this run"),
    "lora_nan": (spoilt(f"lora/{LORA}", float("nan")), f"training.safetensors: tensor (edit/)?lora/{LORA} holds NaN or infinite values"),
    "ema_inf": (spoilt(f"ema/{LORA}", float("inf")), f"training.safetensors: tensor (edit/)?ema/{LORA} holds NaN"),
    "moment_inf": (spoilt("optimizer/2/exp_avg", float("-inf")), "tensor (edit/)?optimizer/2/exp_avg holds NaN"),
    "tensors_damaged": (lambda out: (out / "checkpoints/step-000004/training.safetensors").write_bytes(b"xx") and None, "is damaged"),
    "tensors_missing": (lambda out: (out / "checkpoints/step-000004/training.safetensors").unlink(), "it has no training.safetensors"),
    "state_missing": (lambda out: (out / "checkpoints/step-000004/state.json").unlink(), "is not a checkpoint: it has no state.json"),
    "state_latin": (state_written(b'{"step": "caf\xe9"}'), "state.json is not UTF-8"),
    "state_no_json": (state_written("{"), "state.json is not JSON"),
    "state_list": (state_written("[]"), "state.json holds a list, not an object"),
    "state_nested": (state_written("[" * 100_000), "state.json is not JSON: nested too deeply"),
    "state_digits": (state_written('{"step": ' + "9" * 5000 + "}"), "state.json is not JSON"),
    "step_missing": (state_changed(lambda r: r.pop("step")), "step = None is no number of steps"),
    "step_text": (state_changed(lambda r: r.update(step="4")), "step = '4' is no number of steps"),
    "step_negative": (state_changed(lambda r: r.update(step=-1)), "step = -1 is no number of steps"),
    "step_true": (state_changed(lambda r: r.update(step=True)), "step = True is no number of steps"),
    "step_float": (state_changed(lambda r: r.update(step=4.0)), "step = 4.0 is no number of steps"),
    "step_huge": (state_changed(lambda r: r.update(step=10**300)), "step = 1000.*000 is not the folder's"),
    "step_of_another": (state_changed(lambda r: r.update(step=3)), "step = 3 is not the folder's"),
    "config_missing": (state_changed(lambda r: r.pop("config")), "config = None is not a configuration"),
    "config_list": (state_changed(lambda r: r.update(config=[1])), "config = a list is not a configuration"),
    "section_list": (state_changed(lambda r: r["config"].update(train=[1])), "config = a dict is not a configuration"),
    "decay_text": (state_changed(lambda r: r["config"]["objective"].update(ema_decay="0.9")), "ema_decay = '0.9' is not in"),
    "optimizer_list": (state_changed(lambda r: r.update(optimizer=[])), r"optimizer\S* = a list is not an optimizer's state"),
    "optimizer_state_list": (state_changed(lambda r: r["optimizer"].update(state=[])), "is not an optimizer's state"),
    "data_number": (state_changed(lambda r: r.update(data=5)), "data = 5 is no text"),
}


def assert_refused(out: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(loop, "make_host", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(run_config(out, **SHORT), "latest")
    said = str(caught.value)
    assert str(out / "checkpoints/step-000004") in said and len(said) < 1000
    assert f"go on with --resume {out / 'checkpoints/step-000002'} --discard-later" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
