"""Square Attack: random search with square windows."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sg_lightning.attacks.random_search import SCHEDULE, RandomSearch, draw, signs, whole
from sg_lightning.attacks.search import Samples
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L1, L2, Linf

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
_TINY = 1e-300


@dataclass(frozen=True)
class Square(RandomSearch):
    """Change square windows of the best point so far, under L-infinity, L2 or L1; windows shrink as queries pass.

    L-infinity: a window takes ``x + eps`` or ``x - eps`` per channel; the start is vertical stripes. L2 and L1: a bump
    of two halves with opposite signs is added to one window, paid for by another one, whose perturbation is removed; the
    start is a grid of bumps. Images are (B, C, H, W). In frames (B, T, C, H, W) a window is a square in space held over
    a random interval of steps. (B, H, W) and (B, N) are images of one channel, (B, N) of one row; where a square does
    not fit, a rectangle of its area takes its place.

    Differs from the official code in that every sample draws its own windows, the last row and column can be reached
    (as in the paper), and an L-infinity window that would change nothing takes the opposite signs.

    Args:
        threat: An ``Linf``, ``L2`` or ``L1`` threat.
        queries: Perturbed points tried per sample, >= 1.
        loss: ``"margin"``, or ``"ce"``.
        p: Share of the pixels in the first window, 0 < p <= 1.
        rescale: Stretch the schedule, made for 10,000 queries, to the number of queries (the paper). ``False``: use
            its beginning, as the standard version of AutoAttack does with 5,000.

    Raises:
        TypeError: under other threats.
        ValueError: on settings out of range, or inputs of more than five axes.

    Source:
        Andriushchenko et al., arXiv 1912.00049; L1: Croce and Hein, arXiv 2103.01208.
    """

    threat: Linf | L2 | L1
    p: float = 0.8
    rescale: bool = True
    kind: ClassVar[str] = "square"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Linf | L2 | L1):
            raise TypeError(
                f"Square is defined for Linf, L2 and L1, got {self.threat!r}; use SparseRS under L0 and FlipSearch for events"
            )
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1], got {self.p!r}")

    def _share(self, query: int) -> float:
        """Return the share of the pixels in the window of this query (the start is query 0)."""
        done = query - 1
        time = int(done / self.queries * SCHEDULE) if self.rescale else done
        return self.p / 2 ** bisect_left(_HALVED_AFTER, time)

    def _start(self, at: Samples, noise: SampleGenerator) -> dict[str, Tensor]:
        x = _volume(at.x)
        batch, channels, _, height, width = x.shape
        if isinstance(self.threat, Linf):
            at.high = self.threat.project(at.x + 2 * self.threat.budget, at.x)
            at.low = self.threat.project(at.x - 2 * self.threat.budget, at.x)
            up = signs(draw(noise, x, channels, 1, 1, width)).expand_as(x) > 0
            return {"point": torch.where(_restored(up, at.x), at.high, at.low)}
        side = max(min(height, width) // 5, 1)
        rows, columns = height // side, width // side
        sign = signs(draw(noise.fork("sign"), x, channels, rows, columns))
        turned = whole(draw(noise.fork("turn"), x, 1, rows, columns), 2)
        tiles = self._bump(side, side).to(x.device)[turned] * sign[..., None, None]  # (B, C, rows, columns, side, side)
        grid = tiles.transpose(3, 4).reshape(batch, channels, 1, rows * side, columns * side)
        change = torch.zeros_like(x, dtype=torch.float64)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        change[..., top : top + rows * side, left : left + columns * side] = grid
        return {"point": self._moved(at.x, change)}

    def _propose(self, at: Samples, query: int, noise: SampleGenerator) -> dict[str, Tensor]:
        x = _volume(at.x)
        area = self._share(query) * x.shape[3] * x.shape[4]
        luck = draw(noise, x, x.shape[1] + 8)
        sign = signs(luck[:, 8:, None, None, None])
        if isinstance(self.threat, Linf):
            size = _size(max(round(math.sqrt(area)), 1), area, *x.shape[3:])
            inside = _restored(_Window(x, size, luck[:, :4]).inside.expand_as(x), at.x)
            up = _restored((sign > 0).expand_as(x), at.x)
            point = torch.where(inside, torch.where(up, at.high, at.low), at.point)
            same = (point == at.point).flatten(1).all(1).view(-1, *[1] * (point.dim() - 1))
            return {"point": torch.where(inside & same, torch.where(up, at.low, at.high), point)}
        side = max(round(math.sqrt(area)), 3)
        size = _size(side + (side + 1) % 2, area, *x.shape[3:])
        # One window receives the budget of both and a bump; the other loses its perturbation.
        to, source = _Window(x, size, luck[:, :4]), _Window(x, size, luck[:, [0, 4, 5, 6]])
        eps, channels = self.threat.budget, x.shape[1]
        change = _volume(at.point).double() - x.double()
        bump = sign * to.placed(self._bump(*size), whole(luck[:, 7], 2))
        here = change * to.inside
        new = bump / self._norm(bump) + here / self._norm(here)
        used, held = self._norm(change, 1), self._norm(change * (to.inside | source.inside))
        if isinstance(self.threat, L2):
            target = ((eps**2 - used**2).clamp_min(0.0) / channels + held**2).sqrt()
        else:  # the excess that the factor brings is taken back from everywhere by the projection
            target = ((eps - used).clamp_min(0.0) / channels + held) * channels
        new = new / self._norm(new) * target
        return {"point": self._moved(at.x, torch.where(to.inside, new, change.masked_fill(source.inside, 0.0)))}

    def _moved(self, x: Tensor, change: Tensor) -> Tensor:
        """Add a change (B, C, T, H, W), scaled to the budget under L2, and go back into ball and box."""
        if isinstance(self.threat, L2):
            change = change * (self.threat.budget / self._norm(change, 1))
        return self.threat.project(x.double() + _restored(change, x), x)

    def _norm(self, change: Tensor, first: int = 2) -> Tensor:
        order = 2 if isinstance(self.threat, L2) else 1
        axes = tuple(range(first, 5))
        return torch.linalg.vector_norm(change, order, dim=axes, keepdim=True).clamp_min(_TINY)

    def _bump(self, height: int, width: int) -> Tensor:
        return _bumps(height, width, 2 if isinstance(self.threat, L2) else 1)


class _Window:
    """A window of each sample at a random place.

    Args:
        x: Inputs (B, C, T, H, W).
        size: Height and width of the window; over time it lasts a random number of steps.
        luck: U[0, 1) (B, 4) for its length over time, top, left and first step.
    """

    def __init__(self, x: Tensor, size: tuple[int, int], luck: Tensor) -> None:
        steps, height, width = x.shape[2:]
        self.size = size
        length = whole(luck[:, :1], steps) + 1
        self.rows = torch.arange(height, device=x.device) - whole(luck[:, 1:2], height - size[0] + 1)
        self.columns = torch.arange(width, device=x.device) - whole(luck[:, 2:3], width - size[1] + 1)
        times = torch.arange(steps, device=x.device) - (luck[:, 3:4] * (steps - length + 1)).long()
        #: Whether a place is in the window, bool (B, 1, T, H, W).
        self.inside = (
            _between(times, length)[:, None, :, None, None]
            & _between(self.rows, size[0])[:, None, None, :, None]
            & _between(self.columns, size[1])[:, None, None, None, :]
        )

    def placed(self, planes: Tensor, choice: Tensor) -> Tensor:
        """Put one of ``planes`` (n, *size) per sample into the window, zero elsewhere: (B, 1, T, H, W)."""
        rows = self.rows.clamp(0, self.size[0] - 1)[:, :, None]
        columns = self.columns.clamp(0, self.size[1] - 1)[:, None, :]
        return planes.to(rows.device)[choice[:, None, None], rows, columns][:, None, None] * self.inside


def _between(place: Tensor, length: Tensor | int) -> Tensor:
    return (place >= 0) & (place < length)


def _size(side: int, area: float, height: int, width: int) -> tuple[int, int]:
    """Return a square, or the rectangle of its area if it does not fit."""
    short = min(height, width)
    if side <= short:
        return side, side
    long = min(max(round(area / short), short), max(height, width))
    return (short, long) if height <= width else (long, short)


@lru_cache(maxsize=256)
def _bumps(height: int, width: int, norm: int) -> Tensor:
    """Return a bump with a positive and a negative half, one above and one beside the other, (2, height, width)."""
    return torch.stack([_halves(height, width, norm), _halves(width, height, norm).T])


def _halves(height: int, width: int, norm: int) -> Tensor:
    halves = [_pyramid(height // 2, width, norm), -_pyramid(height - height // 2, width, norm)]
    both = torch.cat(halves)
    return both / torch.linalg.vector_norm(both, norm)


def _pyramid(height: int, width: int, norm: int) -> Tensor:
    """Sum rectangles around the centre, the k-th of half-width k and weight 1 / (k + 1)^2 (L1: ^4); norm 1."""
    rows = (torch.arange(height) - height // 2).abs().unsqueeze(1)
    columns = (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows, columns)
    weights = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2.0 if norm == 2 else -4.0)
    found = weights.flip(0).cumsum(0).flip(0)[ring]
    return found / torch.linalg.vector_norm(found, norm).clamp_min(_TINY)


def _volume(x: Tensor) -> Tensor:
    """View inputs as (B, C, T, H, W)."""
    if not 2 <= x.dim() <= 5:
        raise ValueError(
            "Square needs images (B, C, H, W), frames (B, T, C, H, W), planes (B, H, W) or vectors (B, N), got shape "
            f"{tuple(x.shape)}"
        )
    if x.dim() == 5:
        return x.movedim(2, 1)
    return x.unsqueeze(2) if x.dim() == 4 else x.view(len(x), 1, 1, *[1] * (3 - x.dim()), *x.shape[1:])


def _restored(volume: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_volume`."""
    return volume.movedim(1, 2) if like.dim() == 5 else volume.reshape(like.shape)
