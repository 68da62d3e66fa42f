"""A simulated event camera."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from sg_lightning.datamodules.slicing import Events
from sg_lightning.sampling import SampleGenerator

_CHIP = 0  # seed of the mismatch: all samples are seen by the same camera


@dataclass(frozen=True)
class EventCamera:
    """Turn moving images into events, as a dynamic vision sensor does.

    Each pixel remembers the logarithm of its brightness at its last event. Where the present one is higher or lower by
    more than a threshold the pixel sends an event (1 brighter, 0 darker) and remembers the level that it crossed. Levels
    between two images follow a straight line, so each event has its own time. Thresholds differ between pixels and
    between the two polarities. A crossing sooner after an event than the refractory time sends none. Noise events come
    at random, with either polarity, apart from all this.

    Args:
        threshold: Mean change of the natural logarithm of brightness that makes an event, above 0.
        mismatch: Standard deviation of the thresholds; a threshold is at least a tenth of the mean.
        refractory_us: Time after an event in which a pixel sends no other, in microseconds.
        noise_hz: Noise events of a pixel per second.

    Source:
        Rebecq et al., "ESIM: an open event camera simulator", CoRL 2018: logarithmic brightness, crossings interpolated in
        time, refractory time. Hu et al., "v2e: from video frames to realistic DVS events", arXiv 2006.07722: thresholds of
        each pixel and polarity, mismatch of 0.03, shot noise. Left out: adaptive sampling in time (ESIM), the linear
        response in the dark, the finite bandwidth of pixels, leak events, and that noise grows in the dark (v2e).
    """

    threshold: float = 0.25
    mismatch: float = 0.03
    refractory_us: float = 1000.0
    noise_hz: float = 1.0

    def record(self, logs: Iterable[Tensor], step_us: float, noise: SampleGenerator) -> list[Events]:
        """Watch scenes, and return the events of each.

        Args:
            logs: Logarithms of brightness of all scenes (N, H, W), one image after the other.
            step_us: Time between two images in microseconds.
            noise: Keys of the N scenes.
        """
        images = iter(logs)
        before = next(images)
        _, height, width = before.shape
        chip = torch.Generator().manual_seed(_CHIP)
        spread = torch.randn(2, height, width, generator=chip, dtype=torch.float64).to(before.dtype)
        off, on = (self.threshold + self.mismatch * spread).clamp_min(self.threshold / 10).flatten(1)
        before = before.flatten(1)
        level = before.clone()
        last = torch.full_like(level, -torch.inf)
        found = []
        for number, image in enumerate(images):
            now = image.flatten(1)
            scene, pixel = ((now - level >= on) | (level - now >= off)).nonzero(as_tuple=True)
            while len(scene):
                start, end, base = before[scene, pixel], now[scene, pixel], level[scene, pixel]
                brighter = end > base
                crossed = torch.where(brighter, base + on[pixel], base - off[pixel])
                share = ((crossed - start) / (end - start)).clamp(0.0, 1.0)
                time = (number + share) * step_us
                sent = time - last[scene, pixel] >= self.refractory_us
                level[scene, pixel] = crossed
                last[scene[sent], pixel[sent]] = time[sent]
                found.append(torch.stack([scene, pixel, brighter.long(), time.round().long()])[:, sent])
                again = (end - crossed >= on[pixel]) | (crossed - end >= off[pixel])
                scene, pixel = scene[again], pixel[again]
            before = now
            duration = (number + 1) * step_us
        found.append(self._noise(height * width, duration, noise))
        scene, pixel, polarity, moment = torch.cat(found, dim=1)
        order = (scene * (int(duration) + 2) + moment).argsort(stable=True)
        pixel = pixel[order]
        columns = [part.int().numpy() for part in (pixel % width, pixel // width, polarity[order], moment[order])]
        ends = torch.bincount(scene, minlength=len(noise)).cumsum(0).tolist()
        return [Events(*(part[a:b] for part in columns)) for a, b in zip([0, *ends], ends, strict=False)]

    def _noise(self, pixels: int, duration: float, noise: SampleGenerator) -> Tensor:
        """Draw Poisson processes: waiting times are exponential. Returns scene, pixel, polarity, time, (4, E)."""
        time = torch.zeros(len(noise), pixels, dtype=torch.float64)
        found = [torch.zeros(4, 0, dtype=torch.int64)]
        for event in count():
            if self.noise_hz == 0 or not bool((time < duration).any()):
                return torch.cat(found, dim=1)
            draw = noise.fork("noise", event).uniform(time, 0.0, 2.0)  # whole part: polarity, the rest: waiting time
            time = time - (1.0 - draw.frac()).log() * (1e6 / self.noise_hz)
            scene, pixel = (time < duration).nonzero(as_tuple=True)
            found.append(torch.stack([scene, pixel, draw[scene, pixel].long(), time[scene, pixel].round().long()]))
        raise AssertionError("unreachable")  # pragma: no cover
