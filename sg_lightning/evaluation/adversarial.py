"""The adversarial input of every sample, on disk: memory holds one batch at a time."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sg_lightning.attacks import Suite
from sg_lightning.evaluation.result import RobustnessResult
from sg_lightning.inputs import Input, apply, assign, batch_size, detached, device_of, rebuild, select, tensors
from sg_lightning.threats import Threat

Keep = Literal["few", "all"]
FOLDER = "adversarial"


class AdversarialStore:
    """Writes what each batch gave into a part of its own; at the end, parts become ``adversarial/<norm>.pt``.

    A norm's input of a sample is its first adversarial example within the headline budget; for a sample that stood,
    what the last attack found; for one that was wrong to begin with, or whose gradients were not finite, the clean
    input. A file is a dict for ``torch.load(path, mmap=True)``: ``norm``, ``eps``, ``suite``, ``weights``; ``ids`` and
    ``labels`` (N,); ``clean_correct`` (N,); ``success`` (N,), whether ``x_adv`` makes a correct sample wrong; ``x_adv``
    (N, ...), a dict of tensors for a dict of inputs.

    Args:
        folder: Folder of the evaluation.
        suite: What is run.
    """

    def __init__(self, folder: str | Path, suite: Suite) -> None:
        self.folder = Path(folder) / FOLDER
        self._kept: list[Threat] = []
        for norm in suite.norms:
            threats = [entry for entry in suite.entries if entry.threat.norm == norm]
            last = next(k for k, entry in enumerate(threats) if entry.headline)
            self._kept += [entry.threat for entry in threats[: last + 1]]
        self._held: dict[str, Input] = {}
        self._fell: dict[str, Tensor] = {}

    def begin(self, x: Input) -> None:
        """Start a batch from its clean inputs."""
        self._held = {threat.norm: detached(x) for threat in self._kept}
        self._fell = {norm: torch.zeros(batch_size(x), dtype=torch.bool, device=device_of(x)) for norm in self._held}

    def hold(self, threat: Threat, index: Tensor, x_adv: Input, usable: Tensor, broken: Tensor) -> None:
        """Keep what an attack found for the samples ``index`` of the batch, where ``usable``.

        Where it is ``broken`` by one modality alone, that is an example of a joint threat too.
        """
        for kept in self._kept:
            if kept != threat and not kept.includes(threat):
                continue
            fell = self._fell[kept.norm]
            # Broken by one modality, a sample may yet stand where it is attacked within a smaller share of all.
            mask = broken | (usable & ~fell[index]) if kept == threat else broken
            assign(self._held[kept.norm], index[mask], select(x_adv, mask))
            fell[index] |= broken

    def commit(self, ids: Sequence[int]) -> None:
        """Write the batch.

        Raises:
            OSError: if the folder cannot be written to.
        """
        found = {norm: apply(lambda t: t.cpu(), x) for norm, x in self._held.items()}
        # Not named after the samples: a run that goes on may do some of a batch again.
        _write(self.folder / f"part-{uuid.uuid4().hex}.pt", {"ids": torch.tensor(ids), "x_adv": found})
        self._held = {}

    def finish(self, result: RobustnessResult) -> None:
        """Put the parts together, one file per norm.

        Raises:
            ValueError: if a part is missing.
        """
        paths = sorted(self.folder.glob("part-*.pt"))
        if not paths:
            return  # done before
        parts = [torch.load(path, mmap=True, weights_only=True) for path in paths]
        missing = set(result.ids.tolist()) - {i for part in parts for i in part["ids"].tolist()}
        if missing:
            raise ValueError(
                f"{self.folder} lacks the adversarial inputs of {len(missing)} of {len(result.ids)} samples, because parts "
                "of it were deleted; delete the whole folder of the evaluation and run it again"
            )
        labels = {row.id: row.label for row in result.rows}
        for norm in result.norms:
            scratch = self.folder / f"{norm}.scratch"
            x_adv = _joined([(p["ids"], p["x_adv"][norm]) for p in parts], result.ids, scratch)
            eps = result.headline(norm)
            _write(self.folder / f"{norm}.pt", {
                "norm": norm, "eps": eps, "suite": f"{result.suite.name}-{result.suite.hash}",
                "weights": result.meta["weights"], "ids": torch.from_numpy(result.ids),
                "labels": torch.tensor([labels[i] for i in result.ids.tolist()]),
                "clean_correct": torch.from_numpy(result.clean_correct),
                "success": torch.from_numpy(result.broken(norm, eps)), "x_adv": x_adv,
            })  # fmt: skip
            for path in self.folder.glob(f"{scratch.name}*"):
                path.unlink()
        for path in paths:
            path.unlink()


def check_keep(keep: Keep, out: str | Path | None) -> None:
    """Raise ``ValueError`` on an unknown ``keep``, or on ``"all"`` without a folder."""
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be 'few' or 'all', got {keep!r}")
    if keep == "all" and out is None:
        raise ValueError("keep='all' writes the adversarial input of every sample to disk: give out=, a folder")


def _joined(parts: list[tuple[Tensor, Input]], ids: Any, scratch: Path) -> Input:
    """Return the inputs of all samples in the order of ``ids``, in files rather than in memory."""
    whole = []
    for k, first in enumerate(tensors(parts[0][1])):
        size = len(ids) * first[0].numel()
        flat = torch.from_file(f"{scratch}{k}", shared=True, size=size, dtype=first.dtype)
        whole.append(flat.view(len(ids), *first.shape[1:]))
    joined = rebuild(parts[0][1], whole)
    for some, x_adv in parts:
        assign(joined, torch.from_numpy(np.searchsorted(ids, some.numpy())), x_adv)
    return joined


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write adversarial inputs to {path.parent}: {error}; mend that and run the same again: it goes on from "
            "there"
        ) from error
