"""Data sets with their splits, input domain and attack budgets."""

from sg_lightning.datamodules.digits import Digits
from sg_lightning.datamodules.event_cameras import CIFAR10DVS, NMNIST, DVSGesture, NCaltech101
from sg_lightning.datamodules.events import EventData
from sg_lightning.datamodules.heidelberg import SHD, SSC
from sg_lightning.datamodules.images import CIFAR10, CIFAR100, MNIST, FashionMNIST
from sg_lightning.datamodules.paired import MultimodalDigits, Paired
from sg_lightning.datamodules.pixels import ImageData
from sg_lightning.datamodules.rasters import RasterData
from sg_lightning.datamodules.saccade_digits import SaccadeDigits
from sg_lightning.datamodules.spoken_digits import SpokenDigits

__all__ = [
    "CIFAR10", "CIFAR10DVS", "CIFAR100", "MNIST", "NMNIST", "SHD", "SSC", "DVSGesture", "Digits", "EventData",
    "FashionMNIST", "ImageData", "MultimodalDigits", "NCaltech101", "Paired", "RasterData", "SaccadeDigits", "SpokenDigits",
]  # fmt: skip
