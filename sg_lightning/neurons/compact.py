"""Spikes take a byte each while they wait for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST = 16_384  # elements: smaller tensors are not worth a look
_PROBE = 1_024  # elements that are looked at first; membranes and weights fail here
_BLOCK = 65_536  # elements that stay in the cache of a CPU
_SIXTEENTHS = 16  # 0 and 1, what poolings by 4 and by 16 make of them, counts up to 7


class compact_spikes(saved_tensors_hooks):
    """Keep what a forward pass saves for the backward pass in fewer bytes, wherever that loses nothing.

    A convolution, a linear layer and a pooling keep their input. Where that is spikes, averages of 4 or 16 spikes, or
    counts up to 7, all values are multiples of 1/16 and fit a byte; other values that bfloat16 holds exactly take two.
    Every tensor is checked before it is packed and unpacked when its gradient is computed, so gradients are equal, and
    layers need not know. Membranes, and what batch norms keep, stay as they are.

    The check reads a tensor's values, so on CUDA each one waits for the device. Networks compiled as a whole keep what
    their compiler chose, which is packed alike.

    Args:
        leave: Tensors that live on anyway, such as the batch: packing would add a copy of them.

    Example:
        >>> layer, spikes = torch.nn.Linear(64, 8), (torch.rand(512, 64) < 0.1).float()
        >>> with compact_spikes():
        ...     loss = layer(spikes * 1).sum()  # keeps 32 KiB instead of 128
        >>> loss.backward()
    """

    def __init__(self, leave: Iterable[Tensor] = ()) -> None:
        kept = {tensor.untyped_storage().data_ptr() for tensor in leave}

        def pack_others(tensor: Tensor) -> Any:
            held = type(tensor) is Tensor and tensor.untyped_storage().data_ptr() in kept
            return tensor if held else pack(tensor)

        super().__init__(pack_others, unpack)


class Packed:
    """A tensor in fewer bytes.

    Args:
        values: Its values in the order of memory.
        like: Size, strides and dtype, without data.
        scale: What the values are divided by.
    """

    __slots__ = ("like", "scale", "values")

    def __init__(self, values: Tensor, like: Tensor, scale: int) -> None:
        self.values, self.like, self.scale = values, like, scale


def pack(tensor: Tensor) -> Tensor | Packed:
    """Return a tensor in the fewest bytes that lose nothing, or the tensor itself."""
    # Parameters and the tensors of tracers have types of their own.
    if type(tensor) is not Tensor or tensor.numel() < LEAST or not tensor.is_floating_point():
        return tensor
    like = torch.empty_like(tensor, device="meta")
    if tensor.is_meta or like.stride() != tensor.stride():  # an expanded or cut view: the whole of it lives elsewhere
        return tensor
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    probe = flat[:: flat.numel() // _PROBE]
    for dtype, scale in ((torch.int8, _SIXTEENTHS), (torch.bfloat16, 1)):
        if dtype.itemsize < tensor.dtype.itemsize and _packed(probe, dtype, scale) is not None:
            values = _packed(flat, dtype, scale)
            if values is not None:
                return Packed(values, like, scale)
    return tensor


def unpack(kept: Tensor | Packed) -> Tensor:
    """Return the tensor that was packed, with its strides."""
    if isinstance(kept, Tensor):
        return kept
    values = torch.empty(kept.values.shape, dtype=kept.like.dtype, device=kept.values.device)
    size = _block(values)
    for packed, target in zip(kept.values.split(size), values.split(size), strict=True):
        target.copy_(packed)
        if kept.scale != 1:
            target.mul_(1 / kept.scale)
    return values.as_strided(kept.like.shape, kept.like.stride())


def _packed(flat: Tensor, dtype: torch.dtype, scale: int) -> Tensor | None:
    """Return the values times ``scale`` in another dtype, or nothing if they are not all there."""
    packed = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    size = _block(flat)
    scaled, back = torch.empty_like(flat[:size]), torch.empty_like(flat[:size])
    for source, target in zip(flat.split(size), packed.split(size), strict=True):
        here, again = scaled[: len(source)], back[: len(source)]
        torch.mul(source, scale, out=here)
        target.copy_(here)
        again.copy_(target)
        # Several times faster than torch.equal on a CPU; NaN and infinity are not 0 either.
        if again.sub_(here).abs_().amax().item() != 0:
            return None
    return packed


def _block(flat: Tensor) -> int:
    return min(_BLOCK, flat.numel()) if flat.device.type == "cpu" else flat.numel()
