"""evaluate(): rows, resume, invariance, honesty checks and bad input."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.attacks import BPTT, Oracle, load_suite
from sg_lightning.domains import Box
from sg_lightning.evaluation import RobustnessResult, RobustnessRun, Row, evaluate, wilson
from sg_lightning.evaluation.rows import RowStore, read_rows
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.threats import Budget

BUDGETS = {
    "linf": Budget(eps=("1/16", "2/16"), headline="2/16"),
    "l1": Budget(eps=(1.0, 2.0), headline=1.0),
    "l0": Budget(eps=(1, 2), headline=2),
}


class Net(nn.Module):
    """A small spiking network in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.fire, self.last = nn.Linear(9, 32), LIF(beta=0.8), nn.Linear(32, 3)
        self.double()

    def forward(self, x):
        return self.last(self.fire(2 * self.first(x.flatten(1)).expand(4, -1, -1)).mean(0))


def data(n=24, dtype=torch.float64):
    x = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        y = Net()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 3  # some samples are wrong without an attack
    return x.to(dtype), y


def run(model=None, given=None, **options):
    options = {"suite": "basic", "budgets": BUDGETS, "progress": False, **options}
    return evaluate(model or Net(), given or data(), **options)


def ordered(rows):
    return sorted(rows, key=repr)


def test_rows_do_not_depend_on_batching():
    whole = run(batch_size=24)
    assert {row.status for row in whole.rows} >= {"broken", "survived", "skipped"}
    for size in (1, 7):
        assert ordered(run(batch_size=size).rows) == ordered(whole.rows)
    loader = DataLoader(TensorDataset(*data()), batch_size=5)
    assert ordered(run(given=loader).rows) == ordered(whole.rows)
    assert whole.metrics() != run(seed=1).metrics() or ordered(run(seed=1).rows) != ordered(whole.rows)


def test_figures_follow_from_rows():
    result = run()
    by_hand = {}
    for row in result.rows:
        if row.phase == "main" and row.attack not in ("random", "clean"):
            fine = row.clean and row.status in ("survived", "skipped")
            by_hand.setdefault((row.norm, row.eps), {}).setdefault(row.id, []).append(fine)
    small = {i: all(flags) for i, flags in by_hand["linf", "1/16"].items()}
    large = {i: all(flags) and small[i] for i, flags in by_hand["linf", "2/16"].items()}
    assert result.accuracy("linf", "1/16") == np.mean(list(small.values()))
    assert result.accuracy("linf") == np.mean(list(large.values())) <= result.accuracy("linf", 1 / 16)
    masks = [result.robust(norm) for norm in ("linf", "l1", "l0")]
    assert result.union() == np.logical_and.reduce(masks).mean() <= min(m.mean() for m in masks)
    assert result.metrics()["robust/min/acc"] == min(m.mean() for m in masks)
    assert result.interval("linf") == wilson(int(masks[0].sum()), 24)
    assert result.curve("linf")[0][:2] == (0.0, result.clean)
    assert [point[0] for point in result.curve("l1")] == [0.0, 1.0, 2.0]
    assert result.random_accuracy("linf") >= result.accuracy("linf")
    assert result.clean == pytest.approx(20 / 24)


def test_cascade_spends_nothing_on_the_broken():
    result = run()
    for i in result.ids.tolist():
        for norm in result.norms:
            main = [r for r in result.rows if (r.id, r.norm, r.phase) == (i, norm, "main") and r.attack != "random"]
            states = [r.status for r in main]
            if "broken" in states:
                assert set(states[states.index("broken") + 1 :]) <= {"skipped"}
            if not main[0].clean:
                assert set(states) == {"skipped"}
            assert all(r.queries == 0 for r in main if r.status == "skipped")


def test_interrupted_run_resumes_to_the_same_rows(tmp_path):
    class Dies(Net):
        calls, stop_at = 0, None

        def forward(self, x):
            self.calls += 1
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return super().forward(x)

    counting = Dies()
    whole = run(counting, batch_size=4)
    Dies.stop_at = counting.calls * 2 // 3
    with pytest.raises(KeyboardInterrupt):
        run(Dies(), batch_size=4, out=tmp_path)
    kept = len(read_rows(tmp_path / "rows.csv"))
    assert 0 < kept < len(whole.rows)
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("23,1,1,main,linf,1/1")  # a line torn by the kill
    again = run(batch_size=4, out=tmp_path)
    assert again.meta["resumed_samples"] > 0
    assert ordered(again.rows) == ordered(whole.rows)
    assert run(batch_size=9, out=tmp_path).meta["resumed_samples"] == 24


def test_resume_keeps_examples_and_checks_and_the_folder_is_a_result(tmp_path):
    class Dies(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 700:
                raise KeyboardInterrupt
            return super().forward(x)

    whole = run(batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        run(Dies(), batch_size=4, out=tmp_path)
    again = run(batch_size=4, out=tmp_path)
    assert 0 < again.meta["resumed_samples"] < 24
    assert again.checks == whole.checks
    assert len(again.examples) == len(whole.examples) > 0
    for one, other in zip(again.examples, whole.examples, strict=True):
        assert torch.equal(one["adversarial"], other["adversarial"])
    assert RobustnessResult.load(tmp_path).metrics() == whole.metrics()


def test_changed_data_are_not_resumed_and_not_compared(tmp_path):
    x, y = data()
    result = run(out=tmp_path)
    other = x.clone()
    other[17] = 1 - other[17]
    with pytest.raises(ValueError, match="sample 17 is not the one"):
        run(given=(other, y), out=tmp_path)
    with pytest.raises(ValueError, match="same samples"):
        result.difference(run(given=(other, y)))


def test_a_bad_batch_loses_nothing_of_those_before(tmp_path):
    x, y = data()
    bad = x.clone()
    bad[20] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run(given=DataLoader(TensorDataset(bad, y), batch_size=4), out=tmp_path)
    assert {row.id for row in read_rows(tmp_path / "rows.csv")} == set(range(20))
    again = run(given=DataLoader(TensorDataset(x, y), batch_size=4), out=tmp_path)
    assert again.meta["resumed_samples"] == 20
    assert ordered(again.rows) == ordered(run().rows)


def test_tensors_are_checked_before_any_attack():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, (x, y) = Counting(), data()
    x[-1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run(model, (x, y), batch_size=4)
    assert model.calls == 0


@pytest.mark.parametrize(("change", "named"), [({"seed": 1}, "seed was 0, is 1"), ({"suite": "quick"}, "suite was 'basic-"),
                                               ({"model": Net(1)}, "weights was")])  # fmt: skip
def test_other_runs_are_not_mixed(tmp_path, change, named):
    run(out=tmp_path, suite="basic")
    with pytest.raises(ValueError, match=named):
        run(out=tmp_path, **change)


def test_save_and_load_round_trip(tmp_path):
    result = run(given=data(dtype=torch.float64))
    again = RobustnessResult.load(result.save(tmp_path / "a"))
    assert again.rows == result.rows
    assert again.metrics() == result.metrics()
    assert again.checks == result.checks
    assert again.table() == result.table()
    assert again.suite.hash == result.suite.hash
    assert torch.equal(again.examples[0]["adversarial"], result.examples[0]["adversarial"])
    difference = result.difference(again)
    assert difference.value == 0.0
    assert difference.low < 0 < difference.high
    assert pickle.loads(pickle.dumps(again)).metrics() == result.metrics()
    json.dumps(result.meta)
    with pytest.raises(ValueError, match="no saved result"):
        RobustnessResult.load(tmp_path)


def test_bad_row_files_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a file of rows"):
        read_rows(tmp_path / "rows.csv")
    store = RowStore(tmp_path / "new", {})
    store.append([Row(0, 1, True, "main", "", "", "clean", "skipped", 0.0, 0, 0, 0, 0, "s", "d")])
    with store.path.open("a") as file:
        file.write("x,y\n")
    with pytest.raises(ValueError, match="line 3: not a row"):
        store.read()


def status_of(result, name, norm=None):
    return {c.status for c in result.checks if c.name == name and (norm is None or c.norm == norm)}


def test_checks_pass_on_an_honest_model():
    result = run()
    assert status_of(result, "few zero gradients") == {"pass"}
    assert status_of(result, "accuracy falls to zero as eps grows", "linf") == {"pass"}
    assert status_of(result, "iterative at least as strong as single step", "linf") == {"pass"}


def test_checks_fail_on_masked_gradients():
    class Masked(Net):
        def forward(self, x):
            return super().forward(torch.round(x * 8) / 8 + 0 * x)  # rounding has no gradient

    result = run(Masked())
    assert status_of(result, "few zero gradients") == {"fail"}
    assert "! all norms: few zero gradients" in result.table()
    assert "fail" in status_of(result, "accuracy falls to zero as eps grows")


def test_non_finite_gradients_count_as_not_robust():
    class Broken(Net):
        def forward(self, x):
            return super().forward(x) + (x - x.detach()).abs().sqrt().sum().unsqueeze(0)  # infinite slope at 0

    result = run(Broken())
    assert result.accuracy("linf") == 0.0
    assert status_of(result, "all examples valid") == {"fail"}


def test_stochastic_model_without_votes_is_told():
    class Noisy(Net):
        stochastic = True

        def forward(self, x):
            return super().forward(x + 0.01 * torch.randn_like(x))

    assert status_of(run(Noisy(), suite="quick"), "randomness averaged out") == {"fail"}
    assert status_of(run(Noisy(), suite="quick", eot=10, votes=3), "randomness averaged out") == {"pass"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), "empty"),
        (lambda x, y: (x * float("nan"), y), "NaN or infinite"),
        (lambda x, y: (x * 255, y), "normalise"),
        (lambda x, y: (x, y + 5), "no class of the model"),
        (lambda x, y: (x, y - 5), "labels must be >= 0"),
        (lambda x, y: (x, y[:3]), "labels"),
        (lambda x, y: DataLoader(TensorDataset(x, y), shuffle=True), "shuffle=False"),
    ],
)
def test_bad_data_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        run(given=given(*data()))


def test_bad_models_and_settings_are_refused():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), None

    class Softmax(Net):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with pytest.raises(TypeError, match="returned a tuple"):
        run(Pair())
    with pytest.raises(ValueError, match="probabilities"):
        run(Softmax())
    with pytest.raises(ValueError, match="no budgets"):
        run(budgets=None)
    with pytest.raises(ValueError, match="unknown suite 'standart'"):
        run(suite="standart")
    with pytest.raises(ValueError, match="no spiking neuron"):
        run(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double(), estimator=BPTT(surrogates.Atan(2.0)))
    with pytest.raises(TypeError, match="pair of tensors"):
        run(given="digits")
    with pytest.raises(ValueError, match="max_samples"):
        run(max_samples=0)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write rows"):
        run(out=tmp_path / "file")


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import importlib.util
spec = importlib.util.spec_from_file_location("given", {file!r})
given = importlib.util.module_from_spec(spec)
spec.loader.exec_module(given)

class Dies(given.Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == {stop}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

given.run(Dies(), batch_size=3, out={out!r})
"""


def test_killed_at_any_moment_it_goes_on(tmp_path):
    whole, resumed = run(), []
    for number, stop in enumerate((40, 500, 1100)):
        out = tmp_path / str(number)
        script = KILLED.format(here=str(Path.cwd()), file=__file__, stop=stop, out=str(out))
        done = subprocess.run([sys.executable, "-c", script], check=False)
        assert done.returncode == -signal.SIGKILL
        again = run(out=out)
        resumed.append(again.meta["resumed_samples"])
        assert ordered(again.rows) == ordered(whole.rows)
    assert resumed[0] < resumed[1] < resumed[2] < 24


def test_full_disk_says_so_and_keeps_what_is_there(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; mend that and run the same again"):
        run(batch_size=3, out=tmp_path)
    monkeypatch.undo()
    again = run(out=tmp_path)
    assert again.meta["resumed_samples"] > 0
    assert ordered(again.rows) == ordered(run().rows)


def test_a_damaged_manifest_and_a_foreign_folder_are_named(tmp_path):
    run(out=tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"seed": 0')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        run(out=tmp_path / "a")
    run().save(tmp_path / "b")
    with pytest.raises(ValueError, match="holds a saved result"):
        run(out=tmp_path / "b")


def test_model_is_left_alone_and_subset_is_a_prefix():
    model = Net().train()
    before = [p.clone() for p in model.parameters()]
    few = run(model, max_samples=10, check_samples_count=0)
    assert model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert few.ids.tolist() == list(range(10))
    full = [row for row in run(check_samples_count=0).rows if row.id < 10]
    assert ordered(few.rows) == ordered(full)


def test_every_row_names_the_suite_and_examples_are_inside():
    suite = load_suite("quick", BUDGETS, Box())
    engine = RobustnessRun(Oracle(Net()), suite)
    rows = engine.batch(*data(), ids=range(24))
    assert {row.suite for row in rows} == {f"quick-{suite.hash}"}
    for example in engine.examples:
        if example["norm"] == "linf":
            assert float((example["adversarial"] - example["clean"]).abs().max()) <= 2 / 16 * (1 + 1e-6)
        assert example["predicted"] != example["label"]
