"""What every event-camera data module shares: frames, their domain and their budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from sg_lightning.datamodules.base import SampleData
from sg_lightning.datamodules.slicing import Frames, Slicing, Values
from sg_lightning.threats import Budget, Budgets

# Shares of each sample's events, because recordings differ in length; the values of the project's protocol.
SHARES = ("0.1%", "0.25%", "0.5%", "1%", "2%")
RECORDED: Budgets = {
    "flips": Budget(
        eps=SHARES,
        headline="0.5%",
        reason="One event in 200 added or deleted: fewer than an event camera adds by itself as noise.",
    ),
    "retime_inf": Budget(
        eps=(1, 2, 3),
        headline=1,
        reason="Every event may come one frame earlier or later, the least that can be changed.",
    ),
    "retime_0": Budget(
        eps=("1%", "2%", "5%"), headline="2%", reason="One non-empty cell in 50 may move to another frame of its pixel."
    ),
    "retime_1": Budget(
        eps=("1%", "2%", "5%"),
        headline="2%",
        reason="As many frames of shift in all as one non-empty cell in 50 makes.",
    ),
}


class EventData(SampleData):
    """Base of the event-camera data modules; a subclass brings the recordings.

    Args:
        batch_size: Samples per batch, at least 1.
        time_steps: Number of frames T, at least 1.
        frames: ``"number"``: frames of equal number of events; ``"time"``: frames of equal duration.
        values: ``"counts"``: a cell counts its events, without a ceiling; ``"binary"``: it is 1 if it has any.
        merge_polarity: Count brighter and darker together (C = 1).
        size: Height and width of the frames.
        num_workers: Loader processes; 0 is usually fastest.
        val_fraction: Share of the training samples that validates, above 0 and below 1.
        seed: Seed of the validation split and of the training order.

    Attributes:
        in_channels: Channels C of a frame, for the network.
        input_size: Height and width of a frame, for the network.
        time_steps: Number of frames T, for the network.
        input_shape: (T, C, H, W).
        domain: ``Counts()`` or ``Binary()``.
        budgets: The budgets that attacks use by default: events added or deleted, events that move in time.

    Shape:
        Batches of frames (B, T, C, H, W), float32 whole numbers, and labels (B,), int64.

    Raises:
        ValueError: on an argument outside its range.
    """

    num_classes: ClassVar[int] = 10
    noun: ClassVar[str] = "recordings"
    usual_budgets: ClassVar[Budgets] = RECORDED

    def __init__(
        self,
        batch_size: int,
        *,
        time_steps: int,
        frames: Frames,
        values: Values,
        merge_polarity: bool,
        size: int,
        num_workers: int,
        val_fraction: float,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers, val_fraction=val_fraction, seed=seed)
        self.slicing = Slicing(time_steps, frames, values, merge_polarity)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer >= 1, the height and width of the frames, got {size!r}")
        self.input_size = size
        self.in_channels = self.slicing.channels
        self.time_steps = time_steps
        self.input_shape = self.slicing.shape(size)
        self.domain = self.slicing.domain
        self.budgets = _possible(self.usual_budgets, lambda norm, eps: norm != "retime_inf" or int(eps) < time_steps)


def _possible(budgets: Budgets, keep: Callable[[str, float | str], bool]) -> Budgets:
    """Leave out what frames so few do not allow; a norm whose headline is left out goes too."""
    found = {}
    for norm, budget in budgets.items():
        eps = tuple(value for value in budget.eps if keep(norm, value))
        if any(budget.is_headline(value) for value in eps):
            found[norm] = Budget(eps, budget.headline, budget.reason)
    return found
