"""The embedded spoken digits: what is in them, splits by voice, shifts in training, and that they can be learned."""

import importlib.util
import io
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sg_lightning.backbones import SpikingMLP
from sg_lightning.datamodules import SpokenDigits
from sg_lightning.datamodules.rasters import shifted
from sg_lightning.domains import Counts
from sg_lightning.neurons import LIF, LeakyIntegrator
from sg_lightning.neurons.surrogates import FastSigmoid
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import make_threat

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data():
    return SpokenDigits()


def test_sizes_classes_and_languages(data):
    parts = (data.train_set, data.val_set, data.test_set)
    assert [len(part) for part in parts] == [1720, 200, 400]
    for part in parts:
        pairs = torch.bincount(part.labels * 2 + part.extra["language"], minlength=20)
        assert (pairs == len(part) // 20).all()
        x, _ = part.__getitems__(range(len(part)))
        data.domain.check(x)
        assert 0.03 < x.mean() < 0.2
        assert x.flatten(1).any(1).all()
    assert (data.input_shape, data.in_features, data.time_steps) == ((50, 70), 70, 50)
    assert data.languages == ("en", "de")
    assert len(data.voices) == len(set(data.voices)) == 58


def test_no_voice_is_in_two_parts(data):
    for seed in (0, 1):
        other = SpokenDigits(seed=seed)
        voices = [set(part.extra["speaker"].tolist()) for part in (other.train_set, other.val_set, other.test_set)]
        assert [len(found) for found in voices] == [43, 5, 10]
        assert not voices[0] & voices[1] | voices[0] & voices[2] | voices[1] & voices[2]
    assert set(other.val_set.extra["speaker"].tolist()) != set(data.val_set.extra["speaker"].tolist())
    assert torch.equal(other.test_set.cells, data.test_set.cells)
    with pytest.raises(ValueError, match="val_fraction must leave voices on both sides of 48"):
        SpokenDigits(val_fraction=0.001)


def test_settings_change_the_rasters(data):
    counts = SpokenDigits(values="counts", group=140, time_steps=1, duration=2.0)
    assert counts.domain == Counts()
    x, _ = counts.test_set.__getitems__(range(400))
    assert x.shape == (400, 1, 1)
    assert 300 < x.mean() < 1200  # all spikes of an utterance
    fine, _ = SpokenDigits(time_steps=800, group=1, values="counts").test_set.__getitems__(range(8))
    coarse, _ = SpokenDigits(time_steps=50, group=2, values="counts").test_set.__getitems__(range(8))
    assert torch.equal(fine.unflatten(1, (50, 16)).unflatten(-1, (70, 2)).sum((2, -1)), coarse)
    assert torch.equal(coarse.clamp_max(1), data.test_set.__getitems__(range(8))[0])
    with pytest.raises(ValueError, match="group must divide the 140 channels, got 3"):
        SpokenDigits(group=3)


def test_every_budget_is_a_threat(data):
    assert list(data.budgets) == ["flips", "retime_inf", "retime_0"]
    for norm, budget in data.budgets.items():
        assert [str(make_threat(norm, eps, data.domain).eps) for eps in budget.eps] == [str(e) for e in budget.eps]
        assert budget.reason


def test_rasters_are_shifted_as_a_whole():
    torch.manual_seed(0)
    x = (torch.rand(200, 6, 5) < 0.4).float()
    moved = shifted(x, 2, 1, SampleGenerator.draw(200))
    padded = torch.nn.functional.pad(x, [1, 1, 2, 2])
    found = set()
    for one, before in zip(moved, padded, strict=True):
        matches = [(r, c) for r in range(5) for c in range(3) if torch.equal(one, before[r : r + 6, c : c + 5])]
        assert matches
        found.update(matches[:1])
    assert len(found) == 15
    assert torch.equal(shifted(x, 0, 0, SampleGenerator.draw(200)), x)
    assert SpokenDigits(augment=False).augmented(x, SampleGenerator.draw(200)) is x


def test_a_small_network_understands_new_voices(data):
    torch.manual_seed(0)
    net = SpikingMLP(
        70, (128,), 10, time_steps=50, neuron=LIF(0.9, surrogate=FastSigmoid(5.0)), readout=LeakyIntegrator(0.95)
    )
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    for epoch in range(10):
        for step, (x, y) in enumerate(data.train_dataloader()):
            optimiser.zero_grad()
            x = data.augmented(x, SampleGenerator.from_ids(epoch, range(len(x))).fork("augment", step))
            cross_entropy(net(x), y).backward()
            optimiser.step()
    x, y = data.test_set.__getitems__(range(400))
    with torch.no_grad():
        assert (net(x).argmax(1) == y).float().mean() > 0.8


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the synthesiser espeak-ng")
def test_the_script_makes_what_is_shipped(data, monkeypatch, tmp_path):
    """Two words of the first voice again: their spikes are those in the file, up to rounding of another machine."""
    spec = importlib.util.spec_from_file_location("made", ROOT / "scripts/make_spoken_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert data.voices == (*script.TRAIN, *script.TEST)
    monkeypatch.setattr(script, "TARGET", tmp_path / "made.npz")
    monkeypatch.setattr(script, "TRAIN", script.TRAIN[:1])
    monkeypatch.setattr(script, "TEST", ())
    monkeypatch.setattr(script, "WORDS", {language: words[:2] for language, words in script.WORDS.items()})
    script.main()
    made = np.load(tmp_path / "made.npz")
    assert made["labels"].tolist() == [0, 0, 1, 1] * 2
    shipped = np.load(ROOT / "sg_lightning/datamodules/data/spoken_digits.npz")
    assert np.abs(made["counts"][:4].astype(int) - shipped["counts"][:4]).sum() <= 0.01 * shipped["counts"][:4].sum()


def test_the_waveforms_are_trimmed_and_resampled(monkeypatch):
    spec = importlib.util.spec_from_file_location("made", ROOT / "scripts/make_spoken_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rate, seconds = 22_050, 0.4
    t = np.arange(round(rate * seconds)) / rate
    sound = np.concatenate([np.zeros(rate // 10), 0.5 * np.sin(2 * np.pi * 440 * t), np.zeros(rate // 5)])
    blob = io.BytesIO()
    with wave.open(blob, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": blob.getvalue()}))
    x = script.speak("zero", "en", 150, 50)
    assert len(x) == pytest.approx(seconds * script.SAMPLE_RATE, abs=40)
    loudest = np.abs(np.fft.rfft(x)).argmax() * script.SAMPLE_RATE / len(x)
    assert loudest == pytest.approx(440, abs=3)
    middle = x[1000:-1000]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.02)
    assert abs(x[0]) + abs(x[-1]) < 0.01
