"""Add our two callbacks to a LightningModule that knows nothing of us.

You will see: a small spiking network train on handwritten digits, its robustness measured every few epochs under four
norms (watch the second bar), and the last figures as a table, once without and once with the sparse-gradient penalty.
About ten seconds on one CPU core: python examples/01_callbacks_in_your_project.py --epochs 6
"""

import argparse

import lightning as L
import torch
from torch import nn

from sg_lightning import RobustnessEvaluation, SparseGradient
from sg_lightning.datamodules import Digits
from sg_lightning.neurons import LIF


class YourModule(L.LightningModule):
    """Yours. What the callbacks rely on: batches are (x, y), and self(x) gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.fire, self.out = nn.Linear(64, 128), LIF(beta=0.9), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 10) of images (B, 1, 8, 8) in [0, 1], shown for four time steps."""
        return self.out(self.fire(self.hidden(x.flatten(1)).expand(4, -1, -1)).mean(0))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--weight", type=float, default=0.02, help="of the penalty, in the second run")
    args = parser.parse_args()
    for weight in (0.0, args.weight):
        L.seed_everything(0)
        robustness = RobustnessEvaluation("quick", every_n_epochs=3, max_samples=64)  # budgets: those of the data
        callbacks = [SparseGradient(weight), robustness]
        trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, logger=False,
                            enable_checkpointing=False)  # fmt: skip
        trainer.fit(YourModule(), Digits())
        print(f"\nweight {weight} (64 validation images)\n{robustness.result.table()}\n" if robustness.result else "")


if __name__ == "__main__":
    main()
