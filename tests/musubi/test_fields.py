"""The three fields, without the host: a toy that patches `forward`, swaps blocks and exchanges experts as the host does.

The blocks' places are tags: a block that computes while its tag says that it is elsewhere is an error, which on a GPU would be
a crash or a slow path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from byg_plugin.hosts.ema import EmaWeights
from byg_plugin.musubi.fields import BlockSwap, MusubiFields
from byg_plugin.objectives.base import Text
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from tests.support.toy_fields import toy_batch

BLOCKS, BOUNDARY = 6, 0.5


class ToyLora(nn.Module):
    """Takes the place of a linear's `forward`, as the host's modules do."""

    def __init__(self, linear: nn.Linear, rng: torch.Generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=rng, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=rng, dtype=torch.float64) * 0.3)
        self.org_forward = linear.forward
        self.dropped = 0
        linear.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.dropped += self.training
        return self.org_forward(x) + x @ self.down.T.to(x.dtype) @ self.up.T.to(x.dtype)  # the EMA is float32


class ToyBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)
        self.here = True

    def forward(self, x: Tensor) -> Tensor:
        assert self.here, "a block computes that is not on the device"
        return x + torch.tanh(self.linear(x) + x.mean(1, keepdim=True))


class ToyTransformer(nn.Module):
    """Blocks with the host's ModelOffloader as tags: `swapped` of them are always elsewhere."""

    def __init__(self, width: int, swapped: int = 0, recompute: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(BLOCKS))
        self.swapped, self.recompute, self.forward_only = swapped, recompute, False
        self.switches = 0
        self.moving = False
        """Transfers run beside the computation; a switch of modes waits for them."""
        for index, block in enumerate(self.blocks):
            block.register_full_backward_hook(self._after_backward(index))
        self._start()

    def _start(self) -> None:
        self.moving = False
        for index, block in enumerate(self.blocks):
            block.here = index < BLOCKS - self.swapped  # type: ignore[assignment]

    def _exchange(self, away: int, back: int) -> None:
        self.moving = True
        self.blocks[away].here, self.blocks[back].here = False, True  # type: ignore[assignment]

    def _after_backward(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            behind = BLOCKS - index - 1
            if 0 < behind <= self.swapped:
                self._exchange(BLOCKS - behind, self.swapped - behind)

        return hook

    def switch_block_swap_for_inference(self) -> None:
        print("the host says so each time")
        self.forward_only = True
        self.switches += 1
        self._start()

    def switch_block_swap_for_training(self) -> None:
        print("the host says so each time")
        self.forward_only = False
        self.switches += 1
        self._start()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(x)
            if self.forward_only:
                self._exchange(index, (BLOCKS - self.swapped + index) % BLOCKS) if self.swapped else None
            elif index < self.swapped:
                self._exchange(index, BLOCKS - self.swapped + index)
        return x


class ToyExperts:
    """Two sets of weights in one module, exchanged by pointer as the host does it."""

    def __init__(self, transformer: ToyTransformer):
        self.boundary = BOUNDARY
        self.high = False
        self.log: list[bool] = []
        self._transformer = transformer
        rng = torch.Generator().manual_seed(9)
        self._away = {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) * 0.3 for name, p in transformer.named_parameters()}

    def exchange(self) -> None:
        flags = [block.here for block in self._transformer.blocks]
        assert flags == sorted(flags, reverse=True), "the other expert's blocks were put away as a forward pass starts"
        assert not self._transformer.moving, "a transfer of this expert's blocks would write into the other's"
        parked = {name: value.clone() for name, value in self._transformer.state_dict().items()}
        self._transformer.load_state_dict(self._away, assign=True)
        self._transformer.requires_grad_(False)
        self._away = parked
        self.high = not self.high
        self.log.append(self.high)


class Toy:
    """Fields over the toy, with a LoRA and an EMA that are awake."""

    def __init__(self, *, swapped: int = 0, experts: bool = False, recompute: bool = False, decay: float = 0.9):
        torch.manual_seed(3)
        self.channels = toy_batch().source.shape[1]
        self.transformer = ToyTransformer(self.channels, swapped, recompute).requires_grad_(False)
        rng = torch.Generator().manual_seed(4)
        self.network = nn.ModuleList(ToyLora(block.linear, rng) for block in self.transformer.blocks)
        self.ema = EmaWeights(dict(self.network.named_parameters()), decay)
        if decay:
            self.ema.load({name: torch.randn(p.shape, generator=rng, dtype=p.dtype) for name, p in self.ema.state().items()})
        self.experts = ToyExperts(self.transformer) if experts else None
        swap = BlockSwap(self.transformer) if swapped else None
        self.fields = MusubiFields(self.network, self.ema, self.call, experts=self.experts, swap=swap)
        self.seen: list[tuple[bool | None, bool]] = []

    def call(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        if self.experts is not None:
            assert bool((t >= BOUNDARY).all()) == self.experts.high and bool((t >= BOUNDARY).any()) == self.experts.high
        self.seen.append((None if self.experts is None else self.experts.high, torch.is_grad_enabled()))
        x = noisy.flatten(2).transpose(1, 2)
        x = x + t[:, None, None] + sum(value.flatten(1).mean(1)[:, None, None] for value in text.values())
        if source is not None:
            x = torch.cat([x, source.flatten(2).transpose(1, 2)], dim=1)
        out = self.transformer(x)[:, : noisy[0, 0].numel()]
        return out.transpose(1, 2).reshape(noisy.shape)

    def backward(self, loss: Tensor, *, last: bool) -> float:
        loss.backward()
        self.fields.backward_done()
        return 1.0

    def step(self, t: tuple[float, ...] = (0.13, 0.31, 0.42), **objective: Any) -> dict[str, Tensor]:
        """One step of the objective; returns the gradients."""
        UnpairedCycle(UnpairedCycleConfig(**objective)).step(self.fields, toy_batch(t), self.backward)
        return {name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None}


def test_base_is_the_bare_model_bit_for_bit():
    toy, batch = Toy(), toy_batch()
    with toy.fields.base() as velocity:
        found = velocity(batch.source, batch.t, batch.instruction, None)
    # The same memory: kernels may round equal numbers differently where they lie differently.
    adapted = [block.linear.__dict__.pop("forward") for block in toy.transformer.blocks]
    with torch.no_grad():
        expected = toy.call(batch.source, batch.t, batch.instruction, None)
    for block, forward in zip(toy.transformer.blocks, adapted, strict=True):
        block.linear.forward = forward
    with toy.fields.live() as velocity:
        live = velocity(batch.source, batch.t, batch.instruction, None)
    assert torch.equal(found, expected) and not torch.equal(live, expected)
    with pytest.raises(AssertionError, match="no source tokens"), toy.fields.base() as velocity:
        velocity(batch.source, batch.t, batch.instruction, batch.source)


def test_a_base_that_keeps_the_lora_is_noticed():
    toy, batch = Toy(), toy_batch()
    before = [p.detach().clone() for p in toy.network.parameters()]
    toy.fields.prove_base(batch.source, batch.t, batch.instruction)
    every, toy.fields._adapted = toy.fields._adapted, toy.fields._adapted[1:]  # as if one block had been compiled with its LoRA
    with pytest.raises(ValueError, match="the frozen base changes with the LoRA"):
        toy.fields.prove_base(batch.source, batch.t, batch.instruction)
    toy.fields._adapted = every
    for module, own in every:  # as if all had been compiled without it
        module.forward = own  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the LoRA changes nothing"):
        toy.fields.prove_base(batch.source, batch.t, batch.instruction)
    assert all(torch.equal(p, kept) for p, kept in zip(toy.network.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["edit", "ema", "base", "live"])
def test_every_field_restores_what_it_found_after_an_exception(name: str):
    toy = Toy()
    batch = toy_batch()
    live = [p.data_ptr() for p in toy.network.parameters()]
    forwards = [block.linear.forward for block in toy.transformer.blocks]
    with toy.fields.live() as velocity:
        before = velocity(batch.source, batch.t, batch.instruction, None)
    with pytest.raises(RuntimeError, match="in the middle"), getattr(toy.fields, name)():
        raise RuntimeError("in the middle")
    assert [p.data_ptr() for p in toy.network.parameters()] == live
    assert [block.linear.forward for block in toy.transformer.blocks] == forwards
    assert toy.network.training and torch.is_grad_enabled()
    with toy.fields.live() as velocity:
        assert torch.equal(velocity(batch.source, batch.t, batch.instruction, None), before)


def test_dropout_is_active_where_gradients_are():
    toy, batch = Toy(), toy_batch()
    for field, grad, active in (("edit", True, True), ("edit", False, False), ("ema", True, False), ("live", True, False)):
        toy.network[0].dropped = 0
        with torch.set_grad_enabled(grad), getattr(toy.fields, field)() as velocity:
            velocity(batch.source, batch.t, batch.instruction, None)
        assert bool(toy.network[0].dropped) is active


def test_the_fields_differ_and_carry_gradient_to_the_source():
    toy, batch = Toy(), toy_batch()
    source = batch.source.clone().requires_grad_()
    with toy.fields.edit() as velocity:
        edit = velocity(batch.noise, batch.t, batch.instruction, source)
        edit.square().mean().backward()
    with toy.fields.ema() as velocity:
        ema = velocity(batch.noise, batch.t, batch.instruction, batch.source)
    assert not torch.allclose(edit, ema) and source.grad is not None and source.grad.norm() > 0
    assert not ema.requires_grad


def test_a_network_that_cannot_be_taken_off_is_refused():
    with pytest.raises(ValueError, match="cannot be taken off"):
        MusubiFields(nn.Linear(2, 2), EmaWeights({}, 0.0), lambda *_: torch.zeros(1))


# --- block swap ---


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("swapped", [2, 4])
@pytest.mark.parametrize("objective", [{}, {"merge_identity": True}, {"routing": False}, {"frozen_batch": 4}, {"bootstrap": False}])
def test_blocks_are_there_over_whole_steps(swapped: int, recompute: bool, objective: dict[str, Any]):
    toy, plain = Toy(swapped=swapped, recompute=recompute), Toy(recompute=recompute)
    for _ in range(2):
        found, expected = toy.step(**objective), plain.step(**objective)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert toy.transformer.switches >= 2


def test_the_toy_sees_blocks_in_the_wrong_place():
    """Without the switches the emulation must fail, or the test above shows nothing."""
    toy = Toy(swapped=2)
    toy.fields.swap = None
    with pytest.raises(AssertionError, match="not on the device"):
        toy.step()


def test_two_forward_passes_before_a_backward_pass_are_an_error(capsys: pytest.CaptureFixture[str]):
    toy, batch = Toy(swapped=2), toy_batch()
    with pytest.raises(AssertionError, match="before the last one's backward pass"), toy.fields.edit() as velocity:
        velocity(batch.source, batch.t, batch.instruction, None)
        velocity(batch.source, batch.t, batch.instruction, None)
    assert "each time" not in capsys.readouterr().out


def test_after_the_hosts_own_previews_the_mode_is_not_believed():
    toy = Toy(swapped=2)
    toy.step()
    with toy.fields.ema() as velocity:
        velocity(toy_batch().source, toy_batch().t, toy_batch().instruction, None)
    toy.transformer.switch_block_swap_for_training()  # the host, after its previews
    toy.fields.swap.forget()
    toy.step()


# --- experts ---


@pytest.mark.parametrize("swapped", [0, 2])
@pytest.mark.parametrize("t", [(0.1, 0.3, 0.4), (0.6, 0.7, 0.9)])
def test_each_pass_has_its_expert_and_no_graph_outlives_an_exchange(t: tuple[float, ...], swapped: int):
    toy = Toy(experts=True, recompute=True, swapped=swapped)
    found = toy.step(t)
    with_gradient = [high for high, grad in toy.seen if grad]
    assert len(with_gradient) == 3 and set(with_gradient) == {t[0] >= BOUNDARY}
    assert {high for high, grad in toy.seen if not grad} == {True, False}, "a rollout passes through both"
    first = next(index for index, (_, grad) in enumerate(toy.seen) if grad)
    assert all(grad for _, grad in toy.seen[first:]), "all work without gradient comes first"
    other = Toy(experts=True, recompute=False)
    expected = other.step(t)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in found)


def test_the_wrong_order_of_experts_is_seen():
    """Recomputing with the other expert's weights must change the gradient, or the test above shows nothing."""
    toy, batch = Toy(experts=True, recompute=True), toy_batch((0.1, 0.3, 0.4))

    def gradient(exchanged: bool) -> Tensor:
        toy.network.zero_grad()
        with toy.fields.edit() as velocity:
            loss = velocity(batch.source, batch.t, batch.instruction, None).square().mean()
            if exchanged:
                toy.experts.exchange()
            loss.backward()
            if exchanged:
                toy.experts.exchange()
        return torch.cat([p.grad.flatten() for p in toy.network.parameters()])

    right, wrong = gradient(False), gradient(True)
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_an_exchange_under_a_graph_is_an_error():
    toy, batch = Toy(experts=True), toy_batch((0.1, 0.3, 0.4))
    with pytest.raises(AssertionError, match="backward pass is still to come"), toy.fields.edit() as velocity:
        velocity(batch.source, batch.t, batch.instruction, None)
        velocity(batch.source, batch.t + 0.55, batch.instruction, None)
    with toy.fields.edit() as velocity:  # a new step may begin on the other side
        velocity(batch.source, batch.t + 0.55, batch.instruction, None)


def test_a_batch_on_both_sides_is_split():
    toy = Toy(experts=True)
    batch = toy_batch((0.1, 0.7, 0.4))
    with toy.fields.live() as velocity:
        both = velocity(batch.source, batch.t, batch.instruction, batch.noise)
        alone = [
            velocity(
                batch.source[i : i + 1], batch.t[i : i + 1], {n: v[i : i + 1] for n, v in batch.instruction.items()}, batch.noise[i : i + 1]
            )
            for i in range(3)
        ]
    assert torch.allclose(both.double(), torch.cat(alone).double(), atol=1e-6)
