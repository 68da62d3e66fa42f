"""A model input is a tensor or a flat dict of tensors by modality; these treat both alike.

A leaf that every room may import. Axis 0 is always the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Input: TypeAlias = Tensor | dict[str, Tensor]
Forward: TypeAlias = Callable[..., Tensor]


def tensors(x: Input) -> list[Tensor]:
    """List the tensors of an input, in the order of its keys."""
    return list(x.values()) if isinstance(x, dict) else [x]


def apply(fn: Callable[..., Tensor], x: Input, *others: Input) -> Input:
    """Apply ``fn`` to each modality of one or more inputs of the same structure."""
    if isinstance(x, dict):
        return {key: fn(value, *(other[key] for other in others)) for key, value in x.items()}  # type: ignore[index]
    return fn(x, *others)


def rebuild(x: Input, parts: Sequence[Tensor]) -> Input:
    """Give ``parts`` (as from :func:`tensors`) the structure of ``x``."""
    return dict(zip(x, parts, strict=True)) if isinstance(x, dict) else parts[0]


def batch_size(x: Input) -> int:
    """Return the number of samples."""
    return tensors(x)[0].shape[0]


def device_of(x: Input) -> torch.device:
    """Return the device of the first tensor."""
    return tensors(x)[0].device


def select(x: Input, index: Tensor) -> Input:
    """Take the samples of ``index`` (int64 or bool mask)."""
    return apply(lambda t: t[index], x)


def where(mask: Tensor, new: Input, old: Input) -> Input:
    """Take ``new`` for the samples where ``mask`` (B,) is true, else ``old``."""
    return apply(lambda a, b: torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b), new, old)


def assign(target: Input, index: Tensor, values: Input) -> None:
    """Write ``values`` into the samples ``index`` of ``target``, in place."""
    for t, v in zip(tensors(target), tensors(values), strict=True):
        t[index] = v.to(t.dtype)


def detached(x: Input) -> Input:
    """Copy without history. Inside ``inference_mode(False)`` the copy is a normal tensor."""
    return apply(lambda t: t.detach().clone(), x)
