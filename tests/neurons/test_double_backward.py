"""Gradients of gradients: equal to autograd's through the equations, or refused; never silently wrong."""

import pytest
import torch
from torch import nn

from sg_lightning.neurons import LIF
from sg_lightning.neurons.surrogates import (
    Atan,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Triangular,
)

SMOOTH = [Atan(2.0), FastSigmoid(5.0), Sigmoid(4.0), Gaussian(0.5)]
ROUGH = [Triangular(1.0), Rectangular(1.0), StraightThrough()]


def second_order(run, leaves, g, w, v):
    """Differentiate w . (first-order gradients) with respect to the upstream gradient and all leaves."""
    spikes = run()
    first = torch.autograd.grad(spikes, leaves, g, create_graph=True)
    scalar = (first[0] * w).sum() + sum((f * c).sum() for f, c in zip(first[1:], v, strict=True))
    return torch.autograd.grad(scalar, [g, *leaves], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
def test_equals_autograd_through_the_equations(options, backend, vector, oracle):
    for rule in SMOOTH:
        x = (torch.randn(6, 3, 4, dtype=torch.float64) * 0.8 + 0.3).requires_grad_()
        size = (4,) if vector else ()
        beta = torch.rand(size, dtype=torch.float64) * 0.9
        theta = torch.rand(size, dtype=torch.float64) + 0.5
        neuron = LIF(
            beta, theta, **options, surrogate=rule, learn_beta=True, learn_threshold=True, backend=backend
        ).double()
        g, w = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
        v = [torch.randn_like(beta), torch.randn_like(theta)]
        b, th = beta.clone().requires_grad_(), theta.clone().requires_grad_()
        expected = second_order(lambda: oracle(x, b, th, rule, **options)[0], [x, b, th], g, w, v)  # noqa: B023
        got = second_order(lambda: neuron(x), [x, neuron.beta, neuron.threshold], g, w, v)  # noqa: B023
        for one, two in zip(got, expected, strict=True):
            scale = two.abs().max()
            assert (one - two).abs().max() <= 1e-11 * max(scale, 1e-30)
        assert expected[1].abs().max() > 0


@pytest.mark.parametrize("rule", ROUGH, ids=str)
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rough_surrogates_give_the_upstream_part_and_refuse_the_rest(options, rule, backend, oracle):
    neuron = LIF(0.8, 0.9, **options, surrogate=rule, backend=backend).double()
    x = (torch.randn(5, 2, 3, dtype=torch.float64) * 0.8 + 0.3).requires_grad_()
    g, w = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    (first,) = torch.autograd.grad(neuron(x), x, g, create_graph=True)
    (with_g,) = torch.autograd.grad((first * w).sum(), g, retain_graph=True)
    beta, theta = (p.detach() for p in (neuron.beta, neuron.threshold))
    (linear,) = torch.autograd.grad(oracle(x, beta, theta, rule, **options)[0], x, g, create_graph=True)
    torch.testing.assert_close(with_g, torch.autograd.grad((linear * w).sum(), g)[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match=type(rule).__name__):
        torch.autograd.grad((first * w).sum(), x)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rough_surrogate_refuses_learned_beta_and_threshold_too(backend):
    neuron = LIF(0.8, 0.9, surrogate=Triangular(1.0), learn_beta=True, learn_threshold=True, backend=backend)
    x = torch.rand(4, 2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(neuron(x).sum(), x, create_graph=True)
    for parameter in neuron.parameters():
        with pytest.raises(RuntimeError, match="Triangular"):
            torch.autograd.grad(first.square().sum(), parameter, retain_graph=True)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_third_order_is_refused(backend):
    neuron = LIF(0.8, 0.9, surrogate=Atan(2.0), backend=backend)
    x = torch.rand(3, 2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(neuron(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"third-order.*Atan"):
        torch.autograd.grad(second.sum(), x)


def network(backend, surrogate):
    torch.manual_seed(3)
    layers = [
        nn.Linear(6, 8), LIF(0.8, 0.5, surrogate=surrogate, backend=backend),
        nn.Linear(8, 5), LIF(0.8, 0.5, surrogate=surrogate, backend=backend), nn.Linear(5, 3),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def gradient_penalty(net, x):
    (g,) = torch.autograd.grad(net(x).mean(0)[:, 0].sum(), x, create_graph=True)
    return g.square().sum()


def test_gradient_penalty_of_a_network():
    x = torch.rand(4, 3, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for backend in ("fused", "reference"):
        net = network(backend, Sigmoid(4.0))
        gradient_penalty(net, x).backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-14)
    assert grads[0][0].abs().max() > 0
    with pytest.raises(RuntimeError, match="Triangular"):
        gradient_penalty(network("fused", Triangular(1.0)), x).backward()


def test_first_order_is_the_same_with_and_without_graph():
    net = network("fused", Triangular(1.0))
    x = torch.rand(4, 3, 6, dtype=torch.float64, requires_grad=True)
    plain, kept = (torch.autograd.grad(net(x).sum(), x, create_graph=graph)[0] for graph in (False, True))
    torch.testing.assert_close(plain, kept, rtol=1e-12, atol=1e-14)
