"""The models that the attack benchmark attacks: trained here, with a fixed seed, and kept in benchmarks/cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sg_lightning.attacks import PGD, Oracle
from sg_lightning.backbones import VGG, ConvNet
from sg_lightning.datamodules import CIFAR10, Digits, FashionMNIST, ImageData
from sg_lightning.encoding import Poisson
from sg_lightning.threats import Linf

CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Subject:
    """A model, how it is trained, and the budgets at which about half of the samples survive."""

    title: str
    build: Callable[[], nn.Module]
    size: int
    epochs: int
    train_eps: float
    steps: int
    eps: dict[str, float]
    samples: int
    data: Callable[[str], ImageData] = lambda folder: Digits(seed=0)
    train_samples: int | None = None


SUBJECTS = {
    "convnet": Subject(
        title="ConvNet: 2 convolutions (16, 32), 64 hidden, LIF, T = 8, direct coding; digits at 28 x 28, PGD-3 training",
        build=lambda: ConvNet(input_size=28, channels=(16, 32), hidden=64, time_steps=8),
        size=28, epochs=6, train_eps=0.1, steps=3, eps={"linf": 0.1, "l2": 1.5, "l1": 12.0}, samples=32,
    ),
    "vgg5": Subject(
        title="VGG-5: 3 convolutions (64, 128, 128), 128 hidden, LIF, T = 4, direct coding; digits at 8 x 8, PGD-2 training",
        build=lambda: VGG("vgg5", in_channels=1, input_size=8, time_steps=4, head=(128,)),
        size=8, epochs=3, train_eps=0.1, steps=2, eps={"linf": 0.1, "l2": 0.6, "l1": 2.5}, samples=32,
    ),
    "tiny": Subject(
        title="A tiny ConvNet, to try the benchmark itself",
        build=lambda: ConvNet(channels=(4, 8), hidden=16, time_steps=2),
        size=8, epochs=1, train_eps=0.05, steps=1, eps={"linf": 0.05, "l2": 0.3, "l1": 1.0}, samples=8,
    ),
    "digits": Subject(
        title="ConvNet: 2 convolutions (32, 64), 128 hidden, LIF, T = 4, direct coding; digits at 8 x 8, PGD-5 training",
        build=ConvNet, size=8, epochs=20, train_eps=2 / 16, steps=5, eps={"linf": 2 / 16}, samples=128,
    ),
    "digits-poisson": Subject(
        title="ConvNet: 2 convolutions (32, 64), 128 hidden, LIF, T = 8, Poisson coding; digits at 8 x 8, PGD-3 training",
        build=lambda: ConvNet(encoding=Poisson(8)),
        size=8, epochs=20, train_eps=2 / 16, steps=3, eps={"linf": 2 / 16}, samples=64,
    ),
    "fashion": Subject(
        title="ConvNet: 2 convolutions (16, 32), 64 hidden, LIF, T = 4, direct coding; Fashion-MNIST, PGD-3 training",
        build=lambda: ConvNet(input_size=28, channels=(16, 32), hidden=64, mean=0.286, std=0.353),
        size=28, epochs=5, train_eps=0.1, steps=3, eps={"linf": 0.1}, samples=128,
        data=lambda folder: FashionMNIST(folder, seed=0), train_samples=8000,
    ),
    "cifar10": Subject(
        title=(
            "ConvNet: 4 convolutions (16, 32, 64, 64), 128 hidden, LIF, T = 4, direct coding; CIFAR-10, PGD-3 training on "
            "10,000 images: small enough for one core"
        ),
        build=lambda: ConvNet(
            in_channels=3, input_size=32, channels=(16, 32, 64, 64), hidden=128, mean=CIFAR10.mean, std=CIFAR10.std
        ),
        size=32, epochs=12, train_eps=4 / 255, steps=3, eps={"linf": 4 / 255}, samples=128,
        data=lambda folder: CIFAR10(folder, seed=0, augment=False), train_samples=10_000,
    ),
}  # fmt: skip


def prepare(name: str, data_dir: str = "data") -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained model in evaluation mode, and the first test images with their labels."""
    subject = SUBJECTS[name]
    data = subject.data(data_dir)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    images, labels = _tensors(data.test_dataloader().dataset, subject.samples, subject.size)
    torch.manual_seed(0)
    model = subject.build()
    recipe = repr(
        (subject.title, subject.epochs, subject.train_eps, subject.steps, subject.train_samples, torch.__version__)
    )
    path = CACHE / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(model, subject, *_tensors(data.train_dataloader().dataset, subject.train_samples, subject.size))
        CACHE.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval(), images, labels


def validation(name: str, count: int, data_dir: str = "data") -> tuple[Tensor, Tensor]:
    """Return validation images, which neither trained the model nor are reported, with their labels."""
    data = SUBJECTS[name].data(data_dir)
    data.setup("fit")
    return _tensors(data.val_dataloader().dataset, count, SUBJECTS[name].size)


def _tensors(dataset: Any, count: int | None, size: int) -> tuple[Tensor, Tensor]:
    items = [dataset[i] for i in range(min(len(dataset), count or len(dataset)))]
    images = torch.stack([torch.as_tensor(image) for image, _ in items])
    if images.shape[-1] != size:
        images = functional.interpolate(images, size=(size, size), mode="bilinear").clamp(0, 1)
    return images, torch.tensor([int(label) for _, label in items])


def _train(model: nn.Module, subject: Subject, x: Tensor, y: Tensor) -> None:
    """Train adversarially: the budget grows over the first half of the epochs."""
    optimiser = AdamW(model.parameters(), lr=5e-3)
    schedule = CosineAnnealingLR(optimiser, subject.epochs)
    order = torch.Generator().manual_seed(0)
    for epoch in range(subject.epochs):
        eps = subject.train_eps * min(1.0, 2 * (epoch + 1) / subject.epochs)
        attack, right = PGD(Linf(eps), steps=subject.steps), 0
        model.train()
        for index in torch.randperm(len(x), generator=order).split(64):
            attacked = attack.run(Oracle(model), x[index], y[index], goal="loss", generator=order).x_adv
            logits = model(attacked)
            right += int((logits.argmax(1) == y[index]).sum())
            optimiser.zero_grad()
            functional.cross_entropy(logits, y[index]).backward()
            optimiser.step()
        schedule.step()
        print(f"  epoch {epoch + 1}/{subject.epochs}: {right / len(x):.3f} right at eps {eps:.3f}", file=sys.stderr)
