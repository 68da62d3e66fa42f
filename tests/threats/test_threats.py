"""Threat models: exact projections and maximisers, budgets held, the random control, clear errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_lightning.attacks import PGD
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Joint, Linf, make_threat

SHAPE = (5, 2, 4, 4)
BOX_THREATS = [Linf("8/255"), Linf(0.01), L2(0.01), L2(0.7), L1(0.01), L1(3), L1(1), L0(3), L0(5, unit="cells")]
EVENT_THREATS = [EventFlips(k, domain, mode) for k in (0, 4) for domain in (Binary(), Counts()) for mode in ("flip", "add", "delete")]  # fmt: skip


def clean(threat, seed, dtype=torch.float32, binary=False):
    generator = torch.Generator().manual_seed(seed)
    if threat.domain.lattice == "count":
        return torch.randint(0, 4, SHAPE, generator=generator).to(dtype)
    if binary or threat.domain.lattice == "binary":
        return torch.randint(0, 2, SHAPE, generator=generator).to(dtype)
    x = torch.rand(SHAPE, generator=generator, dtype=dtype)
    x[:, :, 0, :2] = 0.0  # dead corner
    return x


@pytest.mark.parametrize("threat", BOX_THREATS + EVENT_THREATS, ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-30, 0.1, 1.0, 50.0]), binary=st.booleans())
def test_everything_returned_is_allowed(threat, seed, scale, binary):
    x = clean(threat, seed, binary=binary)
    noise = SampleGenerator.from_ids(seed, range(len(x)))
    gradient = scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    gradient[0] = 0.0
    stepped = threat.steepest_step(x, gradient, x, threat.default_step(10))
    for point in (
        threat.project(x + gradient, x), threat.random_start(x, noise), threat.sample(x, noise),
        threat.maximise_linear(x, gradient), threat.project(stepped, x),
    ):  # fmt: skip
        assert bool(threat.contains(point, x).all())
        assert bool((threat.size(point, x) <= threat.budget * (1 + 1e-6)).all())
    inside = threat.project(x + gradient, x)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-6)


def test_contains_says_no():
    x = torch.full((1, 1, 2, 2), 0.5)
    assert not Linf(0.1).contains(x + 0.11, x).any()
    assert not Linf(0.6).contains(x + 0.55, x).any()  # out of the box
    assert not L2(0.1).contains(x + 0.06, x).any()
    assert not L1(0.1).contains(x + 0.03, x).any()
    assert not L0(3).contains(x + 0.01, x).any()
    assert not Linf(0.1).contains(x * torch.nan, x).any()
    raster = torch.tensor([[[0.0, 1.0]]])
    assert EventFlips(2).contains(1 - raster, raster).all()
    assert not EventFlips(2, mode="add").contains(1 - raster, raster).any()
    assert not EventFlips(2, mode="delete").contains(1 - raster, raster).any()
    assert not EventFlips(1).contains(1 - raster, raster).any()
    assert not EventFlips(2).contains(raster + 0.5, raster).any()


def bisect(function, low, high):
    """Find where a falling function reaches 0."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def reference_projection(norm, v, room, eps):
    """Project magnitudes by bisection on the multiplier, in float64."""
    held = np.minimum(v, room)
    if norm == "l1":
        solve = lambda lam: np.minimum(np.maximum(v - lam, 0), room)
        total = np.sum
    else:
        solve = lambda lam: np.minimum(v / (1 + lam), room)
        total = np.linalg.norm
    if total(held) <= eps:
        return held
    return solve(bisect(lambda lam: total(solve(lam)) - eps, 0.0, 1e6))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(0, 1), st.floats(-2, 2)), min_size=2, max_size=12),
    eps=st.sampled_from([0.01, 0.3, 1.0, 2.0, 5.0]),
    binary=st.booleans(),
)
def test_projection_equals_bisection(norm, values, eps, binary):
    x = np.array([float(round(a)) if binary else a for a, _ in values])
    move = np.array([np.sign(b) if binary else b for _, b in values])
    threat = make_threat(norm, eps)
    found = threat.project(torch.tensor((x + move)[None]), torch.tensor(x[None]))[0].numpy() - x
    move = (x + move) - x
    room = np.where(move > 0, 1 - x, x)
    expected = np.sign(move) * reference_projection(norm, np.abs(move), room, eps)
    assert np.abs(found - expected).max() < 1e-7


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), threat=st.sampled_from([Linf(0.1), L2(0.5), L1(1.0)]))
def test_projection_does_not_expand(seed, threat):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 20, generator=generator, dtype=torch.float64)
    a, b = (x + torch.randn(1, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    assert float((threat.project(a, x) - threat.project(b, x)).norm()) <= float((a - b).norm()) + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 4))
def test_sparse_projections_are_nearest_by_enumeration(seed, k):
    from itertools import combinations, product

    rng = np.random.default_rng(seed)
    x, target = rng.random(6), rng.normal(size=6)
    found = L0(k).project(torch.tensor(target[None]), torch.tensor(x[None]))[0].numpy()
    best = math.inf
    for chosen in combinations(range(6), k):
        point = x.copy()
        point[list(chosen)] = np.clip(target[list(chosen)], 0, 1)
        best = min(best, ((point - target) ** 2).sum())
    assert ((found - target) ** 2).sum() == pytest.approx(best, abs=1e-12)
    counts, target = rng.integers(0, 3, 4).astype(float), rng.normal(scale=3, size=4)
    found = EventFlips(k, Counts()).project(torch.tensor(target[None]), torch.tensor(counts[None]))[0].numpy()
    best = min(
        ((np.array(p) - target) ** 2).sum()
        for p in product(range(8), repeat=4)
        if np.abs(np.array(p) - counts).sum() <= k
    )
    assert ((found - target) ** 2).sum() == pytest.approx(best, abs=1e-12)


def test_open_counts_have_no_ceiling():
    x = torch.tensor([[[3.0, 0.0]]])
    up = EventFlips(5, Counts()).maximise_linear(x, torch.tensor([[[2.0, 1.0]]]))
    assert up.tolist() == [[[8.0, 0.0]]]
    down = EventFlips(5, Counts()).maximise_linear(x, torch.tensor([[[-2.0, 1.0]]]))
    assert down.tolist() == [[[0.0, 2.0]]]


@pytest.mark.parametrize("threat", [Linf(0), L2(0), L1(0), L0(0), EventFlips(0)], ids=lambda t: t.norm)
def test_zero_budget_is_the_identity(threat):
    x = clean(threat, 0)
    noise = SampleGenerator.from_ids(0, range(len(x)))
    for point in (
        threat.project(x + 1, x),
        threat.random_start(x, noise),
        threat.sample(x, noise),
        threat.maximise_linear(x, x + 1),
    ):
        assert torch.equal(point, x)


def test_random_control_has_full_size_before_the_walls():
    x = torch.full((64, 1, 8, 8), 0.5, dtype=torch.float64)
    noise = SampleGenerator.from_ids(0, range(64))
    cube = Linf(0.1).sample(x, noise) - x
    assert float(cube.abs().max()) <= 0.1
    assert float(cube.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    assert torch.allclose(L2(0.3).size(L2(0.3).sample(x, noise), x), torch.tensor(0.3, dtype=torch.float64))
    assert torch.allclose(L1(0.3).size(L1(0.3).sample(x, noise), x), torch.tensor(0.3, dtype=torch.float64))
    assert L0(7).size(L0(7).sample(x, noise), x).tolist() == [7] * 64
    raster = (x > 1).double()
    assert EventFlips(9).size(EventFlips(9).sample(raster, noise), raster).tolist() == [9] * 64
    support = (L0(7).sample(x, noise) != x).double().mean(0)  # uniform: every pixel about 7/64 of the time
    assert float(support.max()) < 0.3
    dark = torch.zeros_like(x)  # half of every direction points out of the box
    assert bool((L2(0.3).size(L2(0.3).sample(dark, noise), dark) < 0.3).all())


def test_l0_counts_pixels_not_channels():
    x = torch.zeros(1, 3, 2, 2)
    moved = L0(1).maximise_linear(x, torch.ones(1, 3, 2, 2))
    assert float(moved.sum()) == 3
    assert L0(1).size(moved, x).item() == 1
    assert L0(1, unit="cells").maximise_linear(x, torch.ones(1, 3, 2, 2)).sum().item() == 1
    with pytest.raises(ValueError, match="has 4"):
        L0(5).project(x + 1, x)


def test_joint_threats():
    threat = Joint({"image": Linf(0.1), "audio": EventFlips(2)})
    x = {"image": torch.full((2, 1, 2, 2), 0.5), "audio": torch.zeros(2, 3, 4), "clock": torch.zeros(2, 1)}
    slope = {key: torch.ones_like(value) for key, value in x.items()}
    moved = threat.maximise_linear(x, slope)
    assert float(moved["audio"].sum()) == 4
    assert torch.equal(moved["clock"], x["clock"])
    assert threat.contains(moved, x).all()
    assert torch.allclose(threat.size(moved, x), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert not threat.contains({**moved, "clock": x["clock"] + 1}, x).any()
    with pytest.raises(ValueError, match="also names"):
        threat.project({"image": x["image"]}, {"image": x["image"]})
    with pytest.raises(TypeError, match="needs a dict"):
        threat.project(x["image"], x["image"])
    with pytest.raises(ValueError, match="at least one modality"):
        Joint({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linf(-0.1), "finite and >= 0"),
        (lambda: Linf("8/0"), "ratio like"),
        (lambda: Linf("eight"), "ratio like '8/255', got 'eight'"),
        (lambda: L2(float("nan")), "finite"),
        (lambda: Linf(8), "wider than the domain"),
        (lambda: L0(1.5), "whole number"),
        (lambda: L0(1, unit="voxels"), "pixels"),
        (lambda: L0(1, Counts()), "open"),
        (lambda: EventFlips(1, Box()), "needs events"),
        (lambda: EventFlips(1, mode="swap"), "mode"),
        (lambda: L1(1, Binary()), "integers only"),
        (lambda: make_threat("l3", 1), "unknown norm 'l3'; known norms: linf, l2, l1, l0, flips"),
        (lambda: Budget(eps=(), headline=1), "ascending"),
        (lambda: Budget(eps=(2, 1), headline=1), "ascending"),
        (lambda: Budget(eps=(1, 2), headline=3), "not one of"),
        (lambda: Budget(eps="8/255", headline="8/255"), "sequence"),
    ],
)
def test_bad_threats_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ratios_are_kept_verbatim():
    assert Linf("8/255").budget == 8 / 255
    assert Linf("8/255").key == "linf_8_255"
    assert L2(0.5).key == "l2_0p5"
    assert Budget(eps=("4/255", "8/255"), headline="8/255").is_headline(8 / 255)


def test_budgets_beyond_the_domain_are_refused_at_first_use():
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for threat, largest in ((L2(8.1), "8 apart"), (L1(64.5), "64 apart")):
        with pytest.raises(ValueError, match=f"larger than the domain: inputs of 64 values .* at most {largest}"):
            PGD(threat, steps=1)(torch.nn.Flatten(), x, y)
    with pytest.raises(ValueError, match="larger than the domain"):
        PGD(Joint({"image": L2(8.1)}), steps=1)(lambda v: v["image"].flatten(1), {"image": x}, y)
    PGD(L2(8), steps=1)(torch.nn.Flatten(), x, y)
