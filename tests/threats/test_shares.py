"""Budgets as shares of a sample's own events."""

import pytest
import torch

from sg_lightning.attacks import PGD, RFGSM
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import (
    L0,
    L1,
    L2,
    Budget,
    EventFlips,
    Joint,
    Linf,
    RelaxedL1,
    RelaxedL2,
    RelaxedLinf,
    SpikeRetiming,
    is_relaxed,
    make_threat,
    make_threats,
    parse_eps,
)  # fmt: skip


def raster(events, cells=200, dtype=torch.float32):
    """One sample per number of events, each in a cell of its own."""
    x = torch.zeros(len(events), 10, cells // 10, dtype=dtype)
    for k, count in enumerate(events):
        x[k].view(-1)[:count] = 1.0
    return x


def test_shares_are_exact_and_rounded_down():
    x = raster([0, 1, 49, 50, 99, 100, 150, 200])
    assert EventFlips("2%").limits(x).tolist() == [0, 0, 0, 1, 1, 2, 3, 4]
    assert EventFlips("29%").limits(x[5:6]).tolist() == [29]  # 0.29 * 100 is below 29 in floating point
    assert EventFlips("0.5%").limits(x).tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert EventFlips("1/3%").limits(raster([300], 300)).tolist() == [1]
    assert EventFlips("150%").limits(x[5:6]).tolist() == [150]
    assert EventFlips("10%", Counts()).limits(3 * x[5:6]).tolist() == [30]  # events, not cells
    assert EventFlips(3).limits(x).tolist() == [3.0] * 8


@pytest.mark.parametrize("domain", [Binary(), Counts(), Counts(2)], ids=str)
@pytest.mark.parametrize("mode", ["flip", "add", "delete"])
@pytest.mark.parametrize("seed", range(3))
def test_each_sample_keeps_its_own_budget(domain, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    x = raster([0, 7, 60, 140, 200]) * (1 if domain.lattice == "binary" else 2)
    threat = EventFlips("7%", domain, mode)
    limits = threat.limits(x)
    slope = torch.randn(x.shape, generator=generator)
    noise = SampleGenerator.from_ids(seed, range(5))
    points = (threat.project(x + 3 * slope, x), threat.maximise_linear(x, slope), threat.sample(x, noise))
    for point in points:
        assert bool(threat.contains(point, x).all())
        assert bool((threat.size(point, x) <= limits).all())
    assert not threat.contains(points[0] + 1, x).any()
    for k in range(5):  # as if it were alone with that number
        alone = EventFlips(int(limits[k]), domain, mode)
        one = slice(k, k + 1)
        assert torch.equal(alone.maximise_linear(x[one], slope[one]), points[1][one])
        assert torch.equal(alone.project(x[one] + 3 * slope[one], x[one]), points[0][one])
        assert torch.equal(alone.sample(x[one], noise.select(torch.tensor([k]))), points[2][one])


def test_names_order_and_what_does_not_mix():
    assert EventFlips("2%").key == "flips_2pct"
    assert EventFlips("0.5%").key == "flips_0p5pct"
    assert EventFlips("2%").describe() == {"norm": "flips", "eps": "2%", "domain": "Binary {0, 1}", "mode": "flip"}
    assert EventFlips("2%").with_eps(4).limits(raster([50])).tolist() == [4]
    assert parse_eps("0.5%") == 0.005
    budget = Budget(eps=("0.5%", "1%", "2%"), headline="1.0%")
    assert [budget.is_headline(eps) for eps in ("1%", "2%", 0.01)] == [True, False, False]
    assert [t.eps for t in make_threats("flips", {"flips": budget}, Binary())] == ["0.5%", "1%", "2%"]
    for make, message in (
        (lambda: Budget(eps=("1%", 4), headline=4), "mixes shares"),
        (lambda: Budget(eps=("2%", "1%"), headline="1%"), "ascending"),
        (lambda: Budget(eps=("100%",), headline=1), "not one of"),
        (lambda: Linf("2%"), "eps of Linf cannot be a share"),
        (lambda: L0("2%"), "cannot be a share"),
        (lambda: EventFlips("-2%"), "finite and >= 0"),
        (lambda: EventFlips("two%"), "number or a ratio"),
        (lambda: EventFlips("%"), "number or a ratio"),
        (lambda: PGD(EventFlips(1), step_size="2%"), "step_size cannot be a share"),
        (lambda: RFGSM(Linf(0.1), alpha="2%"), "alpha cannot be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_shares_in_a_joint_threat():
    threat = Joint({"events": EventFlips("10%"), "image": Linf(0.1)})
    x = {"events": raster([50, 0]), "image": torch.full((2, 4), 0.5)}
    moved = threat.maximise_linear(x, {key: torch.ones_like(value) for key, value in x.items()})
    assert threat.contains(moved, x).all()
    assert torch.allclose(threat.size(moved, x), torch.ones(2, dtype=torch.float64), atol=1e-6)
    moved["events"][1, 0, 0] = 1.0
    assert torch.isinf(threat.size(moved, x)).tolist() == [False, True]


@pytest.mark.parametrize("relaxed", [RelaxedLinf, RelaxedL2, RelaxedL1])
def test_relaxed_norms_are_the_plain_ones_between_the_walls(relaxed):
    x = raster([20, 100], dtype=torch.float64)
    plain = {"relaxed_linf": Linf, "relaxed_l2": L2, "relaxed_l1": L1}[relaxed.norm](0.3, Box())
    threat = make_threat(relaxed.norm, 0.3, Binary())
    assert isinstance(threat, relaxed)
    assert threat.relaxed
    assert is_relaxed(threat.norm)
    assert threat.key == f"{relaxed.norm}_0p3"
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = SampleGenerator.from_ids(0, range(2))
    assert torch.equal(threat.project(x + slope, x), plain.project(x + slope, x))
    assert torch.equal(threat.maximise_linear(x, slope), plain.maximise_linear(x, slope))
    assert torch.equal(threat.random_start(x, noise), plain.random_start(x, noise))
    assert threat.default_step(10, 3) == plain.default_step(10, 3)
    assert bool(threat.contains(threat.maximise_linear(x, slope), x).all())
    assert relaxed(2, Counts()).contains(5 * x + 0.001, 5 * x).all()
    assert not EventFlips(5).relaxed
    assert Joint({"a": threat}).norm == "relaxed_joint"
    assert Joint({"a": threat}).key == "relaxed_joint_1"
    assert Joint({"a": SpikeRetiming(1)}).norm == "joint"


def test_plain_norms_on_events_are_refused_with_the_relaxed_name():
    for norm in ("linf", "l2", "l1"):
        with pytest.raises(ValueError, match=f"relaxed_{norm}"):
            make_threat(norm, 1, Binary())
