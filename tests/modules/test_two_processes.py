"""Two processes train as one with twice the batch: SR, AT and AT+SR, whatever else the trainer does."""

import shutil
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sg_lightning import RobustnessEvaluation, SparseGradient, SpikingClassifier
from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.modules import AdversarialClassifier
from sg_lightning.neurons import LIF
from sg_lightning.threats import Budget, Linf

METHODS = ["SR", "AT", "AT+SR"]
WEIGHT = 0.5
SAMPLES, BATCH = 32, 4  # per process; a multiple of both, or the sampler would repeat samples


class Spiking(nn.Module):
    """No batch norm, whose statistics belong to a process, and no dropout, whose masks follow the batch's shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.fire, self.last = nn.Linear(16, 12), LIF(0.9, threshold=0.5), nn.Linear(12, 4)

    def forward(self, x):
        return self.last(self.fire(2 * self.first(x.flatten(1)).expand(3, -1, -1)).mean(0))


class Smooth(Spiking):
    """Without spikes, which the rounding of bfloat16 would flip."""

    def forward(self, x):
        return self.last(torch.tanh(2 * self.first(x.flatten(1))))


class Data(pl.LightningDataModule):
    """In order, so that the sampler deals the batches of one process out to two; Lightning's own would shuffle."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.rand(SAMPLES, 1, 4, 4, generator=generator)
        rows = TensorDataset(x, torch.randint(4, (SAMPLES,), generator=generator))
        sampler = DistributedSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows, self.batch_size, sampler=sampler)


class Save(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save([p.detach() for p in pl_module.parameters()], f"{self.path}.{trainer.global_rank}")


def trained(method, folder, net, *, processes, weight=WEIGHT, **options):
    """Return the weights on every process."""
    pl.seed_everything(5, verbose=False)
    before = [p.detach().clone() for p in net.parameters()]
    settings = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5)}
    if method.startswith("AT"):  # with its random starts
        module = AdversarialClassifier(net, attack=PGD(Linf(0.1), steps=3, step_size=0.05), **settings)
    else:
        module = SpikingClassifier(net, **settings)
    callbacks = [Save(folder / "weights"), *([SparseGradient(weight)] if method.endswith("SR") else [])]
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about tiny data
        pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks, **{"precision": "64-true", **several, **options},
        ).fit(module, Data(2 * BATCH // processes))  # fmt: skip
    after = [torch.load(folder / f"weights.{rank}") for rank in range(processes)]
    return [difference(before, one) for one in after], after


def difference(one, two):
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=["plain", "accumulate", "clip"]
)
def test_two_equal_one(method, options, tmp_path):
    (moved,), (one,) = trained(method, tmp_path, Spiking(), processes=1, **options)
    _, (zero, first) = trained(method, tmp_path, Spiking(), processes=2, **options)
    assert moved > 1e-2
    assert difference(one, zero) < 1e-9  # float64: no spike is flipped by the rounding of another batch shape
    assert difference(zero, first) == 0.0
    others = [other for other in METHODS if other != method]
    for other in others[: not options]:  # or the methods would all do the same
        assert difference(one, trained(other, tmp_path, Spiking(), processes=1)[1][0]) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method, tmp_path):
    # Gradients are rounded to 8 bits per process and per branch of the penalty, so equality has no meaning. But the
    # result must be nearest to what the same method does in float32, among those with other weights.
    _, (zero, one) = trained(method, tmp_path, Smooth(), processes=2, precision="bf16-mixed")
    assert difference(zero, one) == 0.0
    distance = {}
    for other in METHODS:
        for weight in (0.5 * WEIGHT, WEIGHT, 2 * WEIGHT) if other.endswith("SR") else (WEIGHT,):
            _, (exact,) = trained(other, tmp_path, Smooth(), processes=1, precision="32-true", weight=weight)
            distance[other, weight] = (
                sum((a - b).square().sum().item() for a, b in zip(exact, zero, strict=True)) ** 0.5
            )
    assert min(distance, key=distance.get) == (method, WEIGHT)


@pytest.mark.slow  # three compilations
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_backbone(tmp_path):
    _, (one,) = trained("AT+SR", tmp_path, Spiking(), processes=1)
    _, (zero, first) = trained("AT+SR", tmp_path, torch.compile(Spiking()), processes=2)
    assert difference(one, zero) < 1e-9
    assert difference(zero, first) == 0.0


def strategies():
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor needs the package
    return [FSDPStrategy(), ModelParallelStrategy(), deepspeed]


@pytest.mark.parametrize("strategy", strategies(), ids=lambda strategy: type(strategy).__name__)
def test_strategies_that_split_the_weights_are_refused(strategy):
    # Lightning makes the trainer of an FSDP strategy only where there is a GPU.
    trainer = SimpleNamespace(strategy=strategy, datamodule=None)
    module = SpikingClassifier(Spiking())
    said = rf"does not work with {type(strategy).__name__}, which splits the weights over processes: .*strategy='ddp'"
    with pytest.raises(ValueError, match="SparseGradient " + said):
        SparseGradient(0.1).setup(trainer, module, "fit")
    budgets = {"linf": Budget(eps=(0.1,), headline=0.1)}
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match="RobustnessEvaluation " + said):
            RobustnessEvaluation(budgets=budgets).setup(trainer, module, stage)
    SparseGradient(0.0).setup(trainer, module, "fit")


def test_adversarial_training_under_fsdp2_is_refused_before_a_step(tmp_path):
    module = AdversarialClassifier(Spiking(), attack=PGD(Linf(0.1), steps=2))
    module.configure_model = lambda: None
    run = pl.Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(1, 1), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    try:
        with pytest.raises(ValueError, match="AdversarialClassifier does not work with ModelParallelStrategy"):
            run.fit(module, Data(BATCH))
    finally:
        dist.destroy_process_group()  # or processes forked from here would find it
    assert run.global_step == 0


def test_synchronised_batch_norm_needs_a_gpu(tmp_path):
    net = ConvNet(4, 1, 4, channels=(6,), hidden=12, time_steps=2)
    with pytest.raises(ProcessRaisedException, match="SyncBatchNorm layers only work with GPU modules"):
        trained("SR", tmp_path, net, processes=2, sync_batchnorm=True)
