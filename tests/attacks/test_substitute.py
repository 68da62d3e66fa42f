"""Transfer attacks: crafted on another model, judged by this one; what they cost, how a suite takes them in."""

import pytest
import torch
from torch import nn

from sg_lightning.attacks import (
    ASSG,
    BPTT,
    FMN,
    PGD,
    Oracle,
    Square,
    Substitute,
    Suite,
    load_suite,
    with_substitutes,
)
from sg_lightning.evaluation import Row, evaluate
from sg_lightning.evaluation.checks import Tried, run_checks
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, Budget, Linf

BUDGETS = {"linf": Budget(eps=(0.1,), headline=0.1), "l0": Budget(eps=(1,), headline=1)}
SUITE = "attacks: [{attack: fgsm, only: [linf]}, {attack: pgd, steps: 5}, {attack: square, queries: 5, only: [linf]}]"


class Net(nn.Module):
    """A small network in float64, spiking or its twin with ReLU."""

    def __init__(self, seed=0, spiking=True, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(9, 32), nn.Linear(32, classes)
        self.fire = LIF(beta=0.8) if spiking else nn.ReLU()
        self.double()

    def forward(self, x):
        return self.last(self.fire(2 * self.first(x.flatten(1)).expand(4, -1, -1)).mean(0))


def data(n=24):
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, Net()(x).argmax(1).detach()


def ids(n=24):
    return SampleGenerator.from_ids(0, range(n))


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE)
    return path


def test_the_point_is_that_of_the_attack_on_the_substitute():
    x, y = data()
    attack, twin, net = PGD(Linf(0.2), steps=5), Net(spiking=False), Net()
    crafted = attack.run(Oracle(twin), x, y, generator=ids(), goal="loss").x_adv
    oracle = Oracle(net)
    found = Substitute(attack, twin, "ann").run(oracle, x, y, generator=ids())
    assert torch.equal(found.x_adv, crafted)
    assert torch.equal(found.success, net(crafted).argmax(1) != y)
    assert 0 < int(found.success.sum()) < 24
    assert found.queries.tolist() == [1] * 24
    assert (oracle.counts.forwards, oracle.counts.backwards) == (24, 0)


def test_on_the_model_itself_it_is_the_attack_and_batches_do_not_matter():
    x, y = data()
    attack, net = PGD(Linf(0.1), steps=5, estimator=ASSG()), Net()
    own = attack.run(Oracle(net), x, y, generator=ids(), goal="loss")
    same = Substitute(attack, net).run(Oracle(net), x, y, generator=ids())
    assert torch.equal(own.x_adv, same.x_adv)
    assert torch.equal(own.success, same.success)
    order = torch.randperm(24)
    for index in (order, *torch.arange(24).split(7)):
        part = Substitute(attack, net).run(
            Oracle(net), x[index], y[index], generator=SampleGenerator.from_ids(0, index)
        )
        assert torch.allclose(part.x_adv, same.x_adv[index], atol=1e-12)
        assert torch.equal(part.success, same.success[index])


def test_the_estimator_of_the_oracle_reaches_spiking_substitutes_only():
    x, y = data()
    oracle = Oracle(Net(), estimator=BPTT(surrogates.Atan(2.0)))
    for twin in (Net(1), Net(1, spiking=False)):
        swap = BPTT(surrogates.Atan(2.0)) if isinstance(twin.fire, LIF) else None
        attack = PGD(Linf(0.1), steps=3)
        crafted = attack.run(Oracle(twin, estimator=swap), x, y, generator=ids(), goal="loss").x_adv
        assert torch.equal(Substitute(attack, twin).run(oracle, x, y, generator=ids()).x_adv, crafted)


def test_a_suite_takes_substitutes_in(suite):
    plain = load_suite(suite, BUDGETS)
    taken = with_substitutes(plain, {"ann": Net(spiking=False), "seed2": Net(2)})
    assert [a.name for a in taken.entries[0].attacks][-2:] == ["transfer-ann/pgd-5", "transfer-seed2/pgd-5"]
    assert all(a.gradient_free for a in taken.entries[0].attacks[-2:])
    again = with_substitutes(plain, {"ann": Net(spiking=False), "seed2": Net(2)})
    other = with_substitutes(plain, {"ann": Net(spiking=False), "seed2": Net(3)})
    assert plain.hash != taken.hash == again.hash != other.hash
    assert with_substitutes(plain, {}).hash == plain.hash
    spiking = with_substitutes(
        Suite("s", (type(plain.entries[0])(Linf(0.1), (PGD(Linf(0.1), estimator=ASSG()),), True),), True),
        {"ann": Net(spiking=False)},
    )
    assert spiking.entries[0].attacks[-1].attack.estimator is None  # nothing to replace in the twin


def test_evaluate_runs_them_and_refuses_to_resume_with_others(suite, tmp_path):
    options = {"suite": suite, "budgets": BUDGETS, "progress": False, "out": tmp_path / "out", "batch_size": 7}
    twins = {"ann": Net(spiking=False)}
    result = evaluate(Net(), data(), substitutes=twins, **options)
    rows = [row for row in result.rows if row.attack == "transfer-ann/pgd-5" and row.phase == "check"]
    assert len(rows) == 2 * 24
    assert {check.norm for check in result.checks if check.name.startswith("white box")} == {"linf", "l0"}
    loaded = type(result).load(tmp_path / "out")
    assert [(c.name, c.status) for c in loaded.checks] == [(c.name, c.status) for c in result.checks]
    assert sorted(evaluate(Net(), data(), substitutes=twins, **options).rows, key=repr) == sorted(result.rows, key=repr)
    for others in ({"ann": Net(7, spiking=False)}, {"twin": Net(spiking=False)}, None):
        with pytest.raises(ValueError, match="suite was"):
            evaluate(Net(), data(), substitutes=others, **options)


def rows_of(attack, standing):
    return [
        Row(
            id=i, label=0, clean=True, phase="check", norm="linf", eps="0.1", attack=attack,
            status="survived" if stands else "broken", size=0.1, queries=1, iterations=1, gradients=0, zero_gradients=0,
            suite="s", data="d",
        )
        for i, stands in enumerate(standing)
    ]  # fmt: skip


@pytest.mark.parametrize(("missed", "status"), [(0, "pass"), (1, "warn"), (2, "fail")])
def test_black_boxes_that_find_more_are_an_alarm(missed, status):
    tried = [
        Tried("linf", "0.1", "pgd", {"attack": "pgd", "steps": 5}),
        Tried("linf", "0.1", "apgd", {"attack": "apgd", "steps": 9}),
        Tried("linf", "0.1", "square", {"attack": "square"}, gradient_free=True),
    ]
    # pgd breaks the first ten, apgd the next ten; together they leave twenty, of which Square breaks ``missed``
    rows = [
        *rows_of("pgd", [i >= 10 for i in range(40)]),
        *rows_of("apgd", [not 10 <= i < 20 for i in range(40)]),
        *rows_of("square", [i >= 20 + missed or 5 <= i < 20 for i in range(40)]),
    ]
    meta = {"stochastic": False, "eot": 1, "votes": 1, "classes": 3}
    (check,) = [c for c in run_checks(rows, tried, meta) if c.name == "white box at least as strong as black box"]
    assert check.status == status
    assert f"leave 20 of 40 samples (the best, pgd, 75.0%); without, {missed} of these break" in check.detail
    assert not [c for c in run_checks(rows, tried[:2], meta) if c.name.startswith("white box")]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda plain: Substitute("pgd", Net()), ValueError, "needs an attack on the substitute"),
        (lambda plain: Substitute(Substitute(PGD(Linf(0.1)), Net()), Net()), ValueError, "needs an attack"),
        (lambda plain: Substitute(FMN(Linf(0.1)), Net()), ValueError, "looks for the smallest"),
        (lambda plain: Substitute(PGD(Linf(0.1), estimator=ASSG()), Net(spiking=False)), ValueError, "no spiking"),
        (lambda plain: with_substitutes(plain, {"a b": Net()}), ValueError, "letters, digits"),
        (lambda plain: with_substitutes(plain, {"ann": 3}), TypeError, "must be a model"),
        (
            lambda plain: with_substitutes(
                Suite("s", (type(plain.entries[0])(Linf(0.1), (Square(Linf(0.1)),), True),), True), {"ann": Net()}
            ),
            ValueError,
            "no attack under linf",
        ),
        (
            lambda plain: Substitute(PGD(L0(1)), Net(classes=4)).run(Oracle(Net()), *data()),
            ValueError,
            "4 classes, the model 3",
        ),
        (
            lambda plain: evaluate(
                Net(), data(), suite=plain, substitutes={"ann": Net(classes=4)}, progress=False, budgets=BUDGETS
            ),
            ValueError,
            "4 classes, the model 3",
        ),
    ],
)
def test_bad_substitutes_are_refused(suite, make, error, message):
    with pytest.raises(error, match=message):
        make(load_suite(suite, BUDGETS))
