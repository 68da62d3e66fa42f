"""minimal_distances and accuracy_at: closed forms, the whole curve from one run, samples without a distance."""

import math

import pytest
import torch

from sg_lightning.attacks import DDN, FMN, PGD, SigmaZero
from sg_lightning.evaluation import accuracy_at, minimal_distances
from sg_lightning.threats import L0, L2, Linf

W = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(x):
    """Two logits whose difference is w.(x - 1/2)."""
    margin = (x - 0.5).flatten(1) @ W
    return torch.stack([margin, torch.zeros_like(margin)], 1)


def images(n=64):
    """Inputs so far inside the box that its walls are out of reach."""
    x = torch.rand(n, 1, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.3 + 0.4 * x


@pytest.mark.parametrize(("attack", "dual"), [(FMN(Linf(0.1)), 1), (DDN(L2(0.1)), 2), (FMN(L2(0.1)), 2)])
def test_distances_are_those_of_a_plane(attack, dual):
    x = images()
    logits = linear(x)
    exact = logits[:, 0].abs() / W.norm(p=dual)  # Hoelder: the distance to a plane
    found = minimal_distances(linear, x, logits.argmax(1), attack)
    assert found.dtype == torch.float64
    assert (found >= exact * (1 - 1e-9)).all()
    assert float((found / exact).median()) <= 1.002
    for eps in exact.quantile(torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]).double()).tolist():
        assert abs(accuracy_at(found, eps) - float((exact > eps).double().mean())) <= 2 / 64
    curve = [accuracy_at(found, eps) for eps in torch.linspace(0, 1, 50).tolist()]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == 1.0
    assert curve[-1] == 0.0


@pytest.mark.parametrize("attack", [FMN(Linf(0.1), steps=20), DDN(L2(0.1), steps=20), SigmaZero(L0(1), steps=20)])
def test_distances_do_not_depend_on_batches_and_the_misclassified_have_none(attack):
    x = images()
    y = linear(x).argmax(1)
    y[::8] = 1 - y[::8]
    whole = minimal_distances(linear, x, y, attack, batch_size=64)
    assert torch.equal(whole == 0, torch.arange(64) % 8 == 0)
    assert accuracy_at(whole, 0) == 7 / 8
    for size in (1, 7):
        assert torch.allclose(minimal_distances(linear, x, y, attack, batch_size=size), whole, rtol=1e-9)


def test_nothing_found_is_infinite_and_no_gradient_is_broken():
    x = images(4)
    sure = lambda z: linear(z) + torch.tensor([99.0, 0.0])
    none = minimal_distances(sure, x, torch.zeros(4).long(), DDN(L2(0.1), steps=5))
    assert none.tolist() == [math.inf] * 4
    assert accuracy_at(none, 1e9) == 1.0
    steep = lambda z: sure(z) + 0 * (z.flatten(1)[:, :1] - x[0, 0, 0, 0]).abs().sqrt()
    bad = minimal_distances(steep, x, torch.zeros(4).long(), DDN(L2(0.1), steps=5))
    assert bad.isnan().tolist() == [True, False, False, False]
    assert accuracy_at(bad, 0) == 0.75


def test_budgets_may_be_ratios_and_meet_the_threat():
    at = torch.tensor([8 / 255, 8 / 255 * (1 + 1e-9), 0.1], dtype=torch.float64)
    assert accuracy_at(at, "8/255") == pytest.approx(1 / 3)  # on the edge is inside
    with pytest.raises(TypeError, match="need DDN, FMN or SigmaZero"):
        minimal_distances(linear, images(), torch.zeros(64).long(), PGD(Linf(0.1)))
