"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, from their original files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from sg_lightning.datamodules.files import Bytes, RemoteFile, download, read_cifar, read_idx
from sg_lightning.datamodules.pixels import ByteImages, ImageData
from sg_lightning.threats import Budget

_CIFAR_BUDGETS = {
    "linf": Budget(("2/255", "4/255", "8/255"), "8/255", "The customary budget of this data set."),
    "l2": Budget(("0.25", "0.5", "1"), "0.5", "The customary budget of this data set."),
    "l1": Budget(("6", "12", "24"), "12", "The customary budget of this data set."),
    "l0": Budget((5, 10, 20, 40), 20, "Two per cent of the 1,024 pixels, all channels of each."),
}


class DownloadedImages(ImageData):
    """Base of the data sets that are downloaded.

    Args:
        data_dir: Folder of the files; what is missing in it is downloaded.
        batch_size: Images per batch, at least 1.
        num_workers: Loader processes; the images are in memory, so 0 is usually fastest.
        val_fraction: Share of the training images that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.
        augment: Augment training images.
        download: Download what is missing; otherwise its absence is an error.

    Raises:
        FileNotFoundError: in ``setup``, if a file is missing.
        ValueError: in ``setup``, if a file is truncated or damaged.
        OSError: in ``prepare_data``, if a download fails.
    """

    remote: ClassVar[tuple[RemoteFile, ...]]

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        *,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = False,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed, augment=augment)
        self.data_dir = Path(data_dir)
        self.download = download

    @property
    def folder(self) -> Path:
        """The folder that holds the files, as torchvision lays them out."""
        return self.data_dir

    def prepare_data(self) -> None:
        """Download what is missing."""
        for file in self.remote if self.download else ():
            if self.find(file) is None:
                download(file, self.folder)

    def find(self, file: RemoteFile) -> Path | None:
        """Return where a file is, packed or unpacked; ``None`` if it is missing."""
        for name in (file.name, self.unpacked(file.name)):
            if (self.folder / name).exists():
                return self.folder / name
        return None

    @staticmethod
    def unpacked(name: str) -> str:
        """Return the name of an unpacked file."""
        return name.removesuffix(".gz")

    def paths(self) -> list[Path]:
        """Return the files, in the order of ``remote``."""
        found = {file.name: self.find(file) for file in self.remote}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(
                f"{self.folder.absolute()} lacks {', '.join(missing)}: pass data_dir= of the folder that has them, or "
                "download=True and call prepare_data() (a Trainer does)"
            )
        return [path for path in found.values() if path is not None]


def _byte_images(images: Bytes, labels: Bytes, where: Path, classes: int) -> ByteImages:
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{where} holds {len(images)} images but its labels number {len(labels)}; delete both files")
    if int(labels.max()) >= classes:
        raise ValueError(f"the labels of {where} go up to {int(labels.max())}, expected 0 to {classes - 1}")
    x = torch.from_numpy(images.copy())
    return ByteImages(x if x.dim() == 4 else x.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


class CIFAR10(DownloadedImages):
    """Load CIFAR-10: 50,000 + 10,000 colour photographs of 32 x 32 pixels, ten classes.

    Augmentation shifts by up to 4 pixels and mirrors; it is on by default. See :class:`DownloadedImages`.

    Source:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    input_shape: ClassVar[tuple[int, ...]] = (3, 32, 32)
    budgets: ClassVar[dict[str, Budget]] = _CIFAR_BUDGETS
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)
    shift: ClassVar[int] = 4
    mirror: ClassVar[bool] = True
    remote: ClassVar[tuple[RemoteFile, ...]] = (
        RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    )
    plain_folder: ClassVar[str] = "cifar-10-batches-py"
    batches: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        ("test_batch",),
    )
    label: ClassVar[str] = "labels"

    def __init__(
        self,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        *,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = True,
        download: bool = True,
    ) -> None:
        super().__init__(
            data_dir, batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed, augment=augment,
            download=download,
        )  # fmt: skip

    def find(self, file: RemoteFile) -> Path | None:
        """Return the folder of batches, else the archive; ``None`` if both are missing."""
        folder = self.folder / self.plain_folder
        complete = all((folder / name).is_file() for part in self.batches for name in part)
        return folder if complete else super().find(file)

    def read(self) -> tuple[ByteImages, ByteImages]:
        """Read both parts."""
        (source,) = self.paths()
        train, test = (
            _byte_images(*read_cifar(source, names, self.label), source, self.num_classes) for names in self.batches
        )
        return train, test


class CIFAR100(CIFAR10):
    """Load CIFAR-100: 50,000 + 10,000 colour photographs of 32 x 32 pixels, one hundred classes.

    Augmentation shifts by up to 4 pixels and mirrors; it is on by default. See :class:`DownloadedImages`.

    Source:
        Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    num_classes: ClassVar[int] = 100
    mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4865, 0.4409)
    std: ClassVar[tuple[float, ...]] = (0.2673, 0.2564, 0.2762)
    remote: ClassVar[tuple[RemoteFile, ...]] = (
        RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    )
    plain_folder: ClassVar[str] = "cifar-100-python"
    batches: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("train",), ("test",))
    label: ClassVar[str] = "fine_labels"


def _idx_files(base: str, sums: tuple[str, str, str, str]) -> tuple[RemoteFile, ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple(RemoteFile(f"{base}/{name}-ubyte.gz", md5) for name, md5 in zip(names, sums, strict=True))


class MNIST(DownloadedImages):
    """Load MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels.

    Augmentation shifts by up to 2 pixels; it is off by default. See :class:`DownloadedImages`.

    Source:
        LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    input_shape: ClassVar[tuple[int, ...]] = (1, 28, 28)
    budgets: ClassVar[dict[str, Budget]] = {
        "linf": Budget(("0.1", "0.2", "0.3"), "0.3", "The customary budget of this data set."),
        "l2": Budget(("0.5", "1", "2"), "2", "The customary budget of this data set."),
        "l1": Budget(("2.5", "5", "10"), "10", "The customary budget of this data set."),
        "l0": Budget((4, 8, 16), 16, "Two per cent of the 784 pixels."),
    }
    mean: ClassVar[tuple[float, ...]] = (0.1307,)
    std: ClassVar[tuple[float, ...]] = (0.3081,)
    shift: ClassVar[int] = 2
    remote: ClassVar[tuple[RemoteFile, ...]] = _idx_files(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    )  # fmt: skip

    @property
    def folder(self) -> Path:
        """``<data_dir>/<name of the set>/raw``, or ``data_dir`` itself if the files are there."""
        nested = self.data_dir / type(self).__name__ / "raw"
        flat = any((self.data_dir / name).exists() for f in self.remote for name in (f.name, self.unpacked(f.name)))
        return self.data_dir if flat else nested

    def read(self) -> tuple[ByteImages, ByteImages]:
        """Read both parts."""
        paths = self.paths()
        train, test = (
            _byte_images(read_idx(images, 3), read_idx(labels, 1), images, self.num_classes)
            for images, labels in (paths[:2], paths[2:])
        )
        return train, test


class FashionMNIST(MNIST):
    """Load Fashion-MNIST: 60,000 + 10,000 photographs of clothes, 28 x 28 pixels, ten classes.

    Augmentation shifts by up to 2 pixels and mirrors; it is off by default. See :class:`DownloadedImages`.

    Source:
        Xiao et al., arXiv 1708.07747.
    """

    budgets: ClassVar[dict[str, Budget]] = {
        **MNIST.budgets,
        "linf": Budget(("4/255", "8/255", "0.1"), "8/255", "As for photographs; 0.3 would hide the clothes."),
    }
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    mirror: ClassVar[bool] = True
    remote: ClassVar[tuple[RemoteFile, ...]] = _idx_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    )  # fmt: skip
