"""Signs and end points of the path, pinned by autograd; the cosine's definition and its undefined case."""

from __future__ import annotations

import pytest
import torch

from byg_plugin import flow
from tests.support.toy_fields import numbers

SHAPE = (4, 3, 1, 2, 5)


@pytest.fixture
def x() -> torch.Tensor:
    return numbers(*SHAPE, seed="x")


@pytest.fixture
def noise() -> torch.Tensor:
    return numbers(*SHAPE, seed="noise")


T = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)


def test_the_path_starts_at_the_data_and_ends_at_the_noise(x, noise):
    assert not torch.equal(x, noise)
    assert torch.equal(flow.interpolate(x, noise, torch.zeros(4)), x)
    assert torch.equal(flow.interpolate(x, noise, torch.ones(4)), noise)


def test_interpolate_takes_each_samples_own_t(x, noise):
    x_t = flow.interpolate(x, noise, T)
    for i, t in enumerate(T.tolist()):
        torch.testing.assert_close(x_t[i], (1 - t) * x[i] + t * noise[i], rtol=1e-14, atol=1e-14)


def test_the_velocity_is_the_derivative_of_the_path_in_t(x, noise):
    one = torch.ones(4, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: flow.interpolate(x, noise, t), (T,), (one,))
    torch.testing.assert_close(flow.path_velocity(x, noise), derivative, rtol=1e-14, atol=1e-14)


def test_one_step_with_the_true_velocity_predicts_the_data(x, noise):
    x_t = flow.interpolate(x, noise, T)
    torch.testing.assert_close(flow.predict_data(x_t, flow.path_velocity(x, noise), T), x, rtol=1e-12, atol=1e-12)


def test_predict_data_falls_with_v_by_t(x, noise):
    v = noise.clone().requires_grad_()
    flow.predict_data(x, v, T).sum().backward()
    torch.testing.assert_close(v.grad, -T.view(-1, 1, 1, 1, 1).expand(SHAPE), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_integrating_the_velocity_from_noise_lands_on_the_data(x, noise, steps):
    nodes = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    y = noise
    for s, s_next in zip(nodes[:-1], nodes[1:], strict=True):
        y = flow.euler_step(y, flow.path_velocity(x, noise), s.expand(4), s_next.expand(4))
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


def test_euler_step_moves_each_sample_by_its_own_interval(x, noise):
    s, s_next = torch.tensor([1.0, 0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.9, 0.4, 0.0]).double()
    y = flow.euler_step(x, noise, s, s_next)
    for i in range(4):
        torch.testing.assert_close(y[i], x[i] + (s_next[i] - s[i]) * noise[i], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.full((3,), 0.5), torch.full((4, 1), 0.5)])
def test_t_without_one_value_a_sample_is_refused(x, noise, t):
    with pytest.raises(ValueError, match="one value a sample"):
        flow.interpolate(x, noise, t)


def test_mean_squared_is_a_mean_over_the_elements_of_each_sample(x):
    expected = torch.tensor([(x[i] ** 2).sum().item() / x[i].numel() for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(flow.mean_squared(x), expected)
    assert flow.mean_squared(torch.full(SHAPE, 3.0)).tolist() == [9.0] * 4


# --- cosine ---


def test_cosine_is_taken_per_sample_over_the_whole_latent():
    a = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]]]).double()
    b = torch.tensor([[[5.0, 0.0]], [[-4.0, 0.0]], [[7.0, 0.0]], [[1.0, 0.0]]]).double()
    value, defined = flow.cosine(a, b)
    torch.testing.assert_close(value, torch.tensor([1.0, -1.0, 0.0, 0.5**0.5]).double())
    assert defined.all()


def test_cosine_does_not_depend_on_length(x, noise):
    expected, _ = flow.cosine(x, noise)
    for factor in (1e-9, 1e9):
        torch.testing.assert_close(flow.cosine(factor * x, noise)[0], expected, rtol=1e-12, atol=0)


def test_the_gradient_of_the_cosine_points_towards_the_direction_and_not_along_the_length(x, noise):
    a = x.clone().requires_grad_()
    flow.cosine(a, noise)[0].sum().backward()
    step = 1e-3 * a.grad
    assert (flow.cosine(x + step, noise)[0] > flow.cosine(x, noise)[0]).all()
    along = (a.grad * x).flatten(1).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["first", "second", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_direction_has_no_cosine_no_gradient_and_no_nan(x, noise, which, dtype):
    a, b = x.to(dtype), noise.to(dtype)
    for tensor, names in ((a, ("first", "both")), (b, ("second", "both"))):
        if which in names:
            tensor[1] = 0
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value, defined = flow.cosine(a, b)
    assert defined.tolist() == [True, False, True, True]
    assert value[1] == 0
    (1 - value).sum().backward()
    for grad in (a.grad, b.grad):
        assert grad.isfinite().all()
        assert not grad[1].any()
        assert all(grad[i].any() for i in (0, 2, 3))
