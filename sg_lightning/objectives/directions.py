"""The step along which a finite difference reads a dual norm of the input gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sg_lightning.domains import Domain, Domains
from sg_lightning.inputs import Input, apply, rebuild, tensors

Direction = Literal["linf", "l2", "l1", "l0"]


@dataclass(frozen=True)
class Ascent:
    """A step up the gradient, without history.

    Attributes:
        delta: The step, structured as the input.
        length: What the change of the output is divided by: a number or (B,); 0 where no step was possible.
        slope: What the quotient estimates, (B,): the dual norm of the gradient.
    """

    delta: Input
    length: Tensor | float
    slope: Tensor


def flat(x: Input) -> Tensor:
    """Join all modalities into one vector per sample, (B, m)."""
    parts = [t.flatten(1) for t in tensors(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unflat(values: Tensor, like: Input) -> Input:
    """Undo :func:`flat`."""
    parts = tensors(like)
    sizes = [t[0].numel() for t in parts]
    return rebuild(like, [v.view_as(t).to(t.dtype) for v, t in zip(values.split(sizes, 1), parts, strict=True)])


def euclidean(values: Tensor) -> Tensor:
    """Norm of each row (B, m) as (B, 1), free of under- and overflow: scaled by the largest entry first."""
    top = values.abs().amax(1, keepdim=True)
    return top * (values / top.clamp_min(torch.finfo(values.dtype).tiny)).norm(dim=1, keepdim=True)


def room(x: Tensor, up: Tensor, domain: Domain) -> Tensor:
    """Distance of each value to the wall it moves towards; 1 (one event) where there is none."""
    above = torch.ones_like(x) if math.isinf(domain.high) else domain.high - x
    below = torch.ones_like(x) if math.isinf(domain.low) else x - domain.low
    return torch.where(up, above, below).clamp_min(0.0)


def _rooms(x: Input, grad: Input, domain: Domains) -> Input:
    """Return :func:`room` for every modality, each between its own walls."""
    if isinstance(x, dict):
        assert isinstance(grad, dict)
        legal = domain if isinstance(domain, dict) else dict.fromkeys(x, domain)
        return {key: room(part.detach(), grad[key] > 0, legal[key]) for key, part in x.items()}
    assert isinstance(grad, Tensor)
    assert isinstance(domain, Domain)
    return room(x.detach(), grad > 0, domain)


def ascend(x: Input, grad: Input, direction: Direction, step_size: float, coordinates: int, domain: Domains) -> Ascent:
    """Step from ``x`` up ``grad`` in the geometry of one threat norm.

    Args:
        x: Input (B, ...).
        grad: Its gradient; only the direction of each sample's counts.
        direction: The threat norm. ``"linf"``: the sign. ``"l2"``: the normalised gradient. ``"l1"``, ``"l0"``: the
            ``coordinates`` values of largest first-order gain, room x |gradient|.
        step_size: ``"linf"``: change of every value. ``"l2"``: Euclidean length. ``"l1"``, ``"l0"``: share of the
            room, the distance to the wall, that each chosen value crosses.
        coordinates: Number of values that ``"l1"`` and ``"l0"`` move.
        domain: Walls that define the room, for all modalities or by modality.

    Returns:
        The step; the quotient with its length estimates ||g||_1 (linf), ||g||_2 (l2), the room-weighted mean of the
        chosen |g|, at most ||g||_inf (l1), or the sum of room x |g| over the chosen values (l0).
    """
    point, g = flat(apply(Tensor.detach, x)), flat(grad)
    if direction == "linf":
        return Ascent(unflat(step_size * g.sign(), x), step_size, g.abs().sum(1))
    if direction == "l2":
        norm = euclidean(g)
        unit = g / norm.clamp_min(torch.finfo(g.dtype).tiny)
        return Ascent(unflat(step_size * unit, x), step_size, norm.squeeze(1))
    space = flat(_rooms(x, grad, domain))
    gain, chosen = (space * g.abs()).topk(min(coordinates, g.shape[1]), dim=1)
    moves = step_size * (space * g.sign()).gather(1, chosen)
    delta = unflat(torch.zeros_like(point).scatter(1, chosen, moves), x)
    if direction == "l0":
        return Ascent(delta, step_size, gain.sum(1))
    return Ascent(delta, moves.abs().sum(1), g.abs().amax(1))
