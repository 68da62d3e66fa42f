"""The numbers of a report, taken from evaluation results; figures, tables and sentences all read them here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sg_lightning.evaluation import RobustnessResult
from sg_lightning.evaluation.statistics import Share, independent_difference, paired_difference, share_of
from sg_lightning.inputs import Input
from sg_lightning.reporting.style import norm_label
from sg_lightning.threats.base import parse_eps

Results: TypeAlias = Mapping[str, RobustnessResult]
SEVERITY = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Column:
    """One column of the tables: what is compared, its heading and its budget."""

    key: str
    label: str
    eps: str = ""


@dataclass(frozen=True)
class Example:
    """One adversarial example to look at."""

    norm: str
    eps: str
    clean: Input
    adversarial: Input
    label: int
    predicted: int
    size: float


def check_results(results: Results) -> None:
    """Refuse what cannot be reported.

    Raises:
        ValueError: no results at all, a result without samples or norms, or a name that is not a non-empty string.
        TypeError: a value that is not a ``RobustnessResult``.
    """
    if not isinstance(results, Mapping) or not results:
        raise ValueError(
            "results is empty: give at least one, e.g. {'vanilla': evaluate(model, data)} or "
            "{'vanilla': RobustnessResult.load(path)}"
        )
    for name, result in results.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"results must be keyed by the names of the methods, got {name!r}")
        if not isinstance(result, RobustnessResult):
            raise TypeError(f"results[{name!r}] must be a RobustnessResult, as from evaluate(), got {type(result)}")


def choose_baseline(results: Results, baseline: str | None) -> str:
    """Return the method to compare with: the one asked for, else the one called vanilla, else the first."""
    if baseline is not None and baseline not in results:
        raise ValueError(f"baseline {baseline!r} is not among the results {list(results)}")
    return baseline or next((name for name in results if name.lower() == "vanilla"), next(iter(results)))


# --- what was attacked ------------------------------------------------------------------------------------------------


def norms(results: Results) -> list[str]:
    """List the norms of all results, in the order of the suites."""
    return list(dict.fromkeys(norm for result in results.values() for norm in result.norms))


def budgets(result: RobustnessResult, norm: str) -> dict[float, str]:
    """Return the budgets of a norm, as numbers and as they were written, smallest first."""
    found = {parse_eps(eps): eps for eps in result.budgets(norm)}
    return dict(sorted(found.items()))


def headline(result: RobustnessResult, norm: str) -> str:
    """Return the headline budget of a norm as it was written."""
    return result.headline(norm)


def columns(results: Results) -> list[Column]:
    """List what the tables compare: clean, each norm at its headline budget, the weakest norm, the union."""
    found = [Column("clean", "clean")]
    for norm in norms(results):
        eps = dict.fromkeys(headline(result, norm) for result in results.values() if norm in result.norms)
        found.append(Column(norm, norm_label(norm), " or ".join(eps)))
    return [*found, Column("min", "weakest norm"), Column("union", "union")]


# --- shares and differences -------------------------------------------------------------------------------------------


def right(result: RobustnessResult, key: str) -> np.ndarray | None:
    """Tell per sample, bool (N,), whether it is right in a column; ``None`` if the norm was not attacked."""
    if key == "clean":
        return result.clean_correct
    if key == "union":
        return result.union_robust()
    if key == "min":
        key = weakest(result)
    return result.robust(key) if key in result.norms else None


def weakest(result: RobustnessResult) -> str:
    """Return the norm with the lowest accuracy at its headline budget."""
    return min(result.counted_norms, key=result.accuracy)


def cell(result: RobustnessResult, key: str) -> Share | None:
    """Return the accuracy of a column with its Wilson interval; ``None`` if the norm was not attacked."""
    found = right(result, key)
    return None if found is None else share_of(int(found.sum()), len(found))


def control(result: RobustnessResult, norm: str) -> Share | None:
    """Return the accuracy under random perturbations of the headline size; ``None`` if they were not tried."""
    if norm not in result.norms:
        return None
    share = result.random_accuracy(norm)
    return None if math.isnan(share) else share_of(round(share * len(result.ids)), len(result.ids))


def random_curve(result: RobustnessResult, norm: str) -> list[tuple[float, float]]:
    """Return the accuracy under random perturbations over the budget, from the clean accuracy on."""
    found = [(eps, result.random_accuracy(norm, text)) for eps, text in budgets(result, norm).items()]
    return [(0.0, result.clean), *((eps, share) for eps, share in found if not math.isnan(share))]


def difference(old: RobustnessResult, new: RobustnessResult, key: str) -> Share | None:
    """Return how much higher a column is in ``new`` than in ``old``, with its 95 % interval.

    Paired over the samples if both saw the same ones, else as two independent shares. ``None`` where one lacks it.
    """
    before, after = right(old, key), right(new, key)
    if before is None or after is None:
        return None
    if old.same_samples(new):
        return paired_difference(before, after)
    return independent_difference(*(share_of(int(mask.sum()), len(mask)) for mask in (before, after)))


# --- trust ------------------------------------------------------------------------------------------------------------


def worst_status(result: RobustnessResult, key: str) -> str:
    """Return the worst honesty check that concerns a column: ``"pass"``, ``"warn"`` or ``"fail"``."""
    about = {"min": {weakest(result)}, "union": set(result.counted_norms), "clean": set()}.get(key, {key})
    found = [c.status for c in result.checks if key != "clean" and (c.norm in about or not c.norm)]
    return max(found, key=SEVERITY.__getitem__, default="pass")


def examples(result: RobustnessResult) -> list[Example]:
    """List the kept examples."""
    return [Example(**e) for e in result.examples]
