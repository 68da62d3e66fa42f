"""The fast neuron: all time steps in one operator, on whichever path suits the machine and the work."""

from __future__ import annotations

import torch
from torch import Tensor

from sg_lightning.neurons import operators, paths
from sg_lightning.neurons.base import Dynamics, compute_dtype
from sg_lightning.neurons.surrogates import Surrogate


def path(x: Tensor, dynamics: Dynamics, *, keep: bool) -> paths.Choice:
    """Say on which path :func:`simulate` would run its forward pass, and why."""
    return paths.choose(paths.wanted(), x, paths.forward_kind(x, dynamics, keep))


def simulate(
    x: Tensor, beta: Tensor, theta: Tensor, dynamics: Dynamics, rule: Surrogate, *, membrane: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run the neuron over time, from rest.

    Args:
        x: Input current (T, B, ...).
        beta: Leak in [0, 1], scalar or one per channel (axis 2 of ``x``).
        theta: Threshold, scalar or one per channel.
        dynamics: Reset and firing rule.
        rule: Surrogate of the backward pass.
        membrane: Whether u is wanted although no gradient is.

    Returns:
        Spikes (T, B, ...) in the dtype of ``x``, and the membranes u (T, B, ...) if they were kept.
    """
    # Neurons are independent, so any dense layout (channels-last too) is a matrix (T, N) without a copy.
    strides = x.stride()
    order = [0, *sorted(range(1, x.dim()), key=lambda axis: strides[axis], reverse=True)]
    moved = order != list(range(x.dim()))
    rows = x.permute(order) if moved else x

    def per_neuron(p: Tensor) -> Tensor:
        p = p.to(compute_dtype(x))
        if p.dim() == 0:
            return p
        shape = (1, -1) + (1,) * (x.dim() - 3)
        return p.view(shape).expand(x.shape[1:]).permute([axis - 1 for axis in order[1:]]).reshape(-1)

    def restore(y: Tensor) -> Tensor:
        y = y if rows.dim() == 2 else y.view(rows.shape)
        return y.permute([order.index(axis) for axis in range(x.dim())]) if moved else y

    flat = rows if rows.dim() == 2 else rows.reshape(x.shape[0], -1)
    beta, theta = per_neuron(beta), per_neuron(theta)
    graded = torch.is_grad_enabled() and (flat.requires_grad or beta.requires_grad or theta.requires_grad)
    keep = membrane or graded
    s, u = operators.run(flat, beta, theta, dynamics.code, rule.code, keep, paths.wanted())
    return restore(s), restore(u) if keep else None
