"""Data sets with their splits, input domain and attack budgets."""

from sg_lightning.datamodules.digits import Digits
from sg_lightning.datamodules.images import CIFAR10, CIFAR100, MNIST, FashionMNIST
from sg_lightning.datamodules.pixels import ImageData

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "FashionMNIST", "ImageData"]
