"""Data sets with their splits, input domain and attack budgets."""

from sg_lightning.datamodules.digits import Digits
from sg_lightning.datamodules.heidelberg import SHD, SSC
from sg_lightning.datamodules.images import CIFAR10, CIFAR100, MNIST, FashionMNIST
from sg_lightning.datamodules.pixels import ImageData
from sg_lightning.datamodules.rasters import RasterData
from sg_lightning.datamodules.spoken_digits import SpokenDigits

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SHD",
    "SSC",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "RasterData",
    "SpokenDigits",
]
