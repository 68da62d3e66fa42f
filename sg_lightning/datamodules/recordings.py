"""What every data set of event cameras shares: download, cache, denoising, augmentation, splits by class."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError

import torch
from torch import Tensor
from tqdm import tqdm

from sg_lightning._optional import require
from sg_lightning.datamodules.cache import cached
from sg_lightning.datamodules.events import EventData
from sg_lightning.datamodules.neuromorphic import NDA
from sg_lightning.datamodules.slicing import Cells, Events, Frames, Values
from sg_lightning.datamodules.sparse import SparseSamples
from sg_lightning.inputs import Input
from sg_lightning.sampling import SampleGenerator

SPLIT_SEED = 42  # of the sets without an official test part: every run has the same


@dataclass(frozen=True)
class Recording:
    """A file and its class."""

    path: Path
    label: int


class RecordedEvents(EventData):
    """Base of the data sets of event cameras.

    Args:
        data_dir: Folder of the recordings in their original files, or of tonic's folder with them; what is missing is
            downloaded there.
        batch_size: Recordings per batch, at least 1.
        time_steps: Number of frames T, at least 1.
        frames: ``"number"``: frames of equal number of events; ``"time"``: frames of equal duration.
        values: ``"counts"``: a cell counts its events, without a ceiling; ``"binary"``: it is 1 if it has any.
        merge_polarity: Count brighter and darker together (C = 1); else channel 0 is darker, 1 is brighter.
        size: Height and width of the frames; pixels are mapped to cells by whole numbers and their events added.
            ``None`` for the usual size of the set.
        denoise: Drop events without a neighbour in the pixels beside within so many microseconds (tonic's ``Denoise``;
            slow, done once if cached); ``None`` for none.
        augment: Augment training batches on the device (:class:`~sg_lightning.datamodules.neuromorphic.NDA`).
        num_workers: Loader processes; 0 is usually fastest.
        val_fraction: Share of the training recordings that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.
        download: Download what is missing, through tonic; otherwise its absence is an error.
        cache: Keep the frames in ``<data_dir>/cache``; other settings or changed files make them anew.

    Raises:
        ValueError: on an argument outside its range; in ``setup``, if a recording is damaged or its folder no class.
        FileNotFoundError: in ``setup``, if recordings are missing.
        OSError: in ``prepare_data``, if a download fails.
        ImportError: without tonic, for a download or ``denoise``.
    """

    sensor: ClassVar[tuple[int, int]]  # height, width
    usual_size: ClassVar[int]
    tonic_name: ClassVar[str]  # of the class that downloads, and of its folder
    nda: ClassVar[NDA]

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        *,
        time_steps: int = 10,
        frames: Frames = "number",
        values: Values = "counts",
        merge_polarity: bool = False,
        size: int | None = None,
        denoise: int | None = None,
        augment: bool = False,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        download: bool = True,
        cache: bool = True,
    ) -> None:
        super().__init__(
            batch_size,
            time_steps=time_steps,
            frames=frames,
            values=values,
            merge_polarity=merge_polarity,
            size=self.usual_size if size is None else size,
            num_workers=num_workers,
            val_fraction=val_fraction,
            seed=seed,
        )
        if self.input_size > min(self.sensor):
            raise ValueError(
                f"size must be at most {min(self.sensor)}, the pixels of the sensor on its shorter side, got {size}"
            )
        if denoise is not None and (isinstance(denoise, bool) or not isinstance(denoise, int) or denoise < 1):
            raise ValueError(f"denoise must be a time in whole microseconds >= 1, or None, got {denoise!r}")
        self.data_dir = Path(data_dir)
        self.denoise = denoise
        self.augment = augment
        self.download = download
        self.cache = cache

    # --- files ---

    @property
    def folder(self) -> Path | None:
        """The folder that holds the recordings: ``data_dir``, or tonic's folder in it; ``None`` if there is none."""
        for folder in (self.data_dir, self.data_dir / self.tonic_name):
            if self.complete(folder):
                return folder
        return None

    @abstractmethod
    def complete(self, folder: Path) -> bool:
        """Tell whether a folder has the parts of the set."""

    @abstractmethod
    def find(self, folder: Path) -> tuple[list[Recording], list[Recording]]:
        """Return the training and the test recordings, each in a fixed order."""

    @abstractmethod
    def events(self, path: Path) -> Events:
        """Read a recording."""

    def fetch(self) -> None:
        """Have tonic download and unpack the set into ``data_dir``."""
        getattr(self._tonic(), self.tonic_name)(save_to=str(self.data_dir))

    @staticmethod
    def _tonic() -> object:
        return require("tonic.datasets", "events", "downloading recordings of event cameras")

    def prepare_data(self) -> None:
        """Download what is missing, and fill the cache."""
        if self.folder is None and self.download:
            try:
                self.fetch()
            except (URLError, OSError, RuntimeError) as error:  # tonic's word for a wrong checksum is RuntimeError
                raise OSError(
                    f"cannot download {type(self).__name__} ({getattr(error, 'reason', error)}); check the network, or "
                    f"unpack the original files into {self.data_dir}"
                ) from error
        if self.cache:
            self.read()

    # --- frames ---

    def read(self) -> tuple[SparseSamples, SparseSamples]:
        """Read both parts, from the cache if it has them."""
        folder = self.folder
        if folder is None:
            raise FileNotFoundError(
                f"{self.data_dir.absolute()} has no recordings of {type(self).__name__}: pass data_dir= of the folder "
                "that has them, or download=True and call prepare_data() (a Trainer does)"
            )
        parts = dict(zip(("train", "test"), self.find(folder), strict=True))
        for name, recordings in parts.items():
            if not recordings:
                raise FileNotFoundError(f"{folder.absolute()} has no {name} recordings of {type(self).__name__}")
        train, test = (self._part(folder, name, recordings) for name, recordings in parts.items())
        return train, test

    def _part(self, folder: Path, name: str, recordings: Sequence[Recording]) -> SparseSamples:
        def build() -> SparseSamples:
            shown = tqdm(recordings, desc=f"{type(self).__name__} {name}", leave=False, disable=None)
            labels = torch.tensor([recording.label for recording in recordings])
            return self.slicing.samples((self._cells(recording.path) for recording in shown), labels, self.input_size)

        if not self.cache:
            return build()
        files = "\n".join(f"{recording.path.relative_to(folder)} {recording.label}" for recording in recordings)
        settings = {
            **vars(self.slicing),
            "size": self.input_size,
            "denoise": self.denoise,
            "files": hashlib.sha256(files.encode()).hexdigest(),
        }
        sources = [recording.path for recording in recordings]
        return cached(self.data_dir / "cache", f"{type(self).__name__.lower()}-{name}", settings, sources, build)

    def _cells(self, path: Path) -> Cells:
        events = self.events(path)
        if self.denoise is not None:
            events = _denoised(events, self.denoise)
        try:
            return self.slicing.cells(events, self.sensor, self.input_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def augmented(self, x: Input, noise: SampleGenerator) -> Input:
        """Augment training frames, if so wanted."""
        return self.nda(x, noise) if self.augment else x  # type: ignore[arg-type]


def _denoised(events: Events, time: int) -> Events:
    """Drop isolated events, by tonic; its memory starts at time 0."""
    tonic = require("tonic.transforms", "events", "denoise")
    io = require("tonic.io", "events", "denoise")
    start = events.t[0] if len(events) else 0
    array = io.make_structured_array(events.x, events.y, events.t - start, events.p, dtype=io.events_struct)
    kept = tonic.Denoise(filter_time=time)(array) if len(events) else array
    x, y, p, t = (kept[name].astype("int64") for name in "xypt")
    return Events(x, y, p, t + start)


def by_class(folder: Path, classes: Sequence[str], suffixes: Sequence[str]) -> list[Recording]:
    """List the recordings of a folder with one folder per class, sorted by class and name.

    Raises:
        ValueError: on a folder that is no class, if it has recordings.
    """
    found = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in place.iterdir() if path.suffix in suffixes)
        if files and place.name not in classes:
            raise ValueError(
                f"{place} has recordings, but {place.name!r} is no class of the set; its classes are "
                f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}: move or remove the folder"
            )
        found += [Recording(path, classes.index(place.name)) for path in files]
    return sorted(found, key=lambda recording: recording.label)  # stable: by name within a class


def split_by_class(recordings: Sequence[Recording], share: float) -> tuple[list[Recording], list[Recording]]:
    """Hold out a share of every class, drawn with ``SPLIT_SEED``; the held-out ones come with their classes mixed."""
    train, test = [], []
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    labels = torch.tensor([recording.label for recording in recordings])
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        held_out = torch.zeros(len(members), dtype=torch.bool)
        held_out[order[: round(share * len(members))]] = True
        train += [recordings[k] for k in _listed(members[~held_out])]
        test += [recordings[k] for k in _listed(members[held_out])]
    return train, [test[k] for k in _listed(torch.randperm(len(test), generator=generator))]


def _listed(index: Tensor) -> list[int]:
    return [int(k) for k in index]
