"""N-MNIST, DVS Gesture, CIFAR10-DVS and N-Caltech101, from their original files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from sg_lightning._optional import require
from sg_lightning.datamodules.event_files import read_aedat2, read_aedat4, read_bin, read_npy
from sg_lightning.datamodules.neuromorphic import NDA
from sg_lightning.datamodules.recordings import RecordedEvents, Recording, by_class, split_by_class
from sg_lightning.datamodules.slicing import Events

_CALTECH = """
BACKGROUND_Google Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular
bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier
cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly
electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano
hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster
lotus mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid
revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish
stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat
windsor_chair wrench yin_yang
"""


class NMNIST(RecordedEvents):
    """Load N-MNIST: 60,000 + 10,000 digits of MNIST before an event camera that moves in three saccades.

    34 x 34 pixels, some 300 ms and 4,000 events each. Files ``Train/<digit>/*.bin`` and ``Test/<digit>/*.bin``, the
    official parts; samples come in the order of their number in MNIST. The usual size is the sensor's. Augmentation does not
    mirror. See :class:`RecordedEvents`.

    Source:
        Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015.
    """

    sensor: ClassVar[tuple[int, int]] = (34, 34)
    usual_size: ClassVar[int] = 34
    tonic_name: ClassVar[str] = "NMNIST"
    nda: ClassVar[NDA] = NDA(roll=3 / 48, degrees=15.0, mirror=False)

    def complete(self, folder: Path) -> bool:
        """Ask for both parts."""
        return (folder / "Train").is_dir() and (folder / "Test").is_dir()

    def find(self, folder: Path) -> tuple[list[Recording], list[Recording]]:
        """List the official parts."""
        digits = [str(k) for k in range(10)]
        train, test = (
            # The number that names a file is that of the image in MNIST, whose classes are mixed.
            sorted(by_class(folder / part, digits, (".bin",)), key=lambda recording: recording.path.name)
            for part in ("Train", "Test")
        )
        return train, test

    def events(self, path: Path) -> Events:
        """Read a ``.bin`` file."""
        return read_bin(path, *self.sensor)

    def fetch(self) -> None:
        """Have tonic download and unpack both parts."""
        for train in (True, False):
            self._tonic().NMNIST(save_to=str(self.data_dir), train=train)  # type: ignore[attr-defined]


class DVSGesture(RecordedEvents):
    """Load DVS Gesture: 11 gestures of 29 people before a DVS128 camera, 1,077 + 264 samples.

    128 x 128 pixels. One sample per labelled interval, as tonic packs them: ``ibmGestureTrain/<user>_<light>/<k>.npy``
    with class k from 0 to 10, times in whole milliseconds. The official parts, which share no person. The usual size is
    the sensor's. Augmentation does not mirror, which would exchange left and right hand. See :class:`RecordedEvents`.

    Source:
        Amir et al., "A low power, fully event-based gesture recognition system", CVPR 2017.
    """

    num_classes: ClassVar[int] = 11
    sensor: ClassVar[tuple[int, int]] = (128, 128)
    usual_size: ClassVar[int] = 128
    tonic_name: ClassVar[str] = "DVSGesture"
    nda: ClassVar[NDA] = NDA(roll=3 / 48, degrees=15.0, mirror=False)
    parts: ClassVar[tuple[str, str]] = ("ibmGestureTrain", "ibmGestureTest")

    def complete(self, folder: Path) -> bool:
        """Ask for both parts."""
        return all((folder / part).is_dir() for part in self.parts)

    def find(self, folder: Path) -> tuple[list[Recording], list[Recording]]:
        """List the official parts."""
        train, test = (
            [Recording(path, self._label(path)) for path in sorted((folder / part).glob("*/*.npy"))]
            for part in self.parts
        )
        return train, test

    def _label(self, path: Path) -> int:
        if path.stem not in {str(k) for k in range(self.num_classes)}:
            raise ValueError(
                f"{path} is named after no class: the name of a sample is its class, 0.npy to 10.npy; remove it or rename it"
            )
        return int(path.stem)

    def events(self, path: Path) -> Events:
        """Read a ``.npy`` file."""
        return read_npy(path, *self.sensor)

    def fetch(self) -> None:
        """Have tonic download and unpack both parts."""
        for train in (True, False):
            self._tonic().DVSGesture(save_to=str(self.data_dir), train=train)  # type: ignore[attr-defined]


class CIFAR10DVS(RecordedEvents):
    """Load CIFAR10-DVS: 10,000 photographs of CIFAR-10 that move before a DVS128 camera.

    128 x 128 pixels, a class per folder (``airplane/``, ...), in the original ``.aedat`` files or in the ``.aedat4`` files
    that tonic downloads. There is no official test part: 1,000 recordings, 100 of each class, drawn once. The usual size
    is 48. Augmentation mirrors. See :class:`RecordedEvents`.

    Source:
        Li et al., "CIFAR10-DVS: an event-stream dataset for object classification", 2017. Size, frames and augmentation:
        the sparse-gradient paper's code (arXiv 2405.20355).
    """

    sensor: ClassVar[tuple[int, int]] = (128, 128)
    usual_size: ClassVar[int] = 48
    tonic_name: ClassVar[str] = "CIFAR10DVS"
    nda: ClassVar[NDA] = NDA(roll=5 / 48, degrees=30.0, cut=16 / 48)
    classes: ClassVar[tuple[str, ...]] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip

    def complete(self, folder: Path) -> bool:
        """Ask for a folder of each class."""
        return all((folder / name).is_dir() for name in self.classes)

    def find(self, folder: Path) -> tuple[list[Recording], list[Recording]]:
        """Hold out a tenth of each class."""
        return split_by_class(by_class(folder, self.classes, (".aedat", ".aedat4")), 0.1)

    def events(self, path: Path) -> Events:
        """Read an ``.aedat`` or ``.aedat4`` file."""
        return (read_aedat4 if path.suffix == ".aedat4" else read_aedat2)(path, *self.sensor)


class NCaltech101(RecordedEvents):
    """Load N-Caltech101: 8,709 photographs before an event camera that moves in three saccades, 101 classes.

    Recordings of different size, up to 180 x 240 pixels, a class per folder of ``Caltech101``, in ``.bin`` files; frames
    are squeezed to a square. There is no official test part: a tenth of each class, drawn once. The usual size is 48.
    Augmentation mirrors. See :class:`RecordedEvents`.

    Source:
        Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015.
    """

    num_classes: ClassVar[int] = 101
    sensor: ClassVar[tuple[int, int]] = (180, 240)
    usual_size: ClassVar[int] = 48
    tonic_name: ClassVar[str] = "NCALTECH101"
    nda: ClassVar[NDA] = NDA(roll=3 / 48, degrees=15.0)
    classes: ClassVar[tuple[str, ...]] = tuple(_CALTECH.split())

    def complete(self, folder: Path) -> bool:
        """Ask for the folder of classes."""
        return (folder / "Caltech101").is_dir()

    def find(self, folder: Path) -> tuple[list[Recording], list[Recording]]:
        """Hold out a tenth of each class."""
        return split_by_class(by_class(folder / "Caltech101", self.classes, (".bin",)), 0.1)

    def events(self, path: Path) -> Events:
        """Read a ``.bin`` file."""
        return read_bin(path, *self.sensor)

    def fetch(self) -> None:
        """Have tonic download the archive, and unpack the archive of recordings that it holds."""
        super().fetch()
        folder = self.data_dir / self.tonic_name
        if not self.complete(folder):
            inner = next(folder.rglob("Caltech101.zip"), None)
            if inner is not None:
                require("tonic.download_utils", "events", "unpacking").extract_archive(str(inner), str(folder))
