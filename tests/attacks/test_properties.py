"""What holds for every registered attack under every threat it is defined for, on inputs drawn at random."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sg_lightning.attacks import ATTACKS, PGD, PGD0, Oracle, RandomNoise, Square
from sg_lightning.attacks.adapters.base import ForeignAttack
from sg_lightning.attacks.losses import get_loss
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.inputs import select, tensors
from sg_lightning.neurons import LIF
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, EventFlips, Joint, Linf, RelaxedLinf, SpikeRetiming

SHAPE = (2, 2, 3)
THREATS = [
    Linf(0.15), L1(0.9), L2(0.8, Box(-1, 1)), L0(2), L0(2, unit="cells"), EventFlips(2, Binary()),
    EventFlips(3, Counts(4)), SpikeRetiming(1), SpikeRetiming(2, measure="0"), RelaxedLinf(0.2, Binary()),
    Joint({"image": Linf(0.1), "events": EventFlips(1)}),
]  # fmt: skip


def small(attack):
    """Give an attack as little to do as it can have."""
    few = {
        "steps": 4,
        "rounds": 4,
        "queries": 8,
        "restarts": 1,
        "draws": 2,
        "targets": 2 if attack.kind == "multitargeted" else 0,
    }
    return replace(attack, **{f.name: few[f.name] for f in fields(attack) if f.name in few})


def defined():
    """Build every attack of our own under every threat that it does not refuse."""
    for kind, attack in ATTACKS.items():
        if issubclass(attack, ForeignAttack):
            continue  # their noise belongs to the call
        for threat in THREATS:
            try:
                yield pytest.param(small(attack(threat)), id=f"{kind}-{threat.key}")
            except (TypeError, ValueError):
                continue


CASES = list(defined())
every_attack = pytest.mark.parametrize("attack", CASES)
drawn = given(seed=st.integers(0, 10_000))
few = settings(max_examples=2, deadline=None, derandomize=True)


class Net(nn.Module):
    """A tiny spiking network in float64; of the parts of a dict it adds the answers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire, self.last = nn.Linear(12, 16), LIF(beta=0.8), nn.Linear(16, 3)
        self.first.weight.data *= 4
        self.double()

    def forward(self, x):
        return sum(
            self.last(self.fire(self.first(z.flatten(1).double()).expand(3, -1, -1)).mean(0)) for z in tensors(x)
        )


NET = Net().eval()


def inputs(threat, seed, n=5):
    if isinstance(threat, Joint):
        return {name: inputs(part, seed + k, n) for k, (name, part) in enumerate(threat.threats)}
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = threat.domain.low, threat.domain.high
    x = low + x * (high - low)
    return x.round() if threat.domain.lattice else x


def problem(attack, seed, n=5):
    x = inputs(attack.threat, seed, n)
    return x, NET(x).argmax(1)


def without_budget(threat):
    if isinstance(threat, Joint):
        return Joint({name: part.with_eps(0) for name, part in threat.threats})
    return threat.with_eps(0)


def same(a, b, atol=0.0):
    return all(torch.allclose(one, other, rtol=0, atol=atol) for one, other in zip(tensors(a), tensors(b), strict=True))


def ids(numbers, seed=0):
    return SampleGenerator.from_ids(seed, numbers)


def broken(attack, x, y):
    return attack.run(Oracle(NET), x, y, generator=ids(range(len(y)))).success


def test_every_registered_attack_is_tried():
    own = {kind for kind, attack in ATTACKS.items() if not issubclass(attack, ForeignAttack)}
    assert {param.values[0].kind for param in CASES} == own
    assert {param.values[0].threat for param in CASES} == set(THREATS)


@every_attack
@drawn
@few
def test_results_are_in_ball_and_domain(attack, seed):
    x, y = problem(attack, seed)
    result = attack.run(Oracle(NET), x, y, generator=ids(range(5), seed))
    inside = attack.threat.contains(result.x_adv, x)
    if attack.minimal:  # it may have to go further than eps, which is no success then
        assert bool(attack.threat.domain.contains(result.x_adv).all())
        assert bool((inside | ~result.success).all())
    else:
        assert bool(inside.all())
        assert bool((attack.threat.size(result.x_adv, x) <= attack.threat.budget * (1 + 1e-6)).all())
    assert bool(((NET(result.x_adv).argmax(1) != y) | ~result.success).all())
    assert all(a.dtype == b.dtype for a, b in zip(tensors(result.x_adv), tensors(x), strict=True))


@every_attack
@drawn
@few
def test_no_budget_is_the_identity(attack, seed):
    attack = attack.with_threat(without_budget(attack.threat))
    x, y = problem(attack, seed)
    result = attack.run(Oracle(NET), x, y, generator=ids(range(5), seed))
    assert not bool(result.success.any())
    if not attack.minimal:
        assert same(result.x_adv, x)
    wrong = attack.run(Oracle(NET), x, (y + 1) % 3, generator=ids(range(5), seed))
    assert bool(wrong.success.all())
    assert same(wrong.x_adv, x)


@pytest.mark.parametrize("attack", [p for p in CASES if p.values[0].kind != "universal"])  # one pattern for all
@drawn
@few
def test_a_sample_does_not_see_the_others(attack, seed):
    x, y = problem(attack, seed, 8)
    whole = attack.run(Oracle(NET), x, y, generator=ids(range(8)))
    for index in ([5], [6, 2, 5, 0], [7, 5, 4, 3, 1]):
        part = attack.run(Oracle(NET), select(x, torch.tensor(index)), y[index], generator=ids(index))
        assert torch.equal(part.success, whole.success[index])
        assert torch.equal(part.queries, whole.queries[index])
        assert same(part.x_adv, select(whole.x_adv, torch.tensor(index)), atol=1e-9)


LED = ("random", "fgsm", "rfgsm", "universal")
CLIMBING = [p for p in CASES if not p.values[0].minimal and p.values[0].kind not in LED]


@pytest.mark.parametrize("attack", CLIMBING)
@drawn
@few
def test_survivors_end_no_lower_than_they_began(attack, seed):
    """Left out are single steps, the control and patterns for all, which do not choose; minimal norms keep sizes."""
    x, y = problem(attack, seed)
    loss = get_loss(getattr(attack, "loss", "margin"))
    result = attack.run(Oracle(NET), x, y, generator=ids(range(5), seed))
    survivors = ~result.success
    start, end = loss(NET(x), y), loss(NET(result.x_adv), y)
    assert torch.allclose(end[survivors], result.loss[survivors], atol=1e-9)
    assert bool((end >= start - 1e-9)[survivors].all())


RESTARTED = [p for p in CASES if any(f.name == "restarts" for f in fields(p.values[0]))]


@pytest.mark.parametrize("attack", RESTARTED)
@drawn
@few
def test_restarts_break_what_one_run_breaks(attack, seed):
    if attack.kind == "multitargeted":  # with several targets, the starts of the second depend on the restarts
        attack = replace(attack, targets=1)
    x, y = problem(attack, seed, 12)
    once, often = (broken(replace(attack, restarts=n), x, y) for n in (1, 3))
    assert bool((often | ~once).all())


@pytest.mark.parametrize(
    ("attack", "setting"),
    [
        (PGD(Linf(0.1), step_size=0.03), "steps"),
        (PGD(L2(0.3), step_size=0.1), "steps"),
        (PGD(L1(0.6), step_size=0.2), "steps"),
        (PGD(EventFlips(2)), "steps"),
        (PGD0(L0(2), step_size=0.5), "steps"),
        (Square(Linf(0.1), rescale=False), "queries"),
        (Square(L2(0.3), rescale=False), "queries"),
        (RandomNoise(Linf(0.15)), "draws"),
    ],
)
@drawn
@few
def test_longer_runs_break_what_shorter_ones_break(attack, setting, seed):
    """A longer run begins as a shorter one where no step depends on their number.

    Left out are those whose schedule is stretched to the number of steps, so that a longer run takes another path: the
    default steps of PGD, the checkpoints of APGD, SA-PGD and sparse-PGD, the cosines of DDN, FMN and sigma-zero, the
    shrinking changes of Sparse-RS, the search over events and Square with ``rescale``.
    """
    x, y = problem(attack, seed, 12)
    short, long = (broken(replace(attack, **{setting: n}), x, y) for n in (2, 9))
    assert bool((long | ~short).all())
