"""Attacks on dictionary inputs: one modality with the others fixed is what an attack on a single input does."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from sg_lightning import recipes
from sg_lightning.attacks import ATTACKS, HART, PGD, GreedyFlips, InTurn, OnModality, Oracle, Substitute, load_suite
from sg_lightning.attacks.adapters.base import ForeignAttack
from sg_lightning.attacks.adapters.shell import Shell
from sg_lightning.attacks.losses import margin
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.inputs import select
from sg_lightning.neurons import LIF
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Joint, JointBudget, Linf, Modality, SpikeRetiming

SHAPE = (2, 2, 3)
THREATS = [
    Linf(0.1),
    L1(0.6),
    L2(0.5, Box(-1, 1)),
    L0(2),
    EventFlips(2, Binary()),
    EventFlips(2, Counts(4)),
    SpikeRetiming(1),
]
SMALL = {"steps": 4, "rounds": 4, "queries": 8, "restarts": 2, "draws": 2, "targets": 2}
N = 6


class Net(nn.Module):
    """A spiking network in float64 whose modalities meet before the neurons: no answer is a sum over modalities.

    The same spikes give the same logits, whatever the shape of the batch: searches depend on ties.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.eye, self.ear = nn.Linear(12, 16), nn.Linear(12, 16)
        self.fire, self.last = LIF(beta=0.8), nn.Linear(16, 3)
        for layer in (self.eye, self.ear):
            layer.weight.data *= 4
        self.double()

    def forward(self, x):
        current = self.eye(x["eye"].flatten(1)) * (1 + self.ear(x["ear"].flatten(1)).sigmoid())
        logits = self.last(self.fire(current.expand(3, -1, -1)).mean(0))
        return logits + (logits.round(decimals=9) - logits).detach()


class OneInput(nn.Module):
    """The network with all but one modality of one sample put in by hand."""

    def __init__(self, net, modality, others):
        super().__init__()
        self.net, self.modality, self.others = net, modality, others

    def forward(self, part):
        others = {k: v.expand(len(part), *v.shape[1:]) for k, v in self.others.items()}
        return self.net({**others, self.modality: part})


NET = Net().eval()


def values(domain, seed):
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = domain.low + x * (min(domain.high, 4) - domain.low)
    return x.round() if domain.lattice else x


def problem(threat, seed=0):
    x = {"eye": values(threat.domain, seed), "ear": values(Box(), seed + 1)}
    y = NET(x).argmax(1)
    y[-1] = (y[-1] + 1) % 3  # wrong to begin with
    return x, y


def cases():
    for kind, attack in ATTACKS.items():
        if issubclass(attack, ForeignAttack) or kind == "universal":  # noise of the call; one pattern for all samples
            continue
        few = {f.name: SMALL[f.name] for f in fields(attack) if f.name in SMALL}
        if kind == "apgd":
            few["targets"] = 0
        for threat in THREATS:
            try:
                yield pytest.param(replace(attack(threat), **few), id=f"{kind}-{threat.key}-{threat.domain}")
            except (TypeError, ValueError):
                continue


@pytest.mark.parametrize("attack", list(cases()))
@pytest.mark.parametrize("size", [None, 4])
def test_on_one_modality_it_does_what_it_does_on_one_input(attack, size):
    x, y = problem(attack.threat)
    noise = SampleGenerator.from_ids(5, list(range(N)))
    wrapped = OnModality(Modality("eye", attack.threat), attack)
    assert (wrapped.name, wrapped.kind, wrapped.minimal) == (attack.name, attack.kind, attack.minimal)
    assert wrapped.describe() == attack.describe()
    oracle = Oracle(NET, batch_size=size)
    found = wrapped.run(oracle, x, y, generator=noise)
    assert torch.equal(found.x_adv["ear"], x["ear"])
    assert oracle.counts.forwards > 0
    for k in range(N):
        alone = OneInput(NET, "eye", {"ear": x["ear"][k : k + 1]})
        here = torch.tensor([k])
        expected = attack.run(Oracle(alone), x["eye"][here], y[here], generator=noise.select(here))
        torch.testing.assert_close(found.x_adv["eye"][here], expected.x_adv, rtol=0, atol=1e-9)
        for name in ("success", "invalid", "iterations", "queries", "gradients", "zero_gradients"):
            assert torch.equal(getattr(found, name)[here], getattr(expected, name)), name
    assert bool(found.success.any())


def test_gradients_are_of_the_attacked_modality_only():
    x, y = problem(Linf(0.1))
    found = Oracle(NET).seeing("eye", x).value_and_grad(x["eye"], y, margin)
    whole = Oracle(NET).value_and_grad(x, y, margin)
    torch.testing.assert_close(found.grad, whole.grad["eye"])
    torch.testing.assert_close(found.logits, whole.logits)


def test_questions_about_some_samples_must_say_which():
    x, y = problem(Linf(0.1))
    view = Oracle(NET, batch_size=2).seeing("eye", x)
    rows = torch.tensor([4, 1, 1])
    torch.testing.assert_close(view.logits(x["eye"][rows], rows), NET(select(x, rows)))
    for ask in (view.logits, lambda part: view.value_and_grad(part, y[rows], margin), view.differentiable):
        with pytest.raises(RuntimeError, match="3 points of 'eye' belong to a batch of 6 samples, but to which"):
            ask(x["eye"][rows])


def test_shell_of_foreign_libraries_knows_its_samples():
    x, y = problem(Linf(0.1))
    rows = torch.tensor([3, 0])
    shell = Shell(Oracle(NET).seeing("eye", x), Box(), x["eye"][rows], rows)
    unit = shell.unit.clone().requires_grad_()
    logits = shell(unit)
    torch.testing.assert_close(logits, NET(select(x, rows)).float())
    (grad,) = torch.autograd.grad(margin(logits, y[rows]).sum(), unit)
    whole = Oracle(NET).value_and_grad(x, y, margin)
    torch.testing.assert_close(grad.view(2, *SHAPE).double(), whole.grad["eye"][rows], rtol=1e-5, atol=1e-6)


def test_foreign_libraries_that_ask_about_other_points_are_refused():
    x, _ = problem(Linf(0.1))
    shell = Shell(Oracle(NET).seeing("eye", x), Box(), x["eye"], None)
    with pytest.raises(ValueError, match="the library sends 12 points for 6 samples"):
        shell(torch.cat([shell.unit, shell.unit]))
    alone = OneInput(NET, "eye", {"ear": x["ear"][:1]})
    assert Shell(Oracle(alone), Box(), x["eye"])(torch.cat([shell.unit, shell.unit])).shape == (12, 3)


def test_estimators_and_substitutes_go_through():
    x, y = problem(Linf(0.1))
    noise = SampleGenerator.from_ids(1, list(range(N)))
    attack = OnModality(Modality("eye", Linf(0.1)), PGD(Linf(1), steps=4, estimator=HART()))
    assert attack.name == "pgd-4/hart"
    assert attack.attack == PGD(Linf(0.1), steps=4)
    assert replace(attack, estimator=None).name == "pgd-4"
    by_hand = OnModality(Modality("eye", Linf(0.1)), PGD(Linf(0.1), steps=4))
    assert torch.equal(
        attack.run(Oracle(NET), x, y, generator=noise, goal="loss").x_adv["eye"],
        by_hand.run(Oracle(NET, estimator=HART()), x, y, generator=noise, goal="loss").x_adv["eye"],
    )
    other = Net()
    other.eye.weight.data.neg_()
    moved = Substitute(attack, other, "other").run(Oracle(NET), x, y, generator=noise)
    crafted = attack.run(Oracle(other), x, y, generator=noise, goal="loss")
    assert torch.equal(moved.x_adv["eye"][:-1], crafted.x_adv["eye"][:-1])
    assert recipes.build(recipes.describe(attack)) == attack


class TestInTurn:
    threat = Joint({"eye": Linf(0.05), "ear": EventFlips(1)})

    def problem(self):
        x = {"eye": values(Box(), 0), "ear": values(Binary(), 1)}
        return x, NET(x).argmax(1)

    def attack(self, **options):
        return InTurn(self.threat, (PGD(Linf(1), steps=5), GreedyFlips(EventFlips(9))), **options)

    def test_points_are_inside_and_at_least_as_bad_as_one_modality_alone(self):
        x, y = self.problem()
        noise = SampleGenerator.from_ids(1, list(range(N)))
        attack = self.attack()
        assert attack.attacks == (PGD(Linf(0.05), steps=5), GreedyFlips(EventFlips(1)))
        assert attack.name == f"in_turn-2(pgd-5+{attack.attacks[1].name})"
        found = attack.run(Oracle(NET), x, y, generator=noise)
        assert bool(self.threat.contains(found.x_adv, x).all())
        assert torch.equal(NET(found.x_adv).argmax(1) != y, found.success)
        torch.testing.assert_close(found.loss, margin(NET(found.x_adv), y))
        first = PGD(Linf(0.05), steps=5)
        for k in range(N):
            alone = OneInput(NET, "eye", {"ear": x["ear"][k : k + 1]})
            here = torch.tensor([k])
            eye = first.run(Oracle(alone), x["eye"][here], y[here], generator=noise.fork("eye", 0).select(here))
            reached = margin(alone(eye.x_adv), y[here])
            assert bool(found.success[k]) or bool(found.loss[k] >= reached[0] - 1e-9)
            assert bool(found.success[k]) >= bool(eye.success[0])

    def test_samples_do_not_depend_on_their_batch(self):
        x, y = self.problem()
        noise = SampleGenerator.from_ids(1, list(range(N)))
        whole = self.attack().run(Oracle(NET), x, y, generator=noise)
        assert int(whole.success.sum()) > 0
        for options in ({"early_drop": False}, {}):
            for k in range(N):
                here = torch.tensor([k])
                one = self.attack().run(Oracle(NET), select(x, here), y[here], generator=noise.select(here), **options)
                assert torch.equal(one.success, whole.success[here])
                assert torch.equal(one.x_adv["ear"], whole.x_adv["ear"][here])
                torch.testing.assert_close(one.x_adv["eye"], whole.x_adv["eye"][here], rtol=0, atol=1e-9)
                for name in ("iterations", "queries", "gradients"):
                    assert torch.equal(getattr(one, name), getattr(whole, name)[here]), name

    @pytest.mark.parametrize(
        ("build", "error", "message"),
        [
            (lambda: InTurn(Linf(0.1), (PGD(Linf(0.1)),)), TypeError, "under a Joint threat"),
            (
                lambda: InTurn(TestInTurn.threat, (PGD(Linf(0.1)),)),
                ValueError,
                "one attack for each of eye, ear, got 1",
            ),
            (lambda: InTurn(TestInTurn.threat, (GreedyFlips(EventFlips(1)),) * 2), TypeError, "EventFlips"),
            (lambda: TestInTurn().attack(rounds=0), ValueError, "rounds must be a whole number >= 1"),
            (lambda: OnModality(Linf(0.1), PGD(Linf(0.1))), TypeError, "needs a threat on a modality"),
            (lambda: OnModality(Modality("eye", Linf(0.1)), GreedyFlips(EventFlips(1))), TypeError, "EventFlips"),
            (lambda: Modality("eye", Joint({"eye": Linf(0.1)})), TypeError, "threat on a single tensor"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, build, error, message):
        with pytest.raises(error, match=message):
            build()


BUDGETS = {
    "audio_retime_inf": Budget((1,), 1),
    "image_l2": Budget((0.5,), 0.5),
    "image_linf": Budget(("1/16", "2/16"), "2/16"),
    "audio_flips": Budget(("1%", "2%"), "2%"),
    "joint": JointBudget((0.5, 1), 1, of=("image_linf", "audio_flips")),
}
DOMAINS = {"image": Box(), "audio": Binary()}


def test_suites_are_resolved_by_modality():
    suite = load_suite("standard", BUDGETS, DOMAINS)
    assert suite.norms == ("audio_flips", "audio_retime_inf", "image_linf", "image_l2", "joint")
    plain = load_suite("standard", {"linf": BUDGETS["image_linf"]}, Box())
    mine = [entry for entry in suite.entries if entry.threat.norm == "image_linf"]
    assert [[a.name for a in e.attacks] for e in mine] == [[a.name for a in e.attacks] for e in plain.entries]
    assert [e.threat for e in mine] == [Modality("image", e.threat) for e in plain.entries]
    joint = [entry for entry in suite.entries if entry.threat.norm == "joint"]
    assert [e.threat.parts for e in joint] == [
        (("image", Linf("1/16", Box())), ("audio", EventFlips("1%", Binary()))),
        (("image", Linf("2/16", Box())), ("audio", EventFlips("2%", Binary()))),
    ]
    assert [a.kind for a in joint[0].attacks] == ["pgd", "pgd", "pgd", "in_turn"]
    assert [e.headline for e in joint] == [False, True]
    assert load_suite("paper-sr", BUDGETS, DOMAINS).norms == ("image_linf",)
    fitted, left_out = suite.applicable(nn.Linear(2, 2))
    assert "pgd-100/assg-0.4" in left_out
    assert all(a.estimator is None for a in fitted.entries[-1].attacks[-1].attacks)


def test_shares_of_a_joint_budget_are_exact():
    threat = Joint({"a": Linf("8/255"), "b": EventFlips("2.5%"), "c": SpikeRetiming(3), "d": L2(0.3)}, "1/2")
    assert [part.eps for _, part in threat.parts] == ["4/255", "5/4%", 1, "3/20"]
    assert threat.key == "joint_1_2"
    assert threat.with_eps(1).parts == threat.threats
    assert threat.includes(Modality("a", Linf("4/255")))
    assert threat.includes(Modality("c", SpikeRetiming(1)))
    assert threat.includes(Modality("b", EventFlips("1%")))
    for other in (Modality("a", Linf("5/255")), Modality("a", L2(0.01)), Modality("e", Linf(0.01)), Linf("4/255"),
                  Modality("b", EventFlips("1%", mode="add")), Modality("c", SpikeRetiming(1, measure="0"))):  # fmt: skip
        assert not threat.includes(other)


@pytest.mark.parametrize(
    ("budgets", "domain", "message"),
    [
        (
            {"linf": Budget((0.1,), 0.1)},
            DOMAINS,
            "names no modality, but the inputs have image, audio: call it image_linf",
        ),
        ({"touch_linf": Budget((0.1,), 0.1)}, DOMAINS, "names the modality 'touch'"),
        ({"image_linf": Budget((0.1,), 0.1)}, Box(), "the inputs are single tensors"),
        ({"image_l7": Budget((0.1,), 0.1)}, DOMAINS, "unknown norm 'image_l7'.*<modality>_<norm>"),
        ({"image_relaxed_linf": Budget((0.1,), 0.1)}, DOMAINS, "use 'image_linf'"),
        ({"joint": Budget((0.1,), 0.1)}, DOMAINS, "is a Budget; a JointBudget, and no other, is called joint"),
        (
            {"joint": BUDGETS["joint"], "image_linf": BUDGETS["image_linf"]},
            DOMAINS,
            "shares the budget 'audio_flips', but",
        ),
    ],
)
def test_budgets_that_do_not_fit_are_refused(budgets, domain, message):
    with pytest.raises(ValueError, match=message):
        load_suite("quick", budgets, domain)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JointBudget((2,), 2, of=("image_linf", "audio_flips")), "up to 1"),
        (lambda: JointBudget(("2%",), "2%", of=("image_linf", "audio_flips")), "up to 1"),
        (lambda: JointBudget((1,), 1), "at least two modalities"),
        (lambda: JointBudget((1,), 1, of=("image_linf", "image_l2")), "at least two modalities, one each"),
        (lambda: Joint({"a": Linf(0.1)}, 2), "at most 1"),
    ],
)
def test_impossible_shares(build, message):
    with pytest.raises(ValueError, match=message):
        build()
