"""Encodings: what they emit, and whether the gradient they promise is the one they give."""

import copy

import pytest
import torch

from sg_lightning.encoding import Direct, Encoding, Frames, Latency, Poisson


@pytest.mark.parametrize("kind", [Direct, Poisson, Latency, Frames])
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "4"])
def test_time_steps_are_checked(kind, bad):
    with pytest.raises(ValueError, match="time_steps must be an integer >= 1"):
        kind(bad)


@pytest.mark.parametrize("kind", [Direct, Poisson, Latency])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 7), (1, 5, 6)])
def test_time_comes_first(kind, shape):
    encoding = copy.deepcopy(kind(5))
    out = encoding(torch.rand(shape))
    assert isinstance(encoding, Encoding)
    assert out.shape == (5, *shape)
    assert out.dtype == torch.float32
    assert list(encoding.parameters()) == []
    assert "time_steps=5" in repr(encoding)


def test_direct_is_a_view_with_the_summed_gradient():
    x = torch.rand(2, 3, requires_grad=True)
    out = Direct(4)(x)
    assert out.stride(0) == 0
    weights = torch.rand(4, 2, 3)
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights.sum(0))


def test_poisson_rate_extremes_and_reproducibility():
    x = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]])
    steps = 20_000
    spikes = Poisson(steps)(x)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    rate = spikes.mean(0)
    # Six standard errors of a Bernoulli mean; exact at the ends.
    assert ((rate - x).abs() <= 6 * (x * (1 - x) / steps).sqrt()).all()
    # Steps are independent: the chance of two spikes in a row is the square of the rate.
    pairs = (spikes[1:] * spikes[:-1]).mean(0)
    assert ((pairs - x**2).abs() <= 6 * (0.25 / steps) ** 0.5).all()

    torch.manual_seed(3)
    first = Poisson(8)(x)
    second = Poisson(8).eval()(x)
    torch.manual_seed(3)
    assert torch.equal(first, Poisson(8)(x))
    assert not torch.equal(first, second)
    assert Poisson.stochastic
    assert not Direct.stochastic
    assert not Latency.stochastic


def test_poisson_gradient_is_that_of_the_expected_spike():
    x = torch.tensor([[-0.5, 0.0, 0.3, 1.0, 1.5]], requires_grad=True)
    weights = torch.rand(6, 1, 5)
    (Poisson(6)(x) * weights).sum().backward()
    inside = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(x.grad, weights.sum(0) * inside)


def test_latency_by_hand():
    x = torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0, 1.7, -0.2]])
    spikes = Latency(4)(x)[:, 0]
    expected = torch.zeros(4, 7)
    for element, step in enumerate([0, 1, 2, 3, None, 0, None]):
        if step is not None:
            expected[step, element] = 1.0
    assert torch.equal(spikes, expected)


def test_latency_orders_by_brightness():
    x = torch.linspace(0, 1, 257).view(1, -1)
    spikes = Latency(16)(x)[:, 0]
    assert (spikes.sum(0) <= 1).all()
    when = torch.where(spikes.sum(0) == 1, spikes.argmax(0), 16)
    assert (when[1:] <= when[:-1]).all()
    assert set(when.tolist()) == set(range(17))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_latency_gradient_is_the_difference_of_one_step(steps):
    # On the grid k / T one step of brightness is exactly 1 / T, so the promise can be checked by moving the spike.
    encoding, weights = Latency(steps), torch.randn(steps, 1, 1, dtype=torch.float64)

    def loss(value):
        return float((encoding(torch.tensor([[value]], dtype=torch.float64)) * weights).sum())

    for k in range(steps + 1):
        x = torch.tensor([[k / steps]], dtype=torch.float64, requires_grad=True)
        (encoding(x) * weights).sum().backward()
        low, high = max(k - 1, 0) / steps, min(k + 1, steps) / steps
        assert x.grad.item() == pytest.approx((loss(high) - loss(low)) / (high - low), abs=1e-12)
        assert x.grad.item() != 0.0
    outside = torch.tensor([[-0.3, 1.3]], requires_grad=True)
    Latency(steps)(outside).sum().backward()
    assert torch.equal(outside.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [Direct, Poisson, Latency])
def test_nan_stays_visible(kind):
    out = kind(3)(torch.tensor([[float("nan"), 0.5]]))
    assert out[:, 0, 0].isnan().all()
    assert out[:, 0, 1].isfinite().all()


def test_frames_are_a_view_of_the_input():
    x = torch.rand(2, 5, 3, 4, 4)
    out = Frames(5)(x)
    assert out.data_ptr() == x.data_ptr()
    assert all(torch.equal(out[t], x[:, t]) for t in range(5))
    assert torch.equal(Frames()(x), out)
    with pytest.raises(ValueError, match=r"Frames needs inputs of shape \(B, 4, ...\), got \(2, 5, 3, 4, 4\)"):
        Frames(4)(x)
