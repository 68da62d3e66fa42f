"""An attacked event sample, step by step, as an animated picture."""

from __future__ import annotations

import io

import numpy as np
from torch import Tensor

from sg_lightning._optional import require
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.reporting import summary
from sg_lightning.reporting.pictures import attacked, is_events

_PAPER, _INK = (255, 255, 255), (74, 83, 97)
_ADDED, _GONE, _OFF = (178, 24, 43), (33, 102, 172), (160, 170, 182)


def animation(result: RobustnessResult, *, width: int = 160, seconds_per_step: float = 0.2) -> bytes | None:
    """Animate the first kept example that is a sequence of event frames (T, C, H, W).

    Three panels a step: the clean events, the adversarial ones, and what changed. Dark: on, pale: off (of two
    polarities); red: added; blue: taken away.

    Args:
        result: An evaluation that kept examples.
        width: Width of a panel in pixels, at least that of the sensor.
        seconds_per_step: How long a step is shown.

    Returns:
        An animated GIF, or ``None`` if no example is a sequence of frames.

    Raises:
        ImportError: Pillow is not installed (it comes with matplotlib).
    """
    for example in summary.examples(result):
        _, clean, adversarial = attacked(example)
        if clean.dim() == 4 and is_events(clean) and is_events(adversarial):
            return _gif(clean, adversarial, width, seconds_per_step)
    return None


def _gif(clean: Tensor, adversarial: Tensor, width: int, seconds: float) -> bytes:
    image = require("PIL.Image", "report", "drawing an animation")
    scale = max(width // clean.shape[-1], 1)
    steps = []
    for before, after in zip(clean.cpu().numpy(), adversarial.cpu().numpy(), strict=True):
        added, gone = (after > before).any(0), (after < before).any(0)
        changed = np.full((*added.shape, 3), _PAPER, dtype=np.uint8)
        changed[gone], changed[added] = _GONE, _ADDED
        marked = _events(after)
        marked[added] = _ADDED
        panels = [panel.repeat(scale, 0).repeat(scale, 1) for panel in (_events(before), marked, changed)]
        gap = np.full((panels[0].shape[0], 6, 3), 227, dtype=np.uint8)
        steps.append(image.fromarray(np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)))
    buffer = io.BytesIO()
    steps[0].save(
        buffer, format="GIF", save_all=True, append_images=steps[1:], duration=round(1000 * seconds), loop=0, disposal=2
    )
    return buffer.getvalue()


def _events(frame: np.ndarray) -> np.ndarray:
    """Draw a frame (C, H, W) as colours (H, W, 3)."""
    drawn = np.full((*frame.shape[1:], 3), _PAPER, dtype=np.uint8)
    drawn[frame.sum(0) > 0] = _INK
    if len(frame) == 2:  # channel 0 is off, 1 is on, as everywhere
        drawn[frame[0] > frame[1]] = _OFF
    return drawn
