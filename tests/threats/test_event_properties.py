"""What every threat on events keeps for any raster, budget and gradient."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_lightning.domains import Binary, Counts
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import EventFlips, SpikeRetiming

SAMPLES = 4
FLIPS = [
    EventFlips(0, domain, mode) for domain in (Binary(), Counts(4), Counts()) for mode in ("flip", "add", "delete")
]
MOVES = [SpikeRetiming(0, domain, measure) for domain in (Binary(), Counts()) for measure in ("inf", "1", "0")]


def name(threat):
    return f"{threat.norm}-{getattr(threat, 'mode', '')}-{threat.domain}"


@st.composite
def rasters(draw, domain):
    """Draw a batch (B, T, ...) with an empty and a full sample."""
    shape = (SAMPLES, draw(st.integers(2, 6)), *draw(st.sampled_from([(1,), (4,), (2, 1, 3)])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randint(1, 2 if domain.lattice == "binary" else 5, shape, generator=generator)
    x = x * (torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9])))
    x[1], x[2] = 0, 1
    slope = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-30, 1.0, 50.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return x.to(dtype), slope.to(dtype)


def points(threat, x, slope, noise):
    return (
        threat.project(x + slope, x), threat.maximise_linear(x, slope), threat.sample(x, noise),
        threat.random_start(x, noise), threat.project(threat.steepest_step(x, slope, x, 1.0), x),
    )  # fmt: skip


@pytest.mark.parametrize("kind", FLIPS + MOVES, ids=name)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_inside_budget_alone_and_in_company(kind, data):
    x, slope = data.draw(rasters(kind.domain))
    budgets = st.integers(0, x.shape[1] - 1) if kind.norm == "retime_inf" else st.sampled_from([1, 3, 9, "10%", "55%"])
    threat = kind.with_eps(data.draw(budgets))
    noise = SampleGenerator.from_ids(0, range(SAMPLES))
    found = points(threat, x, slope, noise)
    for point in found:
        assert point.dtype == x.dtype
        assert bool(threat.contains(point, x).all())
        assert bool((threat.size(point, x) <= threat.limits(x)).all())
        assert bool((point >= 0).all())
        assert torch.equal(point, point.round())
        if isinstance(threat, SpikeRetiming):  # the same packets in every line
            assert torch.equal(point.sort(1).values, x.sort(1).values)
    few = data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, unique=True).map(torch.tensor))
    alone = points(threat, x[few], slope[few], noise.select(few))
    assert all(torch.equal(one, point[few]) for one, point in zip(alone, found, strict=True))


@pytest.mark.parametrize("kind", FLIPS + MOVES, ids=name)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_no_budget_is_the_identity(kind, data):
    x, slope = data.draw(rasters(kind.domain))
    noise = SampleGenerator.from_ids(0, range(SAMPLES))
    for eps in (0, "0%") if kind.shares else (0,):
        assert all(torch.equal(point, x) for point in points(kind.with_eps(eps), x, slope, noise))


@pytest.mark.parametrize("kind", FLIPS + MOVES, ids=name)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_the_linear_maximum_grows_with_the_budget(kind, data):
    x, slope = data.draw(rasters(kind.domain))
    gains = [
        ((kind.with_eps(eps).maximise_linear(x, slope) - x).double() * slope.double()).flatten(1).sum(1)
        for eps in range(x.shape[1])
    ]
    if kind.domain.lattice == "binary" or isinstance(kind, EventFlips):  # on counts the best retiming is a heuristic
        scale = slope.double().abs().max()
        assert all(bool((b >= a - 1e-12 * scale * x[0].numel()).all()) for a, b in itertools.pairwise(gains))
    assert all(bool((gain >= 0).all()) for gain in gains)
