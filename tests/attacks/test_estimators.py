"""Gradient estimators against their formulas, written out in numpy; where they work and where they are refused."""

import itertools
import json
import math
from dataclasses import fields
from statistics import NormalDist

import numpy as np
import pytest
import snntorch as snn
import torch
from jsonargparse import ArgumentParser
from torch import nn

from sg_lightning.attacks import (
    ASSG,
    BPTR,
    BPTT,
    ENSEMBLES,
    FGSM,
    HART,
    PDSG,
    PGD,
    RGA,
    Act,
    Mix,
    Oracle,
    load_suite,
    make_estimator,
    tune,
)
from sg_lightning.attacks.base import Attack
from sg_lightning.attacks.estimators import Memory
from sg_lightning.attacks.losses import cross_entropy
from sg_lightning.backbones import VGG, ConvNet, SpikingMLP
from sg_lightning.domains import Box
from sg_lightning.neurons import LIF, RecurrentLIF, from_snntorch, fuse_snntorch
from sg_lightning.neurons.surrogates import Atan, Rectangular, StraightThrough, Triangular
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, Linf

STEPS, BETA, THETA = 5, 0.75, 1.25  # exact in binary
OPTIONS = [dict(zip(("reset", "reset_delay", "detach_reset", "fire_at_threshold"), values, strict=True))
           for values in itertools.product(("zero", "subtract", "none"), (False, True), (False, True), (False, True))]  # fmt: skip


# --- the formulas, one neuron at a time, in forward mode


def simulate(x, reset, reset_delay, detach_reset, fire_at_threshold):
    """Return membranes and spikes (T, ...) of the currents ``x`` (T, ...)."""
    c, late, membranes, spikes = np.zeros_like(x[0]), np.zeros_like(x[0]), [], []
    for x_t in x:
        u = BETA * c + x_t - late
        s = (u >= THETA if fire_at_threshold else u > THETA).astype(float)
        c = {"zero": (1 - s) * u, "subtract": u if reset_delay else u - THETA * s, "none": u}[reset]
        late = THETA * s if reset == "subtract" and reset_delay else np.zeros_like(u)
        membranes.append(u)
        spikes.append(s)
    return np.array(membranes), np.array(spikes)


def through_time(u, s, phi, g, reset, reset_delay, detach_reset, fire_at_threshold):
    """Return sum_t g_t ds_t/dx_k for each k, with ds/du = phi: what a nudge of x_k does, followed forward in time."""
    total = np.zeros_like(u)
    for k in range(len(u)):
        dc = dlate = np.zeros_like(u[0])
        for t in range(k, len(u)):
            du = BETA * dc + (t == k) - dlate
            ds = phi[t] * du
            dr = 0 * ds if detach_reset else ds
            dc = {"zero": (1 - s[t]) * du - u[t] * dr, "subtract": du if reset_delay else du - THETA * dr, "none": du}[reset]  # fmt: skip
            dlate = THETA * dr if reset == "subtract" and reset_delay else 0 * dr
            total[k] += g[t] * ds
    return total


def atan(alpha, z):
    return alpha / 2 / (1 + (math.pi / 2 * alpha * z) ** 2)


class NumpyASSG:
    """M and D of one layer over the iterations of an attack."""

    def __init__(self, a=0.425, relax=1.5, decay=0.9):
        self.omega, self.relax, self.decay = 2 * math.tan(math.pi * a) / math.pi, relax, decay
        self.m, self.d = 1.0, 0.0

    def __call__(self, u):
        size = np.abs(u - THETA)
        self.m = self.decay * self.m + (1 - self.decay) * size
        self.d = self.decay * self.d + (1 - self.decay) * np.abs(size - self.m)
        return atan(self.omega / (self.m + self.relax * self.d + 1e-4), u - THETA)


def pdsg(u):
    """Slopes of a layer without space (T, B, N): statistics over the steps so far and all features of the sample."""
    phi = np.empty_like(u)
    for t, b in np.ndindex(u.shape[:2]):
        sigma = float(np.std(u[: t + 1, b], ddof=1)) or 1.0
        density = NormalDist(sigma / 2, sigma).pdf
        phi[t, b] = [density(value - THETA) for value in u[t, b]]
    return phi


def rate_curve_slope(mean):
    """The slope of the piecewise linear rate curve by a small difference."""

    def rate(x):
        return np.interp(x / THETA, [0, 1 - BETA, 2], [0, 0.2 * (1 - BETA), 1])

    return (rate(mean + 1e-7) - rate(mean - 1e-7)) / 2e-7


def layer(name, x, g, options, state):
    """Return the input gradient of one layer from its currents and the gradient of its spikes."""
    u, s = simulate(x, **options)
    if name == "bptr":
        return g * (s.sum(0) > 0)
    if name == "act":
        return g * (x.mean(0) > 0)
    if name == "rga":
        return g * rate_curve_slope(x.mean(0))
    if name == "hart":
        return np.broadcast_to((np.maximum(0, 0.6 - np.abs(u - THETA)) / 0.6**2 * g).mean(0), g.shape)
    phi = {"pdsg": pdsg, "assg": state, "straight_through": np.ones_like, "bptt": lambda u: atan(3.0, u - THETA)}[name](
        u
    )
    return through_time(u, s, phi, g, **options)


ESTIMATORS = {"bptr": BPTR(), "act": Act(), "rga": RGA(), "hart": HART(gamma=0.6), "pdsg": PDSG(), "assg": ASSG(),
              "straight_through": BPTT(StraightThrough()), "bptt": BPTT(Atan(3.0))}  # fmt: skip


class OneNeuron(nn.Module):
    """(B, T) currents to two logits: 0 and a weighted sum of the spikes, weights 1, 2, ..., T."""

    def __init__(self, **options):
        super().__init__()
        self.fire = LIF(BETA, THETA, **options, surrogate=Triangular(0.9))

    def forward(self, x):
        spikes = self.fire(x.T.unsqueeze(2))
        total = (spikes.flatten(1) * torch.arange(1, len(spikes) + 1, dtype=x.dtype).unsqueeze(1)).sum(0)
        return torch.stack([torch.full_like(total, 0.3), total], 1)


def second(logits, y):
    return logits[:, 1]


def test_one_neuron_by_hand():
    # u = 1, 1.5 (fires, > 1.25), 0.5, 1.375 (fires); z = u - 1.25 = -0.25, 0.25, -0.75, 0.125.
    x = torch.tensor([[1.0, 0.75, 0.5, 1.0]], dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    neuron = OneNeuron(reset="zero", detach_reset=True)

    def gradient(estimator):
        return Oracle(neuron, estimator=estimator).value_and_grad(x, y, second).grad.flatten().tolist()

    assert neuron(x)[0, 1] == 2 + 4
    assert gradient(BPTR()) == [1, 2, 3, 4]
    assert gradient(Act()) == [1, 2, 3, 4]
    # Mean current .8125 is .65 thresholds: past the onset .25, slope (1 - .2 * .25) / (2 - .25) per threshold.
    assert gradient(RGA()) == pytest.approx([k * 0.95 / 1.75 / 1.25 for k in (1, 2, 3, 4)], rel=1e-12)
    # Slopes 1 - |z| = .75, .75, .25, .875 times 1, 2, 3, 4 are .75, 1.5, .75, 3.5, in the mean 1.625.
    assert gradient(HART()) == [1.625] * 4
    # With slope 1: d4 = 4, d3 = 3 + .75 d4 = 6; the spike at step 2 empties the membrane: d2 = 2, d1 = 1 + .75 d2.
    assert gradient(BPTT(StraightThrough())) == [2.5, 2, 6, 4]
    assert gradient(Mix((HART(), BPTT(StraightThrough())))) == [2.0625, 1.8125, 3.8125, 2.8125]


def test_silent_inhibited_and_saturated_neurons():
    for level, bptr, act, rga in (
        (0.1, 0, 1, 0.2 / 1.25),
        (-0.5, 0, 0, 0),
        (2.0, 1, 1, 0.95 / 1.75 / 1.25),
        (3.0, 1, 1, 0),
    ):
        x = torch.full((1, 4), level, dtype=torch.float64)
        for estimator, gain in ((BPTR(), bptr), (Act(), act), (RGA(), rga)):
            got = Oracle(OneNeuron(), estimator=estimator).value_and_grad(x, torch.zeros(1).long(), second).grad
            assert got.flatten().tolist() == pytest.approx([gain * k for k in (1, 2, 3, 4)])


def test_rga_without_leak_is_one_half_up_to_two_thresholds():
    neuron = LIF(1.0, 1.0)
    neuron.attack_rule = RGA().rule(Memory())
    x = torch.tensor([-0.1, 0.0, 0.1, 1.0, 2.0, 2.1]).expand(3, 6).requires_grad_()
    assert torch.autograd.grad(neuron(x).sum(), x)[0][0].tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 0.5, 0])


class TwoLayers(nn.Module):
    """(B, T, 4) currents to 10 times the mean spikes of three neurons."""

    def __init__(self, **options):
        super().__init__()
        options = {"surrogate": Triangular(0.9), **options}
        self.first, self.second = (LIF(BETA, THETA, **options) for _ in range(2))
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))

    def forward(self, x):
        return 10 * self.second(2 * self.first(x.movedim(1, 0)) @ self.weight.to(x.dtype).T).mean(0)


MIXTURE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def weighted(logits, y):
    return logits @ MIXTURE.to(logits.dtype)


def frames(seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, STEPS, 4, generator=generator, dtype=torch.float64) + 0.8


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_layers_follow_the_formula_over_two_iterations(name, backend):
    for options in OPTIONS:
        net = TwoLayers(**options, backend=backend)
        oracle, memory, states = Oracle(net, estimator=ESTIMATORS[name]), Memory(), (NumpyASSG(), NumpyASSG())
        weight = 2 * net.weight.detach().numpy()
        for iteration in range(2):
            x = frames(iteration)
            got = oracle.value_and_grad(x, torch.zeros(3).long(), weighted, memory)
            assert torch.equal(got.logits, net(x))
            currents = x.movedim(1, 0).numpy()
            spikes = simulate(currents, **options)[1]
            inner, assg_first, assg_second = spikes @ weight.T, *states
            upper = layer(name, inner, np.broadcast_to(10 / STEPS * MIXTURE.numpy(), inner.shape), options, assg_second)
            lower = layer(name, currents, upper @ weight, options, assg_first)
            assert np.abs(lower).max() > 0
            np.testing.assert_allclose(
                got.grad.movedim(1, 0).numpy(), lower, rtol=1e-6 if name == "rga" else 1e-10, atol=1e-12
            )


@pytest.mark.parametrize("statistics", ["sample", "batch"])
def test_pdsg_measures_channels_over_space_and_time_so_far(statistics):
    z = torch.randn(4, 3, 2, 3, 5, dtype=torch.float64) * torch.tensor([0.5, 2.0]).view(2, 1, 1)
    z[:2, :, 1] = 0.75  # a channel that has not moved yet: sigma 1
    phi = PDSG(statistics).slopes(None, z)
    for t, b, c in np.ndindex(4, 3, 2):
        seen = z[: t + 1, b, c] if statistics == "sample" else z[: t + 1, :, c]
        sigma = float(np.std(seen.numpy(), ddof=1)) or 1.0
        expected = torch.exp(-((z[t, b, c] / sigma - 0.5) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
        torch.testing.assert_close(phi[t, b, c], expected, rtol=1e-10, atol=1e-14)
        step = PDSG(statistics).slope(None, z[t], [*z[:t]])
        torch.testing.assert_close(step[b, c], expected, rtol=1e-10, atol=1e-14)


def test_pdsg_of_batches_measures_each_feature_over_the_batch():
    z = torch.randn(3, 6, 4, dtype=torch.float64)
    phi = PDSG("batch").slopes(None, z)
    sigma = np.std(z[:2, :, 1].numpy(), ddof=1)
    assert phi[1, 5, 1].item() == pytest.approx(NormalDist(sigma / 2, sigma).pdf(z[1, 5, 1].item()), rel=1e-10)
    lone = PDSG("batch").slopes(None, z[:, :1])  # one value at the first step has no deviation
    assert lone[0, 0, 1].item() == pytest.approx(NormalDist(0.5, 1).pdf(z[0, 0, 1].item()), rel=1e-10)


# --- where they work


def gradient(model, x, estimator):
    return Oracle(model, estimator=estimator).value_and_grad(x, torch.zeros(len(x)).long(), cross_entropy)


def backbone(name, dtype=torch.float32):
    """Return a small network whose neurons fire, and inputs."""
    net = {
        "convnet": lambda: ConvNet(5, 2, 8, channels=(6, 8), hidden=12, neuron=LIF(0.9)),
        "vgg": lambda: VGG("vgg5", 5, 2, 8, head=(24, 24), neuron=LIF(0.9)),
    }[name]().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.fill_(0.4)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.mul_(2)
    return net.eval(), torch.rand(4, 2, 8, 8, dtype=dtype)


@pytest.mark.parametrize("name", ["convnet", "vgg"])
@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Mix(), PDSG("batch")], ids=lambda e: e.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backbones_keep_their_forward_pass_and_give_other_gradients(name, estimator, dtype):
    net, x = backbone(name, dtype)
    own, other = gradient(net, x, None), gradient(net, x, estimator)
    assert torch.equal(own.logits, other.logits)
    assert own.logits.std() > 0
    assert not other.invalid.any()
    assert not other.zero.any()
    assert not torch.allclose(own.grad, other.grad, rtol=1e-3)
    assert all(m.attack_rule is None for m in net.modules() if isinstance(m, LIF))


def test_half_precision_models_are_attacked_too():
    net, x = backbone("convnet")
    for estimator in ESTIMATORS.values():
        oracle = Oracle(net, estimator=estimator, autocast=torch.bfloat16)
        found = oracle.value_and_grad(x, torch.zeros(4).long(), cross_entropy)
        assert not found.invalid.any()
        assert not found.zero.any()


@pytest.mark.parametrize("estimator", [PDSG(), ASSG(), ASSG(family="gaussian")], ids=lambda e: e.label)
def test_recurrent_neurons_follow_slopes(estimator):
    class Net(nn.Module):
        def __init__(self, fire):
            super().__init__()
            self.fire = fire

        def forward(self, x):
            return self.fire(x.movedim(1, 0)).mean(0) * 10

    recurrent, plain = Net(RecurrentLIF(4, BETA, THETA).double()), Net(LIF(BETA, THETA))
    fed_back = gradient(recurrent, frames(0), estimator)
    assert not fed_back.zero.any()
    nn.init.zeros_(recurrent.fire.recurrent.weight)  # without feedback it is LIF
    torch.testing.assert_close(
        gradient(recurrent, frames(0), estimator).grad, gradient(plain, frames(0), estimator).grad
    )
    mlp = SpikingMLP(9, (14, 12), 5, time_steps=6, recurrent=True)
    assert torch.isfinite(gradient(mlp, torch.rand(3, 6, 9).round(), estimator).grad).all()


@pytest.mark.parametrize("estimator", [PDSG(), PDSG("batch"), ASSG(), ASSG(family="sigmoid")], ids=lambda e: e.label)
def test_bridged_nets_agree_with_their_fused_twins(estimator):
    net = nn.Sequential(
        nn.Linear(5, 8), snn.Leaky(beta=0.8, threshold=0.5, init_hidden=True), nn.Linear(8, 3),
        snn.Leaky(beta=0.9, threshold=0.3, reset_mechanism="zero", init_hidden=True, output=True),
    )  # fmt: skip
    bridged, fused = (
        Oracle(wrap(net, time_steps=STEPS), estimator=estimator) for wrap in (from_snntorch, fuse_snntorch)
    )
    memories = Memory(), Memory()
    for _ in range(3):  # statistics of earlier iterations count
        x, y = torch.rand(4, 5) * 2, torch.tensor([0, 1, 2, 0])
        ours, theirs = (
            o.value_and_grad(x, y, cross_entropy, m) for o, m in zip((bridged, fused), memories, strict=True)
        )
        torch.testing.assert_close(ours.logits, theirs.logits)
        assert not ours.zero.all()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_statistics_of_the_batch_keep_all_samples_in_the_attack():
    net = TwoLayers()
    x = frames(1, batch=12)
    y = net(x).argmax(1)

    def attacked(estimator, **how):
        noise = SampleGenerator.from_ids(0, range(12))
        oracle = Oracle(net)
        result = PGD(Linf(0.3, domain=Box(-9, 9)), steps=4, estimator=estimator).run(
            oracle, x, y, generator=noise, **how
        )
        return result.x_adv, oracle.counts.backwards

    for estimator, drops in ((PDSG(), True), (PDSG("batch"), False), (Mix((HART(), PDSG("batch"))), False)):
        (early, fewer), (late, every) = attacked(estimator), attacked(estimator, early_drop=False)
        assert torch.equal(early, late)
        assert (fewer < every) == drops
        assert estimator.per_sample == drops


# --- names, descriptions, refusals


def test_labels_and_descriptions_tell_settings_apart():
    estimators = [*ESTIMATORS.values(), ASSG(0.45), ASSG(family="sigmoid"), HART(), RGA(gamma=0.1), PDSG("batch"), Mix(),
                  Mix((HART(0.5), BPTT(Atan(2.0)), BPTR())), *ENSEMBLES["surrogates-19"]]  # fmt: skip
    unique = {json.dumps(e.describe(), sort_keys=True) for e in estimators}
    assert len({e.label for e in estimators}) == len(unique) == len(set(estimators)) < len(estimators)
    assert FGSM(Linf(0.1), estimator=ASSG()).name == "fgsm/assg"
    assert FGSM(Linf(0.1), estimator=ASSG(0.45, "sigmoid")).name == "fgsm/assg-0.45-sigmoid"
    assert Mix().label == "hart+bptt"
    assert json.dumps(HART(2).describe()) == json.dumps(HART(2.0).describe())
    assert FGSM(Linf(0.1), estimator=Mix()).describe()["estimator"] == {
        "name": "mix", "estimators": [{"name": "hart", "gamma": 1.0}, {"name": "bptt"}],
    }  # fmt: skip


def test_nineteen_surrogates_and_the_four_of_the_sr_paper():
    members = ENSEMBLES["surrogates-19"]
    assert len(set(members)) == 19
    kinds = [m.surrogate.name if isinstance(m, BPTT) else m.name for m in members]
    assert {k: kinds.count(k) for k in kinds} == {"triangular": 5, "exponential": 6, "rectangular": 5, "straight_through": 1, "bptr": 1, "act": 1}  # fmt: skip
    assert [m.label for m in ENSEMBLES["sr-4"]] == ["triangular1", "sigmoid4", "atan2", "rga"]


SUITE = """
attacks:
  - {attack: pgd, steps: 2, estimators: surrogates-19}
  - {attack: pgd, steps: 3, estimators: sr-4}
  - {attack: fgsm, estimator: {name: mix, estimators: [{name: hart, gamma: 0.5}, training]}}
  - {attack: fgsm, estimators: [training, bptr, act, rga, hart, pdsg, {name: pdsg, statistics: batch}, {name: assg, a: 0.43}]}
"""


def test_suites_name_estimators_and_ensembles(tmp_path):
    path, budgets = tmp_path / "mine.yaml", {"linf": Budget(eps=(0.1,), headline=0.1)}
    path.write_text(SUITE)
    suite = load_suite(path, budgets, Box())
    attacks = suite.entries[0].attacks
    assert len({attack.name for attack in attacks}) == len(attacks) == 19 + 4 + 1 + 8
    assert attacks[0].estimator == BPTT(Triangular(1.0))
    assert attacks[23].estimator == Mix((HART(0.5), BPTT()))
    assert [a.estimator for a in attacks[24:]] == [
        None,
        BPTR(),
        Act(),
        RGA(),
        HART(),
        PDSG(),
        PDSG("batch"),
        ASSG(0.43),
    ]
    json.dumps(suite.describe())
    before = suite.hash
    path.write_text(SUITE.replace("0.43", "0.44"))
    assert load_suite(path, budgets, Box()).hash != before
    path.write_text("attacks: [{attack: pgd, estimators: sr-5}]")
    with pytest.raises(ValueError, match="or one of surrogates-19, sr-4, got 'sr-5'"):
        load_suite(path, budgets, Box())


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), PDSG("batch"), ASSG(0.4, "sigmoid"), Mix(), Mix((ASSG(), PDSG()))],
                         ids=lambda e: e.label)  # fmt: skip
def test_configs_give_an_estimator_by_its_class(estimator):
    def written(part):
        settings = {f.name: getattr(part, f.name) for f in fields(part)}
        if isinstance(part, Mix):
            settings["estimators"] = [] if part == Mix() else [written(member) for member in part.estimators]
        if isinstance(part, BPTT):
            settings["surrogate"] = written(part.surrogate)
        return {"class_path": f"{type(part).__module__}.{type(part).__name__}", "init_args": settings}

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Attack, "attack")
    threat = {"class_path": "sg_lightning.threats.Linf", "init_args": {"eps": 0.1}}
    attack = {
        "class_path": "sg_lightning.attacks.FGSM",
        "init_args": {"threat": threat, "estimator": written(estimator)},
    }
    config = parser.parse_object({"attack": attack})
    build = getattr(parser, "instantiate", parser.instantiate_classes)  # the second name is deprecated since 4.49
    for read in (config, parser.parse_string(parser.dump(config))):
        assert build(read).attack == FGSM(Linf(0.1), estimator=estimator)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ASSG(0.5), ValueError, "assg: a must be a number above 0 and below 0.5, got 0.5"),
        (lambda: ASSG(math.nan), ValueError, "assg: a must be"),
        (lambda: ASSG("0.4"), ValueError, "got '0.4'"),
        (lambda: ASSG(family="tanh"), ValueError, "unknown family 'tanh'; choose one of atan, sigmoid"),
        (lambda: ASSG(relax=-1.0), ValueError, "relax must be a number 0 or more and below inf, got -1.0"),
        (lambda: ASSG(decay=1.0), ValueError, "decay must be a number 0 or more and below 1"),
        (lambda: HART(0.0), ValueError, "hart: gamma must be a number above 0 and below inf, got 0.0"),
        (lambda: RGA(gamma=-0.1), ValueError, "gamma"),
        (lambda: RGA(saturation=1.0), ValueError, "saturation must be a number above 1"),
        (lambda: PDSG("channel"), ValueError, "statistics must be one of sample, batch, got 'channel'"),
        (lambda: Mix((HART(),)), ValueError, "two or more estimators, all different"),
        (lambda: Mix((HART(), HART())), ValueError, "all different"),
        (lambda: Mix((HART(), "bptt")), TypeError, r"estimators such as HART\(\)"),
        (lambda: make_estimator("harts"), ValueError, "unknown estimator 'harts'; known: training, bptt, bptr, rga"),
        (lambda: make_estimator({"name": "rga", "width": 2}), ValueError, "known: gamma, saturation"),
        (lambda: make_estimator({"name": "mix", "estimators": ["hart", "x"]}), ValueError, "unknown estimator 'x'"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_a_model_cannot_follow_is_refused():
    recurrent = SpikingMLP(9, (14, 12), 5, time_steps=6, recurrent=True)
    bridged = from_snntorch(
        nn.Sequential(nn.Linear(5, 3), snn.Leaky(beta=0.8, init_hidden=True, output=True)), time_steps=3
    )
    for estimator in (BPTR(), RGA(), Act(), HART(), Mix()):
        for model, name in ((recurrent, "RecurrentLIF"), (bridged, "SnnTorchNetwork")):
            with pytest.raises(ValueError, match=f"{name} can only follow new slopes; use BPTT, PDSG or ASSG"):
                Oracle(model, estimator=estimator)
    for estimator in (BPTR(), ASSG(), Mix((ASSG(), BPTT()))):
        with pytest.raises(ValueError, match="has no spiking neuron"):
            Oracle(nn.Linear(3, 2), estimator=estimator)
    Oracle(recurrent, estimator=Mix((ASSG(), BPTT())))
    Oracle(nn.Linear(3, 2), estimator=BPTT())


def test_rules_leave_the_model_after_an_exception():
    net = TwoLayers()

    def boom(logits, y):
        raise RuntimeError("boom")

    for estimator in (ASSG(), Mix()):
        with pytest.raises(RuntimeError, match="boom"):
            Oracle(net, estimator=estimator).value_and_grad(frames(0), torch.zeros(3).long(), boom)
        assert net.first.attack_rule is None


# --- tuning


class Toy(Attack):
    """Break the more of 1000 samples the closer ``a`` is to 0.43."""

    kind = "toy"
    runs = 0

    def _search(self, oracle, x, y, noise, progress, early_drop):
        Toy.runs += 1
        everyone = torch.arange(len(y))
        broken = everyone < 1000 - 8000 * abs(self.estimator.a - 0.43)
        progress.record(everyone, x, broken.float(), broken, 0, 1)


def test_tuning_finds_the_best_setting():
    oracle, x, y = Oracle(TwoLayers()), frames(0, 1000), torch.zeros(1000).long()
    Toy.runs = 0
    best = tune(Toy(Linf(0.1), estimator=ASSG(relax=1.0)), oracle, x, y)
    assert abs(best.estimator.a - 0.43) < 0.006
    assert best.estimator.relax == 1.0
    assert Toy.runs == 16


def test_tuning_runs_real_attacks_with_the_same_noise():
    net, x = TwoLayers(), frames(1, 8)
    attack = PGD(Linf(0.1, domain=Box(-9, 9)), steps=2, estimator=HART())
    noise = SampleGenerator.from_ids(0, range(8))
    settings = {"setting": "gamma", "low": 0.1, "high": 2.45, "rounds": 3, "generator": noise}
    first = tune(attack, Oracle(net), x, net(x).argmax(1), **settings)
    assert first == tune(attack, Oracle(net), x, net(x).argmax(1), **settings)
    assert 0.1 < first.estimator.gamma < 2.45
    with pytest.raises(ValueError, match=r"no estimator with the setting 'a' \(it has: gamma\)"):
        tune(attack, Oracle(net), x, net(x).argmax(1))
    with pytest.raises(ValueError, match="low must be below high"):
        tune(attack, Oracle(net), x, net(x).argmax(1), setting="gamma", low=2.0, high=1.0)


def test_surrogates_not_used_here_are_known():
    assert make_estimator({"name": "exponential", "slope": 2.0, "peak": 0.3}).label == "exponential2-0.3"
    assert make_estimator("straight_through") == BPTT(StraightThrough())
    assert make_estimator({"name": "rectangular", "width": 4}) == BPTT(Rectangular(4.0))
