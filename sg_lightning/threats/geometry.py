"""Exact projections and linear maximisers on ball and box, by sorting; float64, (B, n) magnitudes.

All work on magnitudes: the sign of a change is known and ``room`` (B, n) is the distance to the wall it points at.
Budgets are one number or one per sample, (B, 1).
Sums are accumulated in float64, because float32 cancellation breaks small budgets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill_l2(weight: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Return ``d_i = min(t * weight_i, room_i)`` with the t that gives ``|d|_2 = eps``, or ``room`` if that is shorter.

    With ``weight = |v|`` and ``room <= |v|`` this is the projection of v on ball and box, with ``weight = |g|`` the
    maximiser of ``<g, d>`` (both follow from the optimality conditions).
    """
    room = torch.where(weight > 0, room, 0.0).clamp_max(eps)  # no coordinate can pass eps; also removes infinities
    knots, order = (room / weight.clamp_min(torch.finfo(weight.dtype).tiny)).sort(dim=1)
    filled = room.gather(1, order).square().cumsum(1)
    squares = weight.gather(1, order).square()
    rest = squares.sum(1, keepdim=True) - squares.cumsum(1)
    at_knot = filled + knots.square() * rest.clamp_min(0.0)
    index = (at_knot < eps**2).sum(1, keepdim=True).clamp_max(weight.shape[1] - 1)
    before = torch.where(index > 0, filled.gather(1, (index - 1).clamp_min(0)), 0.0)
    # Summed from the tail: subtracting a cumulative sum would leave nothing of weights far smaller than the largest.
    tail = squares.flip(1).cumsum(1).flip(1).gather(1, index)
    t = ((eps**2 - before).clamp_min(0.0) / tail.clamp_min(torch.finfo(weight.dtype).tiny)).sqrt()
    scaled = torch.minimum(t * weight, room)
    inside = room.square().sum(1, keepdim=True) <= eps**2
    found = torch.where(inside, room, scaled)
    return found * (eps / found.norm(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)


def project_l1(magnitude: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Return ``d_i = min((magnitude_i - lam)+, room_i)`` with the lam that gives ``|d|_1 = eps``, or less if it fits.

    ``eps`` is one for all or (B, 1).
    The sum is piecewise linear and falling in lam with knots at ``magnitude`` and ``magnitude - room``; the first knot
    (from above) where it reaches eps ends a segment that rises, so flat segments (binary inputs, integer eps) are safe.
    """
    room = torch.minimum(room, magnitude)
    knots = torch.cat([magnitude, magnitude - room], dim=1)
    slope_change = torch.cat([torch.ones_like(magnitude), -torch.ones_like(magnitude)], dim=1)
    knots, order = knots.sort(dim=1, descending=True)
    slope = slope_change.gather(1, order).cumsum(1)
    growth = slope[:, :-1] * (knots[:, :-1] - knots[:, 1:])
    total = torch.cat([torch.zeros_like(knots[:, :1]), growth.cumsum(1)], dim=1)
    index = (total < eps).sum(1, keepdim=True).clamp(1, knots.shape[1] - 1) - 1
    lam = knots.gather(1, index) - (eps - total.gather(1, index)) / slope.gather(1, index).clamp_min(1.0)
    cut = torch.minimum((magnitude - lam).clamp_min(0.0), room)
    found = torch.where(room.sum(1, keepdim=True) <= eps, room, cut)
    return found * (eps / found.sum(1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)


def fill_l1(gain: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Spend eps, one for all or (B, 1), on the coordinates of highest gain first, each up to its room (fractional knapsack)."""
    room = torch.where(gain > 0, room, 0.0).clamp_max(eps)
    order = gain.argsort(dim=1, descending=True, stable=True)
    ordered = room.gather(1, order)
    spent_before = ordered.cumsum(1) - ordered
    return torch.zeros_like(room).scatter(1, order, torch.minimum((eps - spent_before).clamp_min(0.0), ordered))


def top_k(score: Tensor, k: int | Tensor) -> Tensor:
    """Return a 0/1 mask (B, n) of the k (one for all or (B, 1)) highest positive scores; ties go to the lower index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return (places < k).to(score.dtype).gather(1, order.argsort(dim=1)) * (score > 0)


def add_towards_zero(x: Tensor, change: Tensor) -> Tensor:
    """Add a float64 ``change`` to ``x`` and round towards ``x``, so that no budget is passed by rounding."""
    change = change.view(x.shape)
    moved = (x.double() + change).to(x.dtype)
    too_far = (moved.double() - x.double()).abs() > change.abs()
    return torch.where(too_far, torch.nextafter(moved, x), moved)
