"""What estimators remember along an attack, and that it belongs to samples."""

import pytest
import torch
from torch import nn

from sg_lightning.attacks import ASSG, BPTR, BPTT, HART, PDSG, PGD, RGA, Act, Mix, Oracle
from sg_lightning.attacks.estimators import Memory, SingleEstimator
from sg_lightning.attacks.estimators.assg import FAMILIES
from sg_lightning.attacks.losses import cross_entropy, get_loss
from sg_lightning.backbones import ConvNet
from sg_lightning.domains import Box
from sg_lightning.neurons import LIF, SlopeRule
from sg_lightning.neurons.surrogates import Atan, Gaussian, Rectangular, Sigmoid, Triangular
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Linf

THREAT = Linf(0.04, domain=Box(0, 1))


class Net(nn.Module):
    """Two spiking layers in float64; the first LIF serves twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = nn.Linear(20, 24), nn.Linear(24, 24), nn.Linear(16, 4)
        self.shrink, self.fire, self.other = nn.Linear(24, 16), LIF(0.8), LIF(0.9, reset="subtract")
        for layer in (self.first, self.between, self.shrink):
            layer.weight.data *= 4
        self.double()

    def forward(self, x):
        spikes = self.fire(self.first(x).expand(4, -1, -1))
        return self.last(self.other(self.shrink(self.fire(self.between(spikes))))).mean(0)


def case(n=24):
    net = Net()
    x = torch.rand(n, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return net, x, net(x).argmax(1)


def values(memory):
    return list(memory.values.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("a", [0.1, 0.35, 0.425, 0.49])
def test_half_the_vanishing_degree_is_the_kernels_mass_up_to_omega(family, a):
    kernel, omega = FAMILIES[family][0], ASSG(a, family).omega
    grid = torch.linspace(0, omega, 200_001, dtype=torch.float64)
    assert torch.trapezoid(kernel.derivative(grid), grid).item() == pytest.approx(a, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "member"),
    [
        ("atan", Atan),
        ("sigmoid", Sigmoid),
        ("gaussian", lambda alpha: Gaussian(1 / alpha)),
        ("triangular", lambda alpha: Triangular(1 / alpha)),
        ("rectangular", lambda alpha: Rectangular(2 / alpha)),
    ],
)
def test_sharpened_kernels_are_the_members_of_their_family(family, member):
    z = torch.linspace(-2, 2, 41, dtype=torch.float64).view(-1, 1)
    estimator = ASSG(family=family, relax=2.0, decay=0.5)
    slopes = estimator.rule(Memory()).slope(None, z, [])
    for u, slope in zip(z.flatten().tolist(), slopes.flatten(), strict=True):
        mean = 0.5 + 0.5 * abs(u)
        spread = 0.5 * abs(abs(u) - mean)
        rule = member(estimator.omega / (mean + 2 * spread + 1e-4))
        torch.testing.assert_close(slope, rule.derivative(torch.tensor(u, dtype=torch.float64)))


def test_default_omega_is_that_of_the_paper():
    assert ASSG().omega == pytest.approx(2 * 4.16530 / 3.14159265, abs=1e-5)  # tan 76.5°


def test_a_layer_that_serves_twice_has_two_statistics():
    net, x, y = case()
    memory = Memory()
    Oracle(net, estimator=ASSG()).value_and_grad(x, y, cross_entropy, memory)
    visits = {(key[1], key[2]) for _, key in memory.values}
    assert visits == {(net.fire, k) for k in range(8)} | {(net.other, k) for k in range(4)}
    assert {tuple(v.shape) for v in values(memory)} == {(24, 24), (24, 16)}


def test_each_iteration_updates_once_however_many_draws():
    net, x, y = case()
    one, ten = Memory(), Memory()
    for step in range(3):
        point = (x + 0.01 * step).clamp(max=1)
        single = Oracle(net, estimator=ASSG()).value_and_grad(point, y, cross_entropy, one)
        averaged = Oracle(net, estimator=ASSG(), eot=10).value_and_grad(point, y, cross_entropy, ten)
        assert all(torch.equal(a, b) for a, b in zip(values(one), values(ten), strict=True))
        torch.testing.assert_close(averaged.grad, single.grad)  # all draws had the slopes of the first
    assert not ten.frozen


def test_updates_change_the_gradient_and_a_frozen_memory_does_not():
    net, x, y = case()
    oracle, memory = Oracle(net, estimator=ASSG()), Memory()
    first = oracle.value_and_grad(x, y, cross_entropy, memory).grad
    assert torch.equal(first, oracle.value_and_grad(x, y, cross_entropy).grad)  # without memory every call is the first
    assert not torch.allclose(first, oracle.value_and_grad(x, y, cross_entropy, memory).grad)
    held = [value.clone() for value in values(memory)]
    memory.frozen = True
    with ASSG().applied(net, memory):
        net(x.clone().requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(values(memory), held, strict=True))


def test_forward_passes_without_gradient_leave_the_memory_alone():
    net, x, _ = case()
    memory = Memory()
    with ASSG().applied(net, memory), torch.no_grad():
        net(x)
    assert not memory.values


def test_chunks_and_selections_remember_what_the_whole_batch_does():
    net, x, y = case()
    whole, chunked = Memory(), Memory()
    for step in range(3):
        point = (x + 0.01 * step).clamp(max=1)
        a = Oracle(net, estimator=ASSG()).value_and_grad(point, y, cross_entropy, whole)
        b = Oracle(net, estimator=ASSG(), batch_size=7).value_and_grad(point, y, cross_entropy, chunked)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        keep = torch.arange(len(x)) % 3 != step  # samples drop out
        x, y, whole, chunked = x[keep], y[keep], whole.select(keep), chunked.select(keep)
        for ours, theirs in zip(values(whole), values(chunked), strict=True):
            assert len(ours) == len(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_members_of_a_mix_have_their_own_statistics():
    net, x, y = case()
    members, memories, mixed = (ASSG(0.4), ASSG(0.45)), (Memory(), Memory()), Memory()
    for step in range(3):
        point = (x + 0.01 * step).clamp(max=1)
        alone = [Oracle(net, estimator=e).value_and_grad(point, y, cross_entropy, m).grad
                 for e, m in zip(members, memories, strict=True)]  # fmt: skip
        both = Oracle(net, estimator=Mix(members)).value_and_grad(point, y, cross_entropy, mixed)
        torch.testing.assert_close(both.grad, (alone[0] + alone[1]) / 2)


class Spy(SingleEstimator):
    """ASSG that notes how much is remembered at each pass."""

    name = "spy"

    def rule(self, memory) -> SlopeRule:
        self.seen.append(len(memory.values))
        return ASSG().rule(memory)


def test_restarts_start_afresh():
    net, x, y = case()
    spy = Spy()
    object.__setattr__(spy, "seen", [])
    PGD(THREAT, steps=3, restarts=2, estimator=spy).run(Oracle(net), x, y, early_drop=False)
    assert spy.seen[-6:] == [0, 24, 24] * 2


def test_samples_do_not_see_each_other():
    net, x, y = case()
    alone, together = Memory(), Memory()
    for step in range(3):
        torch.manual_seed(step)
        company = torch.rand_like(x)
        company[5] = x[5] + 0.01 * step
        company[6] = torch.nan
        a = Oracle(net, estimator=ASSG()).value_and_grad(company[5:6], y[5:6], cross_entropy, alone)
        b = Oracle(net, estimator=ASSG()).value_and_grad(company, y, cross_entropy, together)
        torch.testing.assert_close(a.grad[0], b.grad[5], rtol=1e-9, atol=1e-12)
        assert b.invalid.nonzero().flatten().tolist() == [6]


ESTIMATORS = [ASSG(), ASSG(0.45, "sigmoid"), PDSG(), HART(), Mix(), Mix((ASSG(), PDSG(), HART(0.5))), BPTR(), RGA(), Act(),
              BPTT(Atan(3.0))]  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.label)
def test_results_do_not_depend_on_batching_or_early_drop(estimator):
    net, x, y = case()
    ids, attack = torch.arange(24), PGD(THREAT, steps=5, restarts=2, estimator=estimator)
    whole = attack.run(Oracle(net), x, y, generator=SampleGenerator.from_ids(0, ids))
    assert 0 < int(whole.success.sum()) < 24
    order = torch.randperm(24)
    runs = [
        (attack.run(Oracle(net), x, y, generator=SampleGenerator.from_ids(0, ids), early_drop=False), ids),
        (attack.run(Oracle(net, batch_size=5), x, y, generator=SampleGenerator.from_ids(0, ids)), ids),
        (attack.run(Oracle(net), x[order], y[order], generator=SampleGenerator.from_ids(0, order)), order),
    ]
    runs += [(attack.run(Oracle(net), x[i], y[i], generator=SampleGenerator.from_ids(0, i)), i) for i in ids.split(9)]
    for run, index in runs:
        assert torch.equal(run.success, whole.success[index])
        assert torch.equal(run.iterations, whole.iterations[index])
        torch.testing.assert_close(run.x_adv, whole.x_adv[index], rtol=0, atol=1e-9)


def test_a_pass_that_fails_leaves_what_was_known():
    """It is taken again with half the samples, from the same statistics."""
    torch.manual_seed(0)
    net = ConvNet(num_classes=4, input_size=8, channels=(6,), hidden=16, time_steps=3, neuron=LIF(0.8, 0.4)).double()
    x = torch.rand(6, *net.input_shape, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.int64)
    found = []
    for fails in (False, True):
        calls = []

        def model(x, fails=fails, calls=calls):
            calls.append(len(x))
            z = net(x)
            if fails and len(calls) == 3:
                raise torch.OutOfMemoryError("no room")
            return z

        whole = Whole(model, net)
        oracle, memory, point = Oracle(whole, estimator=ASSG(0.4)), Memory(), x
        for _ in range(5):
            gradient = oracle.value_and_grad(point, y, get_loss("ce"), memory)
            point = point + 0.02 * gradient.grad.sign()
        found.append((point, gradient.grad, len(calls)))
    assert found[1][2] > found[0][2]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-12)


class Whole(torch.nn.Module):
    """A function whose neurons the oracle finds."""

    def __init__(self, function, net):
        super().__init__()
        self.function, self.net = function, net

    def forward(self, x):
        return self.function(x)
