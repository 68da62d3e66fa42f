"""An evaluation in progress: batches in, rows on disk, one result at the end, on any number of processes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sg_lightning.attacks import Oracle, Substitute, Suite
from sg_lightning.evaluation.adversarial import AdversarialStore, Keep, check_keep
from sg_lightning.evaluation.engine import Cost, RobustnessRun, spread_ids
from sg_lightning.evaluation.progress import Bar, Watch
from sg_lightning.evaluation.result import RobustnessResult
from sg_lightning.evaluation.rows import Row, RowStore, unique
from sg_lightning.fingerprint import fingerprint_model, fingerprint_samples
from sg_lightning.inputs import Input, select


class Session:
    """Attack the batches of a test set, skip what a folder holds already, and put all rows together.

    In a process group every process makes its own session and gives it the samples of its share; :meth:`finish` gives
    all of them the same result.

    Args:
        oracle: The model.
        suite: What to run.
        samples: Size of the test set.
        seed: Seed of random starts and controls.
        check_samples_count: Samples on which all attacks run, for the honesty checks.
        out: Folder for rows as they are made; what it holds is not done again. ``None``: nothing is written.
        keep: ``"all"`` writes the adversarial input of every sample into ``out``, ``"few"`` some for pictures.
        bar: Where this process shows its progress.

    Raises:
        ValueError: if ``out`` holds another evaluation, or ``keep="all"`` has no ``out``.
        OSError: if ``out`` cannot be written to.
    """

    def __init__(
        self, oracle: Oracle, suite: Suite, *, samples: int, seed: int = 0, check_samples_count: int = 0,
        out: str | Path | None = None, keep: Keep = "few", bar: Bar | None = None,
    ) -> None:  # fmt: skip
        check_keep(keep, out)
        self.rank, self.world = process()
        self.samples = samples
        self.out = None if out is None else Path(out)
        self.store = None
        if self.out is not None:
            fingerprint = {
                "weights": fingerprint_model(oracle.model), "samples": samples, "suite": f"{suite.name}-{suite.hash}",
                "seed": seed, "estimator": str(oracle.estimator), "eot": oracle.eot, "votes": oracle.votes,
                "checks": check_samples_count,
            }  # fmt: skip
            for attack in (a for entry in suite.entries for a in entry.attacks if isinstance(a, Substitute)):
                fingerprint[f"substitute {attack.label}"] = attack.fingerprint
            if keep == "all":
                fingerprint["keep"] = keep
            self.store = RowStore(self.out, fingerprint, part=self.rank if self.world > 1 else None)
        check_ids = spread_ids(samples, check_samples_count)
        mine = len(range(self.rank, samples, self.world))
        self.bar = bar
        self.run = RobustnessRun(
            oracle, suite, seed=seed, check_ids=check_ids,
            examples=self.store.examples() if self.store is not None else (),
            watch=Watch(bar, suite, mine, len([i for i in check_ids if i % self.world == self.rank])),
            store=AdversarialStore(out, suite) if keep == "all" and out is not None else None,
        )  # fmt: skip
        self.rows = _finished(self.store.read(), self.run) if self.store is not None else []
        self.done = {row.id: row.data for row in self.rows}
        self.resumed = len(self.done)
        if bar is not None:
            bar.begin(f"attacks ({suite.name})", mine, sum(i % self.world == self.rank for i in self.done))

    def share(self, ids: Tensor) -> Tensor:
        """Return the positions of the samples that this process has still to attack, if every one sees all samples."""
        todo = [k for k, i in enumerate(ids.tolist()) if i % self.world == self.rank and i not in self.done]
        return torch.tensor(todo, dtype=torch.int64)

    def batch(self, x: Input, y: Tensor, ids: Tensor) -> None:
        """Attack the samples that are not done yet; ``ids`` (B,) are their positions in the test set.

        Raises:
            ValueError: if a sample that is done was another one then, or on bad data.
        """
        self.check(x, y, ids)
        index = torch.tensor([k for k, i in enumerate(ids.tolist()) if i not in self.done], dtype=torch.int64)
        if len(index) == 0:
            return
        index = index.to(y.device)
        rows = self.run.batch(select(x, index), y[index], ids[index.cpu()].tolist())
        if self.store is not None:
            self.store.append(rows, self.run.examples if self.rank == 0 else ())
        self.rows += rows

    def check(self, x: Input, y: Tensor, ids: Tensor) -> None:
        """Raise ``ValueError`` if a finished sample is not the one that was attacked."""
        if not any(i in self.done for i in ids.tolist()):
            return
        for i, data in zip(ids.tolist(), fingerprint_samples(x, y.long()), strict=True):
            if self.done.get(i, data) != data:
                raise ValueError(
                    f"sample {i} is not the one whose rows are in {self.out}: the data, their order or their "
                    "preprocessing changed; choose another out= or delete it"
                )

    def finish(self, **meta: Any) -> RobustnessResult | None:
        """Gather the rows of all processes; return the result, ``None`` if no sample was seen."""
        self.close()
        counts = self.run.oracle.counts
        parts: list[Any] = [(self.rows, counts.forwards, counts.backwards, self.run.costs)]
        if self.world > 1:
            mine, parts = parts[0], [None] * self.world
            dist.all_gather_object(parts, mine)
        rows: list[Row] = unique([row for part, *_ in parts for row in part])
        if not rows:
            return None
        spent = {"forwards": sum(p[1] for p in parts), "backwards": sum(p[2] for p in parts)}
        costs: dict[str, Cost] = {}
        for *_, part in parts:
            for what, cost in part.items():
                costs.setdefault(what, Cost()).add(cost)
        result = self.run.result(
            rows, counts=spent, costs={what: asdict(cost) for what, cost in costs.items()},
            resumed_samples=self.resumed, **meta,
        )  # fmt: skip
        if self.store is not None and self.out is not None and self.rank == 0:
            result.save(self.out)
            if self.run.store is not None:
                self.run.store.finish(result)
            self.store.drop_parts()
        return result

    def close(self) -> None:
        """Take the progress bar away."""
        if self.bar is not None:
            self.bar.end()


def process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    alone = not (dist.is_available() and dist.is_initialized())
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def _finished(rows: list[Row], run: RobustnessRun) -> list[Row]:
    """Keep the samples whose rows are complete; a killed run may have left some of a batch."""
    main: dict[int, int] = {}
    for row in rows:
        main[row.id] = main.get(row.id, 0) + (row.phase == "main")
    checked = {row.id for row in rows if row.phase == "check"}
    complete = {i for i, n in main.items() if n == run.attacks_per_sample and (i not in run.check_ids or i in checked)}
    return [row for row in rows if row.id in complete]
