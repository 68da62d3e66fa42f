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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # processes may write the same file at once
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
        part: Number of this process among several: it writes to a file of its own, ``rows.<part>.csv``.

    Raises:
        ValueError: if the folder holds rows of another run, naming what differs.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any], part: int | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ("rows.csv" if part is None else f"rows.{part}.csv")
        self._examples = 0
        manifest = self.folder / "manifest.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                _refuse_other_run(_read_manifest(manifest), fingerprint, self.folder)
            elif (self.folder / "rows.csv").exists():
                raise ValueError(f"{self.folder} holds a saved result; choose another out= or delete it")
            else:
                write_atomically(manifest, json.dumps(fingerprint, indent=1, sort_keys=True))
            if self.path.exists():
                self._repair()
            else:
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
        """Read every row, those of other processes too."""
        return unique([row for path in sorted(self.folder.glob("rows*.csv")) for row in read_rows(path, torn=True)])

    def drop_parts(self) -> None:
        """Delete the files of single processes, once ``rows.csv`` holds everything."""
        for path in self.folder.glob("rows.*.csv"):
            path.unlink(missing_ok=True)

    def examples(self) -> list[dict[str, Any]]:
        """Read the adversarial examples kept so far."""
        path = self.folder / EXAMPLES
        return torch.load(path, weights_only=True) if path.exists() else []

    def append(self, rows: Sequence[Row], examples: Sequence[dict[str, Any]] = ()) -> None:
        """Add the rows of a batch, and all examples kept so far, and make sure they are on disk."""
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(to_csv(rows))
                file.flush()
                os.fsync(file.fileno())
            if len(examples) > self._examples:
                write_examples(self.folder / EXAMPLES, examples)
                self._examples = len(examples)
        except OSError as error:
            raise OSError(
                f"cannot write rows to {self.path}: {error.strerror or error}; mend that and run the same again: it goes "
                "on from there"
            ) from error


def write_examples(path: Path, examples: Sequence[dict[str, Any]]) -> None:
    """Write adversarial examples, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(list(examples), temporary)
    except RuntimeError as error:  # torch.save turns a full disk into one
        temporary.unlink(missing_ok=True)
        raise OSError(str(error).strip()) from error
    temporary.replace(path)


def unique(rows: Iterable[Row]) -> list[Row]:
    """Keep one row per sample, phase and attack (padding or a kill while files are merged may leave two)."""
    return list({(row.id, row.phase, row.norm, row.eps, row.attack): row for row in rows}.values())


def read_rows(path: Path, *, torn: bool = False) -> list[Row]:
    """Read ``rows.csv``; with ``torn``, a last line without its end is left out.

    Raises:
        ValueError: naming file and line, if a line is not a row, or the last one has no end.
    """
    text = path.read_text(encoding="utf-8")
    if not torn and not text.endswith("\n"):
        raise ValueError(
            f"{path} was cut off in the middle of line {text.count(chr(10)) + 1}; run the evaluation again"
        )
    lines = list(csv.reader((text[: text.rfind("\n") + 1] if torn else text).splitlines()))
    if not lines or lines[0] != _NAMES:
        raise ValueError(f"{path} is not a file of rows: its first line should be {','.join(_NAMES)}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        try:
            rows.append(from_csv(cells))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a row of an evaluation: {','.join(cells)[:80]!r}") from error
    return rows


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another out= or delete the folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged; choose another out= or delete the folder")  # noqa: TRY004
    return content


def _refuse_other_run(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        details = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(f"{folder} holds the rows of another evaluation ({details}); choose another out= or delete it")
