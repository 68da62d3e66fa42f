"""Packing what waits for the backward pass: fewer bytes, equal gradients."""

import pytest
import torch
from torch import nn

from sg_lightning.backbones import VGG, SpikingMLP
from sg_lightning.neurons import LIF, compact_spikes
from sg_lightning.neurons.compact import LEAST, Packed, pack, unpack

SHAPE = (4, 8, 32, 32)


def spikes(rate=0.2):
    return (torch.rand(SHAPE) < rate).float()


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (spikes, torch.int8),
        (lambda: nn.functional.avg_pool2d(spikes(), 2).repeat(4, 1, 1, 1), torch.int8),
        (lambda: nn.functional.avg_pool2d(spikes(), 4).repeat(16, 1, 1, 1), torch.int8),
        (lambda: torch.randint(8, SHAPE).float(), torch.int8),
        (lambda: torch.randint(200, SHAPE).float(), torch.bfloat16),
        (lambda: -torch.randint(8, SHAPE).double(), torch.int8),
        (lambda: spikes().bfloat16(), torch.int8),
        (lambda: spikes().to(memory_format=torch.channels_last), torch.int8),
        (lambda: spikes().transpose(0, 3), torch.int8),
    ],
)
def test_exact_values_are_packed_and_come_back(make, dtype):
    x = make()
    packed = pack(x)
    assert isinstance(packed, Packed)
    assert packed.values.dtype == dtype
    back = unpack(packed)
    assert torch.equal(back, x)
    assert back.dtype == x.dtype
    assert back.stride() == x.stride()


@pytest.mark.parametrize("where", [0, 12_345, -1])
@pytest.mark.parametrize("value", [0.3, 257.0, 1 / 3, float("nan"), 3e38])
def test_one_value_that_would_change_keeps_the_whole_tensor(where, value):
    x = spikes()
    x.view(-1)[where] = value  # also beyond what is looked at first
    assert pack(x) is x


def test_what_is_not_worth_it_or_lives_elsewhere_is_left_alone():
    small = torch.zeros(LEAST - 1)
    wide = torch.zeros(LEAST).expand(3, LEAST)
    cut = torch.zeros(2, LEAST, 2)[..., 0]
    for x in (small, wide, cut, torch.zeros(LEAST, dtype=torch.int64), nn.Parameter(torch.zeros(LEAST))):
        assert pack(x) is x
    x = spikes()
    weight = torch.ones(1, requires_grad=True)
    for leave, kind in (((), Packed), ((x,), torch.Tensor)):
        context = compact_spikes(leave)
        assert isinstance(context.pack_hook(x.flatten(1)), kind)
    with compact_spikes():
        loss = (weight * x).sum()
    loss.backward()
    assert weight.grad == x.sum()


def gradients(net, x, context=None):
    net.zero_grad()
    if context is None:
        net(x).square().sum().backward()
    else:
        with context:
            loss = net(x).square().sum()
        loss.backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_gradients_are_equal_and_bytes_fewer(kind, cast):
    if kind == "image":
        net, x = VGG("vgg5", time_steps=4, neuron=LIF(0.5, detach_reset=True), head=(64,)), torch.rand(4, 3, 32, 32)
        pools = [name for name, layer in net.features.named_children() if isinstance(layer, nn.AvgPool2d)]
        for name in pools:  # torch's keeps the spikes that it sees
            setattr(net.features, name, nn.AvgPool2d(2))
    else:
        net, x = SpikingMLP(100, (128, 128), 10, time_steps=30), (torch.rand(8, 30, 100) < 0.1).float()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return type(net).forward(net, x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return run(x).float()

    whole = Net()
    usual, packed = gradients(whole, x), gradients(whole, x, compact_spikes([x]))
    assert all(float(g.abs().max()) > 0 for g in usual[:1])
    assert all(torch.equal(a, b) for a, b in zip(usual, packed, strict=True))
    before, after = (kept_bytes(whole, x, how) for how in (lambda t: t, pack))
    assert after < (0.9 if cast else 0.8) * before


def kept_bytes(net, x, how):
    """Count each storage once, without parameters."""
    seen, alive = {}, []
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() in own:
            return tensor
        found = how(tensor)
        alive.append(found)
        storage = (found.values if isinstance(found, Packed) else found).untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return found

    with torch.autograd.graph.saved_tensors_hooks(keep, unpack):
        net(x).sum().backward()
    return sum(seen.values())


def test_second_derivatives_go_through_packed_tensors():
    net = nn.Sequential(nn.Linear(256, 128), LIF(0.5, surrogate="atan"), nn.Linear(128, 1))
    x = (torch.rand(4, 64, 256) < 0.1).float().requires_grad_()
    found = []
    for context in (None, compact_spikes()):
        net.zero_grad()
        if context is not None:
            context.__enter__()
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        loss = g.square().sum()
        if context is not None:
            context.__exit__(None, None, None)
        loss.backward()
        found.append(net[0].weight.grad.clone())
    assert float(found[0].abs().max()) > 0
    assert torch.equal(*found)
