"""Data sets with their splits, input domain and attack budgets."""

from sg_lightning.datamodules.digits import Digits

__all__ = ["Digits"]
