"""LIF against ``snntorch.Leaky``: spikes bit for bit, gradients to rounding, for all options that both have."""

import itertools

import pytest
import snntorch as snn
import torch
from snntorch import surrogate as theirs

from sg_lightning.neurons import LIF, RecurrentLIF
from sg_lightning.neurons.reference import spike
from sg_lightning.neurons.surrogates import Atan, FastSigmoid, Sigmoid, StraightThrough

RULES = {
    "atan": (Atan(2.0), theirs.atan(2.0)),
    "fast_sigmoid": (FastSigmoid(25.0), theirs.fast_sigmoid(25)),
    "sigmoid": (Sigmoid(4.0), theirs.sigmoid(4)),
    "straight_through": (StraightThrough(), theirs.straight_through_estimator()),
}
# Same-step subtraction is another function in snnTorch: test_same_step_subtraction_differs.
RESETS = [
    (r, d) for r, d in itertools.product(("zero", "subtract", "none"), (True, False)) if (r, d) != ("subtract", False)
]
PARAMETERS = [(0.9, 1.0), (torch.tensor([0.9, 0.5, 0.99, 0.0, 1.0]), torch.tensor([1.0, 0.7, 0.3, 1.3, 2.0]))]


def pair(beta, threshold, reset, delay, ours, spike_grad, backend="fused", learn=False):
    neuron = LIF(
        beta, threshold, reset, reset_delay=delay, detach_reset=delay, surrogate=ours,
        learn_beta=learn, learn_threshold=learn, backend=backend,
    )  # fmt: skip
    leaky = snn.Leaky(
        beta=beta, threshold=threshold, reset_mechanism=reset, reset_delay=delay, spike_grad=spike_grad,
        learn_beta=learn, learn_threshold=learn,
    )  # fmt: skip
    return neuron, leaky


def stepped(leaky, x):
    mem, spikes, membranes = torch.zeros_like(x[0]), [], []
    for x_t in x.unbind(0):
        s, mem = leaky(x_t, mem)
        spikes.append(s)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=["scalar", "per-neuron"])
@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_float32_spikes_and_input_gradient(reset, delay, parameters, rule, backend):
    ours, spike_grad = RULES[rule]
    neuron, leaky = pair(*parameters, reset, delay, ours, spike_grad, backend)
    x = (torch.randn(25, 64, 5) * 0.8 + 0.2).requires_grad_()
    s, mem = stepped(leaky, x)
    mine, u = neuron.forward_membrane(x)
    assert 0.05 < s.mean() < 0.6
    assert torch.equal(mine, s)
    if delay or reset == "none":
        assert torch.equal(u, mem)  # what snnTorch calls the membrane, before its reset
    g = torch.randn_like(s)
    (expected,), (got,) = torch.autograd.grad(s, x, g), torch.autograd.grad(mine, x, g)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=["scalar", "per-neuron"])
@pytest.mark.parametrize(("reset", "delay"), RESETS)
def test_float64_beta_and_threshold_gradients(reset, delay, parameters, backend):
    for rule, spike_grad in RULES.values():
        # snnTorch's spikes are float32 whatever its input, which rounds gradients; ours as spike_grad keeps float64.
        for theirs_grad, tolerance in ((spike_grad, 1e-5), (lambda z, r=rule: spike(z, r), 1e-12)):
            neuron, leaky = pair(*parameters, reset, delay, rule, theirs_grad, backend, learn=True)
            neuron, leaky = neuron.double(), leaky.double()
            x = (torch.randn(12, 16, 5, dtype=torch.float64) * 0.8 + 0.2).requires_grad_()
            s, mine = stepped(leaky, x)[0], neuron(x)
            g = torch.randn(s.shape).to(s.dtype)
            assert torch.equal(mine, s.double())
            expected = torch.autograd.grad(s, [x, leaky.beta, leaky.threshold], g)
            got = torch.autograd.grad(mine, [x, neuron.beta, neuron.threshold], g.double())
            for one, two in zip(got, expected, strict=True):
                assert (one - two).abs().max() <= tolerance * two.abs().max()


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_ties_do_not_fire_in_either(reset):
    neuron, leaky = pair(0.5, 1.0, reset, True, Atan(), theirs.atan())
    x = torch.randint(-4, 9, (30, 50, 4)) / 8.0  # multiples of 1/8: sums often equal the threshold exactly
    s, mem = stepped(leaky, x)
    mine, u = neuron.forward_membrane(x)
    assert (u == 1.0).sum() > 20
    assert torch.equal(mine, s)
    assert torch.equal(u, mem)
    firing = LIF(0.5, 1.0, reset, reset_delay=True, fire_at_threshold=True)
    assert (firing(x) != s).any()


@pytest.mark.parametrize("value", [1.4, -0.3])
def test_beta_outside_the_unit_interval_is_clamped_in_both(value):
    neuron, leaky = pair(0.5, 1.0, "subtract", True, Atan(), theirs.atan(), learn=True)
    with torch.no_grad():
        neuron.beta.fill_(value)
        leaky.beta.fill_(value)
    x = torch.rand(10, 8, 3)
    s, mine = stepped(leaky, x)[0], neuron(x)
    assert torch.equal(mine, s)
    for spikes, beta in ((s, leaky.beta), (mine, neuron.beta)):
        assert torch.autograd.grad(spikes.sum(), beta)[0].item() == 0


def test_same_step_subtraction_differs():
    """snnTorch lets a membrane still above threshold after its reset meet twice the threshold; ours does not."""
    neuron, leaky = pair(1.0, 1.0, "subtract", False, Atan(), theirs.atan())
    x = torch.tensor([2.5, 0.0, 0.0]).view(3, 1, 1)
    assert neuron(x).flatten().tolist() == [1, 1, 0]
    assert stepped(leaky, x)[0].flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("reset", ["subtract", "none"])
def test_recurrent_equals_rleaky(reset):
    mine = RecurrentLIF(6, 0.8, 1.0, reset, reset_delay=True, detach_reset=True, surrogate=Atan(2.0), bias=True)
    peer = snn.RLeaky(beta=0.8, linear_features=6, reset_mechanism=reset, spike_grad=theirs.atan(2.0))
    peer.recurrent.load_state_dict(mine.recurrent.state_dict())
    x = (torch.randn(20, 16, 6) + 0.3).requires_grad_()
    spk, mem, spikes = torch.zeros(16, 6), torch.zeros(16, 6), []
    for x_t in x.unbind(0):
        spk, mem = peer(x_t, spk, mem)
        spikes.append(spk)
    expected, got = torch.stack(spikes), mine(x)
    assert 0.05 < expected.mean() < 0.6
    assert torch.equal(got, expected)
    g = torch.randn_like(got)
    want = torch.autograd.grad(expected, [x, peer.recurrent.weight], g)
    have = torch.autograd.grad(got, [x, mine.recurrent.weight], g)
    for one, two in zip(have, want, strict=True):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()
