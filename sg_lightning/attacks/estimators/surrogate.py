"""Back-propagation through time with any surrogate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sg_lightning.attacks.estimators.base import Memory, SingleEstimator
from sg_lightning.neurons import Surrogate


@dataclass(frozen=True)
class BPTT(SingleEstimator):
    """Back-propagate through time with another surrogate.

    Args:
        surrogate: The rule to use in every spiking neuron, e.g. ``Atan(2.0)``. ``None`` keeps the training surrogate.
    """

    surrogate: Surrogate | None = None
    name: ClassVar[str] = "bptt"

    def rule(self, memory: Memory) -> Surrogate | None:
        """Return the surrogate."""
        return self.surrogate

    @property
    def label(self) -> str:
        """The surrogate's name and width."""
        if self.surrogate is None:
            return self.name
        width = "-".join(f"{value:g}" for value in asdict(self.surrogate).values())  # type: ignore[call-overload]
        return f"{self.surrogate.name}{width}"

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the estimator."""
        if self.surrogate is None:
            return {"name": self.name}
        return {"name": self.name, "surrogate": self.surrogate.name, **asdict(self.surrogate)}  # type: ignore[call-overload]
