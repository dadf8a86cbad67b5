"""Inside the real musubi-tuner: experts in their order, swapped and streamed blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.musubi.fields import BlockSwap
from tests.support.musubi_host import A14B, T2V, Rig, latents, needs_host, texts
from tests.support.musubi_images import IMAGES, MASKED
from tests.support.musubi_runs import one_batch

pytestmark = needs_host


def test_experts_in_the_order_of_the_passes(tmp_path: Path):
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True}, objective={"rollout_steps": 8})
    it.wake()
    seen: list[tuple[bool, bool]] = []
    plain = it.fields._call

    def call(*inputs: Any) -> Tensor:
        seen.append((it.trainer.current_model_is_high_noise, torch.is_grad_enabled()))
        assert bool((inputs[1] >= 0.875).all()) == seen[-1][0]
        return plain(*inputs)

    it.fields._call = call
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    it.trainer.byg_objective.step(it.fields, one_batch(A14B), backward)
    assert {high for high, grad in seen if not grad} == {True, False} and {high for high, grad in seen if grad} == {False}
    assert [grad for _, grad in seen] == sorted(grad for _, grad in seen)


def test_the_wrong_order_of_experts_changes_the_gradient(tmp_path: Path):
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True})
    it.wake()
    noisy, t, text = latents(A14B, 1, 1), torch.tensor([0.3]), texts(A14B, 1, 3)

    def gradient(wrong: bool) -> Tensor:
        it.network.zero_grad()
        with it.fields.edit() as velocity:
            loss = velocity(noisy, t, text, noisy).square().mean()
            if wrong:
                it.fields._experts.exchange()
            loss.backward()
            if wrong:
                it.fields._experts.exchange()
        return torch.cat([p.grad.flatten() for p in it.network.parameters()])

    right = gradient(False)
    assert (gradient(True) - right).norm() > 0.1 * right.norm()


def one_step(it: Rig, family: str) -> Tensor:
    """The gradients of one step, in one vector."""
    it.network.zero_grad()
    backward = lambda loss, last: it.trainer._backward(it.accelerator, loss, last=last)  # noqa: E731
    it.trainer.byg_objective.step(it.fields, one_batch(family), backward)
    return torch.cat([p.grad.flatten() for p in it.network.parameters()])


@pytest.mark.parametrize("family", [T2V, A14B, *MASKED])
def test_swapped_blocks_are_on_the_device_when_they_compute(tmp_path: Path, family: str):
    """The host's own offloader decides what moves; its moves are recorded as tags, since a CPU has nowhere to move to."""
    from musubi_tuner.modules import custom_offloading_utils as utils

    it = Rig(tmp_path, family)
    it.wake()
    expected = one_step(it, family)
    blocks = getattr(it.transformer, IMAGES[family].blocks if family in IMAGES else "blocks")
    swapped = len(blocks) // 2
    away: set[int] = set()

    class Tagged(utils.ModelOffloader):
        def _submit_move_blocks(self, every: Any, to_cpu: int, to_cuda: int) -> None:
            away.add(to_cpu)
            away.discard(to_cuda)

        def _wait_blocks_move(self, index: int) -> None:
            return None

        def prepare_block_devices_before_forward(self, every: Any) -> None:
            away.clear()
            away.update(range(self.num_blocks - self.blocks_to_swap, self.num_blocks))

    transformer = it.transformer
    transformer.blocks_to_swap = swapped
    transformer.offloader = Tagged("tiny", blocks, len(blocks), swapped, True, torch.device("cpu"))
    transformer.prepare_block_swap_before_forward()
    computed: list[int] = []
    for index, block in enumerate(blocks):

        def check(module: Any, inputs: Any, index: int = index) -> None:
            assert index not in away, f"block {index} computes and is not on the device"
            computed.append(index)

        block.register_forward_pre_hook(check)
    with pytest.raises(AssertionError, match="not on the device"):  # without our switches it must fail
        one_step(it, family)
    transformer.prepare_block_swap_before_forward()
    it.fields.swap = BlockSwap(transformer)
    computed.clear()
    for _ in range(2):
        assert torch.equal(one_step(it, family), expected)
    assert len(computed) == 2 * len(blocks) * (4 + 2 + 3), "rollout, frozen passes two at once, passes with gradient"


def stream_blocks(it: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The host's h2d-only offloader with a CPU's memory in the device's place; the ring and the masters are its own. -> loaded blocks."""
    from musubi_tuner.modules import custom_offloading_utils as utils

    if not hasattr(utils, "LoRAStreamOffloader"):
        pytest.skip("this musubi-tuner has no block_swap_h2d_only")
    loaded: list[int] = []

    class Copier:
        def __init__(self, *_: Any, **__: Any):
            self.reset = self.sync = lambda: None

        def submit(self, key: int, target: Tensor, source: Tensor, gate: Any = None) -> None:
            target.copy_(source)
            loaded.append(key)

        def wait(self, key: int) -> None:
            return None

    monkeypatch.setattr(utils, "_StagedCopier", Copier)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"record_event": lambda self: None})())
    device: Any = type("Device", (), {"type": "cuda"})()
    blocks = it.transformer.blocks
    offloader = utils.LoRAStreamOffloader("tiny", blocks, len(blocks), 3, True, device, use_pinned_memory=False)
    offloader.device = torch.device("cpu")
    it.transformer.blocks_to_swap, it.transformer.offloader = 3, offloader
    it.transformer.prepare_block_swap_before_forward()
    it.fields.swap = BlockSwap(it.transformer)
    return loaded


def test_streamed_blocks_have_their_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of four blocks pass through a ring of two: a block that computes with another one's weights changes the gradient."""
    it = Rig(tmp_path, T2V, musubi={"gradient_checkpointing": True})
    it.wake()
    expected = one_step(it, T2V)
    loaded = stream_blocks(it, monkeypatch)
    for _ in range(2):
        loaded.clear()
        assert torch.equal(one_step(it, T2V), expected) and len(set(loaded)) >= 2


def test_streamed_blocks_and_experts_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails once the host's ring follows an exchange of the experts: then allow musubi.block_swap_h2d_only for Wan2.2."""
    it = Rig(tmp_path, A14B, musubi={"gradient_checkpointing": True})
    it.wake()
    expected = one_step(it, A14B)
    stream_blocks(it, monkeypatch)
    assert (one_step(it, A14B) - expected).norm() > 0.01 * expected.norm()
