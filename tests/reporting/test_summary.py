import numpy as np
import pytest

from sg_lightning.evaluation import paired_difference
from sg_lightning.reporting import summary
from sg_lightning.reporting.style import percent, points


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
    assert summary.difference(old, new, "linf") == paired_difference(
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
