"""Readout without spikes: a leaky integrator over time."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from sg_lightning.neurons import fused
from sg_lightning.neurons.base import Dynamics, check_sequence, checked_parameter, compute_dtype
from sg_lightning.neurons.surrogates import Atan
from sg_lightning.recipes import Recorded

Readout = Literal["mean", "last", "max", "sum"]


class LeakyIntegrator(Recorded, nn.Module):
    """Read logits from membranes that leak and never fire: v_t = beta v_{t-1} + x_t.

    Args:
        beta: Leak per time step in [0, 1]; 0 reads the currents themselves. A learned one is clamped to [0, 1]
            when used, with zero gradient outside.
        learn_beta: Whether beta is a trained parameter.
        readout: Mean, sum or maximum of the membrane over time, or its last value. The gradient of the maximum
            is shared among equal maxima.

    Shape:
        - Input: (T, B, K).
        - Output: (B, K), in the dtype of the input; the membrane is float32 (float64 for float64 inputs).

    Raises:
        ValueError: beta outside [0, 1] or NaN, an unknown readout; in the forward pass an input that is not (T, B, K)
            or not floating-point.

    Example:
        >>> LeakyIntegrator(beta=0.5, readout="last")(torch.ones(2, 1, 1))
        tensor([[1.5000]])
    """

    beta: Tensor

    def __init__(self, beta: float = 1.0, learn_beta: bool = False, readout: Readout = "mean") -> None:
        super().__init__()
        if readout not in get_args(Readout):
            raise ValueError(f"unknown readout {readout!r}; choose one of {', '.join(get_args(Readout))}")
        value = checked_parameter("beta", beta, None, high=1.0)
        if value.dim():
            raise ValueError(f"beta of a LeakyIntegrator must be a single number, got shape {tuple(value.shape)}")
        self.readout = readout
        if learn_beta:
            self.beta = nn.Parameter(value)
        else:
            self.register_buffer("beta", value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the readout (B, K) of the currents ``x`` (T, B, K)."""
        check_sequence(x, "LeakyIntegrator", rank=3)
        # The membranes of neurons whose spikes change nothing.
        level = x.new_ones((), dtype=compute_dtype(x))
        _, v = fused.simulate(x, self.beta.clamp(0, 1), level, Dynamics("none"), Atan(), membrane=True)
        assert v is not None
        if self.readout == "last":
            return v[-1].to(x.dtype)
        if self.readout == "max":
            return v.amax(0).to(x.dtype)
        return (v.mean(0) if self.readout == "mean" else v.sum(0)).to(x.dtype)

    def extra_repr(self) -> str:  # noqa: D102
        learned = ", learned" if isinstance(self.beta, nn.Parameter) else ""
        return f"beta={self.beta.item():g}{learned}, readout={self.readout!r}"
