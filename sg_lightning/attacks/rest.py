"""What completes the points of an attack on one modality to inputs of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sg_lightning.inputs import batch_size


@dataclass(frozen=True)
class Rest:
    """What an attack on one modality leaves alone: the other modalities of its batch.

    Attributes:
        modality: The attacked one.
        fixed: The whole batch, by modality.
    """

    modality: str
    fixed: dict[str, Tensor]

    def check(self, x: Tensor, rows: Tensor | None) -> None:
        """Raise ``RuntimeError`` if an attack asks about some samples and does not say which."""
        if len(x) != (batch_size(self.fixed) if rows is None else len(rows)):
            raise RuntimeError(
                f"{len(x)} points of {self.modality!r} belong to a batch of {batch_size(self.fixed)} samples, but to which "
                "is not said: attacks must give rows= with each question to their oracle"
            )

    def completed(self, x: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """Return the model's input for the points ``x`` of the samples ``rows`` of the batch; ``None``: all, in order."""
        self.check(x, rows)
        others = self.fixed if rows is None else {key: part[rows] for key, part in self.fixed.items()}
        return {**others, self.modality: x}
