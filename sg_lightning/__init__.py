"""Train adversarially robust spiking neural networks and measure their robustness honestly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sg_lightning._version import __version__

if TYPE_CHECKING:
    from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
    from sg_lightning.evaluation import evaluate
    from sg_lightning.modules import SpikingClassifier

__all__ = ["RobustnessEvaluation", "SparseGradient", "SpikingClassifier", "__version__", "evaluate"]

# Resolved at first use, so that `import sg_lightning` costs nothing and the plain-PyTorch rooms never load Lightning.
_HOMES = {
    "RobustnessEvaluation": "sg_lightning.callbacks",
    "SparseGradient": "sg_lightning.callbacks",
    "SpikingClassifier": "sg_lightning.modules",
    "evaluate": "sg_lightning.evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sg_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
