"""Settings of memory change speed and nothing else."""

import logging
import platform
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sg_lightning.attacks import PGD
from sg_lightning.backbones import ConvNet
from sg_lightning.callbacks import ChannelsLast, KeepFreedMemory, SparseGradient
from sg_lightning.modules import SpikingClassifier
from sg_lightning.neurons import LIF
from sg_lightning.threats import Linf


def fit(*callbacks):
    torch.manual_seed(7)
    net = ConvNet(4, 1, 16, channels=(8, 8), hidden=12, time_steps=3, neuron=LIF(0.5))
    module = SpikingClassifier(net).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(64, 1, 16, 16, generator=generator, dtype=torch.float64)
    data = DataLoader(TensorDataset(x, torch.randint(4, (64,), generator=generator)), 32)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data)
    return module, x


def test_channels_last_trains_and_attacks_the_same_function():
    plain, x = fit(SparseGradient(0.1))
    last, _ = fit(SparseGradient(0.1), ChannelsLast())
    weights = [p for p in last.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    attack, y = PGD(Linf(0.1), steps=3, random_start=False), torch.zeros(64, dtype=torch.int64)
    torch.testing.assert_close(attack(plain, x, y), attack(last, x, y), rtol=1e-6, atol=1e-6)
    last.load_state_dict(plain.state_dict())
    assert weights[0].is_contiguous(memory_format=torch.channels_last)


FAULTS = """
import resource, sys, torch
from sg_lightning.callbacks import KeepFreedMemory
if sys.argv[1] == "kept":
    KeepFreedMemory().setup(None, None, "fit")
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_used_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "default")
    }
    assert faults["kept"] < 0.1 * faults["default"]


def test_elsewhere_it_says_that_it_does_nothing(monkeypatch, caplog):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with caplog.at_level(logging.WARNING):
        KeepFreedMemory().setup(None, None, "fit")
    assert "does nothing here" in caplog.text
