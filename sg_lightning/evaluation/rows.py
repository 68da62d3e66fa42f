"""One row per sample and attack, appended to a file as the evaluation goes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

Status = Literal["broken", "survived", "skipped", "invalid"]
Phase = Literal["main", "check"]


@dataclass(frozen=True)
class Row:
    """What one attack did to one sample.

    Attributes:
        id: Index of the sample in the data set.
        label: Its class.
        clean: Whether it is classified correctly without an attack.
        phase: ``"main"``: the cascade that the figures come from; ``"check"``: every attack, for the honesty checks.
        norm: Norm of the threat; ``""`` in the row that only says whether the sample is correct.
        eps: Budget as written.
        attack: Name of the attack.
        status: ``"skipped"`` where an earlier attack had broken the sample or it was wrong to begin with.
        size: Size of the perturbation in the norm.
        queries: Forward passes spent.
        iterations: Gradient steps until the first success.
        gradients: Input gradients taken.
        zero_gradients: How many of them were zero everywhere.
        suite: Name and content hash of the suite.
        data: Hash of input and label, so that results about other data are never resumed or compared.
    """

    id: int
    label: int
    clean: bool
    phase: Phase
    norm: str
    eps: str
    attack: str
    status: Status
    size: float
    queries: int
    iterations: int
    gradients: int
    zero_gradients: int
    suite: str
    data: str


EXAMPLES = "examples.pt"
_NAMES = [f.name for f in fields(Row)]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def to_csv(rows: Iterable[Row]) -> list[list[str]]:
    """Render rows as strings."""
    return [[str(int(v)) if isinstance(v, bool) else str(v) for v in astuple(row)] for row in rows]


def from_csv(cells: Sequence[str]) -> Row:
    """Read a row back."""
    i, label, clean, phase, norm, eps, attack, status, size, queries, iterations, gradients, zero, suite, data = cells
    return Row(
        int(i), int(label), clean == "1", phase, norm, eps, attack, status,  # type: ignore[arg-type]
        float(size), int(queries), int(iterations), int(gradients), int(zero), suite, data,
    )  # fmt: skip


class RowStore:
    """Rows and manifest in a folder; a run that was killed goes on where it stopped.

    Args:
        folder: Where ``rows.csv`` and ``manifest.json`` live; made if it does not exist.
        fingerprint: What must be equal for a resume: weights, data, suite, seed, settings.

    Raises:
        ValueError: if the folder holds rows of another run, naming what differs.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "rows.csv"
        self._examples = 0
        manifest = self.folder / "manifest.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and manifest.exists():
                _refuse_other_run(json.loads(manifest.read_text(encoding="utf-8")), fingerprint, self.folder)
                self._repair()
            else:
                write_atomically(manifest, json.dumps(fingerprint, indent=1, sort_keys=True))
                write_atomically(self.path, ",".join(_NAMES) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"cannot write rows to {self.folder}: {reason}; choose another out=") from error

    def _repair(self) -> None:
        """Drop a line that a killed run left half written."""
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            write_atomically(self.path, text[: text.rfind("\n") + 1])

    def read(self) -> list[Row]:
        """Read every row."""
        return read_rows(self.path)

    def examples(self) -> list[dict[str, Any]]:
        """Read the adversarial examples kept so far."""
        path = self.folder / EXAMPLES
        return torch.load(path, weights_only=True) if path.exists() else []

    def append(self, rows: Sequence[Row], examples: Sequence[dict[str, Any]] = ()) -> None:
        """Add the rows of a batch, and all examples kept so far, and make sure they are on disk."""
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(to_csv(rows))
            file.flush()
            os.fsync(file.fileno())
        if len(examples) > self._examples:
            write_examples(self.folder / EXAMPLES, examples)
            self._examples = len(examples)


def write_examples(path: Path, examples: Sequence[dict[str, Any]]) -> None:
    """Write adversarial examples, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(list(examples), temporary)
    temporary.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Read ``rows.csv``.

    Raises:
        ValueError: naming file and line, if a line is not a row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != _NAMES:
        raise ValueError(f"{path} is not a file of rows: its first line should be {','.join(_NAMES)}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        try:
            rows.append(from_csv(cells))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a row of an evaluation: {','.join(cells)[:80]!r}") from error
    return rows


def _refuse_other_run(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        details = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(f"{folder} holds the rows of another evaluation ({details}); choose another out= or delete it")
