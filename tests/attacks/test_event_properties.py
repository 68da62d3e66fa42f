"""What every attack on events keeps for any raster, budget and batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sg_lightning.attacks import (
    FGSM,
    PGD,
    SDA,
    FlipSearch,
    GreedyFlips,
    Oracle,
    RandomNoise,
    SwapFlips,
    UniversalFlips,
    make_attack,
    verify,
)  # fmt: skip
from sg_lightning.domains import Binary, Counts
from sg_lightning.neurons import LIF
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import EventFlips, SpikeRetiming

SAMPLES, STEPS, LINES = 6, 4, 3
FLIPS = {"greedy": GreedyFlips, "swap": SwapFlips, "flip_search": FlipSearch, "sda": SDA, "universal": UniversalFlips,
         "pgd": PGD, "fgsm": FGSM, "random": RandomNoise}  # fmt: skip
FEW = {"candidates": 6, "swaps": 2, "width": 3, "steps": 2, "queries": 6, "rounds": 3, "first": 2}
CASES = [
    *((kind, "flips", domain) for kind in FLIPS for domain in (Binary(), Counts())),
    *((kind, f"retime_{m}", d) for kind in ("retiming", "pgd", "random") for m in ("inf", "1", "0") for d in (Binary(), Counts())),
]  # fmt: skip
CASES = [case for case in CASES if not (case[0] in ("sda", "universal") and case[2] == Counts())]


class Net(nn.Module):
    """A small spiking network over rasters (B, T, N) in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire, self.last = nn.Linear(LINES, 12), LIF(beta=0.8), nn.Linear(12, 3)
        self.first.weight.data *= 3
        self.double()

    def forward(self, x):
        return self.last(self.fire(self.first(x.transpose(0, 1))).mean(0))


NET = Net()


def build(kind, norm, domain, eps, mode):
    threat = EventFlips(eps, domain, mode) if norm == "flips" else SpikeRetiming(eps, domain, norm[7:])
    known = make_attack(threat, kind)
    return make_attack(threat, kind, **{key: few for key, few in FEW.items() if hasattr(known, key)})


def budgets(norm):
    return st.integers(0, STEPS - 1) if norm == "retime_inf" else st.sampled_from([0, 1, 3, "0%", "20%", "60%"])


@pytest.mark.parametrize(("kind", "norm", "domain"), CASES, ids=str)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_inside_budget_alone_and_in_company(kind, norm, domain, data):
    attack = build(kind, norm, domain, data.draw(budgets(norm)), data.draw(st.sampled_from(["flip", "add", "delete"])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    x = torch.randint(1, 2 if domain.lattice == "binary" else 4, (SAMPLES, STEPS, LINES), generator=generator)
    x = (x * (torch.rand(x.shape, generator=generator) < 0.5)).double()
    x[1], x[2] = 0.0, 1.0  # no events; no empty bin
    y = NET(x).argmax(1)
    noise = SampleGenerator.from_ids(0, range(SAMPLES))
    result = attack.run(Oracle(NET), x, y, generator=noise)
    verdict = verify(Oracle(NET), attack.threat, x, result.x_adv, y)
    assert bool(verdict.inside.all())
    assert torch.equal(verdict.misclassified, result.success)
    assert bool((result.x_adv >= 0).all())
    still = attack.threat.limits(x) == 0
    assert torch.equal(result.x_adv[still], x[still])
    if norm != "flips":  # the same packets in every line
        assert torch.equal(result.x_adv.sort(1).values, x.sort(1).values)
    if kind != "universal":
        few = data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, unique=True).map(torch.tensor))
        alone = attack.run(Oracle(NET), x[few], y[few], generator=noise.select(few))
        for part in ("x_adv", "success", "invalid", "queries", "gradients", "iterations"):
            assert torch.equal(getattr(alone, part), getattr(result, part)[few]), part
