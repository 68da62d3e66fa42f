"""Spiking neurons over (T, B, ...): stateless layers, surrogate gradients, the snnTorch bridge."""

from sg_lightning.neurons import surrogates
from sg_lightning.neurons.adaptive import ALIF
from sg_lightning.neurons.base import SpikingNeuron
from sg_lightning.neurons.compact import compact_spikes
from sg_lightning.neurons.integrator import LeakyIntegrator
from sg_lightning.neurons.lif import LIF, RecurrentLIF
from sg_lightning.neurons.paths import use_path
from sg_lightning.neurons.rules import BackwardRule, SlopeRule, Trace
from sg_lightning.neurons.snntorch_bridge import from_snntorch
from sg_lightning.neurons.snntorch_fusion import fuse_snntorch
from sg_lightning.neurons.surrogates import Surrogate

__all__ = [
    "ALIF",
    "LIF",
    "BackwardRule",
    "LeakyIntegrator",
    "RecurrentLIF",
    "SlopeRule",
    "SpikingNeuron",
    "Surrogate",
    "Trace",
    "compact_spikes",
    "from_snntorch",
    "fuse_snntorch",
    "surrogates",
    "use_path",
]
