"""Batch normalisation folded into the convolution before it, for as long as an attack runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def folded(model: object) -> Iterator[None]:
    """Let convolutions and linear layers do the work of the batch norm that follows them in an ``nn.Sequential``.

    In evaluation state both are affine, so one layer with other weights computes the same function, with one pass less
    over the activations in each direction, and keeps no activations for weight gradients. Rounding differs: in float32
    by about 1e-6 of the values, which moves a few spikes at threshold, so what an attack finds must be verified on the
    model as it is. Sequences that run in order take part: ``nn.Sequential`` itself and subclasses that say
    ``in_order = True``. Layers in training mode, with hooks, parametrisations or norms without running statistics are
    left alone, and so is a compiled model, which would be compiled anew.

    Args:
        model: The model; anything but a module is left alone. As it was afterwards, also after an exception.
    """
    held: list[tuple[nn.Module, str, nn.Module]] = []
    modules = list(model.modules()) if isinstance(model, nn.Module) and not is_compiled(model) else []
    try:
        for sequence in filter(_in_order, modules):
            for (place, layer), (after, norm) in pairwise(list(sequence._modules.items())):
                merged = _merged(layer, norm)
                if merged is not None and layer is not None and norm is not None:
                    held += [(sequence, place, layer), (sequence, after, norm)]
                    sequence._modules[place], sequence._modules[after] = merged, nn.Identity()
        yield
    finally:
        for sequence, place, layer in reversed(held):
            sequence._modules[place] = layer


def is_compiled(model: object) -> bool:
    """Tell whether ``torch.compile`` made the model or a part of it."""
    return isinstance(model, nn.Module) and any(hasattr(module, "_orig_mod") for module in model.modules())


def _in_order(module: nn.Module) -> bool:
    own = type(module).forward is nn.Sequential.forward or getattr(module, "in_order", False)
    return isinstance(module, nn.Sequential) and own


def _merged(layer: nn.Module | None, norm: nn.Module | None) -> nn.Module | None:
    """Return the one layer that does the work of both, or ``None``."""
    if not isinstance(norm, _BatchNorm) or norm.training or norm.running_mean is None:
        return None
    if layer is None or type(layer) not in (*_CONVOLUTIONS, nn.Linear) or layer.training:
        return None
    if not (_plain(layer) and _plain(norm)):
        return None
    merged = fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)  # type: ignore[type-var]
    return merged.requires_grad_(False)


def _plain(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not hasattr(module, "parametrizations")
