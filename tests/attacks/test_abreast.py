"""Estimators side by side in one pass give what they give one after the other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sg_lightning.attacks import (
    APGD,
    ASSG,
    BPTR,
    BPTT,
    HART,
    PDSG,
    PGD,
    PGD0,
    RGA,
    SAPGD,
    SPGD,
    Act,
    Entry,
    GreedyFlips,
    Mix,
    Oracle,
    SpikeRetimingAttack,
    Suite,
    SwapFlips,
    load_suite,
    room,
)
from sg_lightning.attacks.abreast import companions, run_abreast
from sg_lightning.attacks.estimators import Memory, beside
from sg_lightning.attacks.estimators.beside import Each
from sg_lightning.attacks.losses import get_loss
from sg_lightning.backbones import ConvNet, SpikingMLP
from sg_lightning.evaluation import engine
from sg_lightning.evaluation.engine import RobustnessRun
from sg_lightning.neurons import LIF
from sg_lightning.neurons.surrogates import Atan
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, Budget, EventFlips, Linf, SpikeRetiming

ESTIMATORS = [
    BPTT(), BPTT(Atan(3.0)), HART(0.5), ASSG(0.4), ASSG(0.45, "triangular"), PDSG(), BPTR(), RGA(), Act(),
]  # fmt: skip
SLOPES = [BPTT(), BPTT(Atan(3.0)), ASSG(0.4), PDSG()]


class Counting(nn.Module):
    """Counts calls and rows."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.net(x)


def images():
    torch.manual_seed(2)
    net = ConvNet(num_classes=4, input_size=8, channels=(8,), hidden=24, time_steps=4, neuron=LIF(0.8, 0.4))
    return Counting(net.double().eval()), torch.rand(10, *net.input_shape, dtype=torch.float64)


def rasters(**settings):
    torch.manual_seed(2)
    net = SpikingMLP(12, (24,), num_classes=4, time_steps=6, neuron=LIF(0.8, 0.3), **settings)
    return Counting(net.double().eval()), (torch.rand(10, *net.input_shape) < 0.3).double()


NETS = {"images": (images, ESTIMATORS), "recurrent": (lambda: rasters(recurrent=True), SLOPES)}


@pytest.fixture(params=NETS)
def case(request):
    build, estimators = NETS[request.param]
    net, x = build()
    return net, x, net(x).argmax(1), estimators


def gradients(oracle, x, y, memory=None, rows=None):
    """Two steps of a trajectory, so that memories matter."""
    memory = Memory() if memory is None else memory
    first = oracle.value_and_grad(x, y, get_loss("ce"), memory, rows)
    return first, oracle.value_and_grad(x + 0.05 * first.grad.sign(), y, get_loss("ce"), memory, rows)


def assert_same(found, expected):
    for one, two in zip(found, expected, strict=True):
        for name in ("loss", "logits", "grad"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-12)


def test_a_mix_takes_one_pass_where_few_samples_are_left(case, monkeypatch):
    net, x, y, estimators = case
    oracle = Oracle(net, estimator=Mix(estimators))
    monkeypatch.setattr(room, "_CHEAP", {})
    in_turn = gradients(oracle, x, y)
    assert net.calls[-1] == len(x)
    counted = replace(oracle.counts)
    net.calls.clear()
    monkeypatch.setattr(room, "_CHEAP", {"cpu": len(x) * len(estimators)})
    at_once = gradients(oracle, x, y)
    assert net.calls == [len(x) * len(estimators)] * 2
    assert oracle.counts.forwards == 2 * counted.forwards  # a row is a row
    assert oracle.counts.backwards == 2 * counted.backwards
    assert in_turn[1].grad.abs().max() > 0
    assert_same(at_once, in_turn)


def test_every_sample_has_the_gradient_of_its_estimator(case):
    """Also when some samples have dropped out, in any order, and in chunks."""
    net, x, y, estimators = case
    count = len(estimators)
    alone = [gradients(Oracle(net, estimator=estimator), x, y) for estimator in estimators]
    for size in (None, 7):
        oracle = Oracle(net, estimator=Each(tuple(estimators), len(x)), batch_size=size)
        whole, labels = x.repeat(count, *[1] * (x.dim() - 1)), y.repeat(count)
        for rows in (None, torch.randperm(len(labels))[: len(labels) - 9]):
            some = slice(None) if rows is None else rows
            found = gradients(oracle, whole[some], labels[some], rows=rows)
            for step, gradient in enumerate(found):
                for name in ("loss", "logits", "grad"):
                    expected = torch.cat([getattr(own[step], name) for own in alone])[some]
                    torch.testing.assert_close(getattr(gradient, name), expected, rtol=1e-9, atol=1e-12)


def test_memories_follow_samples_that_drop_out():
    net, x = images()
    y = net(x).argmax(1)
    estimators = (ASSG(0.4), HART(0.5), ASSG(0.45))
    oracle = Oracle(net, estimator=Each(estimators, len(x)))
    memory, whole, labels = Memory(), x.repeat(3, 1, 1, 1), y.repeat(3)
    oracle.value_and_grad(whole, labels, get_loss("ce"), memory)
    kept = torch.tensor([1, 4, 13, 22, 29])
    found = oracle.value_and_grad(whole[kept], labels[kept], get_loss("ce"), memory.select(kept), kept)
    for place, row in enumerate(kept.tolist()):
        own, alone = Memory(), Oracle(net, estimator=estimators[row // len(x)])
        for _ in range(2):
            one = alone.value_and_grad(whole[row : row + 1], labels[row : row + 1], get_loss("ce"), own)
        torch.testing.assert_close(found.grad[place], one.grad[0], rtol=1e-9, atol=1e-12)


IMAGES = [
    PGD(Linf(0.03), steps=6),
    PGD(Linf(0.02), steps=4, restarts=2),
    APGD(Linf(0.03), steps=8),
    APGD(Linf(0.02), steps=6, loss="dlr", targets=2),
    APGD(L1(0.4), steps=8),
    SAPGD(Linf(0.03), steps=6, restarts=2),
    SPGD(L0(1), steps=4),
    PGD0(L0(1), steps=4),
]
SPIKES = [
    GreedyFlips(EventFlips(1), candidates=2),
    SwapFlips(EventFlips(1), steps=2, swaps=3),
    SpikeRetimingAttack(SpikeRetiming(3, measure="1"), steps=6),
]


@pytest.mark.parametrize("attack", IMAGES + SPIKES, ids=lambda a: f"{a.name}-{a.threat.norm}")
def test_attacks_abreast_are_attacks_in_turn(attack, monkeypatch):
    net, x = images() if attack in IMAGES else rasters()
    y = net(x).argmax(1)
    attacks = [replace(attack, estimator=estimator) for estimator in (None, HART(0.5), ASSG(0.4), BPTT(Atan(3.0)))]
    oracle = Oracle(net)
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 1000})
    assert companions(attacks[0], attacks[1:], oracle, y) == attacks[1:]
    noises = [SampleGenerator.from_ids(3, list(range(len(y)))).fork(a.name) for a in attacks]
    together = run_abreast(attacks, oracle, x, y, noises)
    standing, broken = torch.arange(len(y)), []
    for own, noise, (found, given_up) in zip(attacks, noises, together, strict=True):
        if not len(standing):
            break
        assert given_up.nonzero().squeeze(1).tolist() == sorted(set(range(len(y))) - set(standing.tolist()))
        expected = own.run(oracle, x[standing], y[standing], generator=noise.select(standing))
        found = found.of(standing)
        for name in ("success", "invalid", "iterations", "queries", "gradients", "zero_gradients"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found.x_adv, expected.x_adv, rtol=1e-7, atol=1e-9)
        broken.append(int(expected.success.sum()))
        standing = standing[~expected.success]
    assert len(broken) > 1
    assert sum(broken) > 0


def test_only_what_differs_in_its_estimator_runs_along(monkeypatch):
    net, x = images()
    y, oracle = net(x).argmax(1), Oracle(net)
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 30})
    one, two, three = (APGD(Linf(0.03), steps=8, estimator=e) for e in (None, HART(0.5), ASSG(0.4)))
    assert companions(one, [two, three], oracle, y) == [two, three]
    assert companions(one, [two, three, replace(two, estimator=PDSG())], oracle, y) == [two, three]  # no room
    assert companions(one, [two, three], oracle, y.repeat(2)) == []
    for other in (
        replace(two, steps=9), PGD(Linf(0.03), estimator=HART()), replace(two, estimator=PDSG("batch")),
        replace(two, estimator=Mix()),
    ):  # fmt: skip
        assert companions(one, [other, three], oracle, y) == []
    assert companions(replace(one, estimator=PDSG("batch")), [two], oracle, y) == []
    net.stochastic = True
    assert companions(one, [two, three], Oracle(net), y) == []


def test_a_suite_gives_the_same_rows(monkeypatch, tmp_path):
    net, x = images()
    y = net(x).argmax(1)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "eps: all\ncontrol: true\nattacks:\n"
        "  - {attack: pgd, steps: 3}\n"
        "  - {attack: apgd, steps: 6, estimators: [training, {name: hart, gamma: 0.5}, assg], only: [linf, l1]}\n"
        "  - {attack: ddn, steps: 5, only: [l2]}\n"
        "  - {attack: spgd, steps: 6, estimators: [training, assg], only: [l0]}\n"
    )
    rows = []
    for cheap in ({}, {"cpu": 40}):
        monkeypatch.setattr(room, "_CHEAP", cheap)
        budgets = {
            "linf": Budget((0.01, 0.02), 0.02),
            "l2": Budget((0.2,), 0.2),
            "l1": Budget((0.3,), 0.3),
            "l0": Budget((1,), 1),
        }
        suite = load_suite(path, budgets)
        net.calls.clear()
        run = RobustnessRun(Oracle(net), suite, seed=4)
        rows.append((run.batch(x, y, range(len(y))), list(net.calls)))
    (in_turn, calls), (abreast, fewer) = rows
    assert len(fewer) < len(calls)
    for one, two in zip(abreast, in_turn, strict=True):
        assert replace(one, size=0.0) == replace(two, size=0.0)
        assert one.size == pytest.approx(two.size, rel=1e-6)
    assert {row.status for row in abreast} >= {"broken", "survived", "skipped"}


def test_what_was_given_up_in_vain_is_done_again(monkeypatch):
    """A sample that one attack breaks on the folded model, but not on the model as it is, meets the next attack in full."""
    net, x = images()
    y = net(x).argmax(1)
    attacks = tuple(APGD(Linf(0.03), steps=8, estimator=e) for e in (None, HART(0.5), ASSG(0.4)))
    suite = Suite("one", (Entry(Linf(0.03), attacks, True),), control=False)
    verify = engine.verify

    def denying(oracle, threat, x, x_adv, y):
        verdict = verify(oracle, threat, x, x_adv, y)
        return replace(verdict, misclassified=torch.zeros_like(verdict.misclassified)) if len(y) == 10 else verdict

    monkeypatch.setattr(engine, "verify", denying)
    rows = []
    for cheap in ({}, {"cpu": 40}):
        monkeypatch.setattr(room, "_CHEAP", cheap)
        found = RobustnessRun(Oracle(net), suite, seed=4).batch(x, y, range(10))
        rows.append([replace(row, size=0.0) for row in found])
    assert rows[0] == rows[1]
    assert any(row.status == "survived" and row.iterations < 8 for row in rows[0])  # broken, and denied


class Mirrored(nn.Module):
    """Shows the network each image and its mirror image: neurons see twice as many samples as the model."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.cat([x, x.flip(-1)])).unflatten(0, (2, len(x))).mean(0)


def test_neurons_that_see_other_samples(monkeypatch):
    """Nobody knows whose rows are whose: estimators take turns."""
    net, x = images()
    net = Mirrored(net.net)
    y = net(x).argmax(1)
    attacks = tuple(APGD(Linf(0.03), steps=8, estimator=e) for e in (None, HART(0.5), Mix(), Mix((HART(0.3), BPTT()))))
    suite = Suite("one", (Entry(Linf(0.03), attacks, True),), control=False)
    rows = []
    for cheap in ({}, {"cpu": 60}):
        monkeypatch.setattr(room, "_CHEAP", cheap)
        found = RobustnessRun(Oracle(net), suite, seed=4).batch(x, y, range(10))
        rows.append([replace(row, size=0.0) for row in found])
    assert rows[0] == rows[1]


def test_a_model_whose_neurons_have_no_one_surrogate_runs_in_turn():
    net, _ = images()
    assert beside.can_be_beside(net)
    next(m for m in net.modules() if isinstance(m, LIF)).surrogate = None
    assert not beside.can_be_beside(net)


def test_parts_of_mixes_side_by_side_keep_their_memories():
    """Wherever ASSG stands among the parts."""
    net, x = images()
    y = net(x).argmax(1)
    mixes = (Mix((ASSG(0.4), BPTT())), Mix((ASSG(0.45, "triangular"), HART(0.5))))
    whole, labels = x.repeat(2, 1, 1, 1), y.repeat(2)

    def walk(oracle, x, y):
        memory, point = Memory(), x
        for _ in range(4):
            found = oracle.value_and_grad(point, y, get_loss("ce"), memory)
            point = point + 0.02 * found.grad.sign()
        return found.grad

    together = walk(Oracle(net, estimator=Each(mixes, len(x))), whole, labels)
    alone = torch.cat([walk(Oracle(net, estimator=mix), x, y) for mix in mixes])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_an_attack_that_does_not_say_which_samples_are_left_runs_alone(monkeypatch):
    net, x = images()
    y, oracle = net(x).argmax(1), Oracle(net)
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 1000})

    class Mine(PGD):
        pass

    one, two = (Mine(Linf(0.03), estimator=e) for e in (None, HART(0.5)))
    assert companions(one, [two], oracle, y) == []
    each = Oracle(net, estimator=Each((BPTT(), HART(0.5)), len(x)))
    with pytest.raises(beside.OtherSamples):
        each.value_and_grad(x[:3], y[:3], get_loss("ce"))


def test_costs_belong_to_the_attack_that_caused_them(monkeypatch):
    net, x = images()
    y = net(x).argmax(1)
    attacks = tuple(APGD(Linf(0.005), steps=8, estimator=e) for e in (None, HART(0.5), ASSG(0.4)))
    monkeypatch.setattr(room, "_CHEAP", {"cpu": 40})
    run = RobustnessRun(Oracle(net), Suite("one", (Entry(Linf(0.005), attacks, True),), control=False))
    before = replace(run.oracle.counts)
    run.batch(x, y, range(10))
    costs = list(run.costs.values())
    assert len(costs) == 3
    assert all(cost.backwards > 20 and cost.seconds > 0 for cost in costs)
    assert sum(cost.backwards for cost in costs) == run.oracle.counts.backwards - before.backwards
