"""Adaptive neurons against a loop over the paper's equations, in float64, with ordinary autograd."""

import pytest
import torch

from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.registry import make_estimator
from sg_lightning.backbones import ConvNet, SpikingMLP
from sg_lightning.neurons import ALIF, LIF
from sg_lightning.neurons.surrogates import Atan, Triangular


def currents(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.4


def triangle(v):
    """Have the derivative max(0, 1 - |v|)."""
    w = v.clamp(-1, 1)
    return w - w * w.abs() / 2


def paper(x, beta, rest, decay, strength, dampening, detach, weight=None):
    """V, B and b of Bellec et al. 2018, equations 1 to 4, with time steps of 1 and currents scaled by 1 / (1 - beta)."""
    v = b = z = torch.zeros_like(x[0])
    threshold, spikes, thresholds = rest + 0 * v, [], []
    for current in x:
        if weight is not None:
            current = current + z @ weight.T
        v = beta * v + current - threshold * (z.detach() if detach else z)
        b = decay * b + (1 - decay) * z
        threshold = rest + strength * b
        scaled = (v - threshold) / threshold
        smooth = dampening * triangle(scaled)
        z = smooth + ((scaled > 0).double() - smooth).detach()
        spikes.append(z)
        thresholds.append(threshold)
    return torch.stack(spikes), torch.stack(thresholds)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
def test_spikes_and_gradients_are_those_of_the_equations(detach, feedback):
    torch.manual_seed(0)
    x = currents(30, 3, 5).requires_grad_()
    layer = ALIF(
        0.8, 0.7, decay=0.9, strength=1.3, dampening=0.3, detach_reset=detach, learn_beta=True, learn_threshold=True,
        features=5 if feedback else None,
    ).double()  # fmt: skip
    beta, rest = (p.detach().clone().requires_grad_() for p in (layer.beta, layer.threshold))
    weight = layer.recurrent.weight.detach().clone().requires_grad_() if feedback else None
    mine = layer(x)
    wanted, thresholds = paper(x, beta, rest, 0.9, 1.3, 0.3, detach, weight)
    assert torch.equal(mine, wanted)
    assert 0.1 < mine.mean() < 0.9
    assert thresholds.max() > 1.0  # they adapt
    out = torch.randn(mine.shape, dtype=torch.float64)
    names = [x, layer.beta, layer.threshold, *([layer.recurrent.weight] if feedback else [])]
    got = torch.autograd.grad((mine * out).sum(), names)
    expected = torch.autograd.grad((wanted * out).sum(), [x, beta, rest, *([weight] if feedback else [])])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().sum() > 0


def test_without_strength_it_is_a_lif_that_subtracts_late():
    x = currents(20, 2, 4)
    assert torch.equal(ALIF(0.9, 0.8, strength=0.0)(x), LIF(0.9, 0.8, "subtract", reset_delay=True)(x))


def test_constant_drive_fires_less_and_less():
    spikes = ALIF(0.9, 1.0, decay=0.99, strength=5.0)(torch.full((400, 1, 1), 0.6))
    first, last = spikes[:50].sum(), spikes[-50:].sum()
    assert 0 < last < 0.7 * first


def test_dtypes_channels_and_clones():
    layer = ALIF(torch.tensor([0.5, 0.9]), 1.0)
    out = layer(torch.rand(4, 3, 2, 5, 5).bfloat16())
    assert out.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="beta has 2 values"):
        layer(torch.rand(4, 3, 3))
    copy = layer.clone()
    copy.beta.fill_(0.1)
    assert layer.beta.tolist() == pytest.approx([0.5, 0.9])
    assert ALIF(**ALIF(0.7, decay=0.8, dampening=0.5).settings).settings == ALIF(0.7, decay=0.8, dampening=0.5).settings
    assert "strength=1.8" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, r"decay must be a number in \[0, 1\], got 1.5"),
        ({"strength": -1.0}, "strength must be .*at least 0, got -1"),
        ({"dampening": 0.0}, r"dampening must be .*above 0, got 0"),
        ({"features": 0}, "features must be a whole number above 0 or None, got 0"),
        ({"decay": [0.9, 0.8]}, "decay must be a number"),
        ({"surrogate": "steep"}, "steep"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ALIF(**arguments)


def test_inputs_must_fit_the_feedback():
    with pytest.raises(ValueError, match="ALIF has 4 neurons but the input"):
        ALIF(features=4)(torch.rand(3, 2, 5))
    with pytest.raises(ValueError, match=r"\(T, B, N\)"):
        ALIF(features=4)(torch.rand(3, 2, 4, 4))


def test_attacks_swap_the_surrogate_and_give_slopes():
    x = currents(12, 2, 4).requires_grad_()
    layer = ALIF(0.9, 0.8, features=4).double()
    own = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.attack_rule = Triangular(1.0)  # the same, without the dampening
    undamped = torch.autograd.grad(layer(x).sum(), x)[0]
    twin = ALIF(0.9, 0.8, features=4, dampening=1.0).double()
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(undamped, torch.autograd.grad(twin(x).sum(), x)[0])
    assert not torch.allclose(own, undamped)
    for name in ("assg", "pdsg"):
        estimator = make_estimator(name)
        assert estimator.refusal(layer) is None
        with estimator.applied(layer, Memory()):
            spikes = layer(x)
            grad = torch.autograd.grad(spikes.sum(), x)[0]
        assert torch.equal(spikes, twin(x))
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() > 0
    assert "can only follow new slopes" in make_estimator("bptr").refusal(layer)


@pytest.mark.parametrize("recurrent", [False, True])
def test_networks_copy_it(recurrent):
    net = SpikingMLP(6, (8, 7), 3, time_steps=9, recurrent=recurrent, neuron=ALIF(0.9, surrogate=Atan(2.0), decay=0.95))
    neurons = [m for m in net.modules() if isinstance(m, ALIF)]
    assert [n.features for n in neurons] == ([8, 7] if recurrent else [None, None])
    assert all((n.decay, n.surrogate) == (pytest.approx(0.95), Atan(2.0)) for n in neurons)
    x = (torch.rand(5, 9, 6) < 0.3).float().requires_grad_()
    net(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert ConvNet(3, 1, 8, time_steps=2, channels=(4,), hidden=4, neuron=ALIF())(torch.rand(2, 1, 8, 8)).shape == (
        2,
        3,
    )
    with pytest.raises(ValueError, match="neuron has features"):
        SpikingMLP(6, (8,), 3, neuron=ALIF(features=8))
