"""Sparse-PGD and PGD0 against loops written from the papers, one sample at a time; linear optimum; lattices."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sg_lightning.attacks import PGD0, SPGD, Oracle, load_suite
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L2, Budget

SHAPE = (3, 4, 4)
PIXELS, N = 16, 48
BOX = Box()


class Net(nn.Module):
    """A smooth network that keeps the points it was asked about."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(N, 24), nn.Linear(24, 4)
        self.first.weight.data *= 3
        self.double()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return self.last(torch.tanh(self.first(x.flatten(1).double())))


class Linear(nn.Module):
    """Two logits whose difference is w.x, so that the best attack has a closed form; five dead values."""

    def __init__(self, scale=1e-2):
        super().__init__()
        w = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        w[:5] = 0.0
        self.w, self.scale = nn.Parameter(w), scale

    def forward(self, x):
        margin = (x.flatten(1) * self.w.to(x.dtype)).sum(1) * self.scale
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def images(n=6, domain=BOX, seed=1):
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = domain.low + domain.width * x
    return x if domain.lattice is None else x.round()


def ids(n):
    return SampleGenerator.from_ids(0, range(n))


def slope(net, point, y):
    """Gradient of the cross-entropy at one point."""
    point = point.clone().requires_grad_()
    return torch.autograd.grad(cross_entropy(net(point[None]), y[None]), point)[0]


def follow_spgd(x, y, noise, threat, variant, steps):
    """Sparse-PGD for one sample with p (C, H, W) and m (H, W), gradients by autograd; [0, 1] inputs."""
    net, k = Net(), threat.count
    cells = threat.unit == "cells"
    run = noise.fork("restart", 0)
    p = run.fork("change").uniform(x[None], -1.0, 1.0)[0]
    p = torch.min(torch.max(p, -x), 1 - x)
    m = run.fork("mask").normal(torch.zeros(1, N if cells else PIXELS, dtype=torch.float64))[0]
    m = m.view(SHAPE if cells else SHAPE[1:])
    stuck, points = 0, []
    for step in range(steps):
        hard = torch.zeros(m.numel(), dtype=torch.float64)
        hard[m.flatten().topk(k).indices] = 1.0
        hard = hard.view(m.shape)
        points.append(x + p * hard)
        g = slope(net, points[-1], y)
        p_, m_ = p.clone().requires_grad_(), m.clone().requires_grad_()
        soft = p_ * torch.sigmoid(m_)
        to_p, to_m = torch.autograd.grad(soft, (p_, m_), grad_outputs=g)
        if variant == "projected":
            to_p = g * hard
        p = torch.min(torch.max(p + 0.25 * to_p.sign(), -x), 1 - x)
        m = m + 0.25 * m.numel() ** 0.5 * to_m / to_m.norm()
        after = torch.zeros(m.numel(), dtype=torch.float64)
        after[m.flatten().topk(k).indices] = 1.0
        stuck = stuck + 1 if torch.equal(after.view(m.shape), hard) else 0
        if stuck == 3:
            m, stuck = run.fork("mask", step).normal(m.reshape(1, -1))[0].view(m.shape), 0
    return points


def follow_pgd0(x, y, noise, threat, steps):
    """PGD0 for one sample: random start in the box, long step by the L1-normalised gradient, k best pixels."""
    net = Net()

    def keep(point):
        change = point - x
        clipped = (x + change).clamp(0, 1) - x
        gain = change.square() - (change - clipped).square()
        gain = gain.flatten() if threat.unit == "cells" else gain.sum(0).flatten()
        mask = torch.zeros(len(gain), dtype=torch.float64)
        mask[gain.topk(threat.count).indices] = 1.0
        return x + clipped * mask.view(SHAPE if threat.unit == "cells" else SHAPE[1:])

    point, points = keep(noise.fork("restart", 0).uniform(x[None], 0.0, 1.0)[0]), []
    for _ in range(steps):
        points.append(point)
        g = slope(net, point, y)
        point = keep(point + 0.15 * N * g / g.abs().sum())
    return points


@pytest.mark.parametrize("unit", ["pixels", "cells"])
@pytest.mark.parametrize("which", ["unprojected", "projected", "pgd0"])
def test_every_point_is_that_of_the_paper(which, unit):
    threat, steps = L0(3, unit=unit), 25
    attack = PGD0(threat, steps=steps) if which == "pgd0" else SPGD(threat, steps=steps, variant=which)
    x, noise, net = images(4), ids(4), Net()
    y = net(x).argmax(1)
    net.seen.clear()
    attack.run(Oracle(net), x, y, generator=noise, early_drop=False)
    seen = torch.stack(net.seen[1 : steps + 1])  # after the clean inputs
    for k in range(4):
        alone = noise.select(torch.tensor([k]))
        paper = (
            follow_pgd0(x[k], y[k], alone, threat, steps)
            if which == "pgd0"
            else follow_spgd(x[k], y[k], alone, threat, which, steps)
        )
        assert torch.allclose(seen[:, k], torch.stack(paper), atol=1e-9)


def optimum(threat, w, x):
    """Return the largest fall of w.x for one sample."""
    domain = threat.domain
    gain = np.abs(w) * np.where(w > 0, x - domain.low, domain.high - x)
    if threat.unit == "pixels":
        gain = gain.reshape(3, PIXELS).sum(0)
    return np.sort(gain)[::-1][: threat.count].sum()


@pytest.mark.parametrize(
    ("unit", "variant", "bar"),
    [("pixels", "unprojected", 0.995), ("cells", "unprojected", 0.995), ("pixels", "projected", 0.95),
     ("cells", "projected", 0.8)],
)  # fmt: skip
@pytest.mark.parametrize("domain", [Box(), Box(-1.0, 3.0), Binary(), Counts(4)], ids=str)
@pytest.mark.parametrize("scale", [1e-2, 1e-10])
def test_linear_model_falls_to_its_optimum(domain, unit, variant, bar, scale):
    threat = L0(3, domain, unit=unit)
    model, x = Linear(scale), images(8, domain)
    y = torch.zeros(8, dtype=torch.int64)
    result = SPGD(threat, variant=variant).run(Oracle(model), x, y, generator=ids(8), goal="loss")
    assert bool(threat.contains(result.x_adv, x).all())
    w = model.w.detach().numpy()
    best = np.array([optimum(threat, w, one.flatten().numpy()) for one in x])
    fall = ((x - result.x_adv).flatten(1) @ model.w).detach().numpy()
    assert (fall / best).mean() >= bar
    assert (fall > 0).all()


def test_longer_runs_contain_shorter_ones():
    x, net = images(40, seed=5), Net()
    y = net(x).argmax(1)
    for attack in (SPGD, PGD0):
        short, long, again = (
            attack(L0(2), steps=steps, restarts=restarts).run(Oracle(net), x, y, generator=ids(40))
            for steps, restarts in ((5, 1), (40, 1), (5, 4))
        )
        for more in (long, again):
            assert bool((more.success >= short.success).all())
            assert bool((more.loss >= short.loss)[~more.success].all())
        assert 0 < int(short.success.sum()) < int(long.success.sum())


def test_mask_that_stays_is_drawn_again():
    class Flat(Net):
        def forward(self, x):
            return super().forward(0 * x)

    net, x = Flat(), images(3)
    y = net(x).argmax(1)
    net.seen.clear()
    oracle = Oracle(net)
    shown = []
    net.register_forward_pre_hook(lambda _, given: shown.append(given[0].detach()))
    result = SPGD(L0(2), steps=13).run(oracle, x, y, generator=ids(3), early_drop=False)
    supports = [((point != x).any(1).flatten(1)) for point in shown[1:]]
    changes = [not torch.equal(a, b) for a, b in pairwise(supports)]
    assert changes == [False, False, True] * 4 + [False]
    assert result.zero_gradients.tolist() == [13] * 3
    assert not result.success.any()


@pytest.mark.parametrize("unit", ["pixels", "cells"])
@pytest.mark.parametrize("attack", [SPGD, PGD0])
def test_small_budgets_float32_and_single_samples(attack, unit):
    x = images(5).float()
    x[0] = 0.0
    x[1] = 1.0
    net = Net()
    y = net(x).argmax(1)
    none = attack(L0(0, unit=unit), steps=3).run(Oracle(net), x, y, generator=ids(5))
    assert torch.equal(none.x_adv, x)
    threat = L0(2, unit=unit)
    whole = attack(threat, steps=20).run(Oracle(net), x, y, generator=ids(5))
    assert whole.x_adv.dtype == torch.float32
    assert bool(threat.contains(whole.x_adv, x).all())
    one = attack(threat, steps=20).run(Oracle(net), x[2:3], y[2:3], generator=ids(5).select(torch.tensor([2])))
    assert torch.equal(one.success, whole.success[2:3])
    wrong = attack(threat).run(Oracle(net), x, (y + 1) % 4, generator=ids(5))
    assert torch.equal(wrong.x_adv, x)
    assert wrong.queries.tolist() == [1] * 5


def test_inputs_with_time_count_pixels_of_single_steps():
    model = Linear()
    x = images(2).view(2, 3, 2, 2, 2, 2)[:, :, :, 0].reshape(2, 3, 2, 2, 2)  # (B, T, C, H, W)
    flat = lambda z: model(torch.cat([z.flatten(1), z.flatten(1)], 1))
    threat = L0(2)
    result = SPGD(threat, steps=30).run(Oracle(flat), x, torch.zeros(2).long(), generator=ids(2), goal="loss")
    assert ((result.x_adv != x).any(2).flatten(1).sum(1)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SPGD(L2(0.1)), TypeError, "L0 only"),
        (lambda: SPGD(L0(2), variant="dense"), ValueError, "variant must be one of unprojected, projected"),
        (lambda: SPGD(L0(2), steps=0), ValueError, "steps must be"),
        (lambda: PGD0(L0(2), restarts=0), ValueError, "restarts must be"),
        (lambda: PGD0(L0(2), step_size=0), ValueError, "step_size"),
        (lambda: PGD0(L0(2, Binary())), ValueError, "rounds to nothing"),
        (lambda: SPGD(L0(50)).run(Oracle(Linear()), images(2), Linear()(images(2)).argmax(1)), ValueError, "has 16"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_suites_name_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "attacks:\n  - {attack: spgd, variant: projected}\n  - {attack: spgd, steps: 7, restarts: 2}\n  - {attack: pgd0}\n"
    )
    suite = load_suite(path, {"l0": Budget(eps=(1,), headline=1)}, Box())
    assert [a.name for a in suite.entries[0].attacks] == ["spgd-100-projected", "spgd-7x2-unprojected", "pgd0-100"]
