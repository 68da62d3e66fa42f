"""What the classifier logs, stores and refuses."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.backbones import Backbone, ConvNet, SpikingMLP
from sg_lightning.domains import Binary, Box
from sg_lightning.modules import SpikingClassifier
from sg_lightning.neurons import LIF


def network(**options):
    torch.manual_seed(1)
    return ConvNet(4, 1, 4, channels=(6,), hidden=12, time_steps=2, neuron=LIF(0.9), **options)


def data(samples=10, classes=4):
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(samples, 1, 4, 4, generator=generator)
    return x, torch.randint(classes, (samples,), generator=generator)


def loader(x, y, batch_size=4):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(**options):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**defaults, **quiet, **options})


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def test_logged_values_are_those_of_all_samples_together():
    # 10 samples in batches of 4, 4 and 2: a mean of batch means would be another number.
    module = SpikingClassifier(network(), still)
    x, y = data()
    (logged,) = trainer().test(module, loader(x, y), verbose=False)
    module.eval()
    with torch.no_grad():
        logits = module(x)
    assert logged["test/loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-6)
    assert logged["test/acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item(), rel=1e-6)
    assert 0 < logged["test/acc"] < 1
    run = trainer()
    run.fit(module, loader(x, y), loader(x, y))
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(run.callback_metrics)
    predicted = torch.cat(run.predict(module, loader(x, y)))
    with torch.no_grad():
        assert torch.allclose(predicted, module.eval()(x), atol=1e-6)
    assert torch.allclose(torch.cat(run.predict(module, DataLoader(x, batch_size=5))), predicted, atol=1e-6)


def test_training_equals_a_loop_by_hand_with_label_smoothing():
    x, y = data()
    module = SpikingClassifier(network(), lambda p: torch.optim.SGD(p, lr=0.1), label_smoothing=0.1)
    run = trainer(max_epochs=2)
    run.fit(module, loader(x, y), loader(x, y))
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        for bx, by in loader(x, y):
            optimizer.zero_grad()
            cross_entropy(net(bx), by, label_smoothing=0.1).backward()
            optimizer.step()
    for ours, theirs in zip(module.backbone.parameters(), net.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    net.eval()
    with torch.no_grad():
        assert run.callback_metrics["val/loss"].item() == pytest.approx(cross_entropy(net(x), y).item(), rel=1e-4)


def test_two_processes_log_the_same_as_one(tmp_path):
    x, y = data(10)

    class Uneven(torch.utils.data.Sampler):
        def __init__(self, rank):
            self.rows = range(7) if rank == 0 else range(7, 10)

        def __iter__(self):
            return iter(self.rows)

        def __len__(self):
            return len(self.rows)

    class Data(pl.LightningDataModule):
        def test_dataloader(self):
            return DataLoader(TensorDataset(x, y), batch_size=4, sampler=Uneven(self.trainer.global_rank))

    class Save(pl.Callback):
        def on_test_end(self, trainer, pl_module):
            if trainer.global_rank == 0:
                torch.save({k: v.item() for k, v in trainer.callback_metrics.items()}, tmp_path / "metrics.pt")

    run = trainer(strategy="ddp_fork", devices=2, use_distributed_sampler=False, callbacks=[Save()])
    run.test(SpikingClassifier(network(), still), datamodule=Data(), verbose=False)
    (alone,) = trainer().test(SpikingClassifier(network(), still), loader(x, y), verbose=False)
    together = torch.load(tmp_path / "metrics.pt")
    assert together["test/acc"] == pytest.approx(alone["test/acc"], rel=1e-6)
    assert together["test/loss"] == pytest.approx(alone["test/loss"], rel=1e-5)


def test_optimisers_and_schedulers():
    default = SpikingClassifier(network()).configure_optimizers()
    assert isinstance(default, torch.optim.AdamW)
    assert default.defaults["lr"] == 1e-3
    stepped = SpikingClassifier(
        network(), still, lambda o: torch.optim.lr_scheduler.StepLR(o, 1)
    ).configure_optimizers()
    assert isinstance(stepped["lr_scheduler"]["scheduler"], torch.optim.lr_scheduler.StepLR)
    x, y = data()
    plateau = SpikingClassifier(
        network(),
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    )
    run = trainer(max_epochs=8)
    run.fit(plateau, loader(x, y), loader(x, y))
    assert run.optimizers[0].param_groups[0]["lr"] < 1.0


# -- checkpoints of the command line; those of Python are in test_checkpoints.py ----------------------------------------


def test_checkpoint_of_the_cli_loads_without_arguments(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(*data())

    arguments = [
        "fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}",
        "--model.backbone=ConvNet", "--model.backbone.num_classes=4", "--model.backbone.input_size=4",
        "--model.backbone.channels=[6]", "--model.backbone.hidden=11",
        "--model.optimizer=SGD", "--model.optimizer.lr=0.05", "--model.label_smoothing=0.3",
    ]  # fmt: skip
    cli = LightningCLI(
        SpikingClassifier, Data, args=arguments, auto_configure_optimizers=False, save_config_callback=None
    )
    optimizer = cli.trainer.optimizers[0]
    assert optimizer.defaults["lr"] == 0.05
    assert optimizer.defaults["weight_decay"] == 0.0  # nothing of the default optimiser leaks in
    path = tmp_path / "cli.ckpt"
    cli.trainer.save_checkpoint(path)
    loaded = SpikingClassifier.load_from_checkpoint(path).eval()
    x, _ = data()
    with torch.no_grad():
        assert torch.equal(loaded(x), cli.model.eval()(x))
    assert loaded.label_smoothing == 0.3
    assert (loaded.backbone.num_classes, loaded.backbone.head.in_features) == (4, 11)
    again = loaded.configure_optimizers()  # of the CLI's partial
    assert (type(again), again.defaults["lr"], again.defaults["weight_decay"]) == (torch.optim.SGD, 0.05, 0.0)


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"backbone must be a torch\.nn\.Module .* got function"):
        SpikingClassifier(lambda x: x)
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
            SpikingClassifier(network(), label_smoothing=value)


class Softmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x).softmax(1)


class Pair(Softmax):
    def forward(self, x):
        return self.net(x), x


class Column(Softmax):
    def forward(self, x):
        return self.net(x)[:, 0]


class Broken(Softmax):
    def forward(self, x):
        return self.net(x) * math.nan


X, Y = data()
BAD_DATA = {
    "normalised": (network, (X * 4 - 2, Y), r"x of the first \w+ batch has values in .* domain is Box \[0, 1\]"),
    "nan": (network, (X.masked_fill(X > 0.9, math.nan), Y), "holds .* NaN or infinite values"),
    "bytes": (network, ((X * 255).byte(), Y), "has dtype torch.uint8; convert it to float32"),
    "label too large": (network, (X, Y + 1), r"labels must be in 0\.\.3 for 4 classes, got 1\.\.4"),
    "label negative": (network, (X, Y - 1), r"labels must be in 0\.\.3 for 4 classes, got -1"),
    "one-hot": (network, (X, torch.eye(4)[Y]), "labels must be class indices"),
    "shape": (network, (X[..., :3], Y), r"built for inputs of shape \(B, 1, 4, 4\), got \(4, 1, 4, 3\)"),
    "three columns": (network, (X, Y, Y), r"needs batches \(x, y\), got a list of 3"),
    "probabilities": (Softmax, (X, Y), "Softmax returns probabilities .* Remove the softmax"),
    "tuple": (Pair, (X, Y), "Pair must return logits, .* returned tuple"),
    "vector": (Column, (X, Y), r"Column must return float logits of shape \(B, K\)"),
    "nan logits": (Broken, (X, Y), "Broken returned NaN or infinite logits"),
    "unknown classes": (Softmax, (X, Y + 1), r"labels must be in 0\.\.3"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_bad_first_batch(case, stage):
    make, columns, message = BAD_DATA[case]
    module = SpikingClassifier(make(), still)
    rows = DataLoader(TensorDataset(*columns), batch_size=4)
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(trainer(), stage)(module, rows)


def test_domain_is_that_of_the_backbone():
    torch.manual_seed(0)
    spikes, y = (torch.rand(6, 5, 8) > 0.5).float(), torch.randint(3, (6,))
    module = SpikingClassifier(SpikingMLP(8, (6,), 3, time_steps=5), still)
    assert isinstance(module.backbone.domain, (Binary, Box))
    trainer().test(module, loader(spikes, y), verbose=False)
    with pytest.raises(ValueError, match="values"):
        trainer().test(module, loader(spikes * 1.5, y), verbose=False)


def test_any_module_will_do_in_python():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    run = trainer()
    run.fit(SpikingClassifier(net), loader(X * 10, Y))  # no domain known, so any finite values
    assert math.isfinite(run.callback_metrics["train/loss"].item())


def test_samples_do_not_line_up():
    module = SpikingClassifier(network(), still)
    rows = DataLoader([(X[:4], Y[:3])], batch_size=None)
    with pytest.raises(ValueError, match="has 4 samples but there are 3 labels"):
        trainer().test(module, rows)


def test_backbone_is_the_type_offered_in_configs():
    assert SpikingClassifier.__init__.__annotations__["backbone"] == Backbone.__name__
