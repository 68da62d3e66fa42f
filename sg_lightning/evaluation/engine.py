"""Attack a batch: cheap attacks first, small budgets first, only on samples that still stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sg_lightning.attacks import Attack, Oracle, RandomNoise, Suite, verify
from sg_lightning.attacks.base import check_batch
from sg_lightning.evaluation.rows import Phase, Row, Status
from sg_lightning.inputs import Input, detached, select
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Threat

EXAMPLES_PER_NORM = 4
CLEAN = "clean"


class RobustnessRun:
    """Turns batches into rows. The same code serves :func:`evaluate` and the callback.

    Randomness belongs to the sample (run seed and sample id), so the rows do not depend on how samples are batched.

    Args:
        oracle: The model.
        suite: What to run.
        seed: Seed of all random starts and controls.
        check_ids: Samples on which every attack runs, broken or not, for the honesty checks.
    """

    def __init__(self, oracle: Oracle, suite: Suite, *, seed: int = 0, check_ids: frozenset[int] = frozenset()) -> None:
        self.oracle = oracle
        self.suite = suite
        self.seed = seed
        self.check_ids = check_ids
        self.examples: list[dict[str, Any]] = []
        self._tag = f"{suite.name}-{suite.hash}"

    @property
    def attacks_per_sample(self) -> int:
        """Rows of the main phase that each sample gets."""
        return 1 + sum(len(entry.attacks) + self.suite.control for entry in self.suite.entries)

    def batch(self, x: Input, y: Tensor, ids: Sequence[int]) -> list[Row]:
        """Attack a batch and return its rows.

        Raises:
            ValueError: on shapes, labels or values that do not fit.
        """
        y = y.long()
        check_batch(x, y)
        with self.oracle.attacking():
            x, y = detached(x), y.clone()
            noise = SampleGenerator.from_ids(self.seed, list(ids))
            clean = self.oracle.correct(x, y)
            rows = [self._row(i, y[k], clean[k], "main", "", "", CLEAN) for k, i in enumerate(ids)]
            rows += self._cascade(x, y, ids, noise, clean)
            chosen = torch.tensor([k for k, i in enumerate(ids) if i in self.check_ids], dtype=torch.int64)
            if len(chosen):
                rows += self._checks(
                    select(x, chosen), y[chosen], [ids[k] for k in chosen], noise.select(chosen), clean[chosen]
                )
        return rows

    def _cascade(self, x: Input, y: Tensor, ids: Sequence[int], noise: SampleGenerator, clean: Tensor) -> list[Row]:
        rows: list[Row] = []
        standing: dict[str, Tensor] = {}
        for entry in self.suite.entries:
            norm = entry.threat.norm
            alive = standing.setdefault(norm, clean.clone())
            for attack in entry.attacks:
                broken, new = self._attack(attack, x, y, ids, noise, clean, alive, "main")
                alive &= ~broken
                rows += new
            if self.suite.control:
                rows += self._attack(RandomNoise(entry.threat), x, y, ids, noise, clean, clean, "main")[1]
        return rows

    def _checks(self, x: Input, y: Tensor, ids: Sequence[int], noise: SampleGenerator, clean: Tensor) -> list[Row]:
        rows: list[Row] = []
        for entry in self.suite.entries:
            if entry.headline:
                for attack in [*entry.attacks, RandomNoise(entry.threat)]:
                    rows += self._attack(attack, x, y, ids, noise, clean, clean, "check")[1]
                huge = overwhelming(entry.threat, x)
                if huge is not None:
                    rows += self._attack(entry.attacks[-1].with_threat(huge), x, y, ids, noise, clean, clean, "check")[
                        1
                    ]
        return rows

    def _attack(
        self, attack: Attack, x: Input, y: Tensor, ids: Sequence[int], noise: SampleGenerator,
        clean: Tensor, alive: Tensor, phase: Phase,
    ) -> tuple[Tensor, list[Row]]:  # fmt: skip
        """Attack the samples that stand; return who fell (broken or invalid) and one row for everybody."""
        threat = attack.threat
        fell = torch.zeros_like(alive)
        status: list[Status] = ["skipped"] * len(ids)
        size, queries, iterations = [0.0] * len(ids), [0] * len(ids), [0] * len(ids)
        index = alive.nonzero().squeeze(1)
        if len(index):
            part, labels = select(x, index), y[index]
            stream = noise.select(index).fork(threat.norm, str(threat.eps), attack.name)
            found = attack.run(self.oracle, part, labels, generator=stream)
            verdict = verify(self.oracle, threat, part, found.x_adv, labels)
            broken = verdict.counts & ~found.invalid
            # An example outside its threat is a fault of the attack: it never counts as success, nor as robustness.
            invalid = found.invalid | ~verdict.inside
            fell[index] = broken | invalid
            sizes = threat.size(found.x_adv, part)
            for k, position in enumerate(index.tolist()):
                status[position] = "invalid" if invalid[k] else "broken" if broken[k] else "survived"
                size[position] = float(f"{float(sizes[k]):.9g}")  # the last digits depend on the batch shape
                queries[position], iterations[position] = int(found.queries[k]), int(found.iterations[k])
            if phase == "main" and attack.kind != "random":
                self._keep_examples(threat, part, found.x_adv, labels, [ids[k] for k in index], broken, sizes)
        rows = [
            self._row(i, y[k], clean[k], phase, threat.norm, str(threat.eps), attack.name, status[k], size[k], queries[k], iterations[k])
            for k, i in enumerate(ids)
        ]  # fmt: skip
        return fell, rows

    def _row(
        self, i: int, label: Tensor, clean: Tensor, phase: Phase, norm: str, eps: str, attack: str,
        status: Status = "skipped", size: float = 0.0, queries: int = 0, iterations: int = 0,
    ) -> Row:  # fmt: skip
        return Row(
            int(i), int(label), bool(clean), phase, norm, eps, attack, status, size, queries, iterations, self._tag
        )

    def _keep_examples(
        self, threat: Threat, x: Input, x_adv: Input, y: Tensor, ids: Sequence[int], broken: Tensor, sizes: Tensor
    ) -> None:
        headline = any(entry.headline and entry.threat == threat for entry in self.suite.entries)
        if not headline or not isinstance(x, Tensor) or not isinstance(x_adv, Tensor):
            return
        held = sum(example["norm"] == threat.norm for example in self.examples)
        for k in broken.nonzero().squeeze(1).tolist()[: EXAMPLES_PER_NORM - held]:
            predicted = int(self.oracle.logits(x_adv[k : k + 1]).argmax(1))
            self.examples.append({
                "norm": threat.norm, "eps": str(threat.eps), "clean": x[k].cpu(), "adversarial": x_adv[k].cpu(),
                "label": int(y[k]), "predicted": predicted, "size": float(sizes[k]),
            })  # fmt: skip


def overwhelming(threat: Threat, x: Input) -> Threat | None:
    """Return a threat of the same norm under which no network can be right: half the domain for every value.

    ``None`` where that has no meaning (joint threats, open counts).
    """
    if isinstance(x, dict) or threat.norm == "joint":
        return None
    domain = getattr(threat, "domain", None)
    if domain is None or domain.width == float("inf"):
        return None
    values = x[0].numel()
    width = domain.width
    positions = (
        threat.size(torch.where(x < (domain.low + domain.high) / 2, domain.high, domain.low), x)[0]
        if threat.discrete
        else 0
    )
    eps = {
        "linf": width / 2,
        "l2": width / 2 * values**0.5,
        "l1": width / 2 * values,
    }.get(threat.norm, float(int(positions)))
    return threat.with_eps(eps)


def spread_ids(samples: int, wanted: int) -> frozenset[int]:
    """Choose ``wanted`` ids evenly from ``range(samples)``, the same for every run."""
    count = min(samples, wanted)
    return frozenset(k * samples // count for k in range(count)) if count else frozenset()
