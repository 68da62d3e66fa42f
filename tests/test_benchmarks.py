"""The benchmark of attacks: fair turns, honest counting, and results that need no library but ours."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sg_lightning.threats import L2, Linf

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks' folder, which is no package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_contestants_take_turns_in_both_orders(load):
    calls = []
    names = {name: lambda number, name=name: calls.append((number, name)) for name in "abc"}
    told = []
    seconds = load("timing").race(names, 3, lambda name, result: told.append(name))
    assert [name for _, name in calls] == list("abc" + "cba" + "abc")
    assert told == [name for _, name in calls]
    assert {name: len(spent) for name, spent in seconds.items()} == dict.fromkeys("abc", 3)
    assert load("timing").ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_samples_are_counted_in_both_directions(load):
    counting = load("attack_contestants").Counting(nn.Linear(3, 2))
    x = torch.rand(5, 3, requires_grad=True)
    counting(x).sum().backward()
    torch.autograd.grad(counting(x).sum(), x)
    counting(x.detach())
    assert (counting.forwards, counting.backwards) == (15, 10)


def test_judge_believes_nothing(load):
    judge = load("attacks").judge
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.full((4, 1, 2, 2), 0.5)
    y = model(x).argmax(1)
    x_adv = x.clone()
    x_adv[1] = torch.nan
    x_adv[2] += 0.5  # five times the budget
    x_adv[3] += 0.1 * (1 + 5e-6)  # rounding
    found = judge(model, Linf(0.1), x, x_adv, y)
    assert found["outside"] == 0.5
    reached = sum(int(model(z[None]).argmax(1) != y[0]) for z in (x[0], x[0], x[2] + 0.1, x[3] + 0.1))
    assert found["robust"] == 1 - reached / 4
    assert not found["weight_gradients"]
    model(x).sum().backward()
    assert judge(model, L2(0.1), x, x, y)["weight_gradients"]


def test_benchmark_runs_and_writes_what_the_documents_take(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load("attack_models"), "CACHE", tmp_path / "cache")
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- begin: benchmarks/results/attacks.md -->\nold\n<!-- end -->\nafter\n")
    attacks = load("attacks")
    monkeypatch.setattr(load("attack_contestants"), "find_spec", lambda name: None)
    threads = torch.get_num_threads()
    attacks.main(["--subjects", "tiny", "--rounds", "2", "--out", str(tmp_path), "--docs", str(docs)])
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "attacks.json").read_text())
    by_name = {(r["event"], r["contestant"]): r for r in results["records"]}
    assert len(by_name) == 6
    for event in ("PGD-3 L∞", "APGD-5 L2 DLR", "PGD-3 L1"):
        ours, plain = by_name[event, "sg_lightning"], by_name[event, "sg_lightning, no early drop"]
        assert ours["ratio"] == [1.0, 1.0]
        assert len(plain["seconds"]) == 1
        assert ours["robust"][:1] == plain["robust"]
        assert max(ours["outside"]) == 0.0
        assert ours["forwards"][0] <= plain["forwards"][0]
        assert not ours["leaves_weight_gradients"]
    assert results["provenance"]["commit"]
    text = (tmp_path / "attacks.md").read_text()
    assert docs.read_text() == f"before\n<!-- begin: benchmarks/results/attacks.md -->\n{text}<!-- end -->\nafter\n"
    assert (tmp_path / "attacks.png").stat().st_size > 1000


def test_cascade_saves_passes_and_changes_nothing(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load("attack_models"), "CACHE", tmp_path / "cache")
    load("cascade").main(["--subject", "tiny", "--suite", "basic", "--rounds", "1", "--out", str(tmp_path)])
    full, drops, cascade = json.loads((tmp_path / "cascade.json").read_text())["tiny"]["ways"].values()
    assert cascade["robust"] == drops["robust"] == full["robust"]
    assert 0 < cascade["backwards"][0] <= drops["backwards"][0] <= full["backwards"][0]
    assert "| cascade |" in (tmp_path / "cascade.md").read_text()


@pytest.mark.parametrize("module", ["training", "memory", "scaling", "precision", "gpu", "residual"])
def test_speed_benchmarks_run_and_write_their_tables(load, module, monkeypatch, tmp_path):
    own = {
        "training": ["--networks", "tiny", "--rounds", "2"],
        "memory": ["--networks", "tiny", "layer-4"],
        "scaling": ["--small", "--rounds", "2"],
        "gpu": ["--device", "cpu", "--small", "--rounds", "2"],
        "residual": ["--small", "--rounds", "2", "--batch", "2", "--steps", "2"],
        "precision": ["--tasks", "digits", "--seeds", "1", "--epochs", "1"],
    }
    if module == "memory":  # a process for one contestant only
        memory = load(module)
        peak = memory.peak
        monkeypatch.setattr(memory, "peak", lambda name, who: peak(name, who) if who == memory.OURS else None)
    load(module).main([*own[module], "--out", str(tmp_path)])
    text = (tmp_path / f"{module}.md").read_text(encoding="utf-8")
    assert "python " in text
    assert text.count("\n|") >= 4
    found = json.loads((tmp_path / f"{module}.json").read_text(encoding="utf-8"))
    assert found.get("tiny", found)["provenance"]["commit"]


def test_ways_to_save_memory_that_change_gradients_are_not_measured(load, monkeypatch):
    memory = load("memory")
    network = memory.EVERY["tiny"]
    net, (x, y) = memory.contestants(network)[memory.OURS], memory.batch(network)
    memory.check(net, x, y)
    monkeypatch.setattr(
        memory, "_choose", lambda net, way: net.net.features[0].weight.data.mul_(1.01 if way.again else 1)
    )
    with pytest.raises(RuntimeError, match="blocks again: other gradients"):
        memory.check(net, x, y)


def test_rounding_is_compared_spike_by_spike(load):
    torch.manual_seed(0)
    precision = load("precision")
    task = precision.TASKS["digits"]
    net = task.network()
    x, y = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
    for _ in range(50):
        net(x)  # statistics with which all layers fire
    data = SimpleNamespace(test_dataloader=lambda: [(x, y), (x, y)])
    found = precision.compare(net.eval(), data)
    exact, spikes = precision.run(net, x, cast=False)
    rounded, others = precision.run(net, x, cast=True)
    assert found["samples"] == 128
    assert found["changed"] == pytest.approx(float((exact != rounded).float().mean()))
    assert list(found["flipped"]) == list(spikes)
    for name, s in spikes.items():
        assert found["flipped"][name] == pytest.approx(float((s != others[name]).float().mean()))
        assert 0 < found["flipped"][name] < found["fired"][name]


def test_contestants_that_compute_something_else_are_not_timed(load):
    training = load("training")
    network = training.NETWORKS["tiny"]
    nets = training.contestants(network)
    training.check(nets, network)
    with torch.no_grad():
        nets[training.FOLD].net.head.bias += 0.1
    with pytest.raises(RuntimeError, match="computes other logits"):
        training.check(nets, network)
    with torch.no_grad():
        nets[training.OURS].net.features[0].weight.zero_()
    with pytest.raises(RuntimeError, match="every layer must fire"):
        training.check(nets, network)


def test_the_step_of_the_official_style_is_ours(load):
    assert load("sparse_gradient").check()["gradients_relative_to_largest"] < 1e-9


def test_a_cubic_growth_has_exponent_three(load):
    sizes = [1, 2, 4, 8, 16]
    assert load("scaling").exponent(sizes, [n**3 for n in sizes]) == pytest.approx(3)
    assert load("scaling").exponent(sizes, [5.0 + n for n in sizes]) < 1
