"""What an evaluation found: every figure is derived from the rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sg_lightning.attacks import Suite
from sg_lightning.evaluation.checks import Check, Tried, run_checks
from sg_lightning.evaluation.rows import EXAMPLES, Row, read_rows, to_csv, write_atomically, write_examples
from sg_lightning.evaluation.statistics import Share, paired_difference, share_of, wilson
from sg_lightning.threats import is_relaxed
from sg_lightning.threats.base import is_share, metric_key, parse_eps

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Measurement:
    """What was tried under one norm and budget, cheap to dear.

    Attributes:
        norm: Norm of the threat.
        eps: Budget as written.
        names: Name of each attack, as in the rows.
        attacks: Settings of each attack.
        headline: Whether the figure enters the union.
        gradient_free: Whether each attack did without gradients of the model (black box).
    """

    norm: str
    eps: str
    names: tuple[str, ...]
    attacks: tuple[dict[str, Any], ...]
    headline: bool
    gradient_free: tuple[bool, ...]


@dataclass(frozen=True)
class SuiteRecord:
    """The suite of a result as plain data.

    Attributes:
        name: Name or file stem.
        hash: First 12 hex digits of the SHA-256 of its content.
        content: As :meth:`~sg_lightning.attacks.Suite.describe` gives it, the names of the attacks, and
            which of them took no gradients.
    """

    name: str
    hash: str
    content: dict[str, Any]

    @classmethod
    def of(cls, suite: Suite) -> SuiteRecord:
        """Record a resolved suite."""
        content = suite.describe()
        for item, entry in zip(content["entries"], suite.entries, strict=True):
            item["names"] = [attack.name for attack in entry.attacks]
            item["gradient_free"] = [attack.gradient_free for attack in entry.attacks]
        return cls(suite.name, suite.hash, content)

    @cached_property
    def entries(self) -> tuple[Measurement, ...]:
        """One entry per norm and budget, in the order of the suite."""
        return tuple(
            Measurement(
                item["threat"]["norm"],
                str(item["threat"].get("eps", "1")),
                tuple(item["names"]),
                tuple(item["attacks"]),
                item["headline"],
                tuple(item.get("gradient_free", [False] * len(item["names"]))),  # results of 0.1 do not say
            )
            for item in self.content["entries"]
        )


class RobustnessResult:
    """Accuracies, intervals, checks and examples of one evaluation.

    Args:
        rows: One per sample and attack.
        suite: What was run.
        meta: Seed, date, seconds, versions, counts, what else is known of the run.
        examples: A few adversarial examples: norm, eps, clean, adversarial, label, predicted, size.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        suite: Suite | SuiteRecord,
        meta: dict[str, Any],
        examples: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.rows = list(rows)
        self.suite = SuiteRecord.of(suite) if isinstance(suite, Suite) else suite
        self.meta = meta
        self.examples = list(examples)
        clean = {row.id: row.clean for row in self.rows if row.phase == "main"}
        if not clean:
            raise ValueError("no rows: the evaluation has not seen a sample")
        self.ids: NDArray[np.int64] = np.array(sorted(clean))
        self.clean_correct: Mask = np.array([clean[i] for i in self.ids.tolist()], dtype=bool)
        self._position = {i: k for k, i in enumerate(self.ids.tolist())}
        self._data = {row.id: row.data for row in self.rows}
        self._fell: dict[tuple[str, float, str], Mask] = {}
        for row in self.rows:
            if row.phase == "main" and row.norm:
                key = (row.norm, parse_eps(row.eps), row.attack)
                fell = self._fell.setdefault(key, np.zeros(len(self.ids), dtype=bool))
                fell[self._position[row.id]] |= row.status in ("broken", "invalid")
        tried = [
            Tried(entry.norm, entry.eps, name, settings, free)
            for entry in self.suite.entries
            if entry.headline
            for name, settings, free in zip(entry.names, entry.attacks, entry.gradient_free, strict=True)
        ]
        self.checks: list[Check] = run_checks(self.rows, tried, meta)

    # --- what was measured ---------------------------------------------------------------------------------------------

    @property
    def norms(self) -> list[str]:
        """The norms, in the order of the suite."""
        return list(dict.fromkeys(entry.norm for entry in self.suite.entries))

    @property
    def counted_norms(self) -> list[str]:
        """The norms that enter minimum and union: not relaxed ones, which are infeasible, unless there are no others."""
        return [norm for norm in self.norms if not is_relaxed(norm)] or self.norms

    def budgets(self, norm: str) -> tuple[str, ...]:
        """Return the budgets of a norm as written, ascending."""
        self._require(norm)
        return tuple(entry.eps for entry in self.suite.entries if entry.norm == norm)

    def headline(self, norm: str) -> str:
        """Return the headline budget of a norm as written."""
        self._require(norm)
        return next(e.eps for e in self.suite.entries if e.norm == norm and e.headline)

    def _require(self, norm: str) -> None:
        if norm not in self.norms:
            raise ValueError(f"norm {norm!r} was not attacked; measured: {', '.join(self.norms)}")

    # --- figures ---------------------------------------------------------------------------------------------------------

    @property
    def clean(self) -> float:
        """Accuracy without an attack."""
        return float(self.clean_correct.mean())

    def robust(self, norm: str, eps: float | str | None = None) -> Mask:
        """Tell per sample (N,) whether it is correct and no attack of this norm within eps (headline) changed that.

        A sample broken within a smaller budget is broken within a larger one, and one broken by a single modality is
        broken under a joint threat that allows as much.
        """
        limits = self._limits(norm, eps)
        right = self.clean_correct.copy()
        for (other, budget, attack), fell in self._fell.items():
            if budget <= limits.get(other, -1.0) and attack != "random":
                right &= ~fell
        return right

    def broken(self, norm: str, eps: float | str | None = None) -> Mask:
        """Tell per sample (N,) whether an attack of this norm within eps (headline) found an adversarial example.

        Unlike ``~robust(norm)``, not where the sample was wrong to begin with or its gradients were not finite.
        """
        limits = self._limits(norm, eps)
        found = np.zeros(len(self.ids), dtype=bool)
        for row in self.rows:
            if row.phase == "main" and row.norm in limits and row.status == "broken" and row.attack != "random":
                found[self._position[row.id]] |= parse_eps(row.eps) <= limits[row.norm]
        return found

    def after(self, norm: str, eps: float | str, attack: str) -> Share:
        """Return the accuracy, with its Wilson interval, that an attack and all that ran before it under its norm left.

        Raises:
            ValueError: if that attack was not run.
        """
        limit = self._limit(norm, eps)
        names = next(e.names for e in self.suite.entries if e.norm == norm and parse_eps(e.eps) == limit)
        if attack not in names:
            raise ValueError(f"{attack!r} was not run under {norm}; run: {', '.join(names)}")
        before, limits = set(names[: names.index(attack) + 1]), self._limits(norm, eps)
        right = self.clean_correct.copy()
        for (other, budget, name), fell in self._fell.items():
            least = budget < limits.get(other, -1.0) or (
                budget == limits.get(other) and (other != norm or name in before)
            )
            if name != "random" and least:
                right &= ~fell
        return share_of(int(right.sum()), len(right))

    def broken_by(self, norm: str, eps: float | str | None = None) -> dict[str, int]:
        """Count, by attack, the samples that it was the first to break within eps (headline if ``None``), most first.

        Under a joint threat without those that a single modality had broken before.
        """
        limit = self._limit(norm, eps)
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.phase == "main" and row.norm == norm and row.attack != "random" and row.status == "broken":
                counts[row.attack] += parse_eps(row.eps) <= limit
        return {attack: count for attack, count in counts.most_common() if count}

    def _limit(self, norm: str, eps: float | str | None) -> float:
        limit = parse_eps(self.headline(norm) if eps is None else eps)
        measured = [parse_eps(text) for text in self.budgets(norm)]
        if limit not in measured:
            raise ValueError(f"eps={eps} was not measured under {norm}; measured: {', '.join(self.budgets(norm))}")
        return limit

    def _limits(self, norm: str, eps: float | str | None) -> dict[str, float]:
        """Return the largest budget of each norm that is allowed: that of the norm, and what a joint threat includes."""
        limit = self._limit(norm, eps)
        entries = self.suite.content["entries"]
        joint = next(e["threat"] for e in entries if e["threat"]["norm"] == norm)
        limits = {norm: limit}
        for modality, whole in joint.get("threats", {}).items():
            name = f"{modality}_{whole['norm']}"
            alike = {**whole, "norm": name, "modality": modality}
            for threat in (e["threat"] for e in entries if e["threat"]["norm"] == name):
                same_kind = (
                    is_share(threat["eps"]) == is_share(whole["eps"]) and {**threat, "eps": whole["eps"]} == alike
                )
                if same_kind and parse_eps(threat["eps"]) <= limit * parse_eps(whole["eps"]):
                    limits[name] = max(limits.get(name, 0.0), parse_eps(threat["eps"]))
        return limits

    def accuracy(self, norm: str, eps: float | str | None = None) -> float:
        """Return the robust accuracy at eps (headline if ``None``)."""
        return float(self.robust(norm, eps).mean())

    def interval(self, norm: str, eps: float | str | None = None) -> tuple[float, float]:
        """Return the Wilson 95 % interval of :meth:`accuracy`."""
        return wilson(int(self.robust(norm, eps).sum()), len(self.ids))

    def random_accuracy(self, norm: str, eps: float | str | None = None) -> float:
        """Return the accuracy under random perturbations of that size; NaN if they were not measured."""
        fell = self._fell.get((norm, self._limit(norm, eps), "random"))
        return float("nan") if fell is None else float((self.clean_correct & ~fell).mean())

    def union_robust(self) -> Mask:
        """Tell per sample (N,) whether it survives the headline budget of every norm in :attr:`counted_norms`."""
        return np.logical_and.reduce([self.robust(norm) for norm in self.counted_norms])

    def union(self) -> float:
        """Return the share of samples that survive the headline budget of every norm in :attr:`counted_norms`."""
        return float(self.union_robust().mean())

    def curve(self, norm: str) -> list[tuple[float, float, float, float]]:
        """Return ``(eps, accuracy, low, high)`` from the clean accuracy at 0 on, with Wilson intervals."""
        start = (0.0, self.clean, *wilson(int(self.clean_correct.sum()), len(self.ids)))
        return [start, *((parse_eps(e), self.accuracy(norm, e), *self.interval(norm, e)) for e in self.budgets(norm))]

    def difference(self, other: RobustnessResult, norm: str | None = None, eps: float | str | None = None) -> Share:
        """Return accuracy minus the other's, with the 95 % interval of paired samples; ``norm=None``: the union.

        Raises:
            ValueError: if the two were not measured on the same samples.
        """
        if not self.same_samples(other):
            raise ValueError(
                f"a paired difference needs the same samples, but the {len(self.ids)} here and the {len(other.ids)} there "
                "are not: evaluate both on the same data"
            )
        if norm is None:
            return paired_difference(other.union_robust(), self.union_robust())
        return paired_difference(other.robust(norm, eps), self.robust(norm, eps))

    def same_samples(self, other: RobustnessResult) -> bool:
        """Tell whether both are about the same samples: ids, inputs and labels."""
        return self._data == other._data

    def metrics(self) -> dict[str, float]:
        """Return every figure under a stable name, e.g. ``robust/linf_8_255/acc``, for loggers.

        Perturbations that no sensor can produce say so: ``robust/infeasible/relaxed_linf_0p1/acc``.
        """
        found = {"robust/clean/acc": self.clean, "robust/union/acc": self.union()}
        found["robust/min/acc"] = min(self.accuracy(norm) for norm in self.counted_norms)
        for entry in self.suite.entries:
            norm, eps = entry.norm, entry.eps
            key = f"robust/{'infeasible/' if is_relaxed(norm) else ''}{metric_key(norm, eps)}"
            found[f"{key}/acc"] = self.accuracy(norm, eps)
            control = self.random_accuracy(norm, eps)
            if not math.isnan(control):
                found[f"{key}/random_acc"] = control
                found[f"{key}/gap"] = control - found[f"{key}/acc"]
        return found

    def table(self) -> str:
        """Render a table for the terminal; figures tainted by a check carry a mark."""
        width = max(14, *(len(f"{entry.norm} {entry.eps} ") for entry in self.suite.entries))
        lines = [f"{'':<{width}}{'accuracy':>9}  {'95 % interval':<15}{'random':>7}"]
        low, high = wilson(int(self.clean_correct.sum()), len(self.ids))
        lines.append(f"{'clean':<{width}}{self.clean:>9.1%}  [{low:5.1%}, {high:5.1%}]")
        for norm in self.norms:
            bad = [c.status for c in self.checks if c.norm in ("", norm) and c.status != "pass"]
            mark = " !" if "fail" in bad else " ?" if bad else ""
            mark += "  relaxed (infeasible)" if is_relaxed(norm) else ""
            for eps in self.budgets(norm):
                low, high = self.interval(norm, eps)
                control = self.random_accuracy(norm, eps)
                shown = f"{control:>7.1%}" if not math.isnan(control) else " " * 7
                head = " *" if eps == self.headline(norm) else ""
                lines.append(
                    f"{norm + ' ' + eps:<{width}}{self.accuracy(norm, eps):>9.1%}  [{low:5.1%}, {high:5.1%}] {shown}{head}{mark}"
                )
        low, high = wilson(int(self.union_robust().sum()), len(self.ids))
        over = "over the headline budgets (*)" + (", relaxed ones left out" if self.counted_norms != self.norms else "")
        lines.append(f"{'union':<{width}}{self.union():>9.1%}  [{low:5.1%}, {high:5.1%}]   {over}")
        for check in self.checks:
            if check.status != "pass":
                lines.append(
                    f"{'!' if check.status == 'fail' else '?'} {check.norm or 'all norms'}: {check.name}: {check.detail}"
                )
        return "\n".join(lines)

    # --- files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``rows.csv``, ``result.json`` and ``examples.pt`` into a folder, atomically; return the folder."""
        folder = Path(folder)
        names = ",".join(Row.__dataclass_fields__)
        write_atomically(
            folder / "rows.csv", "\n".join([names, *(",".join(cells) for cells in to_csv(self.rows))]) + "\n"
        )
        write_examples(folder / EXAMPLES, self.examples)
        suite = {"name": self.suite.name, "hash": self.suite.hash, "content": self.suite.content}
        content = {"suite": suite, "meta": self.meta, "rows": len(self.rows)}
        write_atomically(folder / "result.json", json.dumps(content, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> RobustnessResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the folder holds no result, or only a part of one.
        """
        folder = Path(folder)
        if not (folder / "result.json").is_file():
            raise ValueError(f"{folder} holds no saved result (result.json is missing)")
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        suite = content["suite"]
        examples = torch.load(folder / EXAMPLES, weights_only=True) if (folder / EXAMPLES).exists() else []
        record = SuiteRecord(suite["name"], suite["hash"], suite["content"])
        rows = read_rows(folder / "rows.csv")
        if len(rows) != content.get("rows", len(rows)):
            raise ValueError(
                f"{folder / 'rows.csv'} holds {len(rows)} of {content['rows']} rows: it was cut off; run the evaluation again"
            )
        return cls(rows, record, content["meta"], examples)
