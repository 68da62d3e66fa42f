"""The oracle of the neuron tests: the equations in ordinary autograd, sharing no code with the neurons."""

import itertools
import math

import pytest
import torch

from sg_lightning.neurons.surrogates import (
    Atan,
    Exponential,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Triangular,
)

RESETS = ("zero", "subtract", "none")
OPTIONS = [
    {"reset": r, "reset_delay": d, "detach_reset": a, "fire_at_threshold": f}
    for r, d, a, f in itertools.product(RESETS, (False, True), (False, True), (False, True))
]


# Antiderivatives of the surrogates.
PRIMITIVES = {
    Atan: lambda z, r: torch.atan(math.pi / 2 * r.alpha * z) / math.pi,
    FastSigmoid: lambda z, r: z / (1 + r.slope * z.abs()),
    Sigmoid: lambda z, r: torch.sigmoid(r.slope * z),
    Gaussian: lambda z, r: torch.erf(z / (r.sigma * math.sqrt(2))) / 2,
    Exponential: lambda z, r: z.sign() * (1 - torch.exp(-r.slope * z.abs())) * (r.peak / r.slope),
    StraightThrough: lambda z, r: z,
    Rectangular: lambda z, r: z.clamp(-r.width / 2, r.width / 2) / r.width,
    Triangular: lambda z, r: ((w := z.clamp(-r.width, r.width)) - w * w.abs() / (2 * r.width)) / r.width,
}


def oracle(x, beta, theta, rule, *, reset, reset_delay, detach_reset, fire_at_threshold):
    """The equations with ordinary autograd: the step's value, the primitive's derivatives of every order."""
    c, late, spikes, membranes = torch.zeros_like(x[0]), torch.zeros_like(x[0]), [], []
    for x_t in x.unbind(0):
        u = beta * c + x_t - late
        z = u - theta
        smooth = PRIMITIVES[type(rule)](z, rule)
        step = ((z >= 0) if fire_at_threshold else (z > 0)).to(x.dtype)
        s = smooth + (step - smooth).detach()
        r = s.detach() if detach_reset else s
        c = {"zero": (1 - r) * u, "subtract": u if reset_delay else u - theta * r, "none": u}[reset]
        late = theta * r if reset == "subtract" and reset_delay else torch.zeros_like(u)
        spikes.append(s)
        membranes.append(u)
    return torch.stack(spikes), torch.stack(membranes)


@pytest.fixture(params=OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def options(request):
    """Every combination of reset, delay, attachment and firing rule."""
    return request.param


@pytest.fixture(name="oracle", scope="session")
def _oracle():
    return oracle


@pytest.fixture(scope="session")
def primitive():
    """Map a surrogate to its antiderivative."""
    return lambda z, rule: PRIMITIVES[type(rule)](z, rule)
