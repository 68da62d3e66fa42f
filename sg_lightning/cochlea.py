"""A cochlea: waveforms become spikes of channels that listen to neighbouring frequencies, differentiably."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sg_lightning.neurons import LIF, Surrogate
from sg_lightning.recipes import Recorded

Values = Literal["binary", "counts"]


def erb(frequency: Tensor) -> Tensor:
    """Return the equivalent rectangular bandwidth in Hz of the auditory filter at a frequency in Hz.

    Source:
        Glasberg and Moore, "Derivation of auditory filter shapes from notched-noise data", 1990: 24.7 (4.37 f/kHz + 1).
    """
    return 24.7 * (4.37e-3 * frequency + 1.0)


def erb_spaced(low: float, high: float, channels: int) -> Tensor:
    """Return centre frequencies (channels,) in Hz, float64, at equal distances on the scale of ERBs (Glasberg and Moore)."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    first, last = (21.4 * torch.log10(4.37e-3 * ends + 1.0)).tolist()
    return (10.0 ** (torch.linspace(first, last, channels, dtype=torch.float64) / 21.4) - 1.0) / 4.37e-3


class Cochlea(Recorded, nn.Module):
    """Turn waveforms into spike rasters: filter bank, hair cells, one leaky integrate-and-fire neuron per channel.

    1. The waveform is scaled to a root mean square of ``level``, filled up with silence, and passed through a first-order
       high-pass (outer and middle ear) and a bank of fourth-order gammatone filters (basilar membrane) of unit gain at
       their centres, which lie at equal distances on the ERB scale.
    2. Hair cells: half-wave rectification, mean over some samples (to about 4 kHz), first-order low-pass (no phase locking
       at high frequencies), compression by a power, and adaptation: a share of the own running average is taken off and
       what is negative cut.
    3. One neuron per channel, with thresholds that differ by a fixed log-normal mismatch.
    4. Spikes are binned in time and over groups of neighbouring channels.

    Everything is deterministic and has a gradient, the spikes by their surrogate, so that attacks may change the waveform:
    ``nn.Sequential(Cochlea(...), network)`` takes waveforms, whose domain is ``Box(-1, 1)``.

    It is simpler than the inner ear of the Heidelberg data sets (a hydrodynamic basilar membrane, hair cells with pools of
    transmitter and bushy cells that collect many of them), so spikes of one are not those of the other. Level, low-pass,
    compression, adaptation and neuron were set by hand so that spoken digits give about as many spikes per channel as there
    (about six).

    Args:
        channels: Number of filters N.
        time_steps: Number of bins T.
        duration: Length of the raster in seconds; shorter waveforms end in silence.
        group: Neighbouring channels that become one; it must divide ``channels``.
        values: Whether a cell says that there was a spike, ``"binary"``, or how many, ``"counts"``.
        sample_rate: Samples per second of the waveform.
        low: Lowest centre frequency in Hz.
        high: Highest centre frequency in Hz, below half the sample rate.
        level: Root mean square that every waveform is scaled to; ``None`` leaves it as it is.
        highpass: Corner of the high-pass in Hz.
        bandwidth: Bandwidth of the gammatone filters in ERBs (1.019 gives a filter its channel's ERB).
        lowpass: Corner of the hair cell's low-pass in Hz.
        compression: Exponent of the hair cell, above 0 and at most 1.
        adaptation: Share of the running average that is taken off, in [0, 1).
        adaptation_time: Time constant of the running average in seconds.
        tau: Time constant of the membrane in seconds.
        threshold: Drive that makes a neuron fire after infinite time.
        mismatch: Deviation of the logarithm of the thresholds.
        surrogate: Stand-in for the derivative of the spike, of a membrane in units of the threshold.
        seed: Seed of the mismatch.

    Shape:
        (B, S) to (B, T, N / group).

    Raises:
        ValueError: on an argument out of its range; in the forward pass on waveforms that are not (B, S), not
            floating-point, or longer than ``duration``.

    Source:
        Gammatone filters: Patterson et al., "An efficient auditory filterbank based on the gammatone function", 1987.
        Spacing: Glasberg and Moore 1990. The chain of basilar membrane, hair cell and neuron: Cramer et al.,
        arXiv 1910.07407.
    """

    centres: Tensor
    bank: Tensor
    hair: Tensor
    average: Tensor

    def __init__(
        self,
        channels: int = 700,
        time_steps: int = 100,
        duration: float = 1.0,
        *,
        group: int = 1,
        values: Values = "binary",
        sample_rate: int = 16_000,
        low: float = 80.0,
        high: float = 7_600.0,
        level: float | None = 0.1,
        highpass: float = 1_000.0,
        bandwidth: float = 1.019,
        lowpass: float = 600.0,
        compression: float = 0.4,
        adaptation: float = 0.6,
        adaptation_time: float = 0.06,
        tau: float = 0.012,
        threshold: float = 0.0495,
        mismatch: float = 0.05,
        surrogate: Surrogate | str = "triangular",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, whole in (("channels", channels), ("time_steps", time_steps), ("group", group)):
            if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {whole!r}")
        above = {
            "duration": duration, "sample_rate": sample_rate, "low": low, "highpass": highpass, "bandwidth": bandwidth,
            "lowpass": lowpass, "adaptation_time": adaptation_time, "tau": tau, "threshold": threshold,
            "compression": compression, "level": 1.0 if level is None else level,
        }  # fmt: skip
        for name, number in above.items():
            if not 0.0 < number < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {number!r}")
        if channels % group:
            raise ValueError(f"group must divide the {channels} channels, got {group}")
        if values not in get_args(Values):
            raise ValueError(f"values must be 'binary' or 'counts', got {values!r}")
        if not low <= high < sample_rate / 2:
            raise ValueError(
                f"centre frequencies must lie below half of sample_rate={sample_rate}, got low={low}, high={high}"
            )
        if compression > 1 or not 0 <= adaptation < 1 or not 0 <= mismatch < math.inf:
            raise ValueError(
                "compression must be in (0, 1], adaptation in [0, 1) and mismatch finite and >= 0, got "
                f"{compression!r}, {adaptation!r}, {mismatch!r}"
            )
        self.time_steps, self.duration, self.group, self.values = time_steps, float(duration), group, values
        self.level, self.compression, self.adaptation = level, compression, adaptation
        self.pool = max(1, round(sample_rate / 4_000))  # samples per step of hair cells and neurons
        self.samples = -(-round(duration * sample_rate) // self.pool) * self.pool
        self.dt = self.pool / sample_rate
        if time_steps > self.samples // self.pool:
            raise ValueError(
                f"time_steps={time_steps} bins of {duration} s are finer than the {self.dt * 1e3:g} ms of the neurons"
            )
        centres = erb_spaced(low, high, channels)
        size = self.samples + round(0.1 * sample_rate)  # the slowest filter has died away after 0.1 s
        bank = _gammatone(centres, bandwidth, sample_rate, size) * _highpass(highpass, sample_rate, size)
        self.register_buffer("centres", centres.float(), persistent=False)
        self.register_buffer("bank", bank.to(torch.complex64), persistent=False)
        factors = torch.tensor([2 * math.pi * lowpass * self.dt, self.dt / adaptation_time], dtype=torch.float64)
        hair, average = _leaks(torch.exp(-factors), 2 * self.samples // self.pool).to(torch.complex64)
        self.register_buffer("hair", hair, persistent=False)
        self.register_buffer("average", average, persistent=False)
        noise = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
        # The membrane is in units of the threshold, the scale that surrogates are made for.
        self.neuron = LIF(
            math.exp(-self.dt / tau), torch.exp(mismatch * noise), fire_at_threshold=True, surrogate=surrogate
        )
        self.gain = (1.0 - math.exp(-self.dt / tau)) / threshold

    def drive(self, waveform: Tensor) -> Tensor:
        """Return what the hair cells give to the neurons, (B, N, steps of ``dt`` seconds)."""
        if waveform.dim() != 2 or not waveform.is_floating_point():
            raise ValueError(
                f"Cochlea needs floating-point waveforms (B, S), got {waveform.dtype} of shape {tuple(waveform.shape)}"
            )
        if not 0 < waveform.shape[1] <= self.samples:
            raise ValueError(
                f"waveforms have {waveform.shape[1]} samples, the raster of {self.duration:g} s has room for {self.samples}: "
                "cut them, or give another duration"
            )
        if self.level is not None:
            rms = waveform.square().mean(1, keepdim=True).clamp_min(1e-12).sqrt()
            waveform = self.level * waveform / rms
        moved = _filtered(waveform.unsqueeze(1), self.bank, self.samples).relu()
        moved = moved.unflatten(-1, (-1, self.pool)).mean(-1)
        rate = _filtered(moved, self.hair, moved.shape[-1]).clamp_min(0.0)
        floor = 1e-6  # an infinite slope at silence is no help to an attack
        rate = (rate + floor).pow(self.compression) - floor**self.compression
        return (rate - self.adaptation * _filtered(rate, self.average, rate.shape[-1])).relu()

    def fire(self, waveform: Tensor) -> Tensor:
        """Return the spikes of all channels before binning, (steps of ``dt`` seconds, B, N)."""
        return self.neuron(self.gain * self.drive(waveform).permute(2, 0, 1))

    def forward(self, waveform: Tensor) -> Tensor:
        """Return rasters (B, T, N / group)."""
        spikes = self.fire(waveform)
        edges = (torch.arange(len(spikes), device=spikes.device) * self.dt * self.time_steps / self.duration).long()
        bins = edges.clamp_max(self.time_steps - 1)
        counts = spikes.new_zeros(self.time_steps, *spikes.shape[1:]).index_add(0, bins, spikes)
        counts = counts.unflatten(-1, (-1, self.group)).sum(-1).transpose(0, 1)
        # Inside its walls a clamp has slope 1, at 1 too: a spike that is alone in its cell matters, others do not.
        return counts.clamp_max(1.0) if self.values == "binary" else counts


def _gammatone(centres: Tensor, bandwidth: float, sample_rate: int, size: int) -> Tensor:
    """Return the spectra (N, size // 2 + 1) of gammatone filters with gain 1 at their centres."""
    t = torch.arange(round(0.1 * sample_rate), dtype=torch.float64) / sample_rate
    f = centres.unsqueeze(1)
    wave = t**3 * torch.exp(-2 * math.pi * bandwidth * erb(f) * t) * torch.cos(2 * math.pi * f * t)
    gain = (wave * torch.exp(-2j * math.pi * f * t)).sum(1, keepdim=True).abs()
    return torch.fft.rfft(wave / gain, size)


def _highpass(corner: float, sample_rate: int, size: int) -> Tensor:
    """Return the spectrum of a first-order high-pass, i f / (corner + i f)."""
    f = 1j * torch.fft.rfftfreq(size, 1 / sample_rate, dtype=torch.float64)
    return f / (corner + f)


def _leaks(factors: Tensor, size: int) -> Tensor:
    """Return the spectra of y_t = a y_{t-1} + (1 - a) x_t for the factors a."""
    a = factors.unsqueeze(1)
    turn = torch.exp(-2j * math.pi * torch.fft.rfftfreq(size, dtype=torch.float64))
    return (1 - a) / (1 - a * turn)


def _filtered(x: Tensor, spectrum: Tensor, steps: int) -> Tensor:
    """Filter along the last axis; the spectrum is long enough that nothing comes round."""
    size = 2 * (spectrum.shape[-1] - 1)
    return torch.fft.irfft(torch.fft.rfft(x, size) * spectrum, size)[..., :steps]
