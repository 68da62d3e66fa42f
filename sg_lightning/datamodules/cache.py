"""Binned samples on disk, under the settings and the files that they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sg_lightning.datamodules.sparse import SparseSamples

_FORMAT = 1  # of the folders written here; another number leaves the older ones alone


def cached(
    folder: Path, name: str, settings: Mapping[str, Any], sources: Iterable[Path], build: Callable[[], SparseSamples]
) -> SparseSamples:
    """Return samples from a cache, or build them and put them there.

    A cache entry is a folder ``<folder>/<name>-<hash>`` of plain arrays. Its hash covers the settings and the name, size
    and time of change of every source, so other settings or other files make another entry. It appears whole or not at
    all: a killed or a second process leaves nothing half. The arrays are mapped from the files, not read.

    Args:
        folder: Where entries are kept; made if it is missing.
        name: What the entry is called, e.g. ``"train"``.
        settings: All that the samples depend on beside the sources, as plain values.
        sources: The files that the samples are made of; of a folder give its files.
        build: Makes the samples.

    Raises:
        OSError: if the folder cannot be written.
        TypeError: if a setting is no plain value.
    """
    content = {
        "format": _FORMAT,
        "settings": dict(settings),
        "sources": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources],
    }
    text = json.dumps(content, sort_keys=True)
    entry = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    found = _load(entry)
    if found is not None:
        return found
    samples = build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{entry.name}.{uuid.uuid4().hex}"
        part.mkdir()  # not tempfile: its folders are for their owner only, data folders are shared
        try:
            _save(samples, part, content)
            shutil.rmtree(entry, ignore_errors=True)  # one that could not be read
            os.replace(part, entry)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if not entry.is_dir():  # else another process was faster
            raise OSError(
                f"cannot write the cache {entry} ({error}); make room or the folder writable, or pass cache=False"
            ) from error
    return _load(entry) or samples


def _save(samples: SparseSamples, folder: Path, content: Mapping[str, Any]) -> None:
    arrays = {"cells": samples.cells, "counts": samples.counts, "offsets": samples.offsets, "labels": samples.labels}
    arrays |= {f"extra-{key}": value for key, value in samples.extra.items()}
    for key, value in arrays.items():
        if value is not None:
            np.save(folder / f"{key}.npy", value.numpy())
    about = {**content, "shape": list(samples.shape), "extra": list(samples.extra)}
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _load(folder: Path) -> SparseSamples | None:
    """Map an entry; ``None`` if there is none or it is damaged."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        counts = _map(folder / "counts.npy") if (folder / "counts.npy").exists() else None
        cells, offsets, labels = (_map(folder / f"{key}.npy") for key in ("cells", "offsets", "labels"))
        extra = {key: _map(folder / f"extra-{key}.npy") for key in about["extra"]}
        return SparseSamples(cells, counts, offsets, labels, tuple(about["shape"]), extra)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _map(path: Path) -> Tensor:
    # Copy on write: torch warns of arrays that cannot be written, and nobody writes.
    array = np.load(path, mmap_mode="c")
    return torch.from_numpy(array) if array.size else torch.from_numpy(np.array(array))
