"""Restarts and targets that go on at once give what they give one after the other."""

import pytest
import torch
from torch import nn

from sg_lightning.attacks import APGD, PGD, PGD0, SAPGD, SPGD, MultiTargeted, OnModality, Oracle, room
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Linf, Modality

ATTACKS = [
    PGD(Linf(0.02), steps=4, restarts=3),
    PGD(Linf(0.02), steps=4, restarts=3, random_start=False),
    PGD(L2(0.06), steps=5, restarts=4, momentum=0.5),
    MultiTargeted(Linf(0.02), steps=3, targets=3, restarts=2),
    APGD(Linf(0.02), steps=6, restarts=3),
    APGD(L2(0.06), steps=6, loss="dlr", targets=3),
    APGD(L1(0.15), steps=10, restarts=3),
    SAPGD(Linf(0.02), steps=6, restarts=3),
    SPGD(L0(1), steps=6, restarts=3),
    PGD0(L0(1), steps=6, restarts=3),
]


class Net(nn.Module):
    """Curved, so that runs end differently, and counting what it is asked."""

    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency
        generator = torch.Generator().manual_seed(3)
        self.first = torch.randn(16, 12, generator=generator, dtype=torch.float64)
        self.second = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return torch.sin(self.frequency * x.flatten(1) @ self.first) @ self.second


def attacked(attack, *, keep=None, early_drop=True, goal="success"):
    net = Net(0.2 if isinstance(attack.threat, L0) else 3)
    x = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = net(x).argmax(1)
    ids = list(range(24)) if keep is None else keep
    noise = SampleGenerator.from_ids(5, ids)
    net.sizes.clear()
    return attack.run(Oracle(net), x[ids], y[ids], generator=noise, early_drop=early_drop, goal=goal), net.sizes


def assert_equal(found, expected):
    for name in ("success", "invalid", "iterations", "queries", "gradients", "zero_gradients"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.x_adv, expected.x_adv, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name}-{attack.threat.norm}")
def test_runs_at_once_are_runs_in_turn(attack, monkeypatch):
    monkeypatch.setattr(room, "_CHEAP", {})
    in_turn, calls = attacked(attack)
    assert 0 < int(in_turn.success.sum()) < 24  # some survive, some fall
    assert_equal(attacked(attack, early_drop=False)[0], in_turn)
    for rows in (40, 1000):
        monkeypatch.setattr(room, "_CHEAP", {"cpu": rows})
        at_once, fewer = attacked(attack)
        assert_equal(at_once, in_turn)
    assert len(fewer) < len(calls)
    some = [3, 17, 8, 20]
    alone, _ = attacked(attack, keep=some)
    for name in ("success", "iterations", "queries"):
        assert torch.equal(getattr(alone, name), getattr(in_turn, name)[some])
    torch.testing.assert_close(alone.x_adv, in_turn.x_adv[some], rtol=1e-9, atol=1e-9)


def test_later_runs_break_what_the_first_leaves(monkeypatch):
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 1000})
    one, many = (attacked(PGD(Linf(0.05), steps=1, step_size=1e-3, restarts=n))[0] for n in (1, 12))
    assert bool((many.success >= one.success).all())
    assert int(many.success.sum()) > int(one.success.sum())
    late = many.success & ~one.success
    assert torch.equal(many.iterations[one.success], one.iterations[one.success])
    assert bool((many.iterations[late] >= 1).all())  # counted as if the runs had gone in turn
    assert int(many.iterations[late].max()) > 4


def test_a_sample_costs_no_more_than_in_turn_once_an_earlier_run_has_broken_it(monkeypatch):
    """Later runs of a sample stop with the earlier one."""
    attack = PGD(Linf(0.2), steps=50, restarts=4)
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 1000})
    found, sizes = attacked(attack)
    assert bool(found.success.all())
    assert sum(sizes) < 4 * (int(found.queries.sum()) + 24)


def test_training_keeps_the_highest_loss_of_all_runs(monkeypatch):
    one, many = (attacked(PGD(Linf(0.02), steps=4, restarts=n), goal="loss")[0] for n in (1, 4))
    assert bool((many.loss >= one.loss - 1e-12).all())
    assert bool((many.loss > one.loss + 1e-6).any())


def test_runs_at_once_on_one_modality(monkeypatch):
    """Rows of later runs see the other modalities of their own sample."""
    net = Net(3)
    threat = Modality("image", Linf(0.02))
    generator = torch.Generator().manual_seed(1)
    x = {
        "image": torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64),
        "audio": torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64),
    }

    def model(inputs):
        return net(inputs["image"]) + net(inputs["audio"])

    y = model(x).argmax(1)
    attack = OnModality(threat, PGD(Linf(0.02), steps=4, restarts=3))
    noise = SampleGenerator.from_ids(5, list(range(12)))
    found = []
    for cheap in ({}, {"cpu": 1000}):
        monkeypatch.setattr(room, "_CHEAP", cheap)
        found.append(attack.run(Oracle(model), x, y, generator=noise))
    in_turn, at_once = found
    assert 0 < int(in_turn.success.sum()) < 12
    assert torch.equal(at_once.success, in_turn.success)
    assert torch.equal(at_once.queries, in_turn.queries)
    torch.testing.assert_close(at_once.x_adv, in_turn.x_adv, rtol=1e-9, atol=1e-9)
