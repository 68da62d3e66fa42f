"""Every shipped suite under every norm, and on a small spiking network."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sg_lightning.attacks import load_suite, read_suite, suite_names
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.evaluation import evaluate
from sg_lightning.neurons import LIF
from sg_lightning.threats import Budget
from sg_lightning.threats.budget import THREATS

EVENTS = [norm for norm in THREATS if norm not in ("linf", "l2", "l1")]
CASES = [
    *((norm, Box()) for norm in ("linf", "l2", "l1", "l0")),
    *((norm, Binary()) for norm in EVENTS),
    *((norm, Counts(5)) for norm in EVENTS),
]
MOVES = ("flips", "retime_inf", "retime_1", "retime_0")


class Net(nn.Module):
    """A small spiking network over rasters (B, T, N)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire, self.last = nn.Linear(5, 12), LIF(beta=0.8), nn.Linear(12, 3)
        self.first.weight.data *= 3

    def forward(self, x):
        return self.last(self.fire(self.first(x.transpose(0, 1))).mean(0))


def rasters(domain):
    x = (torch.rand(4, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    x = x * (3 if domain == Counts(5) else 0.6 if domain.lattice is None else 1)
    return x, Net()(x).argmax(1)


def budget(norm):
    shares = norm in ("flips", "retime_1", "retime_0")
    return Budget(eps=("20%",), headline="20%") if shares else Budget(eps=(1,), headline=1)


@pytest.mark.parametrize(("norm", "domain"), CASES, ids=str)
@pytest.mark.parametrize("name", suite_names())
def test_every_suite_resolves_under_every_norm_or_says_what_it_attacks(name, norm, domain):
    wanted = read_suite(name)[1].get("norms", "all")
    if wanted != "all" and norm not in wanted:
        with pytest.raises(ValueError, match=f"attacks under '{wanted[0]}' but budgets are given only for {norm}"):
            load_suite(name, {norm: budget(norm)}, domain)
        return
    (entry,) = load_suite(name, {norm: budget(norm)}, domain).entries
    assert entry.threat.norm == norm
    assert entry.threat.domain.lattice == (None if norm.startswith("relaxed") else domain.lattice)
    assert any(attack.kind != "random" for attack in entry.attacks)


def shortened(suite):
    """Return the same attacks with a few steps each."""
    few = {"steps": 3, "queries": 8, "rounds": 2, "restarts": 1, "swaps": 2, "candidates": 8, "targets": 1}
    entries = []
    for entry in suite.entries:
        attacks = []
        for attack in entry.attacks:
            settings = {key: few[key] for key in few if isinstance(getattr(attack, key, None), int)}
            settings = {key: min(few, getattr(attack, key)) for key, few in settings.items()}
            attacks.append(replace(attack, **settings))
        entries.append(replace(entry, attacks=tuple(attacks)))
    return replace(suite, entries=tuple(entries))


def run(name, norm, domain):
    suite = shortened(load_suite(name, {norm: budget(norm)}, domain))
    result = evaluate(Net(), rasters(domain), suite, budgets={}, domain=domain, progress=False)
    assert not any(row.status == "invalid" for row in result.rows)
    assert {row.attack for row in result.rows} >= {attack.name for entry in suite.entries for attack in entry.attacks}
    return result


@pytest.mark.parametrize(("norm", "domain"), CASES, ids=str)
@pytest.mark.parametrize("name", ["quick", "basic", "standard"])
def test_suites_run_on_rasters(name, norm, domain):
    assert run(name, norm, domain).norms == [norm]


@pytest.mark.parametrize(("norm", "domain"), [case for case in CASES if case[0] in MOVES], ids=str)
def test_thorough_runs_on_events(norm, domain):
    run("thorough", norm, domain)


@pytest.mark.parametrize("norm", MOVES)
def test_strong_suites_have_attacks_made_for_events(norm):
    made = {"greedy", "swap", "sda", "flip_search"} if norm == "flips" else {"retiming"}
    for name in ("standard", "thorough"):
        (entry,) = load_suite(name, {norm: budget(norm)}, Binary()).entries
        assert made <= {attack.kind for attack in entry.attacks} <= made | {"pgd"}
        (entry,) = load_suite(name, {norm: budget(norm)}, Counts()).entries
        assert made - {"sda"} <= {attack.kind for attack in entry.attacks} <= made - {"sda"} | {"pgd"}


def test_relaxed_norms_get_the_attacks_of_the_norm_they_relax():
    for norm in ("linf", "l2", "l1"):
        (plain,) = load_suite("thorough", {norm: budget(norm)}, Box()).entries
        (relaxed,) = load_suite("thorough", {f"relaxed_{norm}": budget(norm)}, Binary()).entries
        assert [attack.name for attack in relaxed.attacks] == [attack.name for attack in plain.attacks]


def test_an_unknown_lattice_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("attacks: [{attack: pgd, lattice: integers}]")
    with pytest.raises(ValueError, match="binary, count or none"):
        load_suite(path, {"flips": budget("flips")}, Binary())
