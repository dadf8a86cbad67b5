"""Muon in float32: what it computes, that it is torch's own but for rounding, and that matrices of one shape do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from byg_plugin.training.muon import Muon, orthogonalized

SHAPES = [(4, 16), (16, 4), (4, 16), (8, 8), (16, 4), (1, 5)]


def matrices(seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) * 10.0 ** (index - 3) for index, shape in enumerate(SHAPES)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in matrices(0)]


def test_singular_values_come_close_to_one_and_the_vectors_stay():
    for shape in ((4, 16), (16, 4), (6, 6)):
        found = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
        u, _, vh = torch.linalg.svd(found, full_matrices=False)
        made = orthogonalized(found)
        assert made.shape == found.shape
        turned = u.mT @ made @ vh.mT
        diagonal = torch.diagonal(turned, dim1=1, dim2=2)
        assert (turned - torch.diag_embed(diagonal)).abs().max() < 1e-4, "the singular vectors are the matrix's own"
        assert (diagonal > 0.6).all() and (diagonal < 1.3).all(), diagonal


def test_its_length_does_not_hang_on_the_gradient_s():
    found = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalized(found), orthogonalized(1e-3 * found), rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalized(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_matrices_of_one_shape_do_not_meet():
    together = matrices(3)
    alone = [nn.Parameter(value.clone()) for value in together]
    many = [nn.Parameter(value.clone()) for value in together]
    for group in ([many], [[p] for p in alone]):
        for members in group:
            optimizer = Muon(members, lr=0.1, weight_decay=0.1)
            for step in range(3):
                for p in members:
                    p.grad = torch.full_like(p, 0.1 * (step + 1)) + p.detach() ** 2
                optimizer.step()
    for a, b in zip(many, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
def test_it_is_torch_s_own_but_for_the_rounding_of_bfloat16():
    ours, theirs = parameters(), parameters()
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(4):
        for found in (ours, theirs):
            for p, grad in zip(found, matrices(10 + step), strict=True):
                p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()
        assert torch.equal(optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"])


def test_what_has_no_gradient_does_not_move():
    moved, left = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([moved, left], lr=0.1, weight_decay=0.5)
    moved.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert torch.equal(left, torch.ones(3, 4)) and left not in optimizer.state
    assert not torch.equal(moved, torch.ones(3, 4))


def test_weight_decay_is_decoupled():
    with_decay, without = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    for p, decay in ((with_decay, 0.5), (without, 0.0)):
        p.grad = torch.eye(3, 4)
        Muon([p], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(without - with_decay, torch.full((3, 4), 0.05))


def test_its_state_goes_through_a_state_dict():
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.eye(3, 4)
    optimizer.step()
    other = Muon([nn.Parameter(torch.ones(3, 4))], lr=0.1, weight_decay=0.0)
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert torch.equal(state["momentum_buffer"], 0.05 * torch.eye(3, 4))
