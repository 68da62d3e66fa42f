"""Spikes that move in time: sizes, projections and the best-first schedule against enumeration of tiny rasters."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, SpikeRetiming, make_threat, make_threats
from sg_lightning.threats.trains import Packets, lines

MEASURES = ["inf", "1", "0"]
PLACES = {"inf": max, "1": sum, "0": lambda shifts: sum(s > 0 for s in shifts)}


def cheapest(before, after, measure):
    """Price the cheapest matching of one line's spikes by trying all of them."""
    a, b = np.flatnonzero(before), np.flatnonzero(after)
    matchings = (
        [abs(s - t) for s, t in zip(a, order, strict=True)]
        for order in permutations(b)
        if all(before[s] == after[t] for s, t in zip(a, order, strict=True))
    )
    return [PLACES[measure](shifts) if shifts else 0 for shifts in matchings]


def price(x, z, measure):
    """Price two rasters (T, N): over lines the maximum or the sum; infinite if the spikes are not the same."""
    each = []
    for n in range(x.shape[1]):
        if sorted(x[:, n]) != sorted(z[:, n]):
            return np.inf
        each.append(min(cheapest(x[:, n], z[:, n], measure)))
    return max(each) if measure == "inf" else sum(each)


def all_rasters(x):
    """List every raster (T, N) with the same spikes in each line."""
    each = [[np.array(p) for p in sorted(set(permutations(x[:, n])))] for n in range(x.shape[1])]
    return [np.stack(choice, axis=1) for choice in product(*each)]


def tiny(seed, steps=4, width=2, high=2):
    return np.random.default_rng(seed).integers(0, high, (steps, width)).astype(float)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("high", [2, 3], ids=["binary", "counts"])
@pytest.mark.parametrize("seed", range(4))
def test_size_is_that_of_the_cheapest_matching(measure, high, seed):
    x = tiny(seed, high=high)
    others = all_rasters(x)
    threat = SpikeRetiming(1, Counts(), measure)
    found = threat.size(torch.tensor(np.stack(others)), torch.tensor(x).expand(len(others), -1, -1))
    assert found.tolist() == [price(x, z, measure) for z in others]


def test_size_of_anything_else_is_infinite():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    for z in ([[0, 0], [0, 2]], [[1, 1], [0, 2]], [[0, 1], [2, 0]], [[1, 1], [0, 1]]):
        z = torch.tensor([z], dtype=torch.float32)
        for measure in MEASURES:
            assert torch.isinf(SpikeRetiming(9, Counts(), measure).size(z, x)).all()
            assert not SpikeRetiming(9, Counts(), measure).contains(z, x).any()
    split = torch.tensor([[[0.5, 0.0], [0.5, 2.0]]])
    assert not any(SpikeRetiming(9, Counts(), measure).contains(split, x).any() for measure in MEASURES)


@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.integers(0, 5), ties=st.booleans())
def test_projection_and_linear_maximiser_are_exact(measure, seed, eps, ties):
    rng = np.random.default_rng(seed)
    batch = [tiny(seed + k, steps=4, width=3) for k in range(3)]
    v = rng.normal(size=(3, 4, 3))
    v = v.round() if ties else v
    threat = SpikeRetiming(min(eps, 3) if measure == "inf" else eps, measure=measure)
    x, target = torch.tensor(np.stack(batch)), torch.tensor(v)
    near, best = threat.project(target, x), threat.maximise_linear(x, target)
    assert bool(threat.contains(near, x).all())
    assert bool(threat.contains(best, x).all())
    for k, one in enumerate(batch):
        allowed = [z for z in all_rasters(one) if price(one, z, measure) <= threat.budget]
        assert ((near[k].numpy() - v[k]) ** 2).sum() == pytest.approx(min(((z - v[k]) ** 2).sum() for z in allowed))
        assert (best[k].numpy() * v[k]).sum() == pytest.approx(max((z * v[k]).sum() for z in allowed))
        inside = torch.tensor(allowed[seed % len(allowed)][None])
        assert torch.equal(threat.project(inside, x[k : k + 1]), inside)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("domain", [Binary(), Counts()], ids=["binary", "counts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", ["0", "1", "4", "7%"])
def test_everything_returned_is_allowed_and_keeps_the_spikes(measure, domain, dtype, eps):
    if measure == "inf" and eps == "7%":
        eps = "8"
    threat = SpikeRetiming(eps, domain, measure)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2 if domain.lattice == "binary" else 5, (4, 9, 2, 3, 2), generator=generator).to(dtype)
    x *= torch.rand(x.shape, generator=generator) < 0.5
    x[1] = 0.0  # no spikes
    x[2] = 1.0  # no free bin
    noise = SampleGenerator.from_ids(0, range(4))
    slope = torch.randn(x.shape, generator=generator, dtype=dtype)
    slope[3] = 0.0
    points = (
        threat.project(x + slope, x),
        threat.maximise_linear(x, slope),
        threat.sample(x, noise),
        threat.random_start(x, noise),
        threat.project(threat.steepest_step(x, slope, x, 1.0), x),
    )
    for point in points:
        assert point.dtype == dtype
        assert bool(threat.contains(point, x).all())
        assert torch.equal(point.sum(1), x.sum(1))
        assert torch.equal(point.amax(1), x.amax(1))
        assert torch.equal(point[1:3], x[1:3])
        if eps == "0":
            assert torch.equal(point, x)
    assert torch.equal(threat.maximise_linear(x, slope)[3], x[3])
    for k in range(4):  # the control belongs to the sample
        assert torch.equal(threat.sample(x[k : k + 1], noise.select(torch.tensor([k])))[0], points[2][k])


@pytest.mark.parametrize("measure", MEASURES)
def test_counts_improve_on_staying_and_a_lone_packet_moves_best(measure):
    x = torch.zeros(2, 5, 3, dtype=torch.float64)
    x[0, 2, 1], x[1, 0, 0], x[1, 4, 2] = 3.0, 2.0, 1.0
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threat = SpikeRetiming(2, Counts(), measure)
    best = threat.maximise_linear(x, slope)
    lone = [z for z in all_rasters(x[0].numpy()) if price(x[0].numpy(), z, measure) <= 2]
    assert float((best[0] * slope[0]).sum()) == pytest.approx(max((z * slope[0].numpy()).sum() for z in lone))
    assert bool(((best * slope).flatten(1).sum(1) >= (x * slope).flatten(1).sum(1)).all())
    assert float(best[0].max()) == 3.0


def reference_schedule(x, score, measure, budget):
    """Serve the scores (T, N, T) of one raster (T, N) as the paper words it: one loop, one move at a time."""
    steps, width = x.shape
    z, left, moved = x.copy(), budget, set()
    moves = [(s, n, t) for n in range(width) for s in range(steps) for t in range(steps) if x[s, n] and s != t]
    for s, n, t in sorted(moves, key=lambda m: -(score[m] + 1e-6 * (steps - 1 - abs(m[2] - m[0])))):
        cost = abs(t - s) if measure == "1" else 1
        if (s, n) in moved or z[t, n]:
            continue
        if cost > left:
            break
        z[t, n], z[s, n] = x[s, n], 0.0
        moved.add((s, n))
        left -= cost
    return z


@pytest.mark.parametrize("measure", ["1", "0"])
@pytest.mark.parametrize("seed", range(6))
def test_schedule_is_one_scan_from_the_best_score_down(measure, seed):
    rng = np.random.default_rng(seed)
    x = np.stack([tiny(seed + k, steps=6, width=4) for k in range(3)])
    score = rng.random((3, 6, 4, 6))
    threat = SpikeRetiming(5, measure=measure)
    packets = Packets.of(lines(torch.tensor(x)))
    served = torch.tensor(score).permute(0, 2, 1, 3).flatten(0, 1)[packets.line, packets.time]
    limit = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64)
    found = packets.at(threat.schedule(packets, served, limit)).transpose(1, 2)
    for k in range(3):
        assert np.array_equal(found[k].numpy(), reference_schedule(x[k], score[k], measure, float(limit[k])))


def test_within_reach_the_best_free_place_is_served_first():
    x = torch.zeros(1, 5, 1)
    x[0, [1, 2], 0] = 1.0
    packets = Packets.of(lines(x))
    threat = SpikeRetiming(1)
    # The spike of step 2 wants step 1, which is free only after the spike of step 1 has left for step 0.
    score = torch.tensor([[0.9, 0.0, 0.1], [0.8, 0.3, 0.0]])
    assert threat.schedule(packets, score, threat.limits(x)).tolist() == [0, 1]
    # Served first, it finds step 1 held and takes the best of what is left: its own place.
    score = torch.tensor([[0.2, 0.1, 0.0], [0.8, 0.3, 0.0]])
    assert threat.schedule(packets, score, threat.limits(x)).tolist() == [0, 2]


def test_random_control_fills_the_budget():
    x = (torch.rand(16, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    noise = SampleGenerator.from_ids(0, range(16))
    moved = SpikeRetiming(9, measure="0")
    assert moved.size(moved.sample(x, noise), x).tolist() == [9] * 16
    shift = SpikeRetiming(3)
    assert shift.size(shift.sample(x, noise), x).tolist() == [3] * 16
    total = SpikeRetiming(200, measure="1")
    assert bool((total.size(total.sample(x, noise), x) > 100).all())  # matched anew it may be less than was spent


def test_shares_count_spikes_not_their_values():
    x = torch.zeros(2, 10, 10)
    x[0, ::2] = 4.0
    x[1, 0, :7] = 1.0
    threat = SpikeRetiming("29%", Counts(), "0")
    assert threat.limits(x).tolist() == [14, 2]
    assert SpikeRetiming("3", Counts(), "0").limits(x).tolist() == [3, 3]
    assert threat.key == "retime_0_29pct"


def test_names_and_bad_settings():
    for measure in MEASURES:
        threat = make_threat(f"retime_{measure}", 2, Binary())
        assert threat == SpikeRetiming(2, measure=measure)
        assert threat.with_eps(3).norm == f"retime_{measure}"
        assert threat.describe() == {"norm": f"retime_{measure}", "eps": "2", "domain": "Binary {0, 1}"}
    assert [t.norm for t in make_threats("retime_1", {"retime_1": Budget(("1%", "2%"), "2%")})] == ["retime_1"] * 2
    for make, message in (
        (lambda: SpikeRetiming("2%"), "cannot be a share"),
        (lambda: SpikeRetiming(1.5), "whole number"),
        (lambda: SpikeRetiming(1, Box()), "needs spikes"),
        (lambda: SpikeRetiming(1, measure="2"), "measure"),
        (lambda: SpikeRetiming(5).check(torch.zeros(1, 5, 2)), "longer than rasters of 5 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_combinations_of_lines_share_one_budget():
    """Two lines whose only useful moves cost 2 and 3: a budget of 4 affords the better of them, 5 affords both."""
    x = torch.zeros(1, 4, 2)
    x[0, 0] = 1.0
    slope = torch.zeros(1, 4, 2)
    slope[0, 2, 0], slope[0, 3, 1] = 1.0, 1.5
    places = {b: [tuple(t) for t in SpikeRetiming(b, measure="1").maximise_linear(x, slope)[0].nonzero().tolist()] for b in (1, 2, 3, 4, 5)}  # fmt: skip
    assert places[1] == [(0, 0), (0, 1)]
    assert places[2] == [(0, 1), (2, 0)]
    assert places[3] == places[4] == [(0, 0), (3, 1)]
    assert places[5] == [(2, 0), (3, 1)]
