"""The paired step beside musubi-tuner's: the same LoRA on both sides, and what the run itself holds them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step as command
from benchmarks import step_peer, step_shapes
from tests.support.musubi_host import CHECKOUT, needs_host


def test_gradients_of_a_fused_layer():
    start = "transformer.transformer_blocks.0.attn."
    gradients = {}
    for number, part in enumerate(("to_q", "to_k", "to_v"), 1):
        gradients[f"{start}{part}.lora_A.weight"] = torch.full((2, 3), float(number))
        gradients[f"{start}{part}.lora_B.weight"] = torch.full((4, 2), 10.0 * number)
    fused = step_peer.fused_gradients(gradients, "flux")
    base = "lora_unet_double_blocks_0_img_attn_qkv"
    assert fused.keys() == {f"{base}.lora_down.weight", f"{base}.lora_up.weight"}
    assert torch.equal(fused[f"{base}.lora_down.weight"], torch.full((2, 3), 6.0))
    assert fused[f"{base}.lora_up.weight"][:, 0].tolist() == [10.0] * 4 + [20.0] * 4 + [30.0] * 4


def test_parts_of_a_fused_layer_share_what_is_shared_there():
    names = [f"transformer.transformer_blocks.0.attn.{part}.lora_{kind}.weight" for part in ("to_q", "to_k", "to_out.0") for kind in "AB"]
    lora = step_peer.shared_lora({name: torch.Size((2, 2)) for name in names}, "flux", std=0.5, seed=1)
    q, q_up, k, k_up, out, _ = (lora[name] for name in names)
    assert torch.equal(q, k) and q.data_ptr() != k.data_ptr() and not torch.equal(q_up, k_up) and not torch.equal(q, out)


def test_figures_are_the_worse_setting_and_meter():
    def record(ours: list[float], saved: float, alive: float) -> dict[str, Any]:
        sizes = {"embedded": {"saved": saved, "alive": alive}, "peer": {"saved": 10, "alive": 10}}
        return {"seconds": {"embedded": ours, "peer": [1.0, 2.0, 4.0]}, "bytes": sizes, "checkpointing": False, "difference": 1e-7}

    records = [record([0.5, 1.8, 3.2], 9, 12), record([3.0, 1.0, 2.0], 8, 7)]
    assert step_peer.figures(records) == {"peer_seconds": pytest.approx(0.8), "peer_peak": pytest.approx(1.2)}
    assert "| activations kept | 1.8 | 0.800 | 0.900 | 1.200 | 1e-07 |" in step_peer.table(records)


def test_a_difference_is_that_of_the_worst_tensor():
    wanted = {"a": torch.ones(3), "b": torch.ones(3)}
    assert step_peer.worst_difference({"a": torch.ones(3), "b": torch.full((3,), 1.5)}, wanted) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match="nothing shows nothing"):
        step_peer.worst_difference(wanted, {"a": torch.ones(3), "b": torch.zeros(3)})


class TestInsideTheHost:
    pytestmark = needs_host

    def test_a_run_on_a_small_shape(self, capsys: pytest.CaptureFixture[str]):
        command.main(["--peer", "--shape", "tiny", "--repeats", "1"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(" | ")[0] for line in lines[2:]] == ["| activations kept", "| activations recomputed"]
        assert len(lines) == 4, "what the host says does not come between"

    def test_sides_that_compute_something_else_are_not_compared(self, monkeypatch: pytest.MonkeyPatch):
        whole = step_peer.in_host_names
        monkeypatch.setattr(step_peer, "in_host_names", lambda *a: {k: 1.01 * v if "up" in k else v for k, v in whole(*a).items()})
        with pytest.raises(AssertionError, match="do not compute the same"):
            step_peer.compare(step_shapes.shape_named("tiny"), Path(CHECKOUT), 1, "wall")

    def test_recomputation_is_the_hosts_own(self):
        peer = step_peer.Peer(step_shapes.shape_named("tiny"), Path(CHECKOUT))
        peaks = {}
        for setting in (False, True):
            peer.choose(setting)
            assert peer.difference() < step_peer.TOLERANCE
            peaks[setting] = {side: peer.peaks(side) for side in step_peer.SIDES}
        for side in step_peer.SIDES:
            assert peaks[True][side]["saved"] < 0.3 * peaks[False][side]["saved"]
