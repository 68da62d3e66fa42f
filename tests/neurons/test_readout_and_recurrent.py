import pytest
import torch

from sg_lightning.neurons import LIF, LeakyIntegrator, RecurrentLIF
from sg_lightning.neurons.surrogates import Atan


def currents(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * 0.8 + 0.3


@pytest.mark.parametrize("readout", ["mean", "last", "max", "sum"])
def test_leaky_integrator(readout):
    layer = LeakyIntegrator(0.5, readout=readout)
    out = layer(torch.tensor([2.0, -1.0, 1.0]).view(3, 1, 1))  # v = 2, 0, 1
    assert out.item() == {"mean": 1.0, "last": 1.0, "max": 2.0, "sum": 3.0}[readout]


def test_leaky_integrator_learns_beta_and_checks():
    layer = LeakyIntegrator(0.9, learn_beta=True, readout="sum").double()
    x = currents(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: _with_beta(layer, x, b), (x, layer.beta.detach().requires_grad_()))
    with torch.no_grad():
        layer.beta.fill_(1.5)
    out = layer(x)
    torch.testing.assert_close(out, LeakyIntegrator(1.0, readout="sum").double()(x))
    assert torch.autograd.grad(out.sum(), layer.beta)[0].item() == 0
    assert LeakyIntegrator()(torch.ones(2, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for bad, message in (
        ({"beta": 2.0}, r"beta must be in \[0, 1\]"),
        ({"readout": "median"}, "unknown readout 'median'"),
        ({"beta": torch.rand(3)}, "single number"),
    ):
        with pytest.raises(ValueError, match=message):
            LeakyIntegrator(**bad)
    with pytest.raises(ValueError, match=r"\(T, B, N\), got shape \(2, 3\)"):
        layer(torch.rand(2, 3))


def _with_beta(layer, x, beta):
    return torch.func.functional_call(layer, {"beta": beta}, (x,))


def test_recurrent_without_feedback_is_a_lif():
    x = currents(6, 2, 5, dtype=torch.float32)
    plain = LIF(0.9, 1.0, "subtract", reset_delay=True)
    layer = RecurrentLIF(5, **plain.settings)
    with torch.no_grad():
        layer.recurrent.weight.zero_()
    assert torch.equal(layer(x), plain(x))


def test_recurrent_equals_a_loop_over_the_equations(options, primitive):
    layer = RecurrentLIF(4, 0.8, 0.9, **options, surrogate=Atan(2.0), learn_beta=True, bias=True).double()
    x = currents(7, 3, 4).requires_grad_()
    spikes = layer(x)
    beta = layer.beta.detach().clone().requires_grad_()
    fires = torch.ge if options["fire_at_threshold"] else torch.gt
    s, rows = torch.zeros(3, 4, dtype=torch.float64), []
    c = late = s
    for x_t in x.unbind(0):
        u = beta * c + x_t + layer.recurrent(s) - late
        smooth = primitive(u - layer.threshold, layer.surrogate)
        s = smooth + (fires(u, layer.threshold).double() - smooth).detach()
        r = s.detach() if options["detach_reset"] else s
        late = layer.threshold * r if options["reset"] == "subtract" and options["reset_delay"] else 0 * u
        c = u
        if options["reset"] == "zero":
            c = (1 - r) * u
        elif options["reset"] == "subtract" and not options["reset_delay"]:
            c = u - layer.threshold * r
        rows.append(s)
    expected = torch.stack(rows)
    assert torch.equal(spikes, expected.detach().round())
    g = torch.randn_like(spikes)
    weights = list(layer.recurrent.parameters())
    got = torch.autograd.grad((spikes * g).sum(), [x, layer.beta, *weights])
    want = torch.autograd.grad((expected * g).sum(), [x, beta, *weights])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_recurrent_checks():
    with pytest.raises(ValueError, match="features must be a whole number"):
        RecurrentLIF(0)
    with pytest.raises(ValueError, match="beta has 3 values but features=4"):
        RecurrentLIF(4, torch.rand(3))
    with pytest.raises(ValueError, match=r"4 neurons but the input .* has 5"):
        RecurrentLIF(4)(torch.rand(2, 2, 5))
    with pytest.raises(ValueError, match=r"\(T, B, N\), got shape \(2, 2, 4, 1\)"):
        RecurrentLIF(4)(torch.rand(2, 2, 4, 1))
