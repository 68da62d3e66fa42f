"""Train your snnTorch network with the sparse-gradient penalty and attack it.

You will see: an ordinary snnTorch network, which does one time step per call, turned into a function from images to
logits; its training; a table of what is left of it under four norms; and one attack called by hand.
About ten seconds on one CPU core: python examples/02_your_snntorch_net.py --epochs 5
"""

import argparse

import lightning as L
import snntorch as snn
import torch
from snntorch import surrogate
from torch import nn

from sg_lightning import SparseGradient, SpikingClassifier, evaluate
from sg_lightning.attacks import PGD
from sg_lightning.datamodules import Digits
from sg_lightning.neurons import from_snntorch
from sg_lightning.threats import Linf


def your_net() -> nn.Module:
    """Yours: any network of snnTorch neurons."""
    spike_grad = surrogate.fast_sigmoid(slope=10)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        snn.Leaky(beta=0.9, init_hidden=True, spike_grad=spike_grad),
        nn.Linear(128, 10),
        snn.Leaky(beta=0.9, init_hidden=True, spike_grad=spike_grad, output=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64, help="test images to attack, at most 497")
    args = parser.parse_args()
    L.seed_everything(0)
    data = Digits()

    # The hidden state is cleared around every call, so that attack steps do not see each other. The largest membrane
    # potential as logits gives better gradients than counts of few spikes.
    net = from_snntorch(your_net(), time_steps=5, readout="max_membrane")
    module = SpikingClassifier(net, lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    trainer = L.Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[SparseGradient(0.01)], logger=False,
                        enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, data)
    print(evaluate(net, data, "quick", max_samples=args.samples).table())

    x, y = next(iter(data.test_dataloader()))
    module.eval()
    before, after = (float((net(images).argmax(1) == y).float().mean()) for images in (x, PGD(Linf("1/16"))(net, x, y)))
    print(f"\nBy hand, {len(y)} images: accuracy {before:.0%}, after PGD(Linf('1/16')) {after:.0%}")


if __name__ == "__main__":
    main()
