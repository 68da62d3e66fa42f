"""The penalty against a loop written from the paper's formula, against closed forms, and where it could break."""

import math

import pytest
import torch
from torch import nn

from sg_lightning.backbones import ConvNet
from sg_lightning.domains import Box, Counts
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.objectives import gradient_ratio_penalty, sparse_gradient_penalty
from sg_lightning.objectives.sparse_gradient import FiniteDifference, GradientRatio, fidelity, measure


def by_hand(net, x, y, *, h=0.01, direction="linf", output="margin", power=2, sides=(1,), clamp=None):
    """The penalty sample by sample, with exponentials, as the formula reads. ``sides``: +1 up, -1 down."""
    terms = []
    logits = net(x)  # one batch, because batch norm couples the samples
    shift = {s: torch.zeros_like(x) for s in sides}
    first, rivals = [], []
    for i, true in enumerate(y.tolist()):
        z = logits[i]
        rival = max((k for k in range(len(z)) if k != true), key=lambda k: z[k].item())
        rivals.append(rival)
        competitors = [true, rival] if output == "margin" else range(len(z))
        first.append(torch.exp(z[true]) / sum(torch.exp(z[k]) for k in competitors))
    grad = torch.autograd.grad(sum(first), x, retain_graph=True)[0]
    for i in range(len(y)):
        g = grad[i]
        d = g.sign() if direction == "linf" else g / math.sqrt(sum(v**2 for v in g.flatten().tolist()))
        for s in sides:
            shift[s][i] = s * h * d
    total = h * len(sides)
    change = [0.0] * len(y)
    for s in sides:
        moved = x.detach() + shift[s]
        if clamp is not None:
            moved = moved.clamp(*clamp)
        again = net(moved)
        for i, true in enumerate(y.tolist()):
            z = again[i]
            competitors = [true, rivals[i]] if output == "margin" else range(len(z))
            p = torch.exp(z[true]) / sum(torch.exp(z[k]) for k in competitors)
            change[i] = change[i] + s * (p - first[i]) if len(sides) == 1 else change[i] + s * p
    for c in change:
        r = abs(c / total)
        terms.append(r**power)
    return sum(terms) / len(terms)


def relu_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()


def spiking_net():
    net = ConvNet(num_classes=4, in_channels=1, input_size=4, channels=(8,), hidden=16, time_steps=3, neuron=LIF(0.9))
    return net.double()


def batch(shape=(6, 3, 2, 2), classes=4):
    return torch.rand(shape, dtype=torch.float64), torch.randint(classes, (shape[0],))


CASES = {
    "official": ({}, {}),
    "softmax": ({"output": "softmax"}, {"output": "softmax"}),
    "absolute": ({"power": 1}, {"power": 1}),
    "small step": ({"step_size": 0.003}, {"h": 0.003}),
    "backward": ({"difference": "backward"}, {"sides": (-1,)}),
    "central": ({"difference": "central"}, {"sides": (1, -1)}),
    "clamped": ({"clamp": True, "step_size": 0.3}, {"clamp": (0, 1), "h": 0.3}),
    "clamped to counts": ({"clamp": True, "domain": Counts(), "step_size": 0.3}, {"clamp": (0, None), "h": 0.3}),
    "l2": ({"direction": "l2"}, {"direction": "l2", "h": None}),
    "l2 with its own step": ({"direction": "l2", "step_size": 0.2}, {"direction": "l2", "h": 0.2}),
}


@pytest.mark.parametrize("make", [relu_net, spiking_net])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shared", [False, True])
def test_equals_a_loop_over_samples(make, case, shared):
    options, hand = CASES[case]
    net = make()
    shape = (6, 3, 2, 2) if make is relu_net else (6, 1, 4, 4)
    x, y = batch(shape)
    if "h" in hand and hand["h"] is None:
        hand = {**hand, "h": 0.01 * math.sqrt(x[0].numel())}
    expected = by_hand(net, x.clone().requires_grad_(), y, **hand)
    reference = torch.autograd.grad(expected, list(net.parameters()))
    if shared:
        x = x.requires_grad_()
        penalty = sparse_gradient_penalty(net, x, y, logits=net(x), **options)
    else:
        penalty = sparse_gradient_penalty(net, x, y, **options)
    penalty.backward()
    assert penalty.item() > 0
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-9)
    for parameter, wanted in zip(net.parameters(), reference, strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=1e-8, atol=1e-9 * max(1.0, wanted.abs().max().item()))


def test_untouched_inputs_and_gradients():
    net = relu_net()
    x, y = batch()
    before = x.clone()
    penalty = sparse_gradient_penalty(net, x, y)
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(x, before)
    assert all(p.grad is None for p in net.parameters())
    penalty.backward()
    assert x.grad is None


def sigma(v):
    return 1 / (1 + math.exp(-v))


def slope(v):
    return sigma(v) * (1 - sigma(v))


def linear(weights):
    net = nn.Linear(weights.shape[1], weights.shape[0], bias=False).double()
    net.weight.data = weights.double()
    return net


def test_linear_two_class_model_in_closed_form():
    # z = (w.x, 0): p = sigmoid(w.x) for y = 0; up its gradient by h sign(w) the logit rises by h |w|_1.
    w = torch.tensor([0.5, -2.0, 0.25])
    net = linear(torch.stack([w, torch.zeros(3)]))
    x = torch.tensor([[0.2, 0.4, 0.9]], dtype=torch.float64)
    z = 0.1 - 0.8 + 0.225
    expected = ((sigma(z + 0.01 * 2.75) - sigma(z)) / 0.01) ** 2
    y = torch.tensor([0])
    assert sparse_gradient_penalty(net, x, y).item() == pytest.approx(expected, rel=1e-10)
    # d/dw of ((s(z + h|w|) - s(z)) / h)^2 with the direction frozen
    sparse_gradient_penalty(net, x, y).backward()
    r = (sigma(z + 0.0275) - sigma(z)) / 0.01
    moved = x[0] + 0.01 * w.double().sign()
    by_formula = 2 * r / 0.01 * (slope(z + 0.0275) * moved - slope(z) * x[0])
    assert torch.allclose(net.weight.grad[0], by_formula, rtol=1e-9)
    # the dual norms at first order, p' = s(z)(1 - s(z))
    g = slope(z) * w.abs()
    tiny = {"step_size": 1e-5, "power": 1}
    assert sparse_gradient_penalty(net, x, y, **tiny).item() == pytest.approx(g.sum().item(), rel=1e-4)
    assert sparse_gradient_penalty(net, x, y, direction="l2", **tiny).item() == pytest.approx(g.norm().item(), rel=1e-4)
    assert sparse_gradient_penalty(net, x, y, direction="l1", **tiny).item() == pytest.approx(g.max().item(), rel=1e-4)
    # rooms up the gradient: 0.8, 0.4 (down to 0), 0.1; two best gains: 0.4 * 2 and 0.8 * 0.5
    l0 = sparse_gradient_penalty(net, x, y, direction="l0", coordinates=2, **tiny)
    assert l0.item() == pytest.approx(slope(z) * 1.2, rel=1e-4)
    ratio = 2.75**2 / (0.25 + 4 + 0.0625)
    assert gradient_ratio_penalty(net, x, y).item() == pytest.approx(ratio, rel=1e-9)


def test_no_room_at_the_wall_counts_nothing():
    w = torch.tensor([1.0, -1.0])
    net = linear(torch.stack([w, torch.zeros(2)]))
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)  # the first sits in the corner that p climbs to
    y = torch.tensor([0, 0])
    for direction in ("l1", "l0"):
        both = sparse_gradient_penalty(net, x, y, direction=direction)
        second = sparse_gradient_penalty(net, x[1:], y[1:], direction=direction)
        assert both.item() == pytest.approx(second.item() / 2)
        assert both.item() > 0
    both.backward()
    assert torch.isfinite(net.weight.grad).all()


def test_room_is_that_of_the_domain():
    w = torch.tensor([1.0, 3.0])
    net = linear(torch.stack([w, torch.zeros(2)]))
    x, y = torch.tensor([[0.0, 2.5]], dtype=torch.float64), torch.tensor([0])
    options = {"direction": "l0", "coordinates": 1, "step_size": 1e-5, "power": 1}
    for domain, gain in ((Box(0, 3), 3.0), (Box(-1, 2.6), 2.6), (Counts(), 3.0)):
        got = sparse_gradient_penalty(net, x, y, domain=domain, **options).item()
        assert got == pytest.approx(slope(7.5) * gain, rel=1e-3)


def test_saturated_sample_has_no_way_up_but_a_way_down():
    net = linear(torch.tensor([[12.0, 0.0], [0.0, 0.0]]))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    up, down, both = (
        sparse_gradient_penalty(net, x, y, difference=d, step_size=0.5).item()
        for d in ("forward", "backward", "central")
    )
    assert up < 1e-4 * down
    assert math.sqrt(both) == pytest.approx((math.sqrt(up) + math.sqrt(down)) / 2)


def test_competitor_is_frozen_at_the_clean_point():
    # Class 1 is the best wrong class at x; after the step class 2 would be.
    net = linear(torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.49, 4.0]]))
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    got = sparse_gradient_penalty(net, x, y, step_size=0.1).item()
    assert got == pytest.approx(((sigma(0.55) - sigma(0.5)) / 0.1) ** 2, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e3, 1e-12, 0.0])
@pytest.mark.parametrize("direction", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("output", ["margin", "softmax"])
def test_extreme_logits_stay_finite(dtype, scale, direction, output):
    net = nn.Linear(5, 3).to(dtype)
    net.weight.data *= scale
    x, y = torch.rand(4, 5, dtype=dtype), torch.randint(3, (4,))
    options = {"direction": direction, "output": output}
    for penalty in (
        sparse_gradient_penalty(net, x, y, **options),
        sparse_gradient_penalty(net, x, y, difference="central", **options),
        gradient_ratio_penalty(net, x, y, output=output),
    ):
        net.zero_grad()
        penalty.backward()
        assert torch.isfinite(penalty)
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("direction", ["linf", "l2", "l1", "l0"])
def test_one_sample_and_two_classes(direction):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1])
    each = [sparse_gradient_penalty(net, x[i : i + 1], y[i : i + 1], direction=direction) for i in range(5)]
    whole = sparse_gradient_penalty(net, x, y, direction=direction)
    assert whole.item() == pytest.approx(sum(each).item() / 5, rel=1e-3)
    # With two classes the two-class softmax is the softmax.
    full = sparse_gradient_penalty(net, x, y, direction=direction, output="softmax")
    assert full.item() == pytest.approx(whole.item(), rel=2e-3)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.sound = nn.Linear(4, 3).double(), nn.Linear(2, 3).double()

    def forward(self, x):
        return self.image(x["image"].flatten(1)) + self.sound(x["sound"])


@pytest.mark.parametrize("direction", ["linf", "l2", "l1", "l0"])
def test_a_dict_is_one_long_vector(direction):
    net = TwoInputs()
    joint = nn.Linear(6, 3).double()
    joint.weight.data = torch.cat([net.image.weight, net.sound.weight], 1).detach()
    joint.bias.data = (net.image.bias + net.sound.bias).detach()
    x = {"image": torch.rand(5, 2, 2).double(), "sound": torch.rand(5, 2).double()}
    y = torch.randint(3, (5,))
    flat = torch.cat([x["image"].flatten(1), x["sound"]], 1)
    for penalty, options in ((sparse_gradient_penalty, {"direction": direction}), (gradient_ratio_penalty, {})):
        got, wanted = penalty(net, x, y, **options), penalty(joint, flat, y, **options)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-10)
    watched = {k: v.clone().requires_grad_() for k, v in x.items()}
    shared = sparse_gradient_penalty(net, watched, y, logits=net(watched), direction=direction)
    assert shared.item() == pytest.approx(sparse_gradient_penalty(net, x, y, direction=direction).item(), rel=1e-12)


def test_stochastic_networks_are_compared_under_the_same_noise():
    torch.manual_seed(1)
    smooth = nn.Linear(20, 3)
    noisy = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    x, y = torch.rand(16, 20), torch.randint(3, (16,))
    # |p(x + h d) - p(x)| / h is bounded by the slope; fresh masks would give differences of 0.1 over 0.01, squared.
    assert sparse_gradient_penalty(noisy, x, y).item() < 20 * sparse_gradient_penalty(smooth, x, y).item()
    state = torch.get_rng_state()
    noisy(x)
    after_one = torch.get_rng_state()
    torch.set_rng_state(state)
    sparse_gradient_penalty(noisy, x, y)
    assert torch.equal(torch.get_rng_state(), after_one)


def test_gradient_reaches_whatever_made_the_input():
    front, net = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    raw, y = torch.rand(5, 4).double(), torch.randint(3, (5,))
    sparse_gradient_penalty(net, front(raw), y).backward()
    eps, i, j = 1e-6, 1, 2
    numeric = []
    for sign in (1, -1):
        with torch.no_grad():
            front.weight[i, j] += sign * eps
        numeric.append(sparse_gradient_penalty(net, front(raw).detach(), y).item())
        with torch.no_grad():
            front.weight[i, j] -= sign * eps
    assert front.weight.grad[i, j].item() == pytest.approx((numeric[0] - numeric[1]) / (2 * eps), rel=1e-4)


def test_ratio_gradient_against_finite_differences():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.rand(4, 6).double(), torch.randint(3, (4,))
    gradient_ratio_penalty(net, x, y).backward()
    for parameter in (net[0].weight, net[2].weight):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 1] += sign * 1e-6
            values.append(gradient_ratio_penalty(net, x, y).item())
            with torch.no_grad():
                parameter[0, 1] -= sign * 1e-6
        assert parameter.grad[0, 1].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_ratio_needs_a_smooth_surrogate():
    x, y = torch.rand(4, 1, 4, 4).double(), torch.randint(4, (4,))
    for rule, works in ((surrogates.Atan(2.0), True), (surrogates.Triangular(1.0), False)):
        net = ConvNet(4, 1, 4, channels=(8,), hidden=16, neuron=LIF(0.9, surrogate=rule)).double()
        if works:
            gradient_ratio_penalty(net, x, y).backward()
            assert net.features[0].weight.grad.abs().max() > 0
            continue
        with pytest.raises(RuntimeError, match="Triangular"):
            gradient_ratio_penalty(net, x, y).backward()


def test_fidelity_of_a_smooth_net_is_one_and_of_quantised_steps_is_not():
    torch.manual_seed(3)
    x, y = torch.rand(64, 1, 4, 4).double(), torch.randint(4, (64,))
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    assert fidelity(measure(FiniteDifference(step_size=1e-4), smooth, x, y)).item() > 0.999
    spiking = spiking_net().eval()
    assert fidelity(measure(FiniteDifference(step_size=1e-7), spiking, x, y)).item() < 0.5
    constant = linear(torch.zeros(3, 2))
    got = fidelity(measure(FiniteDifference(), constant, torch.rand(4, 2).double(), torch.zeros(4, dtype=torch.int64)))
    assert got.item() == 0.0
    with pytest.raises(ValueError, match="ratio"):
        fidelity(measure(GradientRatio(), smooth, x, y))


def test_the_scale_of_the_input_gradient_changes_nothing():
    net = relu_net()
    x, y = batch()
    one = measure(FiniteDifference(), net, x, y)
    two = measure(FiniteDifference(), net, x, y, grad_scale=torch.tensor(2.0**16))
    assert torch.equal(one.penalty, two.penalty)
    assert torch.allclose(one.slope, two.slope, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "l7"}, "unknown direction 'l7'; choose one of linf, l2, l1, l0"),
        ({"output": "logit"}, "unknown output 'logit'"),
        ({"difference": "sideways"}, "unknown difference"),
        ({"power": 3}, "unknown power 3; choose one of 1, 2"),
        ({"step_size": 0.0}, "step_size must be finite and above 0"),
        ({"step_size": math.nan}, "step_size must be"),
        ({"step_size": -0.1}, "step_size must be"),
        ({"direction": "l0", "step_size": 1.5}, r"share of the room in \(0, 1\]"),
        ({"coordinates": 3}, "only applies to the directions 'l1' and 'l0'"),
        ({"direction": "l1", "coordinates": 0}, "coordinates must be an integer >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_gradient_penalty(nn.Linear(3, 2), torch.rand(2, 3), torch.tensor([0, 1]), **options)


def test_bad_inputs():
    net, x, y = nn.Linear(3, 2), torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="x does not require grad"):
        sparse_gradient_penalty(net, x, y, logits=net(x))
    watched = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="logits do not depend on x"):
        sparse_gradient_penalty(net, watched, y, logits=net(x))
    with pytest.raises(ValueError, match="logits do not depend on x"):
        sparse_gradient_penalty(net, watched, y, logits=net(watched).detach())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        sparse_gradient_penalty(net, x, y)
    with pytest.raises(ValueError, match=r"floating-point inputs, got torch\.int64"):
        sparse_gradient_penalty(net, torch.ones(2, 3, dtype=torch.int64), y)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1 for 2 classes, got 0\.\.2"):
        sparse_gradient_penalty(net, x, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.1"):
        sparse_gradient_penalty(net, x, torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match="labels must be class indices"):
        sparse_gradient_penalty(net, x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="got 3 labels for logits of 2 samples"):
        sparse_gradient_penalty(net, x, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="the batch is empty"):
        sparse_gradient_penalty(net, x[:0], y[:0])
    with pytest.raises(TypeError, match="returned tuple; return the logits alone"):
        sparse_gradient_penalty(lambda v: (net(v), v), x, y)
    with pytest.raises(ValueError, match=r"float logits of shape \(B, K\) with K >= 2"):
        sparse_gradient_penalty(nn.Linear(3, 1), x, y)
