"""Attacks without gradients: schedules, the shape of every query, closed forms, invariances, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sg_lightning.attacks import BPTT, PGD, FlipSearch, Oracle, SparseRS, Square, load_suite
from sg_lightning.attacks.square import _bumps
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Linf


class Net(nn.Module):
    """A small spiking network in float64."""

    def __init__(self, values=48):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.fire = nn.Linear(values, 32), nn.BatchNorm1d(32), LIF(beta=0.8)
        self.first.weight.data *= 6
        self.last = nn.Linear(32, 3)
        self.double()

    def forward(self, x):
        current = self.norm(self.first(x.flatten(1))).expand(4, -1, -1)
        return self.last(self.fire(current).mean(0))


class Watching:
    """A function of numpy (nothing to differentiate) that remembers what it was asked; never wrong about class 0."""

    def __init__(self, weight=None):
        self.weight, self.asked = weight, []

    def __call__(self, x):
        self.asked.append(x.clone())
        w = np.zeros(x[0].numel()) if self.weight is None else self.weight
        margin = torch.from_numpy(x.double().numpy().reshape(len(x), -1) @ w) + 1e6
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def inputs(*shape, seed=1, binary=False):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.round() if binary else x


def noise(n, seed=0):
    return SampleGenerator.from_ids(seed, range(n))


def climb(attack, w, x):
    """Attack a linear function that is never wrong; return how far it fell for each sample."""
    watching = Watching(w)
    result = attack.run(Oracle(watching), x, torch.zeros(len(x)).long(), generator=noise(len(x)))
    assert bool(attack.threat.contains(result.x_adv, x).all())
    return (x - result.x_adv).flatten(1).numpy() @ w, watching.asked


WEIGHTS = np.random.default_rng(0).standard_normal(48)


# --- Square -------------------------------------------------------------------------------------------------------------


def test_windows_shrink_as_in_the_paper():
    attack = Square(Linf(0.1), queries=10_000)
    halved = dict(zip((10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), range(9), strict=True))
    for query, times in halved.items():
        assert attack._share(1 + query) == 0.8 / 2**times
        assert attack._share(1 + query + 1) == 0.8 / 2 ** (times + 1)
    assert Square(Linf(0.1), queries=1000)._share(1 + 6) == 0.8 / 4  # 60 of 10,000
    assert Square(Linf(0.1), queries=1000, rescale=False)._share(1 + 6) == 0.8


@pytest.mark.parametrize(("norm", "power"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("side", [1, 3, 5, 8])
def test_bumps_are_stacks_of_growing_rectangles(side, norm, power):
    def pyramid(height, width):  # the paper's words: rectangles around the centre, each counted with its weight
        found = np.zeros((height, width))
        for k in range(max(height // 2, width // 2) + 1):
            rows = slice(max(height // 2 - k, 0), min(height // 2 + k + 1, height))
            columns = slice(max(width // 2 - k, 0), min(width // 2 + k + 1, width))
            found[rows, columns] += 1 / (k + 1) ** power
        return found / max(np.linalg.norm(found.ravel(), norm), 1e-300)

    both = np.concatenate([pyramid(side // 2, side), -pyramid(side - side // 2, side)])
    both /= np.linalg.norm(both.ravel(), norm)
    np.testing.assert_allclose(_bumps(side, side, norm)[0].numpy(), both, atol=1e-12)
    np.testing.assert_allclose(_bumps(side, side, norm)[1].numpy(), both.T, atol=1e-12)


def test_every_linf_query_is_a_square_of_corners():
    x, eps = inputs(5, 2, 9, 9), 0.3
    _, (clean, start, *asked) = climb(Square(Linf(eps), queries=300), np.zeros(162), x)
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    assert torch.equal(clean, x)
    up = (start - high).abs() < 1e-12
    assert bool((up | ((start - low).abs() < 1e-12)).all())
    assert bool((up == up[:, :, :1]).all())  # vertical stripes
    reached = torch.zeros(9, 9, dtype=torch.bool)
    for query, point in enumerate(asked, start=1):
        assert bool((torch.minimum((point - low).abs(), (point - high).abs()) < 1e-12).all())
        side = max(round((0.8 / 2 ** sum((query - 1) / 300 * 10_000 >= t + 1 for t in (10, 50, 200, 500, 1000, 2000, 4000,
                                                                                    6000, 8000)) * 81) ** 0.5), 1)  # fmt: skip
        for changed in (point != start).any(1):
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            assert 0 < len(rows) <= side  # something changes, in a window of this size
            assert int(rows.max() - rows.min()) < side
            assert int(columns.max() - columns.min()) < side
            reached |= changed
    assert bool(reached.all())


@pytest.mark.parametrize("threat", [L2(1.0), L1(3.0)])
def test_bumps_move_the_budget_from_window_to_window(threat):
    x = 0.5 + 0 * inputs(4, 1, 10, 10)  # far from the walls
    _, (_, start, *asked) = climb(Square(threat, queries=40), np.zeros(100), x)
    for point in (start, *asked):
        assert torch.allclose(threat.size(point, x), torch.tensor(threat.budget).double())
    moved = asked[-1] - x
    assert bool(((moved > 0).flatten(1).any(1) & (moved < 0).flatten(1).any(1)).all())
    seen = {tuple(point[0].flatten().tolist()) for point in asked}
    assert len(seen) >= 0.9 * len(asked)  # a window may be drawn twice


@pytest.mark.parametrize("threat", [Linf(0.1), Linf(0.4)])
def test_square_reaches_the_optimum_of_a_linear_model(threat):
    x = inputs(6, 3, 4, 4)
    room = np.where(WEIGHTS > 0, x.flatten(1).numpy(), 1 - x.flatten(1).numpy())
    best = (np.abs(WEIGHTS) * np.minimum(room, threat.budget)).sum(1)
    assert (climb(Square(threat, queries=400), WEIGHTS, x)[0] >= 0.9 * best).all()


@pytest.mark.parametrize("threat", [L2(1.0), L1(3.0)])
def test_square_finds_where_a_linear_model_is_weak(threat):
    w = np.zeros((10, 10))
    w[2:5, 5:8], w[5:8, 5:8] = 1.0, -1.0  # two neighbouring patches of opposite signs, the shape of a bump
    x = 0.5 + 0 * inputs(4, 1, 10, 10)
    best = threat.budget * (np.linalg.norm(w) if threat.norm == "l2" else 1.0)
    assert (climb(Square(threat, queries=400), w.ravel(), x)[0] >= 0.7 * best).all()


def test_windows_of_frames_last_an_interval():
    x = inputs(6, 5, 2, 6, 6)
    _, (_, start, *asked) = climb(Square(Linf(0.1), queries=60), np.zeros(360), x)
    up = start > x
    assert bool((up == up[:, :1, :, :1]).all())  # stripes last
    lengths = set()
    for point in asked:
        for old, new in zip(start, point, strict=True):
            times = (old != new).flatten(1).any(1).nonzero().squeeze(1)
            lengths.add(len(times))
            assert len(times) == int(times.max() - times.min()) + 1
    assert lengths == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("shape", [(3, 9), (3, 4, 12), (3, 12, 2), (3, 1, 3, 20), (3, 2, 1, 4, 4), (3, 1, 1, 1)])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(0.5)])
def test_square_attacks_inputs_of_any_shape(shape, threat):
    x = inputs(*shape)
    w = np.random.default_rng(1).standard_normal(x[0].numel())
    fell, asked = climb(Square(threat, queries=30), w, x)
    assert all(bool(threat.contains(point, x).all()) for point in asked)
    assert (fell > 0).any()


# --- sparse -------------------------------------------------------------------------------------------------------------


def test_changes_become_fewer_as_in_sparse_rs():
    attack = SparseRS(L0(100), queries=10_000, alpha=0.6)
    for query, divisor in ((1, 2), (50, 2), (51, 4), (200, 4), (201, 5), (500, 5), (501, 6), (1000, 6), (1001, 8), (2000, 8),
                           (2001, 10), (4000, 10), (4001, 12), (6000, 12), (6001, 15), (8000, 15), (8001, 20)):  # fmt: skip
        assert attack._changed(query, 100) == int(0.6 / divisor * 100)
    assert attack._changed(9000, 3) == 1
    assert SparseRS(L0(100), queries=100, alpha=0.6)._changed(1, 100) == 15  # 100 of 10,000


def test_sparse_rs_moves_pixels_and_colours_them_at_the_corners():
    x = inputs(4, 3, 5, 5) * 1.8 - 0.9
    threat = L0(6, domain=Box(-1, 1))
    _, (_, start, *asked) = climb(SparseRS(threat, queries=50, alpha=0.7), np.zeros(75), x)
    first = (start != x).any(1).flatten(1)
    assert first.sum(1).tolist() == [6] * 4
    for query, point in enumerate(asked, start=1):
        changed = (point != x).any(1).flatten(1)
        assert changed.sum(1).tolist() == [6] * 4
        values = point.movedim(1, -1).flatten(1, 2)[changed]
        assert bool((values.abs() == 1).all())
        divisor = 4 if query == 1 else 5 if query == 2 else 6 if query <= 5 else 8 if query <= 10 else 10
        assert (first & ~changed).sum(1).tolist() == [max(int(0.7 / divisor * 6), 1)] * 4
    colours = {tuple(v.tolist()) for v in torch.cat([p.movedim(1, -1)[(p != x).any(1)] for p in asked])}
    assert len(colours) == 8


def test_a_single_pixel_never_takes_the_colour_it_has():
    x = inputs(8, 2, 3, 3, binary=True)
    _, asked = climb(SparseRS(L0(1), queries=80), np.zeros(18), x)
    assert all(bool((threat_size == 1).all()) for threat_size in (L0(1).size(point, x) for point in asked[2:]))
    alone = inputs(8, 1, 1, binary=True)  # every pixel may change: its colours are searched
    asked = climb(SparseRS(L0(1), queries=5), np.zeros(1), alone)[1]
    assert all(torch.equal(point, 1 - asked[1]) for point in asked[2:])


def test_sparse_rs_finds_the_best_cells_of_a_linear_model():
    x, w = inputs(6, 2, 3, 3), WEIGHTS[:18]
    gain = np.abs(w) * np.where(w > 0, x.flatten(1).numpy(), 1 - x.flatten(1).numpy())
    best = np.sort(gain, 1)[:, -3:].sum(1)
    np.testing.assert_allclose(climb(SparseRS(L0(3, unit="cells"), queries=600), w, x)[0], best, rtol=1e-9)


def test_sparse_rs_ends_where_no_other_pixel_is_better():
    """As in the paper, a pixel that stays keeps its colour, so the end need not be the best of all."""
    x, w = inputs(6, 2, 3, 3), WEIGHTS[:18]
    found = SparseRS(L0(2), queries=600).run(Oracle(Watching(w)), x, torch.zeros(6).long(), generator=noise(6)).x_adv
    fell = ((x - found).flatten(1).numpy() * w).reshape(6, 2, 9).sum(1)
    best = (np.abs(w) * np.where(w > 0, x.flatten(1).numpy(), 1 - x.flatten(1).numpy())).reshape(6, 2, 9).sum(1)
    inside = (x != found).any(1).flatten(1).numpy()
    assert inside.sum(1).tolist() == [2] * 6
    assert (np.where(inside, fell, np.inf).min(1) >= np.where(inside, 0, best).max(1)).all()


@pytest.mark.parametrize("mode", ["flip", "add", "delete"])
@pytest.mark.parametrize("domain", [Binary(), Counts(), Counts(4)])
def test_flip_search_finds_the_best_events_of_a_linear_model(mode, domain):
    x = inputs(6, 2, 6, binary=True) * (1 if domain == Binary() else 3)
    w, threat = WEIGHTS[:12], EventFlips(3, domain=domain, mode=mode)
    best = []
    for one in x.flatten(1).numpy():
        events = [
            *(-w[i] for i in range(12) for _ in range(min(3, int(domain.high - one[i]) if domain.high < 9 else 3)))
        ]
        removed = [w[i] for i in range(12) for _ in range(int(one[i]))]
        gains = np.sort(removed * (mode != "add") + events * (mode != "delete"))[::-1][:3]
        best.append(gains[gains > 0].sum())
    fell, asked = climb(FlipSearch(threat, queries=800), w, x)
    np.testing.assert_allclose(fell, best, rtol=1e-9)
    assert all(bool(threat.contains(point, x).all()) for point in asked)
    if domain == Counts() and mode != "delete":
        assert max(float(point.max()) for point in asked) > 3  # counts are not clamped


def test_flip_search_tries_rare_events_as_often_as_empty_cells():
    x = torch.zeros(20, 400)
    x[:, 7] = 1.0
    _, asked = climb(FlipSearch(EventFlips(1), queries=40), np.zeros(400), x)
    deleted = torch.stack([point[:, 7] == 0 for point in asked[1:]]).double().mean()
    assert abs(float(deleted) - 0.5) < 0.06  # 800 draws: 3.4 standard errors
    empty = torch.zeros(3, 9)
    _, asked = climb(FlipSearch(EventFlips(2, mode="delete"), queries=3), np.zeros(9), empty)
    assert all(torch.equal(point, empty) for point in asked)


# --- all ----------------------------------------------------------------------------------------------------------------


ATTACKS = [Square(Linf(0.03), queries=40), Square(L2(0.3), queries=40), Square(L1(0.9), queries=40),
           SparseRS(L0(2), queries=40), FlipSearch(EventFlips(1), queries=40)]  # fmt: skip
named = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.kind}-{a.threat.norm}")


def case(attack, n=20):
    model, x = Net().eval(), inputs(n, 3, 4, 4, binary=attack.kind == "flip_search")
    return model, x, model(x).argmax(1)


@named
def test_results_do_not_depend_on_batching_or_early_drop(attack):
    model, x, y = case(attack)
    ids = torch.arange(20)
    whole = attack.run(Oracle(model), x, y, generator=SampleGenerator.from_ids(0, ids))
    assert 0 < int(whole.success.sum()) < 20
    order = torch.randperm(20)
    for index, oracle, drop in (
        (ids, Oracle(model), False),
        (ids, Oracle(model, batch_size=7), True),
        (order, Oracle(model), True),
    ):
        other = attack.run(oracle, x[index], y[index], generator=SampleGenerator.from_ids(0, index), early_drop=drop)
        assert torch.equal(other.success, whole.success[index])
        assert torch.equal(other.queries, whole.queries[index])
        assert torch.allclose(other.x_adv, whole.x_adv[index], atol=1e-9)
    alone = [attack.run(Oracle(model), x[i], y[i], generator=SampleGenerator.from_ids(0, i)) for i in ids[:4].split(1)]
    assert torch.cat([one.success for one in alone]).tolist() == whole.success[:4].tolist()


@named
def test_queries_are_counted_and_the_broken_ask_no_more(attack):
    model, x, y = case(attack)
    oracle = Oracle(model)
    result = attack.run(oracle, x, y, generator=noise(20))
    assert bool((result.queries[~result.success] == 41).all())
    assert torch.equal(result.queries, result.iterations + 1)
    assert oracle.counts.forwards == int(result.queries.sum())
    assert oracle.counts.backwards == 0 == int(result.gradients.sum())
    assert bool((Oracle(model).misclassified(result.x_adv, y) == result.success).all())
    wrong = attack.run(Oracle(model), x, (y + 1) % 3, generator=noise(20))
    assert torch.equal(wrong.x_adv, x)
    assert wrong.queries.tolist() == [1] * 20


@named
def test_more_queries_break_more(attack):
    model, x, y = case(attack, 40)
    shares = [
        type(attack)(attack.threat, queries=q).run(Oracle(model), x, y, generator=noise(40)).success.double().mean()
        for q in (1, 20, 300)
    ]
    assert shares[0] <= shares[1] < shares[2]


@named
def test_survivors_end_above_their_start_and_no_budget_changes_nothing(attack):
    model, x, y = case(attack)
    result = attack.run(Oracle(model), x, y, generator=noise(20), goal="loss")
    logits = model(x)
    true = logits.gather(1, y[:, None]).squeeze(1)
    margin = logits.scatter(1, y[:, None], -torch.inf).amax(1) - true
    assert bool((result.loss >= margin).all())
    assert bool((result.loss > margin).any())
    nothing = attack.with_threat(attack.threat.with_eps(0))
    assert torch.equal(nothing.run(Oracle(model), x, y, generator=noise(20)).x_adv, x)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_inside(attack, dtype):
    x = inputs(5, 3, 4, 4, binary=attack.kind == "flip_search").to(dtype)
    model = lambda z: Net().eval()(z.double())
    result = attack.run(Oracle(model), x, model(x).argmax(1), generator=noise(5))
    assert result.x_adv.dtype == dtype
    assert bool(attack.threat.contains(result.x_adv, x).all())


@named
def test_model_and_random_state_are_left_alone(attack):
    class Explodes(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 9:
                raise RuntimeError("boom")
            return super().forward(x)

    model = Explodes().train()
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    _, x, y = case(attack)
    kept = x.clone()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="boom"):
        attack.run(Oracle(model), x, y, generator=noise(20), early_drop=False)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(x, kept)


@named
def test_answers_that_are_no_numbers_do_not_stop_the_search(attack):
    model, x, y = case(attack)
    holes = lambda z: torch.where(z.flatten(1)[:, :1] > 0.7, torch.nan, model(z))
    assert attack.run(Oracle(holes), x, y, generator=noise(20)).x_adv.isfinite().all()


def test_masked_gradients_do_not_stop_a_search():
    model = Net().eval()
    stairs = lambda z: model((z * 16).round() / 16 + 0 * z)
    x = inputs(20, 3, 4, 4)
    y = stairs(x).argmax(1)
    assert not PGD(Linf(0.1), steps=10, random_start=False).run(Oracle(stairs), x, y).success.any()
    detached = lambda z: model(z.detach()).detach()
    for masked in (stairs, detached):
        found = Square(Linf(0.1), queries=200).run(Oracle(masked), x, masked(x).argmax(1), generator=noise(20))
        assert float(found.success.double().mean()) > 0.8


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    threat=st.sampled_from([Linf(0.3, Box(-1, 2)), Linf(3.0, Box(-1, 2)), L2(0.7, Box(-1, 2)), L1(0.9, Box(-1, 2)), L0(1),
                            L0(1, Counts(3)), L0(1, unit="cells"), EventFlips(2, Counts(3)), EventFlips(5, Counts())]),
    corners=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_query_is_allowed(shape, threat, corners, seed):
    x = inputs(2, *shape, seed=seed) * min(threat.domain.width, 3) + threat.domain.low
    if threat.domain.lattice is not None or corners:
        x = x.round()
    attack = {"l0": SparseRS, "flips": FlipSearch}.get(threat.norm, Square)(threat, queries=12)
    w = np.random.default_rng(seed).standard_normal(x[0].numel())
    assert all(bool(threat.contains(point, x).all()) for point in climb(attack, w, x)[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Square(Linf(0.1), queries=0), ValueError, "queries must be"),
        (lambda: Square(Linf(0.1), queries=True), ValueError, "queries must be"),
        (lambda: Square(Linf(0.1), p=0), ValueError, "p must be"),
        (lambda: Square(Linf(0.1), loss="hinge"), ValueError, "unknown loss"),
        (lambda: Square(L0(1)), TypeError, "use SparseRS under L0"),
        (lambda: SparseRS(L2(0.5)), TypeError, "defined for L0"),
        (lambda: SparseRS(L0(1), alpha=1.5), ValueError, "alpha must be"),
        (lambda: FlipSearch(L0(1)), TypeError, "use SparseRS"),
        (lambda: Square(Linf(0.1), estimator=BPTT(surrogates.Atan(2.0))), ValueError, "no use for the estimator"),
        (
            lambda: climb(Square(Linf(0.1), queries=1), np.zeros(1), inputs(2, 1, 1, 1, 1, 1)),
            ValueError,
            "Square needs",
        ),
        (lambda: climb(SparseRS(L0(9), queries=1), np.zeros(8), inputs(2, 2, 2, 2)), ValueError, "has 4"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_suites_know_the_searches(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "attacks: [{attack: square, queries: 100, only: [linf]}, {attack: sparse_rs, only: [l0]}, "
        "{attack: flip_search, only: [flips]}]"
    )
    budgets = {"linf": Budget(eps=(0.1,), headline=0.1), "l0": Budget(eps=(2,), headline=2)}
    suite = load_suite(tmp_path / "mine.yaml", budgets)
    assert [a.name for e in suite.entries for a in e.attacks] == ["square-100", "sparse_rs-5000"]
    assert [a.gradient_free for e in suite.entries for a in e.attacks] == [True, True]
