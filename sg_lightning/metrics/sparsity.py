"""How large and how sparse an input gradient is, per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALL = 1e-3  # coordinates below this share of the largest one count as small


def gradient_sparsity(grad: Tensor) -> dict[str, Tensor]:
    r"""Measure size and sparsity of each sample's gradient.

    With ``g`` the gradient of one sample as a vector of ``m`` numbers:

    ================  =======================================================  ==============================
    key               definition                                               range, dense to sparse
    ================  =======================================================  ==============================
    ``l1``            ``sum |g_i|``                                            size only
    ``l2``            ``sqrt(sum g_i^2)``                                      size only
    ``linf``          ``max |g_i|``                                            size only
    ``zero_share``    share of ``g_i == 0``                                    0 to 1 - 1/m
    ``small_share``   share of ``|g_i| < 1e-3 max |g|`` (zeros included)       0 to 1 - 1/m
    ``l1_over_l2``    ``l1 / l2``                                              sqrt(m) to 1
    ``hoyer``         ``(sqrt(m) - l1/l2) / (sqrt(m) - 1)``                    0 to 1
    ``gini``          ``1 - 2 sum_k (a_k / l1) (m - k + 1/2) / m``,            0 to 1 - 1/m
                      ``a_1 <= ... <= a_m`` the sorted ``|g|``
    ``participation`` ``(sum g_i^2)^2 / sum g_i^4``: how many coordinates       m to 1
                      carry the energy
    ================  =======================================================  ==============================

    All but the three sizes do not change when ``g`` is scaled. They are computed on ``g / max |g|``, so gradients as
    small as 1e-30 do not underflow. Trained spiking networks hardly ever have exact zeros, so ``zero_share`` says
    little by itself; ``hoyer`` and ``l1_over_l2`` are the ones the theory of gradient sparsity speaks about.

    A gradient that is zero everywhere has no shape: its shares are 1, everything else is 0, nothing is NaN.
    ``l1_over_l2 == 0`` or ``zero_share == 1`` tells such samples from all others; leave them out of averages of the
    shape measures. With ``m = 1`` ``hoyer`` is 0. A gradient with a NaN or an infinity gives NaN everywhere.

    Args:
        grad: One gradient per sample, of any floating type; 16-bit types are widened first.

    Shape:
        - grad: (B, ...)
        - each measure: (B,)

    Raises:
        ValueError: ``grad`` is not a floating tensor (B, ...) with at least one number per sample.

    Source:
        Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 5, 2004 (arXiv cs/0408058);
        Hurley and Rickard, "Comparing measures of sparsity", 2009 (arXiv 0811.4706), for Gini; Bell and Dean,
        "Atomic vibrations in vitreous silica", 1970, for the participation ratio (times m, so it is a count).

    Example:
        >>> measures = gradient_sparsity(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
        >>> [round(float(measures[key]), 3) for key in ("l1", "l2", "l1_over_l2", "hoyer", "gini")]
        [7.0, 5.0, 1.4, 0.6, 0.536]
    """
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        given = grad.dtype if isinstance(grad, Tensor) else type(grad).__name__
        raise ValueError(f"grad must be a floating tensor (B, ...), got {given}")
    if grad.dim() < 2 or grad.shape[1:].numel() == 0:
        raise ValueError(f"grad must have shape (B, ...) with one axis or more per sample, got {tuple(grad.shape)}")
    size = grad.detach().flatten(1).abs()
    size = size if size.dtype == torch.float64 else size.float()
    m = size.shape[1]

    linf = size.amax(1)
    zero = linf == 0
    unit = size / torch.where(zero, 1.0, linf).unsqueeze(1)  # in [0, 1]; all zero where the gradient is
    sum1, sum2, sum4 = unit.sum(1), unit.square().sum(1), unit.pow(4).sum(1)
    root = sum2.sqrt()
    safe = torch.where(zero, 1.0, root)

    ratio = sum1 / safe
    hoyer = (math.sqrt(m) - ratio) / (math.sqrt(m) - 1) if m > 1 else torch.zeros_like(ratio)
    rank = (m - torch.arange(1, m + 1, device=unit.device, dtype=unit.dtype) + 0.5) / m
    gini = 1 - 2 * (unit.sort(1).values * rank).sum(1) / torch.where(zero, 1.0, sum1)
    measures = {
        "l1": sum1 * linf,
        "l2": root * linf,
        "linf": linf,
        "zero_share": (size == 0).to(size.dtype).mean(1),
        "small_share": (unit < SMALL).to(size.dtype).mean(1),
        "l1_over_l2": ratio,
        "hoyer": torch.where(zero, 0.0, hoyer.clamp(0, 1)),  # rounding can leave the range by 1e-7
        "gini": torch.where(zero, 0.0, gini.clamp(0, 1)),
        "participation": sum2.square() / torch.where(zero, 1.0, sum4),
    }
    finite = torch.isfinite(linf)
    return {name: torch.where(finite, value, torch.nan) for name, value in measures.items()}
