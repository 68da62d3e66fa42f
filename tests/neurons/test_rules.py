"""The machinery that replaces backward passes: a rule that says what a surrogate says is that surrogate."""

import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

from sg_lightning.neurons import LIF, BackwardRule, RecurrentLIF, SlopeRule, from_snntorch, fuse_snntorch
from sg_lightning.neurons.surrogates import Atan, Triangular

STEPS = 5


class Follow(SlopeRule):
    """The slopes of a surrogate, step by step; it notes what it was asked."""

    def __init__(self, surrogate):
        self.surrogate, self.asked = surrogate, []

    def slope(self, neuron, z, past):
        self.asked.append((neuron, z, list(past)))
        return self.surrogate.derivative(z)


class Twice(BackwardRule):
    """Hand back twice what comes; it keeps the traces."""

    def __init__(self):
        self.traces = []

    def pullback(self, trace):
        self.traces.append(trace)
        return lambda grad: 2 * grad


def layouts(dtype):
    """Currents (T, B, C, H, W): dense, channels last, and one that is the same at all steps, stride 0."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(STEPS, 2, 3, 4, 2, generator=generator, dtype=torch.float64).mul(1.5).to(dtype)
    last = dense.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return {"dense": dense, "channels last": last, "expanded": dense[0].expand_as(dense)}


def gradient(neuron, x, weights, *, membrane=False):
    x = x.detach().requires_grad_()  # keeps the strides
    spikes, *rest = neuron.forward_membrane(x) if membrane else (neuron(x),)
    total = (spikes * weights).sum() + sum((u * weights.sin()).sum() for u in rest)
    return spikes.detach(), torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.8, (0.9, 0.5, 1.0)], ids=["scalar", "vector"])
def test_slopes_of_a_surrogate_are_that_surrogate(options, dtype, beta):
    beta = torch.tensor(beta, dtype=dtype)
    theta = torch.tensor(0.7, dtype=dtype) if beta.dim() == 0 else torch.tensor([1.0, 0.6, 0.8], dtype=dtype)
    rounding = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for backend in ("fused", "reference"):
        plain = LIF(beta, theta, **options, surrogate=Atan(3.0), backend=backend)
        ruled = LIF(beta, theta, **options, surrogate=Triangular(0.2), backend=backend)
        ruled.attack_rule = Follow(Atan(3.0))
        for x in layouts(dtype).values():
            weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view(x.shape)
            for membrane in (False, True):
                spikes, expected = gradient(plain, x, weights, membrane=membrane)
                same, got = gradient(ruled, x, weights, membrane=membrane)
                assert 0 < spikes.mean() < 1
                assert torch.equal(spikes, same)
                torch.testing.assert_close(got, expected, **rounding)


def test_the_tests_of_slopes_can_fail(options):
    plain, ruled = LIF(0.8, 0.7, **options, surrogate=Atan(3.0)), LIF(0.8, 0.7, **options, surrogate=Atan(3.0))
    ruled.attack_rule = Follow(Atan(2.9))
    x = layouts(torch.float64)["dense"]
    assert not torch.allclose(gradient(plain, x, x)[1], gradient(ruled, x, x)[1], rtol=1e-3)


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_recurrent_neuron_follows_slopes(reset):
    plain = RecurrentLIF(6, 0.8, 0.5, reset, surrogate=Atan(3.0)).double()
    ruled = RecurrentLIF(6, 0.8, 0.5, reset, surrogate=Triangular(0.2)).double()
    ruled.load_state_dict(plain.state_dict())
    rule = ruled.attack_rule = Follow(Atan(3.0))
    x = torch.randn(STEPS, 3, 6, dtype=torch.float64)
    spikes, expected = gradient(plain, x, x.cos())
    same, got = gradient(ruled, x, x.cos())
    assert torch.equal(spikes, same)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert [len(past) for _, _, past in rule.asked] == list(range(STEPS))


def leaky_net(spike_grad):
    torch.manual_seed(1)
    common = {"spike_grad": spike_grad, "init_hidden": True}
    return nn.Sequential(
        nn.Linear(5, 8),
        snn.Leaky(beta=0.8, threshold=0.5, **common),
        nn.Linear(8, 8),
        snn.Leaky(beta=0.9, threshold=0.3, reset_mechanism="zero", reset_delay=False, **common),
        nn.Linear(8, 3),
        snn.Leaky(beta=0.9, threshold=0.3, reset_mechanism="none", output=True, **common),
    )


def test_bridged_net_follows_slopes():
    built = from_snntorch(leaky_net(surrogate.atan(3.0)), time_steps=STEPS)
    ruled = from_snntorch(leaky_net(surrogate.sigmoid(4)), time_steps=STEPS)
    rule = ruled.attack_rule = Follow(Atan(3.0))
    x = torch.rand(4, 5)
    logits, expected = gradient(built, x, torch.tensor([1.0, -2.0, 0.5]))
    same, got = gradient(ruled, x, torch.tensor([1.0, -2.0, 0.5]))
    assert torch.equal(logits, same)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert sorted(len(past) for _, _, past in rule.asked) == sorted([*range(STEPS)] * 3)


def test_membrane_readout_of_a_fused_net_follows_slopes():
    net = leaky_net(surrogate.atan(3.0))
    built, ruled = (fuse_snntorch(net, time_steps=STEPS, readout="last_membrane") for _ in range(2))
    for layer in ruled.layers:
        if isinstance(layer, LIF):
            layer.surrogate, layer.attack_rule = Triangular(0.2), Follow(Atan(3.0))
    x = torch.rand(4, 5)
    torch.testing.assert_close(gradient(ruled, x, torch.ones(3)), gradient(built, x, torch.ones(3)))


def test_slopes_see_the_membranes_of_all_steps_so_far():
    neuron = LIF(0.8, 0.7)
    rule = neuron.attack_rule = Follow(Atan())
    x = layouts(torch.float64)["dense"]
    shifted = neuron.forward_membrane(x)[1] - neuron.threshold.double()
    gradient(neuron, x, x)
    assert len(rule.asked) == STEPS
    for t, (layer, z, past) in enumerate(rule.asked):
        assert layer is neuron
        assert torch.equal(z, shifted[t])
        assert len(past) == t
        assert all(torch.equal(old, shifted[k]) for k, old in enumerate(past))


@pytest.mark.parametrize("fire_at_threshold", [False, True])
def test_whole_backward_passes_and_their_traces(fire_at_threshold):
    neuron = LIF(torch.tensor([0.9, 0.5, 1.0]), 0.5, fire_at_threshold=fire_at_threshold)
    rule = neuron.attack_rule = Twice()
    for x in layouts(torch.float32).values():
        x = (x * 2).round() / 2 if x.stride(0) else x  # some membranes lie exactly on the threshold
        spikes, got = gradient(neuron, x, x.cos())
        trace = rule.traces.pop()
        assert torch.equal(got, 2 * x.cos())
        assert trace.neuron is neuron
        assert torch.equal(trace.currents, x)
        assert torch.equal(trace.spikes, spikes)
        assert torch.equal(trace.membranes, neuron.forward_membrane(x)[1])
        assert trace.dynamics == neuron.dynamics
        assert torch.equal(trace.beta.expand(2, 3, 4, 2)[0, :, 0, 0], neuron.beta)


def test_forward_passes_without_gradient_do_not_ask_the_rule():
    neuron, x = LIF(0.8), layouts(torch.float32)["dense"]
    rule = neuron.attack_rule = Follow(Atan())
    with torch.no_grad():
        quiet = neuron(x.requires_grad_())
    assert torch.equal(neuron(x.detach()), quiet)
    assert not rule.asked


def test_learned_parameters_get_no_gradient():
    neuron = LIF(0.8, 0.7, learn_beta=True, learn_threshold=True)
    neuron.attack_rule = Follow(Atan())
    x = layouts(torch.float32)["dense"].requires_grad_()
    grads = torch.autograd.grad(neuron(x).sum(), [x, neuron.beta, neuron.threshold], allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1:] == (None, None)


@pytest.mark.parametrize("rule", [Follow(Atan()), Twice()], ids=["slopes", "whole"])
def test_half_precision_currents(rule):
    neuron = LIF(0.8, 0.7)
    x = layouts(torch.bfloat16)["dense"]
    spikes = neuron(x)
    neuron.attack_rule = rule
    same, got = gradient(neuron, x, torch.ones_like(x))
    assert torch.equal(spikes, same)
    assert got.dtype == torch.bfloat16
    assert torch.isfinite(got).all()


def test_gradients_of_gradients_are_refused():
    neuron, x = LIF(0.8), layouts(torch.float64)["dense"].requires_grad_()
    neuron.attack_rule = Follow(Atan())
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad((neuron(x) * x.sin()).sum(), x, create_graph=True)


def test_nan_stays_in_its_sample():
    neuron, x = LIF(0.8), layouts(torch.float64)["dense"].clone()
    neuron.attack_rule = Follow(Atan())
    clean = gradient(neuron, x, torch.ones_like(x))[1]
    x[2, 1] = torch.nan
    got = gradient(neuron, x, torch.ones_like(x))[1]
    assert torch.equal(got[:, 0], clean[:, 0])
    assert got[:, 1].isnan().any()
