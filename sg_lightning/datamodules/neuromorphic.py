"""Augmentation of event frames, a batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sg_lightning.sampling import SampleGenerator


@dataclass(frozen=True)
class NDA:
    """Neuromorphic data augmentation: one of roll, rotation, shear and cutout, the same in all frames of a sample.

    Each sample gets one of the four at random, and a mirror image in half of the cases if ``mirror``. Cells are taken
    from the nearest cell, so counts stay counts and binary frames binary; what comes from outside is empty. Of the
    authors' code are the choice of one among roll, rotation and shear with their strengths and the rolling around the
    edge; mirror and cutout are in their paper and in the code of the sparse-gradient paper, with these sizes.
    CutMix, which changes labels, is left out.

    Args:
        roll: Largest shift in either direction, as a share of the frame's side.
        degrees: Largest angle of a rotation, and of a shear along the rows.
        cut: Side of the square that cutout empties, as a share of the frame's side; its centre is any cell.
        mirror: Whether left and right may be exchanged.

    Source:
        Li et al., "Neuromorphic data augmentation for training spiking neural networks", arXiv 2203.06145.
    """

    roll: float = 5 / 48
    degrees: float = 30.0
    cut: float = 16 / 48
    mirror: bool = True

    def __call__(self, x: Tensor, noise: SampleGenerator) -> Tensor:
        """Augment frames (B, T, C, H, W)."""
        size, height, width = len(x), x.shape[-2], x.shape[-1]

        def draw(name: str, low: float, high: float, columns: int = 1) -> list[Tensor]:
            like = torch.empty(size, columns, device=x.device)
            return list(noise.fork(name).uniform(like, low, high).unsqueeze(2).unbind(1))

        row, column = torch.meshgrid(
            torch.arange(height, device=x.device), torch.arange(width, device=x.device), indexing="ij"
        )
        row, column = row.reshape(1, -1), column.reshape(1, -1)
        kind = draw("kind", 0, 4)[0].floor()
        if self.mirror:
            column = torch.where(draw("mirror", 0, 1)[0] < 0.5, width - 1 - column, column)

        limits = [round(self.roll * side) for side in (height, width)]
        shift = [
            (u * (2 * limit + 1)).floor().long() - limit for u, limit in zip(draw("roll", 0, 1, 2), limits, strict=True)
        ]
        rolled = (row - shift[0]) % height, (column - shift[1]) % width

        angle = draw("angle", -1, 1)[0] * math.radians(self.degrees)
        above, beside = row - (height - 1) / 2, column - (width - 1) / 2
        turned = angle.cos() * above - angle.sin() * beside, angle.sin() * above + angle.cos() * beside
        sheared = above.expand_as(turned[0]), beside - angle.tan() * above
        moved = [
            torch.where(kind == 1, a, b) + (side - 1) / 2
            for a, b, side in zip(turned, sheared, (height, width), strict=True)
        ]

        source = [
            torch.where(kind == 0, a, torch.where(kind == 3, b, c.round().long()))
            for a, b, c in zip(rolled, (row, column), moved, strict=True)
        ]
        inside = (source[0] >= 0) & (source[0] < height) & (source[1] >= 0) & (source[1] < width)
        centre = [(u * side).floor() for u, side in zip(draw("cut", 0, 1, 2), (height, width), strict=True)]
        half = [round(self.cut * side) // 2 for side in (height, width)]
        hole = torch.ones_like(inside)
        for place, middle, reach in zip((row, column), centre, half, strict=True):
            hole = hole & (place >= middle - reach) & (place < middle + reach)
        inside = inside & ~((kind == 3) & hole)

        index = (source[0].clamp(0, height - 1) * width + source[1].clamp(0, width - 1)).unsqueeze(1)
        flat = x.reshape(size, -1, height * width)
        return (flat.gather(2, index.expand_as(flat)) * inside.unsqueeze(1)).view_as(x)
