import itertools

import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

from sg_lightning.neurons import LIF, from_snntorch, fuse_snntorch
from sg_lightning.neurons.reference import spike

READOUTS = ["mean_spikes", "sum_spikes", "last_membrane", "max_membrane"]
FUSIBLE = [
    (r, d) for r, d in itertools.product(("zero", "subtract", "none"), (True, False)) if (r, d) != ("subtract", False)
]


def leaky(*, output=False, **kw):
    return snn.Leaky(**{"beta": 0.8, "init_hidden": True, "output": output, **kw})


def in_float64(net):
    """Give the neurons spikes of their input's precision: snnTorch's own are float32 and stop a float64 net."""
    for layer in net.modules():
        if isinstance(layer, snn.Leaky):
            rule = surrogate_of(layer)
            layer.spike_grad = lambda z, rule=rule: spike(z, rule)
    return net.double()


def surrogate_of(layer):
    return next(m for m in fuse_snntorch(nn.Sequential(layer), time_steps=1).modules() if isinstance(m, LIF)).surrogate


def mlp(reset="subtract", delay=True, spike_grad=None, **kw):
    options = {"reset_mechanism": reset, "reset_delay": delay, "spike_grad": spike_grad, **kw}
    net = nn.Sequential(
        nn.Linear(5, 16), leaky(beta=0.7, **options),
        nn.Sequential(nn.Linear(16, 12), leaky(beta=torch.rand(12), threshold=torch.rand(12) + 0.2, **options)),
        nn.Linear(12, 3), leaky(beta=0.9, threshold=0.3, output=True, **options),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(2.5)
    return net


def in_one_order(model):
    """List the parameters by layer and name: the two libraries register beta and threshold in different orders."""
    by_layer = [dict(m.named_parameters(recurse=False)) for m in model.modules()]
    return [layer[name] for layer in by_layer for name in sorted(layer)]


def compare(net, x, steps, readout, tolerance=1e-10, train=True):
    fused = fuse_snntorch(net, time_steps=steps, readout=readout).to(x.dtype).train(train)
    stepped = from_snntorch(in_float64(net), time_steps=steps, readout=readout).train(train)
    x = x.clone().requires_grad_()
    a, b = fused(x), stepped(x)
    assert b.detach().std() > 0
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(a)
    ours, theirs = in_one_order(fused), in_one_order(stepped)
    assert len(ours) == len(theirs)
    wanted = ((a, [x, *ours]), (b, [x, *theirs]))
    grads = [torch.autograd.grad(out, leaves, g, materialize_grads=True) for out, leaves in wanted]
    for one, two in zip(*grads, strict=True):
        # A convolution's bias before a batch norm has gradient 0 up to rounding.
        assert (one - two).abs().max() <= 1e-13 + tolerance * two.abs().max()
    return fused, stepped


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize(("reset", "delay"), FUSIBLE)
def test_equal_outputs_and_gradients(reset, delay, learn, readout):
    net = mlp(reset, delay, learn_beta=learn, learn_threshold=learn)
    compare(net, torch.rand(6, 5, dtype=torch.float64), 7, readout)


@pytest.mark.parametrize(
    "spike_grad",
    [
        None,
        surrogate.atan(3.0),
        surrogate.fast_sigmoid(slope=7),
        surrogate.sigmoid(4),
        surrogate.straight_through_estimator(),
    ],
)
def test_surrogates_are_recognised_with_their_width(spike_grad):
    net = mlp(spike_grad=spike_grad)
    fused = fuse_snntorch(net, time_steps=5)
    neurons = [m for m in fused.modules() if isinstance(m, LIF)]
    z = torch.linspace(-1, 1, 50).requires_grad_()
    expected = torch.autograd.grad(net[1].spike_grad(z).sum(), z)[0]
    for neuron in neurons:
        torch.testing.assert_close(neuron.surrogate.derivative(z.detach()), expected)
    assert len(neurons) == 3


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("readout", READOUTS)
def test_conv_net_with_batch_norm(readout, train):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), leaky(threshold=0.5), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), leaky(threshold=0.4, reset_mechanism="zero"), nn.Flatten(),
        nn.Linear(6, 10), leaky(threshold=0.2, output=True),
    )  # fmt: skip
    fused, stepped = compare(net, torch.rand(5, 1, 8, 8, dtype=torch.float64), 4, readout, 1e-9, train)
    layers = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (fused, stepped)]
    for one, two in zip(*layers, strict=True):
        assert one.num_batches_tracked.item() == two.num_batches_tracked.item() == (4 if train else 0)
        torch.testing.assert_close(one.running_mean, two.running_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.running_var, two.running_var, rtol=1e-10, atol=1e-12)


def test_float32_spikes_are_equal_up_to_rounding_of_the_matrix_products():
    net = mlp()
    x = torch.rand(64, 5)
    a = fuse_snntorch(net, time_steps=10, readout="sum_spikes")(x)
    b = from_snntorch(net, time_steps=10, readout="sum_spikes")(x)
    assert (a != b).float().mean() <= 0.01


def test_parameters_are_copied():
    net = mlp()
    fused = fuse_snntorch(net, time_steps=2)
    x = torch.rand(2, 5)
    before = fused(x)
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(fused(x), before)


def test_a_fixed_beta_outside_the_unit_interval_is_clamped():
    net = nn.Sequential(nn.Linear(5, 3), leaky(beta=1.5, output=True))
    compare(net, torch.rand(6, 5, dtype=torch.float64), 4, "last_membrane")


class Mine(snn.Leaky):
    pass


def inhibiting():
    neuron = leaky()
    neuron.inhibition = True  # through the constructor it warns
    return neuron


def wrap(neuron):
    return nn.Sequential(nn.Linear(5, 3), neuron)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (wrap(leaky(reset_delay=False)), r"layer 1 \(Leaky\).*same-step subtraction"),
        (wrap(inhibiting()), "inhibition"),
        (wrap(leaky(graded_spikes_factor=2.0)), "scales its spikes"),
        (wrap(leaky(spike_grad=surrogate.triangular())), "surrogate has no counterpart.*atan"),
        (wrap(leaky(spike_grad=lambda z: (z > 0).float())), "surrogate has no counterpart"),
        (wrap(leaky(surrogate_disable=True)), "surrogate has no counterpart"),
        (wrap(leaky(beta=torch.rand(3, 1, 1))), "single values or one per feature"),
        (wrap(leaky(beta=1.5, learn_beta=True)), r"beta must be in \[0, 1\], got 1.5"),
        (wrap(Mine(beta=0.9, init_hidden=True)), r"layer 1 \(Mine\)"),
        (wrap(snn.Synaptic(alpha=0.5, beta=0.9, init_hidden=True)), r"layer 1 \(Synaptic\).*from_snntorch"),
        (nn.Sequential(nn.Sequential(nn.Dropout(0.5)), *wrap(leaky())), r"layer 0.0 \(Dropout\)"),
        (nn.Sequential(leaky(), nn.Linear(3, 3)), "last layer must be a snntorch.Leaky"),
        (leaky(), "only a plain nn.Sequential can be fused, got Leaky"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refused_with_the_reason(net, message):
    with pytest.raises(ValueError, match=message):
        fuse_snntorch(net, time_steps=3)


def test_other_errors():
    with pytest.raises(ValueError, match="unknown readout"):
        fuse_snntorch(wrap(leaky()), time_steps=3, readout="mean")
    for steps in (0, None):
        with pytest.raises(ValueError, match="time_steps must be a whole number above 0"):
            fuse_snntorch(wrap(leaky()), time_steps=steps)
    images = nn.Sequential(nn.Conv2d(1, 3, 2), leaky(beta=torch.rand(3)), nn.Flatten(), nn.Linear(27, 3), leaky())
    with pytest.raises(ValueError, match=r"one value per feature, but the layer gets \(2, 3, 3, 3\)"):
        fuse_snntorch(images, time_steps=2)(torch.rand(2, 1, 4, 4))
