"""How much of the robustness that training against a norm could give, a defence gives without it."""

from __future__ import annotations

MIN_GAIN = 0.05  # below five points of possible gain the ratio is noise divided by noise


def transfer_ratio(defence: float, vanilla: float, reference: float, *, min_gain: float = MIN_GAIN) -> float | None:
    """Normalise a robust accuracy: 0 is undefended training, 1 is training against that very norm.

    ``(defence - vanilla) / (reference - vanilla)``, all three robust accuracies under the same norm, budget and
    attacks. Negative where the defence hurts, above 1 where it beats the reference.

    Args:
        defence: Robust accuracy of the defence in question, in [0, 1].
        vanilla: Robust accuracy of undefended training, in [0, 1].
        reference: Robust accuracy of adversarial training against this norm, in [0, 1].
        min_gain: The reference must beat vanilla by more than this, in [0, 1], for the ratio to mean something.

    Returns:
        The ratio, or ``None`` where ``reference - vanilla <= min_gain``.

    Raises:
        ValueError: an accuracy or ``min_gain`` is outside of [0, 1] (percentages must be divided by 100).

    Example:
        >>> transfer_ratio(defence=0.5, vanilla=0.25, reference=0.75)
        0.5
        >>> transfer_ratio(defence=0.35, vanilla=0.25, reference=0.28) is None
        True
    """
    given = {"defence": defence, "vanilla": vanilla, "reference": reference, "min_gain": min_gain}
    for name, value in given.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}; divide percentages by 100")
    possible = reference - vanilla
    # A hair of tolerance: 0.30 - 0.25 is 0.0499999... or 0.0500001 by the accident of rounding.
    return (defence - vanilla) / possible if possible > min_gain + 1e-9 else None
