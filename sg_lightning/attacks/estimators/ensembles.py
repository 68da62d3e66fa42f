"""Named lists of estimators: an attack runs with each, and a sample counts as robust if it survives all."""

from __future__ import annotations

from sg_lightning.attacks.estimators.base import Estimator
from sg_lightning.attacks.estimators.rate import BPTR, RGA, Act
from sg_lightning.attacks.estimators.surrogate import BPTT
from sg_lightning.neurons.surrogates import Atan, Exponential, Rectangular, Sigmoid, StraightThrough, Triangular

# Ozdenizci and Legenstein, arXiv 2311.09266, and its public code; see Act for the difference in that member.
SURROGATES_19: tuple[Estimator, ...] = (
    *(BPTT(Triangular(width)) for width in (1.0, 2.0, 3.0, 0.5, 0.25)),
    *(BPTT(Exponential(slope, peak)) for peak in (0.3, 1.0) for slope in (0.5, 1.0, 2.0)),
    *(BPTT(Rectangular(width)) for width in (0.25, 0.5, 1.0, 2.0, 4.0)),
    BPTT(StraightThrough()),
    BPTR(),
    Act(),
)

# Liu et al., arXiv 2405.20355, by its public code: the training surrogate, two others, and the rate gradient.
SR_4: tuple[Estimator, ...] = (BPTT(Triangular(1.0)), BPTT(Sigmoid(4.0)), BPTT(Atan(2.0)), RGA())

ENSEMBLES: dict[str, tuple[Estimator, ...]] = {"surrogates-19": SURROGATES_19, "sr-4": SR_4}
