"""Attack a batch: cheap attacks first, small budgets first, only on samples that still stand."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from sg_lightning._version import __version__
from sg_lightning.attacks import Attack, AttackResult, Oracle, RandomNoise, Suite, verify
from sg_lightning.attacks.abreast import companions, run_abreast
from sg_lightning.attacks.base import check_batch
from sg_lightning.evaluation.adversarial import AdversarialStore
from sg_lightning.evaluation.progress import Watch
from sg_lightning.evaluation.result import RobustnessResult
from sg_lightning.evaluation.rows import Phase, Row, Status
from sg_lightning.fingerprint import fingerprint_model, fingerprint_samples
from sg_lightning.inputs import Input, detached, select
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, EventFlips, Joint, Linf, Modality, Threat

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
        examples: Adversarial examples kept so far, of a run that goes on.
        watch: Shows the progress.
        store: Takes the adversarial input of every sample.
    """

    def __init__(
        self,
        oracle: Oracle,
        suite: Suite,
        *,
        seed: int = 0,
        check_ids: frozenset[int] = frozenset(),
        examples: Sequence[dict[str, Any]] = (),
        watch: Watch | None = None,
        store: AdversarialStore | None = None,
    ) -> None:
        self.oracle = oracle
        self.suite = suite
        self.seed = seed
        self.check_ids = check_ids
        self.examples = list(examples)
        self.watch = watch or Watch(None, suite, 0, 0)
        self.store = store
        self.costs: dict[str, Cost] = {}
        self._tag = f"{suite.name}-{suite.hash}"
        self._started = time.perf_counter()

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
            clean = self.oracle.correct(x, y)
            rows = [
                Row(
                    id=int(i), label=int(y[k]), clean=bool(clean[k]), phase="main", norm="", eps="", attack=CLEAN,
                    status="skipped", size=0.0, queries=self.oracle.votes, iterations=0, gradients=0, zero_gradients=0,
                    suite=self._tag, data=data,
                )
                for k, (i, data) in enumerate(zip(ids, fingerprint_samples(x, y), strict=True))
            ]  # fmt: skip
            batch = _Batch(x, y, clean, SampleGenerator.from_ids(self.seed, list(ids)), rows)
            checked = torch.tensor([k for k, i in enumerate(ids) if i in self.check_ids], dtype=torch.int64)
            if self.store is not None:
                self.store.begin(x)
            rows = [*rows, *self._cascade(batch), *(self._checks(batch.select(checked)) if len(checked) else ())]
        if self.store is not None:
            self.store.commit(ids)
        return rows

    def _cascade(self, batch: _Batch) -> list[Row]:
        rows: list[Row] = []
        standing: dict[str, Tensor] = {}
        fallen: list[tuple[Threat, Tensor]] = []
        for entry in self.suite.entries:
            alive = standing.setdefault(entry.threat.norm, batch.clean.clone())
            for threat, fell in fallen:
                if entry.threat.includes(threat):
                    alive &= ~fell
            for number, attack in enumerate(entry.attacks):
                fell, new = self._attack(attack, batch, alive, "main", entry.attacks[number + 1 :])
                alive &= ~fell
                fallen.append((entry.threat, fell))
                rows += new
            if self.suite.control:
                rows += self._attack(RandomNoise(entry.threat), batch, batch.clean, "main")[1]
        return rows

    def _checks(self, batch: _Batch) -> list[Row]:
        rows: list[Row] = []
        for entry in self.suite.entries:
            if entry.headline:
                attacks = [*entry.attacks, RandomNoise(entry.threat)]
                huge = overwhelming(entry.threat, batch.x)
                if huge is not None and entry.strongest is not None:
                    attacks.append(entry.strongest.with_threat(huge))
                for attack in attacks:
                    rows += self._attack(attack, batch, batch.clean, "check")[1]
        return rows

    def _attack(
        self, attack: Attack, batch: _Batch, alive: Tensor, phase: Phase, following: Sequence[Attack] = ()
    ) -> tuple[Tensor, list[Row]]:
        """Attack the samples that stand; return who fell (broken or invalid) and one row for everybody.

        Of the ``following`` attacks, those that may as well run along do so, and are looked up when it is their turn.
        """
        with self.watch.attack(attack, len(batch.y)):
            return self._attack_standing(attack, batch, alive, phase, following)

    def _attack_standing(
        self, attack: Attack, batch: _Batch, alive: Tensor, phase: Phase, following: Sequence[Attack]
    ) -> tuple[Tensor, list[Row]]:
        threat = attack.threat
        told = {"phase": phase, "norm": threat.norm, "eps": str(threat.eps), "attack": attack.name}
        rows = [replace(row, queries=0, **told) for row in batch.rows]  # type: ignore[arg-type]
        fell = torch.zeros_like(alive)
        index = alive.nonzero().squeeze(1)
        if len(index) == 0:
            return fell, rows
        part = batch.select(index)
        with self._adding_to(self._cost(_label(attack) + (" (checks)" if phase == "check" else ""))):
            found = self._searched(attack, batch, part, index, following)
            verdict = verify(self.oracle, threat, part.x, found.x_adv, part.y)
        broken = verdict.counts & ~found.invalid
        sizes = threat.size(found.x_adv, part.x)
        # An example outside its threat is a fault of the attack: it never counts as success, nor as robustness. But the
        # smallest example of a sample may well be larger than eps.
        invalid = found.invalid | ~(verdict.inside | (attack.minimal & (sizes > threat.limits(part.x))))
        fell[index] = broken | invalid
        for k, position in enumerate(index.tolist()):
            status: Status = "invalid" if invalid[k] else "broken" if broken[k] else "survived"
            rows[position] = replace(
                rows[position], status=status,
                size=float(f"{float(sizes[k]):.9g}"),  # the last digits depend on the batch shape
                queries=int(found.queries[k]), iterations=int(found.iterations[k]),
                gradients=int(found.gradients[k]), zero_gradients=int(found.zero_gradients[k]),
            )  # fmt: skip
        if phase == "main" and attack.kind != "random":
            self._keep_examples(threat, part, found.x_adv, broken, sizes)
            if self.store is not None:
                self.store.hold(threat, index, found.x_adv, ~invalid, broken)
        return fell, rows

    def _searched(
        self, attack: Attack, batch: _Batch, part: _Batch, index: Tensor, following: Sequence[Attack]
    ) -> AttackResult:
        """Run an attack on the samples ``index`` of a batch, or look up what it found while another one ran."""
        threat = attack.threat
        if id(attack) in batch.ahead:
            before, found, given_up = batch.ahead.pop(id(attack))
            places = torch.searchsorted(before, index)  # who stands now stood then: samples only ever fall
            if not bool(given_up[places].any()):
                return found.of(places)
            following = ()  # what broke a sample did not pass verification: all over again
        if attack.minimal:  # once for all budgets
            whatever_eps = attack.with_threat(threat.with_eps(0))
            if whatever_eps not in batch.searched:
                found = attack.run(self.oracle, part.x, part.y, generator=part.noise.fork(threat.norm, attack.name))
                batch.searched[whatever_eps] = index, found
                return found
            before, found = batch.searched[whatever_eps]
            return found.again(torch.searchsorted(before, index))
        group = [attack, *companions(attack, following, self.oracle, part.y)]
        streams = [part.noise.fork(threat.norm, str(threat.eps), other.name) for other in group]
        joint = Cost()
        with self._adding_to(joint):
            together = run_abreast(group, self.oracle, part.x, part.y, streams) if len(group) > 1 else []
        if not together:
            return attack.run(self.oracle, part.x, part.y, generator=streams[0])
        (found, _), *later = together
        spent = [int(result.queries.sum()) for result, _ in together]
        for other, share in zip(group[1:], spent[1:], strict=True):  # what each has to do with it
            own = joint.times(share / max(sum(spent), 1))
            self._cost(_label(other)).add(own)
            self._cost(_label(attack)).add(own.times(-1))
        batch.ahead.update({id(other): (index, *result) for other, result in zip(group[1:], later, strict=True)})
        return found

    @contextmanager
    def _adding_to(self, cost: Cost) -> Iterator[None]:
        """Add what happens inside the block to a cost."""
        counts, started = self.oracle.counts, time.perf_counter()
        forwards, backwards = counts.forwards, counts.backwards
        yield
        cost.add(Cost(counts.forwards - forwards, counts.backwards - backwards, time.perf_counter() - started))

    def _cost(self, what: str) -> Cost:
        return self.costs.setdefault(what, Cost())

    def _keep_examples(self, threat: Threat, batch: _Batch, x_adv: Input, broken: Tensor, sizes: Tensor) -> None:
        """Keep a few for pictures; of a dictionary input the attacked modality."""
        headline = any(entry.headline and entry.threat == threat for entry in self.suite.entries)
        if not headline or isinstance(threat, Joint):
            return
        y, whole = batch.y, x_adv
        x, x_adv = (threat.part(t) if isinstance(threat, Modality) else t for t in (batch.x, x_adv))
        assert isinstance(x, Tensor)
        assert isinstance(x_adv, Tensor)
        held = sum(example["norm"] == threat.norm for example in self.examples)
        for k in broken.nonzero().squeeze(1).tolist()[: EXAMPLES_PER_NORM - held]:
            predicted = int(self.oracle.logits(select(whole, torch.tensor([k], device=y.device))).argmax(1))
            self.examples.append({
                "norm": threat.norm, "eps": str(threat.eps), "clean": x[k].cpu(), "adversarial": x_adv[k].cpu(),
                "label": int(y[k]), "predicted": predicted, "size": float(sizes[k]),
            })  # fmt: skip

    def result(self, rows: Sequence[Row], **meta: Any) -> RobustnessResult:
        """Put rows together with what is known of the run; ``meta`` adds to it."""
        oracle = self.oracle
        known = {
            "seed": self.seed, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._started, 1), "model": type(oracle.model).__name__,
            "weights": fingerprint_model(oracle.model), "classes": oracle.classes, "estimator": str(oracle.estimator),
            "eot": oracle.eot, "votes": oracle.votes, "stochastic": oracle.stochastic,
            "counts": {"forwards": oracle.counts.forwards, "backwards": oracle.counts.backwards},
            "versions": {"sg_lightning": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        return RobustnessResult(sorted(rows, key=lambda row: row.id), self.suite, {**known, **meta}, self.examples)


@dataclass
class Cost:
    """Samples sent forwards and backwards through the model, and seconds."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    def add(self, other: Cost) -> None:
        """Add another one to it."""
        self.forwards += other.forwards
        self.backwards += other.backwards
        self.seconds += other.seconds

    def times(self, share: float) -> Cost:
        """Return a share of it."""
        return Cost(round(self.forwards * share), round(self.backwards * share), self.seconds * share)


@dataclass(frozen=True)
class _Batch:
    """Samples with their noise, whether they are right (B,), and the row that says so.

    ``searched``: what minimal-norm attacks found, and for which samples; ``ahead``: what attacks whose turn has not come did.
    """

    x: Input
    y: Tensor
    clean: Tensor
    noise: SampleGenerator
    rows: list[Row]
    searched: dict[Attack, tuple[Tensor, AttackResult]] = field(default_factory=dict)
    ahead: dict[int, tuple[Tensor, AttackResult, Tensor]] = field(default_factory=dict)

    def select(self, index: Tensor) -> _Batch:
        rows = [self.rows[k] for k in index.tolist()]
        return _Batch(select(self.x, index), self.y[index], self.clean[index], self.noise.select(index), rows)


def _label(attack: Attack) -> str:
    return f"{attack.threat.norm} {attack.threat.eps} {attack.name}"


def overwhelming(threat: Threat, x: Input) -> Threat | None:
    """Return a threat of the same norm under which no network can be right: half the domain for every value.

    ``None`` where that has no meaning: open counts, events that may only be added, deleted or moved, and threats that leave
    a modality of a dictionary alone, by which a network may go.
    """
    if isinstance(threat, Joint) and isinstance(x, dict):
        parts = {name: overwhelming(part, x[name]) for name, part in threat.threats}
        huge = {name: part for name, part in parts.items() if part is not None}
        return Joint(huge, 1, threat.name) if huge.keys() == x.keys() else None
    if isinstance(x, dict):
        return None
    domain, values = threat.domain, x[0].numel()
    if domain.width == float("inf") or getattr(threat, "mode", "flip") != "flip":
        return None
    if isinstance(threat, L0 | EventFlips):
        opposite = torch.where(x < (domain.low + domain.high) / 2, domain.high, domain.low)
        return threat.with_eps(int(threat.size(opposite, x)[0]))
    for norm, unit in ((Linf, 1.0), (L2, values**0.5), (L1, values)):
        if isinstance(threat, norm):
            return threat.with_eps(domain.width / 2 * unit)
    return None


def spread_ids(samples: int, wanted: int) -> frozenset[int]:
    """Choose ``wanted`` ids evenly from ``range(samples)``, the same for every run."""
    count = min(samples, wanted)
    return frozenset(k * samples // count for k in range(count)) if count else frozenset()
