"""Evaluate any PyTorch model, from a checkpoint, and export the adversarial images.

You will see: a plain torch model (no spikes, no Lightning) trained and saved; its table of accuracies under four norms,
made from the checkpoint alone; what is in the exported files; and how well its adversarial images fool another network.
A few seconds on one CPU core: python examples/03_evaluate_any_model.py --samples 64
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from sg_lightning import evaluate
from sg_lightning.datamodules import Digits


def network(width: int) -> nn.Module:
    """Yours: images (B, 1, 8, 8) in [0, 1] to logits (B, 10); normalise inside, not in the data."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def trained(width: int, data: Digits, epochs: int) -> nn.Module:
    """Train in the plainest way."""
    model = network(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in (batch for _ in range(epochs) for batch in data.train_dataloader()):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64, help="test images to attack, at most 497")
    parser.add_argument("--out", type=Path, default=Path("runs/any_model"))
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    data = Digits()
    torch.save(trained(128, data, args.epochs).state_dict(), args.out / "model.pt")
    other = trained(64, data, args.epochs)

    model = network(128)
    model.load_state_dict(torch.load(args.out / "model.pt"))
    # Rows are written as they are made: started again, the same evaluation goes on where it stopped.
    result = evaluate(model, data, "quick", max_samples=args.samples, out=args.out / "attacks", keep="all")
    print(f"{result.table()}\n")
    for path in sorted((args.out / "attacks/adversarial").glob("*.pt")):
        found = torch.load(path, mmap=True)
        x_adv, y = found["x_adv"][found["success"]], found["labels"][found["success"]]
        fooled = float((other(x_adv).argmax(1) != y).float().mean())
        print(f"{path}: {len(y)} of {len(found['ids'])} succeed; {fooled:.0%} of these fool another network")


if __name__ == "__main__":
    main()
