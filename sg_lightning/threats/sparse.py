"""Threats that count: changed pixels or cells (L0) and added or deleted events."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sg_lightning.domains import Binary, Domain
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats.base import SingleThreat, is_share
from sg_lightning.threats.geometry import add_towards_zero, fill_l1, project_l1, top_k

Mode = Literal["flip", "add", "delete"]


@dataclass(frozen=True)
class _Counting(SingleThreat):
    """A whole-number budget and steps that jump to the best vertex for the (averaged) gradient."""

    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_share(self.eps) and self.budget != round(self.budget):
            raise ValueError(f"{type(self).__name__} counts: eps must be a whole number, got {self.eps!r}")

    @property
    def count(self) -> int:
        """The budget as an int, unless it is a share: then see :meth:`limits`."""
        return round(self.budget)

    def steepest_step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:  # type: ignore[override]
        """Jump to the allowed point that is best for ``grad`` (``step_size`` has no meaning here).

        This is a conditional-gradient step; PGD feeds it a running average of gradients. It is not the PGD0 of
        Croce and Hein (arXiv 1909.05040).
        """
        return self.maximise_linear(x, grad)  # type: ignore[return-value]


@dataclass(frozen=True)
class L0(_Counting):
    """At most eps pixels (all channels of a position) or single values may change, to anything in the domain.

    Args:
        eps: How many may change, a whole number.
        domain: Legal values; both walls must be finite.
        unit: ``"pixels"``: a position of (B, ..., C, H, W) with all its channels (and, with a time axis, of one
            step); inputs without (C, H, W) have one value per pixel. ``"cells"``: single values.

    Raises:
        ValueError: on a bad eps, unit or an open domain; at first use if eps exceeds the number of pixels.
    """

    unit: Literal["pixels", "cells"] = "pixels"
    norm: ClassVar[str] = "l0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("pixels", "cells"):
            raise ValueError(f"unit must be 'pixels' or 'cells', got {self.unit!r}")
        if math.isinf(self.domain.width):
            raise ValueError(
                f"L0 moves values up to the walls, but {self.domain} is open: give a ceiling or use EventFlips"
            )

    def check(self, x: Tensor) -> None:  # type: ignore[override]
        """Raise ``ValueError`` if there are fewer pixels than may change."""
        self._check_count(self.pixels(x).shape[1], x.shape)

    def _check_count(self, pixels: int, shape: torch.Size) -> None:
        if self.count > pixels:
            raise ValueError(f"L0 may change {self.count} {self.unit}, but the input {tuple(shape)} has {pixels}")

    def pixels(self, x: Tensor) -> Tensor:
        """Arrange values by pixel: (B, pixels, channels)."""
        if self.unit == "cells" or x.dim() < 4:
            return x.reshape(len(x), -1, 1)
        return x.movedim(-3, -1).flatten(1, -2)

    def from_pixels(self, pixels: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`pixels` for an input of the shape of ``like``."""
        if self.unit == "cells" or like.dim() < 4:
            return pixels.reshape(like.shape)
        return pixels.view(like.movedim(-3, -1).shape).movedim(-1, -3)

    def per_pixel(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Sum values (B, n) over the channels of each pixel: (B, pixels), or (B, cells)."""
        if self.unit == "cells" or len(shape) < 4:
            return values
        return values.view(shape).sum(-3).flatten(1)

    def per_value(self, pixels: Tensor, shape: torch.Size) -> Tensor:
        """Give each value of a pixel the entry of its pixel: (B, n)."""
        if self.unit == "cells" or len(shape) < 4:
            return pixels
        return pixels.view(*shape[:-3], 1, *shape[-2:]).expand(shape).reshape(shape[0], -1)

    def choose(self, score: Tensor, shape: torch.Size, count: int | Tensor | None = None) -> Tensor:
        """Return a 0/1 mask (B, n) of the ``count`` (eps) pixels whose scores (B, n) have the highest positive sums."""
        pixels = self.per_pixel(score, shape)
        self._check_count(pixels.shape[1], shape)
        return self.per_value(top_k(pixels, self.count if count is None else count), shape)

    def project(self, x_adv: Tensor, x: Tensor, eps: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Keep the pixels whose undoing would cost most distance, clipped to the domain; ``eps`` (B,): one per sample."""
        change = (x_adv.double() - x.double()).flatten(1)
        clipped = change.sign() * torch.minimum(change.abs(), self._room(x, change))
        if self.domain.lattice is not None:
            clipped = clipped.round()
        gain = clipped * (2 * change - clipped)  # distance that undoing the change would add
        return add_towards_zero(x, clipped * self.choose(gain, x.shape, None if eps is None else eps.unsqueeze(1)))

    def maximise_linear(self, x: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Send the pixels with the highest sum of |grad| times room to the wall; exact."""
        slope = grad.double().flatten(1)
        slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(1e-300)
        move = slope.sign() * self._room(x, slope)
        return add_towards_zero(x, move * self.choose(slope * move, x.shape))

    def sample(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Give eps random pixels random values: uniform in the domain, flipped if it is binary."""
        flat = x.double()
        lottery = self.per_pixel(generator.fork("support").uniform(flat).flatten(1), x.shape)
        # Channel sums are not uniform but exchangeable between pixels, which is all a uniform support needs.
        chosen = self.choose(self.per_value(lottery, x.shape) + 1.0, x.shape)
        values = generator.fork("value").uniform(flat, self.domain.low, self.domain.high)
        if self.domain.lattice == "binary":
            values = 1.0 - flat
        elif self.domain.lattice == "count":
            values = generator.fork("value").uniform(flat, self.domain.low, self.domain.high + 1.0).floor()
        return add_towards_zero(x, (values - flat).flatten(1) * chosen)

    def random_start(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Start from the random control."""
        return self.sample(x, generator)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the number of changed pixels or cells, (B,)."""
        changed = (x_adv != x).double().flatten(1)
        return (self.per_pixel(changed, x.shape) > 0).double().sum(1)

    def _size(self, change: Tensor) -> Tensor:
        raise AssertionError("size() is overridden")  # pragma: no cover

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat."""
        return {**super().describe(), "unit": self.unit}


@dataclass(frozen=True)
class EventFlips(_Counting):
    """At most eps events may be added or deleted; values stay whole numbers.

    On binary rasters an event added or deleted is a flip. On counts each event counts, so that two events added to
    one cell cost two; nothing is clamped to 1.

    Args:
        eps: How many events: a whole number, or a share of the sample's own events such as ``"2%"``, rounded down.
        domain: ``Binary()`` or ``Counts()``.
        mode: ``"flip"`` (both), ``"add"`` or ``"delete"`` only.

    Raises:
        ValueError: on a bad eps or mode, or a domain of real values.
    """

    domain: Domain = Binary()  # noqa: RUF009 - frozen
    mode: Mode = "flip"
    norm: ClassVar[str] = "flips"
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("flip", "add", "delete"):
            raise ValueError(f"mode must be 'flip', 'add' or 'delete', got {self.mode!r}")
        if self.domain.lattice is None:
            raise ValueError(
                f"EventFlips needs events, but the domain is {self.domain}: use domain=Binary() or Counts()"
            )

    def allowed(self, direction: Tensor, x: Tensor) -> Tensor:
        """Return how many events (B, n) ``direction`` (B, n) may add or delete; 0 where the mode forbids it."""
        room = self._room(x, direction)
        if self.mode == "add":
            room = torch.where(direction > 0, room, 0.0)
        elif self.mode == "delete":
            room = torch.where(direction < 0, room, 0.0)
        return room

    def growing(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Tell which single events may come on top of ``x_adv`` whatever the budget, bool (B, 2 n): added, then deleted."""
        flat = x.double().flatten(1)
        change = x_adv.double().flatten(1) - flat
        up, down = (self.allowed(direction, x) for direction in (torch.ones_like(flat), -torch.ones_like(flat)))
        return torch.cat([(change >= 0) & (change < up), (change <= 0) & (-change < down)], dim=1)

    def project(self, x_adv: Tensor, x: Tensor, eps: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Keep the eps single events whose undoing would cost most distance.

        The real-valued L1 projection rounded by largest remainders, which is optimal for whole events. ``eps`` (B,): a
        budget for each sample.
        """
        events = (self.limits(x) if eps is None else eps.double()).unsqueeze(1)
        change = (x_adv.double() - x.double()).flatten(1)
        # A cell that rounds to no event has none to give.
        room = torch.minimum(self.allowed(change, x), change.abs().add(0.5).floor())
        real = project_l1(change.abs(), room, events)
        whole = (real + 1e-9).floor()
        left = events - whole.sum(1, keepdim=True)
        remainder = torch.where(whole + 1 <= room, real - whole + 1.0, 0.0)
        order = remainder.argsort(dim=1, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
        whole = whole + ((rank < left) & (remainder > 0) & (real > 0))
        return (x.double() + (change.sign() * whole).view(x.shape)).to(x.dtype)

    def maximise_linear(self, x: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Spend the events where the gradient gains most; exact."""
        slope = grad.double().flatten(1)
        events = fill_l1(slope.abs(), self.allowed(slope, x), self.limits(x).unsqueeze(1))
        return (x.double() + (slope.sign() * events).view(x.shape)).to(x.dtype)

    def sample(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Change eps random cells by one event each, uniform among the cells where the mode allows it."""
        flat = x.double().flatten(1)
        up = self.allowed(torch.ones_like(flat), x) >= 1
        down = self.allowed(-torch.ones_like(flat), x) >= 1
        coin = generator.fork("direction").uniform(flat, -1.0, 1.0).sign()
        direction = torch.where(up & down, coin, up.double() - down.double())
        lottery = (generator.fork("support").uniform(flat) + 1.0) * (up | down)
        return (x.double() + (direction * top_k(lottery, self.limits(x).unsqueeze(1))).view(x.shape)).to(x.dtype)

    def random_start(self, x: Tensor, generator: SampleGenerator) -> Tensor:  # type: ignore[override]
        """Start from the random control."""
        return self.sample(x, generator)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """Check finiteness, whole events, budget, domain and mode per sample."""
        change = (x_adv - x).flatten(1)
        wrong_way = (change < 0).any(1) if self.mode == "add" else (change > 0).any(1)
        return super().contains(x_adv, x) & ((self.mode == "flip") | ~wrong_way)

    def _size(self, change: Tensor) -> Tensor:
        return change.abs().sum(1)

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies this threat."""
        return {**super().describe(), "mode": self.mode}
