"""The recurrent loop with the closed-form backward pass against the readable loop in plain autograd."""

import pytest
import torch
from torch import nn

from sg_lightning.neurons import RecurrentLIF, use_path
from sg_lightning.neurons.recurrence import serves
from sg_lightning.neurons.surrogates import Atan, Gaussian, Triangular


def layer(options, rule, *, vector, bias, dtype=torch.float64):
    torch.manual_seed(3)
    beta, theta = (torch.rand(6), torch.rand(6) + 0.4) if vector else (0.8, 0.9)
    neuron = RecurrentLIF(
        6, beta, theta, **options, surrogate=rule, learn_beta=True, learn_threshold=True, bias=bias
    ).to(dtype)
    with torch.no_grad():
        neuron.recurrent.weight.mul_(2)
    return neuron


def currents(steps=7, dtype=torch.float64):
    return (torch.randn(steps, 3, 6, dtype=torch.float64) * 0.8 + 0.3).to(dtype)


def both(neuron, x, run):
    found = []
    for path in ("auto", "reference"):
        with use_path(path):
            found.append(run(neuron, x))
    return found


def assert_close(found, expected, tolerance):
    for one, two in zip(found, expected, strict=True):
        scale = max(float(two.abs().max()), 1e-30)
        assert float((one - two).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-neuron"])
def test_gradients(options, vector):
    for rule, bias, steps in ((Triangular(0.8), True, 7), (Atan(2.0), False, 7), (Gaussian(0.5), True, 1)):
        neuron, x = layer(options, rule, vector=vector, bias=bias), currents(steps).requires_grad_()
        g = torch.randn_like(x)

        def run(neuron, x, g=g):
            s = neuron(x)
            return s, torch.autograd.grad((s * g).sum(), [x, *neuron.parameters()], allow_unused=True)

        (s, grads), (expected, wanted) = both(neuron, x, run)
        assert torch.equal(s, expected)
        assert 0.05 < s.mean() < 0.8
        zeros = [torch.zeros_like(t) for t in (x, *neuron.parameters())]
        grads, wanted = ([z if t is None else t for t, z in zip(ts, zeros, strict=True)] for ts in (grads, wanted))
        assert_close(grads, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits(options, dtype):
    neuron, x = layer(options, Atan(2.0), vector=True, bias=True, dtype=dtype), currents(12, dtype)
    with torch.no_grad():
        assert torch.equal(*both(neuron, x, lambda neuron, x: neuron(x)))
    x.requires_grad_()
    assert torch.equal(*both(neuron, x, lambda neuron, x: neuron(x)))


def test_gradients_of_gradients(options):
    neuron, x = layer(options, Atan(2.0), vector=True, bias=True), currents().requires_grad_()
    g = torch.randn_like(x).requires_grad_()

    def run(neuron, x):
        inputs = [x, *neuron.parameters()]
        first = torch.autograd.grad((neuron(x) * g).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [*inputs, g], allow_unused=True)

    found, expected = both(neuron, x, run)
    assert [t is None for t in found] == [t is None for t in expected]
    assert_close([t for t in found if t is not None], [t for t in expected if t is not None], 1e-10)


def test_a_rough_surrogate_has_no_second_derivative():
    neuron, x = layer({"reset": "zero"}, Triangular(1.0), vector=False, bias=False), currents().requires_grad_()
    (g,) = torch.autograd.grad(neuron(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Triangular"):
        torch.autograd.grad(g.square().sum(), x)


def test_under_autocast():
    """Products in bfloat16, membranes in float32; the gradient of the weights is summed more exactly."""
    neuron = layer({"reset": "zero"}, Atan(2.0), vector=False, bias=True, dtype=torch.float32)
    x = currents(dtype=torch.float32).requires_grad_()
    g = torch.randn(x.shape)

    def run(neuron, x):
        with torch.autocast("cpu", torch.bfloat16):
            s = neuron(x)
        return s, torch.autograd.grad((s * g).sum(), [x, *neuron.recurrent.parameters()])

    (s, grads), (expected, wanted) = both(neuron, x, run)
    assert torch.equal(s, expected)
    assert s.dtype == expected.dtype == torch.float32
    assert_close(grads, wanted, 2e-2)
    half = x.detach().bfloat16().requires_grad_()
    (s, grads), (expected, wanted) = both(neuron, half, run)
    assert torch.equal(s, expected)
    assert grads[0].dtype == torch.bfloat16
    assert_close([t.float() for t in grads], [t.float() for t in wanted], 2e-2)


def test_only_membranes_are_kept():
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    neuron, x = layer({"reset": "zero"}, Atan(2.0), vector=False, bias=False), currents(50).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        neuron(x)
    own = sum(p.nbytes for p in neuron.parameters())
    assert sum(kept.values()) <= x.nbytes + own + 64


def test_a_feedback_that_is_more_than_its_weights_goes_through_its_module():
    neuron, x = layer({"reset": "zero"}, Atan(2.0), vector=False, bias=False), currents()
    assert serves(neuron.recurrent)
    seen = []
    neuron.recurrent.register_forward_hook(lambda *_: seen.append(1))
    assert not serves(neuron.recurrent)
    neuron(x)
    assert len(seen) == len(x)
    parametrised = nn.utils.parametrizations.weight_norm(
        layer({"reset": "zero"}, Atan(2.0), vector=False, bias=False).recurrent
    )
    assert not serves(parametrised)


def test_it_compiles_without_graph_breaks():
    torch._dynamo.reset()
    neuron, x = layer({"reset": "zero"}, Atan(2.0), vector=False, bias=True), currents(4)
    fast = torch.compile(neuron, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x).square().sum(), neuron.recurrent.weight)[0] for f in (fast, neuron)]
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()
