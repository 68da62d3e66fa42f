"""Train four small spiking networks, attack them under four norms, write an HTML report.

You will see: four training runs (vanilla; SR, the sparse-gradient penalty; AT, adversarial training; AT+SR) of a
spiking ConvNet on handwritten digits, a progress bar per attack run, one summary table, and the path of the report.
About four minutes on two CPU cores: python examples/demo.py --out runs/demo
"""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sg_lightning import SparseGradient, SpikingClassifier, evaluate
from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.datamodules import Digits
from sg_lightning.evaluation import RobustnessResult
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.objectives import input_gradient_metrics
from sg_lightning.reporting import write_report
from sg_lightning.threats import Linf


@dataclass(frozen=True)
class Method:
    """One row of the report: the weight of the sparse-gradient penalty, and whether to train on attacked images."""

    penalty: float = 0.0
    adversarial: bool = False


METHODS = {
    "vanilla": Method(),
    "SR": Method(penalty=0.02),
    "AT": Method(adversarial=True),
    "AT+SR": Method(penalty=0.01, adversarial=True),
}
TRAIN_EPS = "2/16"  # two of the sixteen grey levels, the headline budget of Digits


class History(Callback):
    """Keep one number per epoch for the training curves of the report."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy what was logged."""
        for name in ("train/loss", "val/loss", "train/acc", "val/acc"):
            if name in trainer.callback_metrics:
                self.values.setdefault(name, []).append(float(trainer.callback_metrics[name]))


def train(
    method: Method, data: Digits, epochs: int, seed: int
) -> tuple[SpikingClassifier, dict[str, list[float]], float]:
    """Train one network; every method starts from the same weights and sees the same batches."""
    seed_everything(seed, verbose=False)
    options = {
        "optimizer": lambda parameters: AdamW(parameters, lr=5e-3),
        "lr_scheduler": lambda optimizer: CosineAnnealingLR(optimizer, epochs),
    }
    if method.adversarial:
        attack = PGD(Linf(TRAIN_EPS), steps=5)
        module: SpikingClassifier = AdversarialClassifier(ConvNet(), attack=attack, **options)
    else:
        module = SpikingClassifier(ConvNet(), **options)
    history = History()
    callbacks: list[Callback] = [history]
    if method.penalty:
        callbacks.append(SparseGradient(weight=method.penalty))
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(module, data)
    return module, history.values, time.perf_counter() - started


def main() -> None:
    """Run the whole demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the report and the results")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default="basic", help="quick, basic, or the path of a suite YAML")
    parser.add_argument("--samples", type=int, default=200, help="test images to attack, at most 497")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    data = Digits(seed=args.seed)
    data.setup("test")
    images, labels = (torch.stack(part) if isinstance(part[0], torch.Tensor) else torch.tensor(part) for part in
                      zip(*(data.test_dataloader().dataset[i] for i in range(256)), strict=True))  # fmt: skip
    results: dict[str, RobustnessResult] = {}
    histories, gradients, seconds = {}, {}, {}
    for number, (name, method) in enumerate(METHODS.items(), start=1):
        print(f"\n[{number}/{len(METHODS)}] {name}: training", file=sys.stderr)
        module, histories[name], seconds[name] = train(method, data, args.epochs, args.seed)
        print(f"[{number}/{len(METHODS)}] {name}: attacking", file=sys.stderr)
        results[name] = evaluate(module, data, suite=args.suite, seed=args.seed, max_samples=args.samples)
        module.eval()
        gradients[name] = input_gradient_metrics(module, images, labels)
    for name, result in results.items():
        print(f"\n{name} (trained in {seconds[name]:.0f} s)\n{result.table()}")
        result.save(args.out / "results" / name.lower().replace("+", "_"))

    report = write_report(
        results,
        args.out,
        title="Does sparse-gradient training transfer across norms? A demonstration on digits",
        settings={
            "data": "Digits (scikit-learn, 8 x 8 pixels, 16 grey levels)",
            "model": "ConvNet 32-64, 128 hidden, LIF neurons, 4 time steps, direct coding",
            "training": f"{args.epochs} epochs AdamW lr 5e-3 cosine, batch 64, seed {args.seed}; "
            f"AT: PGD-5, L-infinity eps {TRAIN_EPS}",
            "penalty weights": {name: method.penalty for name, method in METHODS.items()},
            "training seconds": {name: round(value, 1) for name, value in seconds.items()},
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
        },
        gradient_metrics=gradients,
        histories=histories,
    )
    print(f"\nReport: {report}")


def commit() -> str:
    """Name the commit that made the figures, if this is a git checkout."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
