"""Saving memory changes nothing else, and leaves no trace."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.backbones.base import OverTime
from sg_lightning.callbacks import SaveMemory, SparseGradient
from sg_lightning.modules import AdversarialClassifier, SpikingClassifier
from sg_lightning.neurons import LIF, compact
from sg_lightning.threats import Linf


def data():
    generator = torch.Generator().manual_seed(3)
    return DataLoader(
        TensorDataset(torch.rand(64, 1, 16, 16, generator=generator), torch.randint(4, (64,), generator=generator)), 32
    )


def module():
    torch.manual_seed(7)
    return SpikingClassifier(ConvNet(4, 1, 16, channels=(8, 8), hidden=12, time_steps=3, neuron=LIF(0.5)))


class Foreign(pl.LightningModule):
    """Somebody else's module without a network of ours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self((x > 0.5).float()), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, *callbacks, **options):
    trainer = pl.Trainer(
        max_epochs=2, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, **options,
    )  # fmt: skip
    trainer.fit(model, data())
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("what", [None, "norms", "blocks"])
def test_training_is_the_same(what, precision, monkeypatch):
    packed = []
    true_pack = compact.pack
    monkeypatch.setattr(compact, "pack", lambda t: packed.append(true_pack(t)) or packed[-1])
    saver, penalty = SaveMemory(recompute=what), SparseGradient(0.1)
    found = fit(module(), penalty, saver, precision=precision)
    assert any(isinstance(kept, compact.Packed) for kept in packed)
    usual = fit(module(), SparseGradient(0.1), precision=precision)
    for (name, a), b in zip(usual.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(part.recompute is None for part in found.modules() if isinstance(part, OverTime))


def test_adversarial_training_is_the_same():
    def attacked():
        torch.manual_seed(7)
        net = ConvNet(4, 1, 16, channels=(8, 8), hidden=12, time_steps=3, neuron=LIF(0.5))
        return AdversarialClassifier(net, attack=PGD(Linf(0.1), steps=2))

    usual, found = fit(attacked()), fit(attacked(), SaveMemory(recompute="blocks"))
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), found.parameters(), strict=True))


def test_other_modules_too():
    usual, found = fit(Foreign()), fit(Foreign(), SaveMemory())
    assert all(torch.equal(a, b) for a, b in zip(usual.parameters(), found.parameters(), strict=True))
    with pytest.raises(ValueError, match="Foreign has no OverTime inside"):
        fit(Foreign(), SaveMemory(recompute="blocks"))


def test_an_error_leaves_nothing_behind():
    class Breaks(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            raise RuntimeError("stop")

    model, saver = module(), SaveMemory(recompute="blocks")
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, saver, Breaks())
    assert all(part.recompute is None for part in model.modules() if isinstance(part, OverTime))
    weight, spikes = torch.ones(1, requires_grad=True), torch.zeros(2 * compact.LEAST)
    assert (weight * spikes).grad_fn._saved_other.data_ptr() == spikes.data_ptr()  # not packed, the very tensor


def test_an_epoch_cut_short_ends_the_packing():
    class Skips(Foreign):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    found = fit(Skips(), SaveMemory())
    assert all(torch.equal(a, b) for a, b in zip(Foreign().parameters(), found.parameters(), strict=True))
    weight, spikes = torch.ones(1, requires_grad=True), torch.zeros(2 * compact.LEAST)
    assert (weight * spikes).grad_fn._saved_other.data_ptr() == spikes.data_ptr()


def test_mistakes():
    with pytest.raises(ValueError, match="recompute must be"):
        SaveMemory(recompute="everything")
