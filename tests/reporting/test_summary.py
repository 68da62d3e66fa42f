import numpy as np
import pytest

from sg_lightning.reporting import summary
from sg_lightning.reporting.style import percent, points


def test_shares_carry_their_wilson_interval():
    # The example of Newcombe, Statistics in Medicine 17, 1998, p. 857.
    assert summary.share_of(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)


def test_independent_difference_equals_newcombes_published_example():
    # Newcombe 1998 (two independent proportions), example (a), method 10: 56/70 - 48/80, interval 0.0524 to 0.3339.
    found = summary.independent_difference(48, 80, 56, 70)
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_paired_difference_by_hand():
    before = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1, 0], dtype=bool)
    after = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)  # three gained, one lost
    # Half a sample in each cell: centre 2/12, variance (3 + 1 + 1 - 4/12) / 144.
    half = 1.959964 * (5 - 4 / 12) ** 0.5 / 12
    assert summary.paired_difference(before, after) == pytest.approx((0.2, 2 / 12 - half, 2 / 12 + half))


@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.1), (0.3, 0.02), (0.05, 0.05)])
def test_paired_interval_covers_the_truth_about_95_percent_of_the_time(gain, loss):
    rng, samples, hits, runs = np.random.default_rng(0), 80, 0, 2000
    for draw in rng.random((runs, samples)):
        after = draw < gain  # gained, or
        before = (draw >= gain) & (draw < gain + loss)  # lost, else wrong both times
        found = summary.paired_difference(before, after)
        hits += found.low <= gain - loss <= found.high
    assert 0.93 <= hits / runs <= 0.99


def test_paired_interval_of_equal_answers_is_not_empty():
    same = np.arange(50) % 2 == 0
    found = summary.paired_difference(same, same)
    assert found.value == 0
    assert found.low < 0 < found.high


def test_cells_equal_counts_of_the_rows(results, truth):
    for name, result in results.items():
        right = truth[name]
        norms = ("linf", "l2", "l1", "l0")
        assert summary.cell(result, "clean").value == pytest.approx(right["clean"].mean())
        for norm in norms:
            assert summary.cell(result, norm).value == pytest.approx(right[norm].mean())
        assert summary.cell(result, "min").value == pytest.approx(min(right[norm].mean() for norm in norms))
        union = np.logical_and.reduce([right[norm] for norm in norms]).mean()
        assert summary.cell(result, "union").value == pytest.approx(union)
    assert summary.cell(result, "flips") is None


def test_columns_carry_the_headline_budgets_as_written(results):
    assert [(c.key, c.eps) for c in summary.columns(results)] == [
        ("clean", ""), ("linf", "2/16"), ("l2", "0.5"), ("l1", "1.5"), ("l0", "2"), ("min", ""), ("union", ""),
    ]  # fmt: skip


def test_differences_are_paired_on_the_same_samples_and_independent_on_others(results, make_result):
    old, new = results["vanilla"], results["SR"]
    assert summary.difference(old, new, "linf") == summary.paired_difference(
        summary.right(old, "linf"), summary.right(new, "linf")
    )
    right = {norm: summary.right(new, norm) for norm in ("linf", "l2", "l1", "l0")}
    elsewhere = make_result(summary.right(new, "clean"), right, first_id=1000)
    unpaired = summary.difference(old, elsewhere, "linf")
    assert unpaired.value == pytest.approx(summary.difference(old, new, "linf").value)
    assert (
        unpaired.high - unpaired.low
        > summary.difference(old, new, "linf").high - summary.difference(old, new, "linf").low
    )


def test_baseline_is_the_named_one_else_vanilla_else_the_first(results):
    result = results["SR"]
    assert summary.choose_baseline(results, "AT") == "AT"
    assert summary.choose_baseline({"SR": result, "Vanilla": result}, None) == "Vanilla"
    assert summary.choose_baseline({"SR": result, "AT": result}, None) == "SR"
    with pytest.raises(ValueError, match="'nobody' is not among"):
        summary.choose_baseline(results, "nobody")


def test_worst_status_marks_the_norm_the_union_and_the_weakest_norm(results):
    result = results["SR"]  # one failed check, for l2
    assert [summary.worst_status(result, key) for key in ("clean", "l2", "linf", "union")] == [
        "pass", "fail", "pass", "fail",
    ]  # fmt: skip


def test_numbers_are_written_with_a_true_minus_and_no_signed_zero():
    assert points(0.254) == "+25.4"
    assert points(-0.0061) == "−0.6"
    assert points(-0.0001) == points(0.0) == "±0.0"
    assert percent(0.12345) == "12.3\u00a0%"
    assert percent(float("nan")) == "n/a"
