"""A resumed training is the uninterrupted one to the bit: weights, optimiser, data order, augmentation, attack noise."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.callbacks import RobustnessEvaluation, SparseGradient
from sg_lightning.datamodules import Digits
from sg_lightning.datamodules.base import SeededShuffle
from sg_lightning.encoding import Poisson
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.threats import Linf


class FewDigits(Digits):
    """72 training images; shifted and mirrored, to see that augmentation resumes too."""

    shift, mirror = 1, True

    def __init__(self, batch_size=16, **options):
        super().__init__(batch_size, **options)
        self.augment = True

    def _split(self):
        train, val, test = super()._split()
        return train.part(torch.arange(72)), val.part(torch.arange(8)), test

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            seen.append(batch[0])
        return batch


seen = []


def module():
    """Spikes drawn anew at every call, dropout, random starts: all that may be random in a step."""
    torch.manual_seed(7)
    net = ConvNet(channels=(4,), hidden=8, encoding=Poisson(2))
    net.features.append(nn.Dropout(0.2))
    return AdversarialClassifier(
        net,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        attack=PGD(Linf("2/16"), steps=2),
    )


def run(folder, seed, *, ckpt_path=None, data=None, every=None, monitor=True, more=(), **options):
    """Fit; return weights and optimiser state, and what the steps saw."""
    seen.clear()
    net = module()
    pl.seed_everything(seed, verbose=False)
    torch.rand(seed)  # another history of draws
    callbacks = [
        SparseGradient(0.05),
        ModelCheckpoint(folder, save_last=True, every_n_train_steps=every),
        *([RobustnessEvaluation("quick", max_samples=4)] if monitor else []),
        *more,
    ]
    trainer = pl.Trainer(
        callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(net, data or FewDigits(), ckpt_path=ckpt_path)
    moments = [s["momentum_buffer"] for o in trainer.optimizers for s in o.state_dict()["state"].values()]
    return [*net.state_dict().values(), *moments], list(seen), trainer


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_epochs_and_two_more_are_four(tmp_path, workers):
    data = {"data": FewDigits(num_workers=workers)}
    whole, inputs, trainer = run(tmp_path / "a", 1, max_epochs=4, **data)
    run(tmp_path / "b", 1, max_epochs=2, monitor=False, **data)
    # Another seed of the process, another callback that draws: neither may matter.
    rest, later, resumed = run(tmp_path / "b", 5, max_epochs=4, ckpt_path=tmp_path / "b/last.ckpt", **data)
    assert same(later, inputs[len(inputs) // 2 :])
    assert same(rest, whole)
    assert resumed.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
    other, _, _ = run(tmp_path / "c", 2, max_epochs=4)
    assert not same(other, whole)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 7), (2, 4)])
def test_from_the_middle_of_an_epoch(tmp_path, accumulate, steps):
    options = {"monitor": False, "accumulate_grad_batches": accumulate}
    whole, inputs, _ = run(tmp_path / "a", 1, max_epochs=2, **options)
    run(tmp_path / "b", 1, max_steps=steps, every=1, **options)
    assert len(seen) == 7
    rest, later, _ = run(tmp_path / "b", 5, max_epochs=2, ckpt_path=tmp_path / "b/last.ckpt", **options)
    assert len(inputs) == 10
    assert same(later, inputs[7:])
    assert same(rest, whole)


class Keep(pl.Callback):
    def __init__(self, folder, name):
        self.path = folder / name

    def on_train_end(self, trainer, pl_module):
        torch.save([list(pl_module.state_dict().values()), seen], f"{self.path}{trainer.global_rank}.pt")


def test_two_processes(tmp_path):
    """Forked processes; the seed of the process is the parent's, and the second run has another."""
    options = {"devices": 2, "strategy": "ddp_fork", "monitor": False}
    for name, seed, epochs, path in (
        ("whole", 1, 2, None),
        ("half", 1, 1, None),
        ("rest", 5, 2, tmp_path / "half/last.ckpt"),
    ):
        run(tmp_path / name, seed, max_epochs=epochs, ckpt_path=path, more=[Keep(tmp_path, name)], **options)
    for rank in (0, 1):
        whole, half, rest = (torch.load(tmp_path / f"{name}{rank}.pt") for name in ("whole", "half", "rest"))
        assert same(rest[0], whole[0])
        assert same(half[1] + rest[1], whole[1])
        assert len(whole[1]) == 6  # 36 of 72 images for each, in batches of 16
    # Together they saw, shifted and mirrored alike, what one process with twice the batch sees.
    zero, one = (torch.load(tmp_path / f"whole{rank}.pt")[1] for rank in (0, 1))
    _, alone, _ = run(tmp_path / "alone", 1, max_epochs=2, data=FewDigits(32), monitor=False)
    assert same([torch.stack(pair, 1).flatten(0, 1) for pair in zip(zero, one, strict=True)], alone)


def test_processes_share_each_epoch():
    data = FewDigits().train_set.part(torch.arange(7))
    shares = [SeededShuffle(data, 3, 2, rank) for rank in (0, 1)]
    alone = SeededShuffle(data, 3)
    for _ in range(2):
        zero, one, whole = list(shares[0]), list(shares[1]), list(alone)
        assert len(zero) == len(one) == 4
        assert sorted({*zero, *one}) == sorted(whole) == list(range(7))
        assert whole[::2] == zero
    assert list(SeededShuffle(data, 4)) != list(SeededShuffle(data, 3))
