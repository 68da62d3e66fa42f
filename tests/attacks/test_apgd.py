"""APGD and SA-PGD against a loop written from the papers, one sample at a time; targets; losses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sg_lightning.attacks import APGD, PGD, SAPGD, MultiTargeted, Oracle
from sg_lightning.attacks.losses import get_loss
from sg_lightning.neurons import LIF
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Linf

N, CLASSES = 30, 5


class Net(nn.Module):
    """A smooth network, so that a reference in other operations follows the same path."""

    def __init__(self, classes=CLASSES, spiking=False):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(N, 24), nn.Linear(24, classes)
        self.fire = LIF(0.9) if spiking else None
        self.first.weight.data *= 4
        self.double()

    def forward(self, x):
        h = self.first(x.flatten(1))
        return self.last(torch.tanh(h) if self.fire is None else self.fire(h.expand(4, -1, -1)).mean(0))


def case(n=5, seed=0):
    x = torch.rand(n, 1, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, Net()(x).argmax(1), SampleGenerator.from_ids(0, range(n))


def ask(net, point, y):
    point = point.clone().requires_grad_()
    loss = cross_entropy(net(point[None]), y[None])
    (grad,) = torch.autograd.grad(loss, point)
    return float(loss.detach()), grad


def clip(point, x, eps, norm):
    """Project on ball and box: clip for L-infinity, bisection for L2."""
    d = point - x
    if norm == "linf":
        return (x + d.clamp(-eps, eps)).clamp(0, 1)
    inside = (x + d).clamp(0, 1) - x
    if inside.norm() <= eps:
        return x + inside
    low, high = 0.0, 1.0
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if ((x + t * d).clamp(0, 1) - x).norm() < eps else (low, t)
    return (x + low * d).clamp(0, 1)


def by_hand(net, x, y, start, eps, norm, steps):
    """Write algorithm 1 of arXiv 2003.01690 down, checkpoints from a list of all losses."""
    checkpoints, p = [0.0, 0.22], 0.22
    while p < 1.2:
        p += max(checkpoints[-1] - checkpoints[-2] - 0.03, 0.06)
        checkpoints.append(p)
    windows = {round(steps * c) for c in checkpoints[1:]}
    size, point, before = 2 * eps, start, start
    value, grad = ask(net, point, y)
    losses, best, best_value, best_grad = [value], point, value, grad
    last_check, last_best, moved = 0, value, True
    for k in range(steps):
        step = grad.sign() if norm == "linf" else grad / grad.norm()
        z = clip(point + size * step, x, eps, norm)
        new = z if k == 0 else clip(point + 0.75 * (z - point) + 0.25 * (point - before), x, eps, norm)
        before, point = point, new
        value, grad = ask(net, point, y)
        losses.append(value)
        if value > best_value:
            best, best_value, best_grad = point, value, grad
        if k + 1 in windows and k + 1 < steps:
            rises = sum(b > a for a, b in zip(losses[last_check : k + 1], losses[last_check + 1 : k + 2], strict=True))
            shrink = rises <= 0.75 * (k + 1 - last_check) or (not moved and best_value <= last_best)
            moved, last_best, last_check = shrink, best_value, k + 1
            if shrink:
                size, point, grad = size / 2, best, best_grad
    return best


@pytest.mark.parametrize(("threat", "norm"), [(Linf(0.08), "linf"), (L2(0.5), "l2")])
@pytest.mark.parametrize("steps", [20, 100])
def test_apgd_is_algorithm_1(threat, norm, steps):
    net = Net()
    x, y, noise = case()
    found = APGD(threat, steps=steps).run(Oracle(net), x, y, generator=noise, goal="loss").x_adv
    start = threat.sample(x, noise.fork("restart", 0))
    for k in range(len(x)):
        assert torch.allclose(found[k], by_hand(net, x[k], y[k], start[k], threat.budget, norm, steps), atol=1e-6)


def test_sapgd_is_the_published_update():
    net, eps, steps = Net(), 0.08, 100
    x, y, noise = case()
    found = SAPGD(Linf(eps), steps=steps).run(Oracle(net), x, y, generator=noise, goal="loss").x_adv
    start = Linf(eps).sample(x, noise.fork("restart", 0))
    halvings = np.cumsum([22, 19, 16, 13, 10, 7, 6, 6])  # each window three steps shorter, down to six
    for k in range(len(x)):
        point, m, v, best = start[k], 0.0, 0.0, (-1.0, None)
        for i in range(steps + 1):
            loss, g = ask(net, point, y[k])
            best = max(best, (loss, point), key=lambda pair: pair[0])
            size = eps / 2 ** int((halvings <= i).sum())
            m, v = 0.5 * m + g / g.abs().mean(), 0.8 * v + g**2 / (g**2).mean()
            point = clip(point + (m / (v.sqrt() + 1e-12) * size).clamp(-size, size), x[k], eps, "linf")
        assert torch.allclose(found[k], best[1], atol=1e-9)


@pytest.mark.parametrize("eps", [0.6, 3.0])
def test_l1_finds_what_many_random_restarts_of_pgd_do_not_beat(eps):
    net = Net()
    x, y, noise = case(20)
    ours = APGD(L1(eps), steps=100).run(Oracle(net), x, y, generator=noise, goal="loss")
    theirs = PGD(L1(eps), steps=100, restarts=5).run(Oracle(net), x, y, generator=noise, goal="loss")
    assert bool(L1(eps).contains(ours.x_adv, x).all())
    assert float((ours.loss - theirs.loss).mean()) > -0.02


def test_l1_steps_in_wider_balls_count_only_as_projected_on_the_threat():
    net = Net(spiking=True)
    x, _, noise = case(20)
    y = net(x).argmax(1)
    result = APGD(L1(0.3), steps=30).run(Oracle(net), x, y, generator=noise)
    assert bool(L1(0.3).contains(result.x_adv, x).all())
    assert torch.equal(net(result.x_adv).argmax(1) != y, result.success)
    early = result.iterations[result.success & (result.iterations < 18)]
    assert set(early.tolist()) <= {3, 6, 9, 12, 15}
    assert len(early) > 0


@pytest.mark.parametrize(
    "attack", [APGD(Linf(0.06), steps=20, loss="dlr", targets=9), MultiTargeted(Linf(0.06), steps=20)]
)
def test_targets_reach_classes_that_the_untargeted_run_does_not(attack):
    x, y, noise = case(30)
    oracle = Oracle(Net())
    many = attack.run(oracle, x, y, generator=noise)
    # Four wrong classes, so four runs, each of 20 steps, for those that stand.
    assert int(many.iterations.max()) == 4 * 20
    few = type(attack)(Linf(0.06), steps=20, targets=1).run(oracle, x, y, generator=noise)
    assert bool((many.success >= few.success).all())


def test_losses_by_hand():
    z = torch.tensor([[3.0, 1.0, 0.5, -2.0], [0.0, 2.0, 1.0, 5.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    both = torch.stack([y, torch.tensor([3, 2])], 1)
    assert get_loss("margin")(z, y).tolist() == [-2.0, 3.0]
    assert get_loss("dlr")(z, y).tolist() == pytest.approx([-2 / 2.5, 3 / 4])
    assert get_loss("margin", targeted=True)(z, both).tolist() == [-5.0, -1.0]
    assert get_loss("dlr", targeted=True)(z, both).tolist() == pytest.approx([-5 / 3.75, -1 / 4.5])
    assert get_loss("ce", targeted=True)(z, both).tolist() == pytest.approx(
        (-cross_entropy(z, both[:, 1], reduction="none")).tolist()
    )
    scaled = get_loss("dlr")(1e3 * z + 7, y)
    assert torch.allclose(scaled, get_loss("dlr")(z, y))
    two = z[:, :2]
    assert torch.equal(get_loss("dlr")(two, y), get_loss("margin")(two, y))
    assert torch.equal(get_loss("dlr", targeted=True)(z[:, :3], both[1:].expand(2, 2) * 0 + 1), torch.zeros(2).double())


@pytest.mark.parametrize("scale", [1e-8, 1e3])
@pytest.mark.parametrize(
    "make", [lambda t: APGD(t, loss="dlr"), lambda t: APGD(t, loss="margin"), lambda t: SAPGD(t, loss="dlr")]
)
def test_scaled_logits_do_not_stop_them(scale, make):
    class Scaled(Net):
        def forward(self, x):
            return scale * super().forward(x)

    x, y, noise = case(20)
    plain = make(Linf(0.05)).run(Oracle(Net()), x, y, generator=noise).success
    assert torch.equal(make(Linf(0.05)).run(Oracle(Scaled()), x, y, generator=noise).success, plain)
    assert 0 < int(plain.sum()) < 20


def test_two_classes_and_no_gradient():
    net = Net(2)
    x, _, noise = case(6)
    y = net(x).argmax(1)
    for attack in (APGD(Linf(0.3), loss="dlr", targets=9), MultiTargeted(L2(2.0)), SAPGD(Linf(0.3), loss="dlr")):
        assert bool(attack.run(Oracle(net), x, y, generator=noise).success.any())
    flat = lambda z: torch.stack([z.flatten(1).sum(1) * 0, z.flatten(1).sum(1) * 0 - 1], 1)
    for attack in (APGD(Linf(0.3), steps=5), APGD(L1(2.0), steps=9), APGD(L2(1.0), steps=5), SAPGD(Linf(0.3), steps=5)):
        result = attack.run(Oracle(flat), x, y * 0, generator=noise)
        assert not bool(result.success.any() or result.invalid.any())
        assert bool(attack.threat.contains(result.x_adv, x).all())
        assert torch.equal(result.zero_gradients, result.gradients)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: APGD(L0(2)), TypeError, "use PGD under other threats"),
        (lambda: SAPGD(L2(0.1)), TypeError, "L-infinity only"),
        (lambda: APGD(Linf(0.1), steps=0), ValueError, "steps must be a whole number >= 1"),
        (lambda: APGD(Linf(0.1), targets=-1), ValueError, "targets must be a whole number >= 0"),
        (lambda: APGD(Linf(0.1), rho=1.0), ValueError, "rho must be between 0 and 1"),
        (lambda: MultiTargeted(Linf(0.1), targets=0), ValueError, "targets must be a whole number >= 1"),
        (lambda: SAPGD(Linf(0.1), restarts=True), ValueError, "restarts must be"),
        (lambda: APGD(Linf(0.1), loss="cw"), ValueError, "known losses: ce, margin, dlr"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_names_say_what_differs():
    assert APGD(Linf(0.1)).name == "apgd-100"
    assert APGD(Linf(0.1), restarts=5, loss="dlr", targets=9).name == "apgd-100x5-dlr-t9"
    assert SAPGD(Linf(0.1), steps=50, loss="margin").name == "sapgd-50-margin"
    assert MultiTargeted(Linf(0.1), steps=20, targets=3).name == "multitargeted-20t3"
