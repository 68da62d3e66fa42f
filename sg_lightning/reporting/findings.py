"""Plain-language findings, every one computed from the numbers; none is written before they are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sg_lightning.evaluation import RobustnessResult, Share
from sg_lightning.reporting import summary
from sg_lightning.reporting.style import norm_label, percent, points
from sg_lightning.reporting.summary import Results
from sg_lightning.reporting.training import GradientMetrics, measured

if TYPE_CHECKING:
    from torch import Tensor

NO_DIFFERENCE = 0.1  # medians of gradient measures closer than this, relatively, are called alike


@dataclass(frozen=True)
class Finding:
    """A heading and sentences of plain text (not yet escaped); ``care`` marks a warning about the figures."""

    title: str
    sentences: tuple[str, ...]
    care: bool = False


def find(results: Results, baseline: str, gradient_metrics: GradientMetrics | None = None) -> list[Finding]:
    """Compute the findings.

    Args:
        results: One result per method, by name.
        baseline: The method that all others are compared with.
        gradient_metrics: As for :func:`~sg_lightning.reporting.gradient_sparsity_figure`.
    """
    found = [_against(results, baseline, name) for name in results if name != baseline]
    found.append(_union(results))
    if gap := _random(results):
        found.append(gap)
    if gradient_metrics and len(gradient_metrics) > 1:
        reference = baseline if baseline in gradient_metrics else next(iter(gradient_metrics))
        found.append(_gradients(gradient_metrics, reference))
    trust = _trust(results)
    return [trust, *found] if trust.care else [*found, trust]


def _against(results: Results, baseline: str, name: str) -> Finding:
    """Compare a method with the baseline: the largest clear change first, then the others by kind."""
    old, new = results[baseline], results[name]
    changes: dict[str, Share] = {}
    for column in summary.columns({baseline: old, name: new}):
        change = summary.difference(old, new, column.key)
        if change is not None and column.key != "min":  # the weakest norm may be another one on each side
            changes[column.key] = change
    clean = changes.pop("clean")
    up = sorted((key for key, c in changes.items() if c.low > 0), key=lambda key: -changes[key].value)
    down = sorted((key for key, c in changes.items() if c.high < 0), key=lambda key: changes[key].value)
    open_ = [key for key in changes if key not in up and key not in down]

    sentences = []
    clear = [key for key in [*up, *down] if key != "union"]
    main = ""
    if clear:
        main = max(clear, key=lambda key: abs(changes[key].value))
        verb = "raises" if changes[main].value > 0 else "lowers"
        sentences.append(
            f"{name} {verb} {_place(new, main)} accuracy {_from_to(old, new, main)} ({_change(changes[main])}), "
            f"{_clean_cost(clean)}."
        )
        up, down = ([key for key in keys if key != main] for keys in (up, down))
    else:
        sentences.append(
            f"Against {baseline}, {name} shows no clear change under any single norm at the headline budgets, "
            f"{_clean_cost(clean)}."
        )
    also = "Also clearly higher" if clear and changes[main].value > 0 else "Clearly higher"
    lower = "Also clearly lower" if clear and changes[main].value < 0 else "Clearly lower"
    for words, keys in ((also, up), (lower, down), ("No clear difference, zero is within the interval", open_)):
        if keys:
            each = (f"{_place(new, key)} {_from_to(old, new, key)} ({_change(changes[key])})" for key in keys)
            sentences.append(f"{words}: {'; '.join(each)}.")
    return Finding(f"{name} compared with {baseline}", tuple(sentences))


def _place(result: RobustnessResult, key: str) -> str:
    return "union" if key == "union" else f"{norm_label(key)} (ε\u00a0=\u00a0{summary.headline(result, key)})"


def _from_to(old: RobustnessResult, new: RobustnessResult, key: str) -> str:
    before, after = summary.cell(old, key), summary.cell(new, key)
    assert before is not None
    assert after is not None
    return f"from {percent(before.value)} to {percent(after.value)}"


def _change(change: Share) -> str:
    return f"{points(change.value)} points {_interval(change)}"


def _interval(share: Share) -> str:
    return f"[{points(share.low)} to {points(share.high)}]"


def _clean_cost(clean: Share) -> str:
    interval = _interval(clean)
    size = f"{abs(100 * clean.value):.1f} points"
    if clean.low <= 0 <= clean.high:
        if abs(clean.value) < 5e-4:
            return f"with clean accuracy unchanged {interval}"
        return f"at a clean {'cost' if clean.value < 0 else 'gain'} of {size}, not distinguishable from none {interval}"
    return f"at a clean {'cost' if clean.value < 0 else 'gain'} of {size} {interval}"


def _union(results: Results) -> Finding:
    """Who keeps most samples when the attacker may choose the norm, and is that clear."""
    shares = {name: summary.cell(result, "union") for name, result in results.items()}
    order = sorted((name for name, s in shares.items() if s is not None), key=lambda name: -shares[name].value)  # type: ignore[union-attr]
    first = order[0]
    best = shares[first]
    assert best is not None
    counted = dict.fromkeys(norm for result in results.values() for norm in result.counted_norms)
    all_norms = ", ".join(norm_label(norm) for norm in counted)
    sentences = [
        (
            f"An attacker who may choose among {all_norms} for every sample leaves {first} right on "
            f"{percent(best.value)} [{100 * best.low:.1f} to {100 * best.high:.1f}]."
        )
    ]
    if len(order) > 1:
        lead = summary.difference(results[order[1]], results[first], "union")
        other = shares[order[1]]
        assert lead is not None
        assert other is not None
        verdict = "clear" if lead.low > 0 else "not clear"
        sentences.append(
            f"{order[1]} leaves just as much; which is better stays open {_interval(lead)}."
            if lead.value == 0
            else f"Next is {order[1]} with {percent(other.value)}; the lead of {points(lead.value)[1:]} points is "
            f"{verdict} {_interval(lead)}."
        )
    return Finding("All norms at once", tuple(sentences))


def _random(results: Results) -> Finding | None:
    """How much of the damage is knowledge of the network and how much mere size."""
    sentences = []
    for name, result in results.items():
        tried = [norm for norm in summary.norms({name: result}) if summary.control(result, norm) is not None]
        if not tried:
            continue
        gaps = {norm: result.random_accuracy(norm) - result.accuracy(norm) for norm in tried}
        norm = max(gaps, key=lambda key: gaps[key])
        sentences.append(
            f"{name}: {_place(result, norm)} leaves {percent(result.random_accuracy(norm))} if random and "
            f"{percent(result.accuracy(norm))} if adversarial, {points(gaps[norm]).lstrip('+')} points apart."
        )
    return Finding("Random against adversarial, where it differs most", tuple(sentences)) if sentences else None


def _median(metrics: Mapping[str, Tensor], key: str) -> float:
    return float(np.median(measured(metrics, key)))


def _gradients(metrics: GradientMetrics, baseline: str) -> Finding:
    """Say, against the baseline, whether the input gradient became smaller and whether it became sparser."""
    sentences = []
    for name in metrics:
        if name == baseline:
            continue
        dead = [method for method in (baseline, name) if measured(metrics[method], "l1").size == 0]
        if dead:
            sentences.append(f"{name}: no comparison, every gradient of {dead[0]} is zero or not finite.")
            continue
        old, new = metrics[baseline], metrics[name]
        typical = _median(new, "l1") / _median(old, "l1")
        mean = float(measured(new, "l1").mean() / measured(old, "l1").mean())
        words = [_word(ratio, "smaller", "larger", "of about the same size") for ratio in (typical, mean)]
        # Confident samples have tiny gradients, so the typical and the mean size can move in opposite ways.
        size = words[0] if words[0] == words[1] else f"{words[0]} for the typical sample, {words[1]} on average"
        ratio = _median(new, "l1_over_l2") / _median(old, "l1_over_l2")
        sentences.append(
            f"{name}: the gradient is {size} (‖g‖₁ is {typical:.2g} times that of {baseline} in the median, {mean:.2g} "
            f"times in the mean) and {_word(ratio, 'sparser', 'denser', 'about as sparse')} (median ‖g‖₁/‖g‖₂ is "
            f"{ratio:.2g} times, median Hoyer sparsity goes from {_median(old, 'hoyer'):.2f} to "
            f"{_median(new, 'hoyer'):.2f})."
        )
    return Finding("Input gradients", tuple(sentences))


def _word(ratio: float, below: str, above: str, alike: str) -> str:
    return alike if abs(ratio - 1) < NO_DIFFERENCE else below if ratio < 1 else above


def _trust(results: Results) -> Finding:
    """Count the honesty checks and name the figures that a failed one taints."""
    checks = [(name, check) for name, result in results.items() for check in result.checks]
    bad = [(name, check) for name, check in checks if check.status != "pass"]
    if not checks:
        return Finding("No honesty checks were run", ("Read every robust accuracy as an upper bound.",), care=True)
    if not bad:
        return Finding(
            "Every honesty check passed",
            (f"{len(checks)} of {len(checks)} passed. They cannot prove that no stronger attack exists.",),
        )
    failed = sum(check.status == "fail" for _, check in bad)
    sentences = [
        (
            f"{failed} of {len(checks)} failed and {len(bad) - failed} gave a warning. Read the figures they concern, marked "
            "in the table, as upper bounds."
        )
    ]
    sentences += [f"{name}: {check.name} ({check.status}): {check.detail}" for name, check in bad]
    return Finding("Some figures need care", tuple(sentences), care=True)
