"""The Heidelberg spiking data sets, SHD and SSC, from their original HDF5 files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sg_lightning._optional import require
from sg_lightning.datamodules.base import Samples
from sg_lightning.datamodules.cache import cached
from sg_lightning.datamodules.files import RemoteFile, download, unpack
from sg_lightning.datamodules.rasters import RasterData, Train, Values
from sg_lightning.datamodules.sparse import SparseSamples

_SLAB = 256  # samples that are read at once


class SpikeFile:
    """A file of spike trains in the layout of the Heidelberg data sets, checked while it is read.

    Args:
        path: File with ``spikes/times`` (seconds), ``spikes/units``, ``labels``, and maybe ``extra/speaker`` and
            ``extra/keys``.
        channels: Units are 0 to ``channels`` - 1.
        classes: Labels are 0 to ``classes`` - 1.

    Raises:
        ValueError: naming the file, and the sample where there is one, if it is truncated, damaged, empty or something
            else, lengths disagree, or a value is out of its range.
        ImportError: without h5py.
    """

    def __init__(self, path: Path, channels: int, classes: int) -> None:
        self.path, self.channels = path, channels
        h5py = require("h5py", "audio", "reading the Heidelberg data sets")
        try:
            self.file = h5py.File(path, "r")
            missing = [key for key in ("spikes/times", "spikes/units", "labels") if key not in self.file]
            if missing:
                raise KeyError(f"it lacks {', '.join(missing)}")
            self._times, self._units = self.file["spikes/times"], self.file["spikes/units"]
            self.labels: NDArray[Any] = self.file["labels"][()]
            self.speaker: NDArray[Any] | None = self.file["extra/speaker"][()] if "extra/speaker" in self.file else None
            names = len(self.file["extra/keys"]) if "extra/keys" in self.file else classes
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"it is no whole file of spikes: {error}") from error
        sizes = {"spikes/times": len(self._times), "spikes/units": len(self._units), "labels": len(self.labels)}
        sizes |= {} if self.speaker is None else {"extra/speaker": len(self.speaker)}
        if len(set(sizes.values())) > 1 or not len(self.labels):
            raise self._damaged(f"it must have as many samples in all parts, at least one, got {sizes}")
        if names != classes:
            raise self._damaged(f"extra/keys names {names} classes, expected {classes}: is it another data set?")
        wrong = np.flatnonzero((self.labels.astype(np.int64) < 0) | (self.labels >= classes))
        if len(wrong):
            raise self._damaged(
                f"sample {wrong[0]} has label {self.labels[wrong[0]]}, expected 0 to {classes - 1}; {len(wrong)} such labels"
            )

    def __iter__(self) -> Iterator[Train]:
        """Yield times in seconds and channels of one sample after the other."""
        for start in range(0, len(self.labels), _SLAB):
            try:
                times, units = self._times[start : start + _SLAB], self._units[start : start + _SLAB]
            except OSError as error:
                last = min(start + _SLAB, len(self.labels)) - 1
                raise self._damaged(f"samples {start} to {last} cannot be read: {error}") from error
            for offset, pair in enumerate(zip(times, units, strict=True)):
                self._check(start + offset, *pair)
                yield pair

    def _check(self, sample: int, times: NDArray[Any], units: NDArray[Any]) -> None:
        if len(times) != len(units):
            raise self._damaged(f"sample {sample} has {len(times)} times but {len(units)} units")
        late = np.diff(times, prepend=times[:1])
        for bad, what, values in (
            (~np.isfinite(times), "a time that is not finite", times),
            (times < 0, "a time below 0", times),
            (late < 0, "a time before that of the spike before it", times),
            (units.astype(np.int64) >= self.channels, f"a unit that is not one of 0 to {self.channels - 1}", units),
            (units.astype(np.int64) < 0, f"a unit that is not one of 0 to {self.channels - 1}", units),
        ):
            if bad.any():
                spike = int(bad.argmax())
                raise self._damaged(f"spike {spike} of sample {sample} has {what}: {values[spike]}")

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} cannot be read: {why}; delete it (and its cache) to download it again")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class _Heidelberg(RasterData):
    """Files of the Heidelberg data sets: download, unpack, cache."""

    remote: ClassVar[dict[str, RemoteFile]]

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int,
        *,
        download: bool,
        cache: bool,
        time_steps: int,
        duration: float,
        group: int,
        values: Values,
        num_workers: int,
        val_fraction: float,
        seed: int,
        augment: bool,
    ) -> None:
        super().__init__(
            batch_size, time_steps=time_steps, duration=duration, group=group, values=values, num_workers=num_workers,
            val_fraction=val_fraction, seed=seed, augment=augment,
        )  # fmt: skip
        self.data_dir = Path(data_dir)
        self.download = download
        self.cache = cache

    @property
    def folder(self) -> Path:
        """``<data_dir>/<name of the set>``, or ``data_dir`` itself if the files are there."""
        flat = any(self._forms(self.data_dir, part) for part in self.remote)
        return self.data_dir if flat else self.data_dir / type(self).__name__

    def _forms(self, folder: Path, part: str) -> list[Path]:
        """List where a file is: as it is, zipped or gzipped."""
        name = self.remote[part].name.removesuffix(".zip")
        return [path for path in (folder / name, folder / f"{name}.zip", folder / f"{name}.gz") if path.exists()]

    def prepare_data(self) -> None:
        """Download what is missing, unpack it, and bin it into the cache."""
        for part, file in self.remote.items():
            if self.download and not self._forms(self.folder, part):
                download(file, self.folder)
        for part in self.remote if self.cache else ():
            self.samples(part)

    def samples(self, part: str) -> SparseSamples:
        """Return the samples of one file, from the cache if they are there.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if it is damaged.
        """
        found = self._forms(self.folder, part)
        if not found:
            raise FileNotFoundError(
                f"{self.folder.absolute()} lacks {self.remote[part].name.removesuffix('.zip')}: pass data_dir= of the "
                "folder that has it (zipped or not), or download=True and call prepare_data() (a Trainer does)"
            )
        path = found[0] if found[0].suffix == ".h5" else unpack(found[0])

        def build() -> SparseSamples:
            file = SpikeFile(path, self.channels, self.num_classes)
            try:
                extra = {} if file.speaker is None else {"speaker": torch.from_numpy(file.speaker.astype(np.int16))}
                shown = tqdm(
                    file, desc=f"{type(self).__name__} {part}", total=len(file.labels), leave=False, disable=None
                )
                return self.rasters(shown, file.labels, extra)
            finally:
                file.close()

        settings = {key: getattr(self, key) for key in ("time_steps", "duration", "group", "values")}
        return cached(self.folder / "cache", path.stem, settings, [path], build) if self.cache else build()


def _remote(**sums: str) -> dict[str, RemoteFile]:
    base = "https://zenkelab.org/datasets"
    return {name.split("_")[1]: RemoteFile(f"{base}/{name}.h5.zip", md5) for name, md5 in sums.items()}


class SHD(_Heidelberg):
    """Load the Spiking Heidelberg Digits: spoken digits in English and German as spikes of 700 channels, 20 classes.

    8,156 training and 2,264 test utterances of 12 speakers, two of whom (4 and 5) are heard in the test set only. There is
    no validation file: a share of the training samples drawn with ``seed`` validates, or all samples of some speakers,
    which measures what new speakers cost. Needs the extra ``audio``.

    Args:
        data_dir: Folder of ``shd_train.h5`` and ``shd_test.h5`` or of ``SHD/`` with them; what is missing is downloaded.
        batch_size: Samples per batch, at least 1.
        time_steps: Number of time bins T.
        duration: Seconds that the bins share. Later spikes are left out; no utterance is longer than 1.4 s.
        group: Neighbouring channels that become one; it must divide 700.
        values: Whether a cell says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        val_fraction: Share of the training samples that validates, above 0 and below 1.
        val_speakers: Speakers who validate instead, e.g. ``(0, 1)``.
        num_workers: Loader processes; 0 is usually fastest.
        seed: Seed of the validation split and of the training order.
        augment: Shift training rasters at random by up to 8 % of their bins and 3 % of their channels.
        download: Download what is missing; otherwise its absence is an error.
        cache: Keep the binned samples beside the files, under their settings.

    Shape:
        Batches of rasters (B, T, 700 / group), float32 whole numbers, and labels (B,), int64: 0 to 9 English zero to
        nine, 10 to 19 German null to neun.

    Raises:
        FileNotFoundError: in ``setup``, if a file is missing.
        ValueError: on an argument out of its range; in ``setup``, if a file is truncated or damaged.
        OSError: in ``prepare_data``, if a download or the cache fails.
        ImportError: in ``setup``, without h5py.

    Source:
        Cramer et al., arXiv 1910.07407 (data: CC BY 4.0). 1.4 s in 100 bins are the authors' choice in their tutorials.
    """

    num_classes: ClassVar[int] = 20
    remote: ClassVar[dict[str, RemoteFile]] = _remote(
        shd_train="f3252aeb598ac776c1b526422d90eecb", shd_test="1503a5064faa34311c398fb0a1ed0a6f"
    )

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        *,
        time_steps: int = 100,
        duration: float = 1.4,
        group: int = 1,
        values: Values = "binary",
        val_fraction: float = 0.1,
        val_speakers: Sequence[int] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = False,
        download: bool = True,
        cache: bool = True,
    ) -> None:
        super().__init__(
            data_dir, batch_size, download=download, cache=cache, time_steps=time_steps, duration=duration, group=group,
            values=values, num_workers=num_workers, val_fraction=val_fraction, seed=seed, augment=augment,
        )  # fmt: skip
        self.val_speakers = val_speakers

    def read(self) -> tuple[Samples, Samples]:
        """Read both files."""
        return self.samples("train"), self.samples("test")

    def split(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the indices that train and that validate: drawn with ``seed``, or by speaker."""
        if self.val_speakers is None:
            return super().split(samples)
        assert isinstance(samples, SparseSamples)
        return self.whole_speakers(samples, self.val_speakers)


class SSC(_Heidelberg):
    """Load the Spiking Speech Commands: 35 words as spikes of 700 channels.

    75,466 training, 9,981 validation and 20,382 test utterances of one second; the files say which validates. Needs the
    extra ``audio``, and about 2 GB of disk for the cache of 100 bins and 700 channels.

    Args:
        data_dir: Folder of ``ssc_train.h5``, ``ssc_valid.h5`` and ``ssc_test.h5`` or of ``SSC/`` with them; what is missing
            is downloaded.
        batch_size: Samples per batch, at least 1.
        time_steps: Number of time bins T.
        duration: Seconds that the bins share. Later spikes are left out.
        group: Neighbouring channels that become one; it must divide 700.
        values: Whether a cell says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        num_workers: Loader processes; 0 is usually fastest.
        seed: Seed of the training order.
        augment: Shift training rasters at random by up to 8 % of their bins and 3 % of their channels.
        download: Download what is missing; otherwise its absence is an error.
        cache: Keep the binned samples beside the files, under their settings.

    Shape:
        Batches of rasters (B, T, 700 / group), float32 whole numbers, and labels (B,), int64 in 0 to 34.

    Raises:
        FileNotFoundError: in ``setup``, if a file is missing.
        ValueError: on an argument out of its range; in ``setup``, if a file is truncated or damaged.
        OSError: in ``prepare_data``, if a download or the cache fails.
        ImportError: in ``setup``, without h5py.

    Source:
        Cramer et al., arXiv 1910.07407 (data: CC BY 4.0); the speech is that of Warden, arXiv 1804.03209.
    """

    num_classes: ClassVar[int] = 35
    remote: ClassVar[dict[str, RemoteFile]] = _remote(
        ssc_train="d102be95e7144fcc0553d1f45ba94170",
        ssc_valid="b4eee3516a4a90dd0c71a6ac23a8ae43",
        ssc_test="a35ff1e9cffdd02a20eb850c17c37748",
    )

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        *,
        time_steps: int = 100,
        duration: float = 1.0,
        group: int = 1,
        values: Values = "binary",
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = False,
        download: bool = True,
        cache: bool = True,
    ) -> None:
        super().__init__(
            data_dir, batch_size, download=download, cache=cache, time_steps=time_steps, duration=duration, group=group,
            values=values, num_workers=num_workers, val_fraction=0.1, seed=seed, augment=augment,
        )  # fmt: skip

    def sets(self) -> tuple[Samples, Samples, Samples]:
        """Read the three files."""
        return self.samples("train"), self.samples("valid"), self.samples("test")
