import copy
import gc
import io
import weakref

import pytest
import snntorch as snn
import torch
from snntorch import surrogate, utils
from torch import nn

from sg_lightning.neurons import SpikingNeuron, from_snntorch
from sg_lightning.neurons.surrogates import Atan, StraightThrough

STEPS = 6
ATAN = surrogate.atan(2.0)


def hidden_sequential():
    return nn.Sequential(
        nn.Linear(5, 8),
        snn.Leaky(beta=0.8, spike_grad=ATAN, init_hidden=True),
        nn.Linear(8, 3),
        snn.Leaky(beta=0.9, threshold=0.3, spike_grad=ATAN, init_hidden=True, output=True),
    )


def nested_sequential():
    block = nn.Sequential(nn.Linear(5, 8), nn.Sequential(snn.Synaptic(alpha=0.7, beta=0.8, init_hidden=True)))
    return nn.Sequential(block, nn.Linear(8, 3), snn.Leaky(beta=0.9, threshold=0.3, init_hidden=True, output=True))


def tuple_sequential():
    """Layers that return (spikes, membrane) in the middle of the net, which nn.Sequential alone cannot run."""
    return nn.Sequential(nn.Linear(5, 8), snn.Leaky(beta=0.8), nn.Linear(8, 3), snn.Leaky(beta=0.9, threshold=0.3))


def learnable_beta():
    return nn.Sequential(
        nn.Linear(5, 8),
        snn.Leaky(beta=torch.full((8,), 0.7), learn_beta=True, learn_threshold=True, init_hidden=True),
        nn.Linear(8, 3),
        snn.Leaky(beta=0.5, threshold=0.3, learn_beta=True, init_hidden=True, output=True),
    )


def recurrent():
    return nn.Sequential(
        nn.Linear(5, 8),
        snn.RLeaky(beta=0.8, linear_features=8, init_hidden=True),
        nn.Linear(8, 3),
        snn.Alpha(alpha=0.9, beta=0.8, threshold=0.05, init_hidden=True, output=True),
    )


class OneStep(nn.Module):
    """One time step per call, hidden state inside, (spikes, membrane) out."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"fc": nn.Linear(5, 8), "lif": snn.Leaky(beta=0.8, init_hidden=True)})
        self.head = nn.Linear(8, 3)
        self.out = snn.Leaky(beta=0.9, threshold=0.3)

    def forward(self, x):
        return self.out(self.head(self.body["lif"](self.body["fc"](x))))


class OwnLoop(nn.Module):
    """The style of snnTorch's tutorials: state in local variables, recordings stacked over time."""

    def __init__(self, as_lists=False):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, 8), snn.Leaky(beta=0.8, learn_beta=True)
        self.fc2, self.lif2 = nn.Linear(8, 3), snn.Leaky(beta=0.9, threshold=0.3)
        self.as_lists = as_lists

    def forward(self, x):
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spikes, membranes = [], []
        for _ in range(STEPS):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return (spikes, membranes) if self.as_lists else (torch.stack(spikes), torch.stack(membranes))


class Leaking(OwnLoop):
    """As OwnLoop, but never resets: used alone, its second call differs from its first."""

    def forward(self, x):
        spikes, membranes = [], []
        for _ in range(STEPS):
            spk, mem = self.lif2(self.fc2(self.lif1(self.fc1(x))[0]))
            spikes.append(spk)
            membranes.append(mem)
        return torch.stack(spikes), torch.stack(membranes)


NETS = {
    "hidden": (hidden_sequential, STEPS),
    "nested": (nested_sequential, STEPS),
    "tuples": (tuple_sequential, STEPS),
    "learnable": (learnable_beta, STEPS),
    "recurrent": (recurrent, STEPS),
    "one step": (OneStep, STEPS),
    "own loop": (OwnLoop, None),
    "lists": (lambda: OwnLoop(as_lists=True), None),
    "leaking": (Leaking, None),
}


def build(name, readout="mean_spikes"):
    torch.manual_seed(1)
    make, steps = NETS[name]
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(2.5)  # so that the nets fire
    return from_snntorch(net, time_steps=steps, readout=readout)


def batch():
    return torch.rand(4, 5, generator=torch.Generator().manual_seed(2))


def input_gradient(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((model(x) * torch.tensor([1.0, -2.0, 3.0])).sum(), x)[0]


def hidden_tensors(net):
    names = ("mem", "spk", "syn", "syn_exc", "syn_inh", "reset")
    found = [getattr(m, n, None) for m in net.modules() if isinstance(m, snn.SpikingNeuron) for n in names]
    return [t for t in found if isinstance(t, torch.Tensor) and t.numel()]


@pytest.mark.parametrize("readout", ["mean_spikes", "sum_spikes", "last_membrane", "max_membrane"])
@pytest.mark.parametrize("name", NETS)
def test_stateless_and_attackable(name, readout):
    model, x = build(name, readout), batch()
    logits = model(x)
    assert logits.shape == (4, 3)
    assert logits.detach().std() > 0
    first, second = input_gradient(model, x), input_gradient(model, x)
    assert torch.equal(first, second)
    assert first.abs().max() > 0
    assert torch.equal(model(x), logits)
    assert torch.equal(model(x[1:2]), logits[1:2]) or torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    assert not hidden_tensors(model)


def test_leaking_net_needs_the_bridge():
    model, x = build("leaking"), batch()
    assert not torch.equal(model.net(x)[1], model.net(x)[1])
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("readout", ["mean_spikes", "sum_spikes", "last_membrane", "max_membrane"])
def test_equals_the_loop_that_users_write(readout):
    model, x = build("hidden", readout), batch()
    net = copy.deepcopy(model.net)
    utils.reset(net)
    spikes, membranes = zip(*(net(x) for _ in range(STEPS)), strict=True)
    spikes, membranes = torch.stack(spikes), torch.stack(membranes)
    expected = {
        "mean_spikes": spikes.mean(0),
        "sum_spikes": spikes.sum(0),
        "last_membrane": membranes[-1],
        "max_membrane": membranes.max(0).values,
    }[readout]
    assert 0.05 < spikes.mean() < 0.95
    assert torch.equal(model(x), expected)


def test_own_loop_is_only_read():
    model, x = build("own loop"), batch()
    assert torch.equal(model(x), OwnLoop.forward(copy.deepcopy(model.net), x)[0].mean(0))


@pytest.mark.parametrize("name", NETS)
def test_inference_mode_then_gradients(name):
    model, x = build(name), batch()
    with torch.inference_mode():
        quiet = model(x)
    assert not any(b.is_inference() for b in model.buffers())
    assert torch.equal(model(x), quiet)
    assert input_gradient(model, x).abs().max() > 0
    model(x).sum().backward()


@pytest.mark.parametrize("name", NETS)
def test_copies_and_checkpoints(name):
    model, x = build(name), batch()
    logits = model(x)
    assert torch.equal(copy.deepcopy(model)(x), logits)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = from_snntorch(NETS[name][0](), time_steps=NETS[name][1])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), logits)


def test_nothing_is_kept_between_forwards():
    class Box:
        def __init__(self, tensor):
            self.tensor = tensor
            boxes.append(weakref.ref(self))

    boxes = []  # of what autograd keeps for the backward pass
    model, x = build("nested", "last_membrane"), batch().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        logits = model(x)
    assert any(box() for box in boxes)
    del logits
    gc.collect()
    assert not any(box() for box in boxes)


def test_cleared_after_an_exception():
    model, x = build("hidden"), batch()
    expected = model(x)

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.net[2].register_forward_hook(fail)
    model.attack_rule = StraightThrough()
    own = model.net[1].spike_grad
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert not hidden_tensors(model)
    assert model.net[1].spike_grad is own
    model.attack_rule = None
    assert torch.equal(model(x), expected)


def test_state_from_before_the_bridge_is_dropped():
    net = hidden_sequential()
    x = batch()
    for _ in range(3):
        net(x)
    torch.manual_seed(0)
    used = from_snntorch(net, time_steps=STEPS)(x)
    utils.reset(net)
    assert torch.equal(used, from_snntorch(net, time_steps=STEPS)(x))


def test_trains_learnable_beta():
    model, x = build("learnable"), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # a second backward fails if a graph of the first is still alive
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.parametrize("name", NETS)
def test_attack_rule_keeps_the_forward_and_changes_the_gradient(name):
    model, x = build(name), batch()
    assert isinstance(model, SpikingNeuron)
    logits, own = model(x), input_gradient(model, x)
    model.attack_rule = StraightThrough()
    assert torch.equal(model(x), logits)
    other = input_gradient(model, x)
    assert not torch.allclose(own, other)
    model.attack_rule = None
    assert torch.equal(input_gradient(model, x), own)


def test_attack_rule_equals_a_net_built_with_that_surrogate():
    x = batch()
    swapped = from_snntorch(hidden_sequential(), time_steps=STEPS)
    swapped.attack_rule = Atan(5.0)
    built = copy.deepcopy(swapped)
    built.attack_rule = None
    for layer in built.net:
        if isinstance(layer, snn.Leaky):
            layer.spike_grad = surrogate.atan(5.0)
    torch.testing.assert_close(input_gradient(swapped, x), input_gradient(built, x), rtol=1e-5, atol=1e-8)


def test_attack_rule_gives_gradients_where_the_net_has_none():
    net = nn.Sequential(nn.Linear(5, 3), snn.Leaky(beta=0.8, surrogate_disable=True, init_hidden=True, output=True))
    model, x = from_snntorch(net, time_steps=STEPS), batch()
    assert not model(x.requires_grad_()).requires_grad
    model.attack_rule = Atan(2.0)
    assert input_gradient(model, x.detach()).abs().max() > 0


def test_surrogate_that_is_a_module_can_be_swapped():
    class Spike(nn.Module):
        def forward(self, z):
            return ATAN(z)

    net = nn.Sequential(nn.Linear(5, 3), snn.Leaky(beta=0.8, init_hidden=True, output=True))
    del net[1].__dict__["spike_grad"]
    net[1].spike_grad = Spike()
    model, x = from_snntorch(net, time_steps=STEPS), batch()
    own = input_gradient(model, x)
    model.attack_rule = StraightThrough()
    assert not torch.equal(input_gradient(model, x), own)
    model.attack_rule = None
    assert isinstance(net[1].spike_grad, Spike)
    assert torch.equal(input_gradient(model, x), own)


def test_time_axis_in_the_input():
    net = hidden_sequential()
    frames = torch.rand(4, 7, 5)
    model = from_snntorch(net, time_dim=1, readout="sum_spikes")
    got = model(frames)
    utils.reset(net)
    assert torch.equal(got, torch.stack([net(frames[:, t])[0] for t in range(7)]).sum(0))
    assert torch.equal(
        from_snntorch(net, time_dim=1)(frames[:, :1].expand(-1, STEPS, -1)),
        from_snntorch(net, time_steps=STEPS)(frames[:, 0]),
    )


def test_batch_axis_of_the_net():
    class TimeFirst(OwnLoop):
        def forward(self, x):  # (T, B, N)
            mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
            spikes = []
            for x_t in x:
                spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                spikes.append(spk2)
            return torch.stack(spikes)

    net, x = TimeFirst(), torch.rand(4, 7, 5)
    assert torch.equal(from_snntorch(net, batch_dim=1)(x), net(x.transpose(0, 1)).mean(0))


def test_conv_net():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), snn.Leaky(beta=0.8, init_hidden=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 10), snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )  # fmt: skip
    model = from_snntorch(net, time_steps=3, readout="max_membrane")
    x = torch.rand(2, 1, 8, 8)
    assert model(x).shape == (2, 10)
    x.requires_grad_()
    a, b = (torch.autograd.grad(model(x).sum(), x)[0] for _ in range(2))
    assert torch.equal(a, b)


def test_errors_at_construction():
    net = hidden_sequential()
    for arguments, message in (
        ({"readout": "mean"}, "unknown readout 'mean'"),
        ({"time_steps": 0}, "time_steps must be a whole number above 0, got 0"),
        ({"time_steps": 2.0}, "time_steps must be a whole number above 0"),
        ({"time_steps": 2, "time_dim": 1}, "not both"),
        ({"time_dim": 0}, "axis 0 of x is the batch"),
    ):
        with pytest.raises(ValueError, match=message):
            from_snntorch(net, **arguments)
    with pytest.raises(ValueError, match="no snnTorch neurons"):
        from_snntorch(nn.Linear(3, 3), time_steps=2)


def test_errors_in_the_forward_pass():
    x = batch()
    with pytest.raises(ValueError, match=r"give time_steps=.*time_dim="):
        from_snntorch(hidden_sequential())(x)
    with pytest.raises(ValueError, match=r"its own time loop leave both out"):
        from_snntorch(OwnLoop(), time_steps=3)(x)
    spikes_only = nn.Sequential(nn.Linear(5, 3), snn.Leaky(beta=0.8, init_hidden=True))
    with pytest.raises(ValueError, match=r"'last_membrane' needs the membrane.*output=True"):
        from_snntorch(spikes_only, time_steps=2, readout="last_membrane")(x)
    with pytest.raises(ValueError, match=r"floating-point tensor.*int64"):
        from_snntorch(hidden_sequential(), time_steps=2)(torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"time_dim=3 but x has shape \(4, 5\)"):
        from_snntorch(hidden_sequential(), time_dim=3)(x)
