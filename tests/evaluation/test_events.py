"""Evaluation on spikes: shares in rows, timing budgets, relaxed norms that are marked and left out of the union."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from sg_lightning.attacks import FGSM, Entry, Suite
from sg_lightning.domains import Binary, Box
from sg_lightning.evaluation import RobustnessResult, evaluate
from sg_lightning.neurons import LIF
from sg_lightning.threats import Budget, EventFlips, Linf

BUDGETS = {
    "flips": Budget(eps=("5%", "15%"), headline="15%"),
    "retime_inf": Budget(eps=(1, 2), headline=1),
    "retime_0": Budget(eps=("10%",), headline="10%"),
    "relaxed_linf": Budget(eps=(0.1, 0.5), headline=0.5),
}
SUITE = """
attacks:
  - {attack: pgd, steps: 3}
  - {attack: greedy, candidates: 8, only: [flips]}
  - {attack: sda, rounds: 3, only: [flips]}
  - {attack: retiming, steps: 3, only: [retime_inf, retime_1, retime_0]}
"""


class Net(nn.Module):
    """A small spiking network over rasters (B, T, N), in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire, self.last = nn.Linear(6, 24), LIF(beta=0.8), nn.Linear(24, 3)
        self.first.weight.data *= 3
        self.double()

    def forward(self, x):
        return self.last(self.fire(self.first(x.transpose(0, 1))).mean(0))


def data(n=24):
    x = (torch.rand(n, 8, 6, generator=torch.Generator().manual_seed(3)) < 0.3).double()
    x[0] = 0.0
    with torch.no_grad():
        y = Net()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 3  # some samples are wrong without an attack
    return x, y


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "events.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def result(suite):
    return evaluate(Net(), data(), suite, budgets=BUDGETS, domain=Binary(), progress=False)


def test_rows_hold_the_share_as_written_and_the_size_in_events(result):
    x, _ = data()
    limits = {eps: EventFlips(eps).limits(x) for eps in ("5%", "15%")}
    rows = [row for row in result.rows if row.norm == "flips" and row.status in ("broken", "survived")]
    assert {row.eps for row in rows if row.phase == "main"} == {"5%", "15%"}
    assert all(row.size == int(row.size) for row in rows)
    assert all(row.size <= limits[row.eps][row.id] for row in rows if row.eps in limits)
    assert any(row.size > limits["5%"][row.id] for row in rows)
    assert result.budgets("flips") == ("5%", "15%")
    assert not any(row.status == "invalid" for row in result.rows)
    assert {"greedy-8", "sda-3", "retiming-3"} <= {row.attack for row in result.rows}


def test_figures_under_shares(result):
    assert result.accuracy("flips", "5%") >= result.accuracy("flips", "15%") == result.accuracy("flips", 0.15)
    assert [point[0] for point in result.curve("flips")] == [0.0, 0.05, 0.15]
    names = result.metrics()
    assert {"robust/flips_15pct/acc", "robust/retime_0_10pct/acc", "robust/infeasible/relaxed_linf_0p5/acc"} <= set(
        names
    )
    assert "flips 15%" in result.table()
    with pytest.raises(ValueError, match="was not measured"):
        result.accuracy("flips", "2%")


def test_relaxed_norms_are_marked_and_do_not_count(result):
    feasible = ["flips", "retime_inf", "retime_0"]
    assert result.norms == [*feasible, "relaxed_linf"]
    assert result.counted_norms == feasible
    assert np.array_equal(result.union_robust(), np.logical_and.reduce([result.robust(n) for n in feasible]))
    assert result.accuracy("relaxed_linf") < result.union() == result.metrics()["robust/union/acc"]
    assert result.metrics()["robust/min/acc"] == min(result.accuracy(n) for n in feasible)
    lines = result.table().splitlines()
    assert all(("relaxed (infeasible)" in line) == line.startswith("relaxed_linf") for line in lines)
    assert any(line.startswith("union") and "relaxed ones left out" in line for line in lines)


def test_figures_survive_saving_and_batching(result, suite, tmp_path):
    again = evaluate(Net(), data(), suite, budgets=BUDGETS, domain=Binary(), progress=False, batch_size=5, out=tmp_path)
    assert sorted(again.rows, key=repr) == sorted(result.rows, key=repr)
    assert RobustnessResult.load(tmp_path).table() == result.table()
    entries = json.loads((tmp_path / "result.json").read_text())["suite"]["content"]["entries"]
    for threat in (entry["threat"] for entry in entries):
        assert threat.get("infeasible", False) == threat["norm"].startswith("relaxed_")


def test_relaxed_norms_alone_make_a_union_of_their_own():
    alone = {"relaxed_linf": BUDGETS["relaxed_linf"]}
    result = evaluate(Net(), data(), "quick", budgets=alone, domain=Binary(), progress=False)
    assert result.union() == result.accuracy("relaxed_linf")


def test_infeasible_perturbations_never_pass_unmarked():
    class Module:
        domain = Binary()
        budgets: ClassVar = {"linf": Budget(eps=(0.1,), headline=0.1)}

        def prepare_data(self):
            pass

        def setup(self, stage):
            pass

        def test_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)

    with pytest.raises(ValueError, match="relaxed_linf"):
        evaluate(Net(), Module(), "quick", progress=False)
    with pytest.raises(ValueError, match="leave domain out"):
        evaluate(Net(), Module(), "quick", domain=Box(), progress=False)
    hidden = Suite("mine", (Entry(Linf(0.1), (FGSM(Linf(0.1)),), True),), control=False)
    with pytest.raises(ValueError, match="marked infeasible"):
        evaluate(Net(), Module(), hidden, budgets={}, progress=False)
    with pytest.raises(ValueError, match="use 'linf'"):
        evaluate(Net(), data(), "quick", budgets={"relaxed_linf": Module.budgets["linf"]}, domain=Box(), progress=False)
    flips = (EventFlips(1), EventFlips("1%"))
    with pytest.raises(ValueError, match="mixes shares"):
        Suite("mine", tuple(Entry(threat, (FGSM(threat),), True) for threat in flips), control=False)


def test_report_and_loggers_mark_what_is_infeasible(result, tmp_path):
    from sg_lightning import reporting
    from sg_lightning.callbacks.loggers import table_rows

    norms = {row[0] for row in table_rows(result)}
    assert {"flips", "relaxed_linf (infeasible)"} <= norms
    pytest.importorskip("matplotlib")
    page = reporting.write_report({"net": result}, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "L∞, relaxed (infeasible)" in page
    assert "which no sensor can produce" in page
    assert "retiming B∞" in page
    choice = page[page.index("An attacker who may choose among") :][:120]
    assert "relaxed" not in choice
