"""Measures of robustness and of input gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sg_lightning.metrics.sparsity import gradient_sparsity
from sg_lightning.metrics.transfer import transfer_ratio

if TYPE_CHECKING:
    from sg_lightning.metrics.robustness import RobustAccuracy, UnionAccuracy

__all__ = ["RobustAccuracy", "UnionAccuracy", "gradient_sparsity", "transfer_ratio"]


# torchmetrics takes a second to import; the plain-PyTorch rooms that only need functions shall not wait for it.
def __getattr__(name: str) -> Any:
    if name in ("RobustAccuracy", "UnionAccuracy"):
        from sg_lightning.metrics import robustness

        return getattr(robustness, name)
    raise AttributeError(f"module 'sg_lightning.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
