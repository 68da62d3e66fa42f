"""Activations computed again: the same losses, gradients and statistics from fewer bytes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sg_lightning.attacks import Oracle
from sg_lightning.attacks.estimators import PDSG
from sg_lightning.attacks.losses import cross_entropy as attack_loss
from sg_lightning.backbones import VGG, ConvNet, FusionNet, SEWResNet, SpikingMLP, WideResNet, recompute
from sg_lightning.backbones.base import OverTime
from sg_lightning.neurons import ALIF, LIF, compact_spikes
from sg_lightning.objectives import sparse_gradient_penalty

NEURON = LIF(0.5, surrogate="atan", learn_beta=True)
IMAGE = {"num_classes": 4, "in_channels": 1, "input_size": 8, "time_steps": 3, "neuron": NEURON}
MAKERS = {
    "convnet": lambda: ConvNet(**IMAGE),
    "vgg": lambda: VGG("vgg5", **IMAGE, head=(16,)),
    "wide_resnet": lambda: WideResNet(10, 1, **IMAGE, pool=2),
    "sew_resnet": lambda: SEWResNet("sew_resnet18", **IMAGE),
    "mlp": lambda: SpikingMLP(8, (16, 16), 4, time_steps=8, neuron=NEURON),
    "recurrent": lambda: SpikingMLP(8, (16, 16), 4, time_steps=8, recurrent=True),
}


def settled(kind):
    torch.manual_seed(1)
    net = MAKERS[kind]()
    x = (torch.rand(6, *net.input_shape) < 0.3).float() if "image" not in kind else torch.rand(6, *net.input_shape)
    return net, x, torch.randint(4, (6,))


def step(net, state, x, y, what, loss=lambda net, x, y: cross_entropy(net(x), y)):
    """Return loss, gradients and buffers of one training step from a given state."""
    net.load_state_dict(state)
    recompute(net, what)
    net.train().zero_grad()
    value = loss(net, x, y)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)], [
        b.clone() for b in net.buffers()
    ]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("what", ["norms", "blocks"])
@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_changes_but_memory(kind, what):
    net, x, y = settled(kind)
    state = copy.deepcopy(net.state_dict())
    usual, statistics = step(net, state, x, y, None)
    again, counted = step(net, state, x, y, what)
    assert sum(float(g.abs().max()) > 0 for g in usual) > len(usual) // 2
    assert equal(usual, again)
    assert equal(statistics, counted)
    if kind not in ("mlp", "recurrent"):
        assert not equal(statistics, [b for name, b in state.items() if name in dict(net.named_buffers())])


def pass_over(net, x, y):
    """Penalise the gradient: two forward passes, a gradient to the input, and a backward pass through both."""
    x = x.clone().requires_grad_()
    logits = net(x)
    return cross_entropy(logits, y) + 0.1 * sparse_gradient_penalty(net, x, y, logits=logits)


def curved(net, x, y):
    """Take a gradient of a gradient."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(net(x), y), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("loss", [pass_over, curved])
@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_penalties_on_gradients_are_the_same(what, loss):
    net, x, y = settled("convnet")
    state = copy.deepcopy(net.state_dict())
    usual, statistics = step(net, state, x, y, None, loss)
    with compact_spikes([x]):
        again, counted = step(net, state, x, y, what, loss)
    assert equal(usual, again)
    assert equal(statistics, counted)


@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_dropout_draws_once(what):
    net = OverTime(nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), LIF(0.5), nn.Linear(32, 4))
    x = torch.rand(3, 5, 8)
    found = []
    for way in (None, what):
        recompute(net, way)
        net.zero_grad()
        torch.manual_seed(5)
        out = net(x)
        out.square().sum().backward()
        found.append([out.detach(), net[0].weight.grad, torch.rand(1)])
    assert equal(*found)


@pytest.mark.parametrize("what", ["norms", "blocks"])
def test_compiled_networks_recompute(what):
    net, x, y = settled("convnet")
    state = copy.deepcopy(net.state_dict())
    usual, statistics = step(net, state, x, y, None)
    torch._dynamo.reset()
    recompute(net, what)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    again, counted = step(net, state, x, y, what, lambda _, x, y: cross_entropy(compiled(x), y))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(usual, again, strict=True))
    assert all(torch.allclose(a.float(), b.float()) for a, b in zip(statistics, counted, strict=True))
    torch._dynamo.reset()


def saved(net, x):
    """Count the elements of what a forward pass saves, each storage once."""
    sizes, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x)
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def test_norms_keep_what_goes_in_and_blocks_keep_spikes():
    torch.manual_seed(0)
    net = OverTime(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), LIF(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), LIF()
    )
    x, size = torch.rand(4, 2, 2, 16, 16), 4 * 2 * 8 * 256
    found = {}
    for what in (None, "norms", "blocks"):
        recompute(net, what)
        found[what] = saved(net, x) / size
    # Two layers: the conv's output twice, membranes twice, the spikes between them; numbers of channels beside that.
    assert found[None] == pytest.approx(5, abs=0.02)
    assert found["norms"] == pytest.approx(3, abs=0.02)
    assert found["blocks"] == pytest.approx(1, abs=0.02)


def test_a_mode_that_changes_before_the_backward_pass_does_not_matter():
    net, x, y = settled("convnet")
    state = copy.deepcopy(net.state_dict())

    def evaluated_in_between(net, x, y):
        loss = cross_entropy(net(x), y)
        net.eval()
        return loss

    usual = step(net, state, x, y, None, evaluated_in_between)
    again = step(net, state, x, y, "blocks", evaluated_in_between)
    assert equal(usual[0], again[0])
    assert equal(usual[1], again[1])
    assert not any(part.training for part in net.modules())


def test_several_modalities():
    torch.manual_seed(2)
    net = FusionNet({"a": MAKERS["convnet"](), "b": MAKERS["mlp"]()}, fusion="gated")
    x = {"a": torch.rand(3, 1, 8, 8), "b": (torch.rand(3, 8, 8) < 0.3).float()}
    y, state = torch.tensor([0, 1, 2]), copy.deepcopy(net.state_dict())
    assert equal(step(net, state, x, y, None)[0], step(net, state, x, y, "blocks")[0])


@pytest.mark.parametrize("steps", [1, 7, 20, 100])
@pytest.mark.parametrize("recurrent", [False, True])
def test_pieces_of_a_long_sequence_give_the_same(recurrent, steps):
    torch.manual_seed(1)
    net = SpikingMLP(12, (16, 16), 4, time_steps=20, recurrent=recurrent, neuron=LIF(0.9, learn_beta=True)).double()
    x, y = (torch.rand(6, 20, 12) < 0.3).double(), torch.randint(4, (6,))
    state = copy.deepcopy(net.state_dict())
    usual, _ = step(net, state, x, y, None)
    again, _ = step(net, state, x, y, steps)
    assert torch.equal(usual[0], again[0])
    assert all(float(g.abs().max()) > 0 for g in usual)
    for a, b in zip(usual, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_pieces_keep_states_only():
    torch.manual_seed(0)
    net = OverTime(nn.Linear(8, 64), LIF(0.9), nn.Linear(64, 64), LIF(0.9))
    x = torch.rand(64, 8, 8)
    found = []
    for what in (None, 8):
        recompute(net, what)
        found.append(saved(net, x) / (8 * 64))
    assert found[0] == pytest.approx(3 * 64, rel=0.01)  # two membranes, the spikes between
    assert found[1] == pytest.approx(2 * 7, rel=0.01)  # the states of two layers between eight pieces


def test_pieces_under_an_attack_and_compiled():
    net = SpikingMLP(12, (16,), 4, time_steps=20)
    x, y = (torch.rand(6, 20, 12) < 0.3).float(), torch.randint(4, (6,))
    state = copy.deepcopy(net.state_dict())
    usual, _ = step(net, state, x, y, None)
    torch._dynamo.reset()
    recompute(net, 10)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    again, _ = step(net, state, x, y, 10, lambda _, x, y: cross_entropy(compiled(x), y))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(usual, again, strict=True))
    torch._dynamo.reset()
    gradients = []
    for what in (None, 10):
        recompute(net, what)
        oracle = Oracle(net, estimator=PDSG())
        with oracle.attacking():
            gradients.append(oracle.value_and_grad(x, y, attack_loss).grad)
    assert torch.equal(*gradients)


def test_no_graph_no_work(monkeypatch):
    net, x, _ = settled("convnet")
    recompute(net, "blocks")
    monkeypatch.setattr("sg_lightning.backbones.recomputation.checkpoint", None)
    with torch.no_grad():
        assert net(x).shape == (6, 4)
    with pytest.raises(TypeError):
        net(x)


def test_mistakes():
    with pytest.raises(
        ValueError, match="recompute must be 'norms', 'blocks', a number of steps >= 1 or None, got 'all'"
    ):
        recompute(MAKERS["convnet"](), "all")
    for bad in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="recompute must be"):
            recompute(MAKERS["mlp"](), bad)
    with pytest.raises(ValueError, match="BatchNorm2d normalises by the statistics of all steps"):
        recompute(MAKERS["convnet"](), 2)
    with pytest.raises(ValueError, match="ALIF cannot continue from a state"):
        recompute(SpikingMLP(8, (4,), 2, time_steps=3, neuron=ALIF()), 2)
    with pytest.raises(ValueError, match="Linear has no OverTime inside"):
        recompute(nn.Linear(2, 2), "norms")
