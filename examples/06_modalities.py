"""Train on image, events and sound of a digit at once, then attack one of them: do the others keep the decision?

You will see: a spiking network of three encoders train with the sparse-gradient penalty; its table under attacks on the
image, on the events, on the sound, and on all of them; what the same attack does to the sound where nothing else is heard
or seen; and a report with pictures of what was changed. Events and sound are stand-ins: a simulated event camera and
synthetic speech. About half a minute on one CPU core: python examples/06_modalities.py --epochs 8
"""

import argparse
from pathlib import Path

import lightning as L
import torch

from sg_lightning import SparseGradient, SpikingClassifier, evaluate
from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet, FusionNet, SpikingMLP
from sg_lightning.datamodules import MultimodalDigits
from sg_lightning.encoding import Frames
from sg_lightning.neurons import LIF
from sg_lightning.reporting import write_report
from sg_lightning.threats import EventFlips, Modality

ASKED = ("image_linf", "events_flips", "audio_flips", "joint")  # joint shares the other three


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64, help="test pairs to attack, at most 497")
    parser.add_argument("--out", type=Path, default=Path("runs/modalities"))
    args = parser.parse_args()
    L.seed_everything(0)
    data = MultimodalDigits(drop=0.2)  # batches ({"image": ..., "events": ..., "audio": ...}, y)
    encoders = {
        "image": ConvNet(channels=(16, 32), hidden=64),
        "events": ConvNet(channels=(8, 16), hidden=64, encoding=Frames(), neuron=LIF(beta=0.9)),
        "audio": SpikingMLP(1, (128,), neuron=LIF(beta=0.9)),
    }
    net = FusionNet(encoders, fusion="gated", hidden=64, sizes=data.sizes)  # pixels, channels, steps: from the data
    module = SpikingClassifier(net, lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    penalty = SparseGradient(0.003, step_size={"image": 0.01, "events": 0.1, "audio": 0.1})
    trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[penalty], logger=False,
                        enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, data)
    budgets = {name: data.budgets[name] for name in ASKED}
    result = evaluate(module, data, "quick", budgets=budgets, max_samples=args.samples)
    print(f"{result.table()}\n")
    x, y = next(iter(data.test_dataloader()))
    module.eval()
    attack = PGD(Modality("audio", EventFlips("5%")), steps=10)
    for name, given in (("sound alone", {"audio": x["audio"]}), ("image, events and sound", x)):
        before, after = (float((module(z).argmax(1) == y).float().mean()) for z in (given, attack(module, given, y)))
        print(f"{name}: accuracy {before:.0%}, with 5% of the sound's spikes flipped {after:.0%}")
    print(f"\nReport: {write_report({'fusion': result}, args.out)}")


if __name__ == "__main__":
    main()
