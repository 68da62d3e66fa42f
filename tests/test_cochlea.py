"""The cochlea against analytic cases, and waveforms attacked through it."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sg_lightning.attacks import PGD
from sg_lightning.backbones import SpikingMLP
from sg_lightning.cochlea import Cochlea, erb, erb_spaced
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.neurons import LIF
from sg_lightning.recipes import build, describe
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L2, Linf

RATE = 16_000


def tone(frequency, seconds=0.2, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)


def test_bandwidths_and_centres_are_those_of_glasberg_and_moore():
    assert erb(torch.tensor(1000.0)).item() == pytest.approx(132.639)  # 24.7 * 5.37
    centres = erb_spaced(80.0, 7600.0, 700)
    assert centres[[0, -1]].tolist() == pytest.approx([80.0, 7600.0])
    steps = centres.diff() / erb(centres[:-1])
    assert steps.min() > 0.995 * steps.max()  # neighbours are equally many bandwidths apart


def test_filters_have_the_gain_and_width_of_gammatones():
    cochlea = Cochlea(20, duration=0.5, highpass=1e-3, low=200.0, high=6000.0)
    size = 2 * (cochlea.bank.shape[1] - 1)
    gain = cochlea.bank.abs()
    frequencies = torch.fft.rfftfreq(size, 1 / RATE)
    for row, centre in zip(gain, cochlea.centres, strict=True):
        nearest = (frequencies - centre).abs().argmin()
        assert row[nearest].item() == pytest.approx(1.0, abs=0.02)
        assert abs(frequencies[row.argmax()] - centre) < 0.03 * centre + 3
        # The rectangle of the same area and height is 1.019 b wide by construction: 1 ERB.
        width = row.square().sum().item() * RATE / size / row.max().item() ** 2
        assert width == pytest.approx(erb(centre).item(), rel=0.04)


def test_the_highpass_is_of_first_order():
    with_it, without = (Cochlea(1, low=1000.0, high=1000.0, highpass=corner).bank[0] for corner in (1000.0, 1e-3))
    place = round(1000.0 * 2 * (len(with_it) - 1) / RATE)
    assert (with_it[place] / without[place]).abs().item() == pytest.approx(2**-0.5, abs=1e-3)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 4000.0])
def test_a_tone_excites_the_channels_of_its_frequency(frequency):
    cochlea = Cochlea(140, 20, duration=0.2)
    per_channel = cochlea.fire(tone(frequency).unsqueeze(0)).sum((0, 1))
    loudest = cochlea.centres[per_channel >= per_channel.max()].log2().mean() - math.log2(frequency)
    assert abs(loudest) < 0.15  # octaves
    assert per_channel[(cochlea.centres / frequency).log2().abs() > 1.5].sum() == 0


def test_onsets_fire_most_and_silence_never():
    cochlea = Cochlea(70, 20, duration=0.4)
    x = torch.zeros(1, round(0.4 * RATE))
    x[:, 3200:] = tone(1000.0)
    spikes = cochlea(x)
    assert spikes[:, :10].sum() == 0
    onset, later = cochlea.fire(x)[800:1000].sum(), cochlea.fire(x)[1400:1600].sum()
    assert onset > later > 0
    assert cochlea(torch.zeros(2, 100)).sum() == 0


def test_loudness_does_not_matter_unless_so_wanted():
    x = torch.stack([tone(700.0), tone(700.0, amplitude=0.05)])
    one, two = Cochlea(70)(x)
    assert (one != two).float().mean() < 0.001
    loud, quiet = Cochlea(70, level=None, values="counts")(x)
    assert loud.sum() > quiet.sum()


def test_rasters_group_and_bin_the_spikes():
    x = torch.stack([tone(500.0) + tone(2500.0), tone(1500.0, amplitude=0.2) + 0.1 * torch.randn(3200)])
    cochlea = Cochlea(70, 16, duration=0.25, group=7, values="counts")
    fired = cochlea.fire(x)
    assert fired.shape == (1000, 2, 70)
    wanted = torch.zeros(2, 16, 10)
    for step, sample, channel in fired.nonzero().tolist():
        wanted[sample, int(step * cochlea.dt / 0.25 * 16), channel // 7] += 1
    assert torch.equal(cochlea(x), wanted)
    assert wanted.max() > 1
    Counts().check(wanted)
    raster = Cochlea(70, 16, duration=0.25, group=7)(x)
    assert torch.equal(raster, wanted.clamp_max(1))
    Binary().check(raster)


def test_channels_differ_in_their_thresholds_and_the_seed_says_how():
    one, same, other = (Cochlea(50, seed=seed).neuron.threshold for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.log().std().item() == pytest.approx(0.05, rel=0.3)


def test_it_can_be_built_from_its_recipe_and_samples_do_not_mix():
    cochlea = Cochlea(14, 10, 0.2, group=2, surrogate="atan", seed=3)
    again = build(describe(cochlea))
    x = torch.stack([tone(f) for f in (400.0, 900.0, 2200.0)])
    assert torch.equal(again(x), cochlea(x))
    assert torch.equal(cochlea(x[1:2]), cochlea(x)[1:2])
    assert list(cochlea.state_dict()) == ["neuron.beta", "neuron.threshold"]  # the filters follow from the arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be an integer >= 1, got 0"),
        ({"group": 3}, "group must divide the 700 channels, got 3"),
        ({"values": "rates"}, "values must be 'binary' or 'counts'"),
        ({"high": 9000.0}, "below half of sample_rate=16000, got low=80.0, high=9000.0"),
        ({"duration": 0.0}, "duration must be finite and above 0, got 0.0"),
        ({"tau": math.nan}, "tau must be finite and above 0, got nan"),
        ({"compression": 2.0}, "compression must be in"),
        ({"time_steps": 5000}, "time_steps=5000 bins of 1.0 s are finer than the 0.25 ms of the neurons"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cochlea(**arguments)


def test_bad_waveforms():
    cochlea = Cochlea(7, 10, 0.1)
    for x, message in (
        (torch.zeros(2, 1, 50), r"waveforms \(B, S\), got torch.float32 of shape \(2, 1, 50\)"),
        (torch.zeros(2, 50, dtype=torch.int16), r"floating-point waveforms .* got torch.int16"),
        (torch.zeros(2, 1601), "waveforms have 1601 samples, the raster of 0.1 s has room for 1600"),
    ):
        with pytest.raises(ValueError, match=message):
            cochlea(x)


@pytest.fixture(scope="module")
def listener():
    """A network that tells four notes in noise, through a cochlea that it is attacked through."""
    generator = torch.Generator().manual_seed(0)
    notes = torch.tensor([500.0, 700.0, 1000.0, 1400.0])

    def play(size):
        y = torch.randint(0, 4, (size,), generator=generator)
        t = torch.arange(round(0.1 * RATE)) / RATE
        detuned = notes[y] * (1 + 0.03 * torch.randn(size, generator=generator))
        phase = 2 * math.pi * torch.rand(size, 1, generator=generator)
        x = 0.1 * torch.sin(2 * math.pi * detuned[:, None] * t + phase)
        return (x + 0.02 * torch.randn(x.shape, generator=generator)).clamp(-1, 1), y

    torch.manual_seed(0)
    model = nn.Sequential(
        Cochlea(35, 20, 0.1, low=200.0, high=4000.0),
        SpikingMLP(35, (32,), 4, time_steps=20, neuron=LIF(0.9, surrogate="atan")),
    )
    x, y = play(192)
    with torch.no_grad():
        rasters = model[0](x)
    optimiser = torch.optim.Adam(model[1].parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(model[1](rasters), y).backward()
        optimiser.step()
    return model.eval(), *play(48)


@pytest.mark.parametrize("threat", [Linf(0.08, Box(-1, 1)), L2(2.0, Box(-1, 1))], ids=["linf", "l2"])
def test_waveforms_are_attacked_through_it(listener, threat):
    model, x, y = listener
    clean = (model(x).argmax(1) == y).float().mean()
    noisy = threat.sample(x, SampleGenerator.from_ids(0, range(len(x))))
    attacked = PGD(threat, steps=10)(model, x, y)
    assert threat.contains(attacked, x).all()
    assert clean > 0.9
    at_random = (model(noisy).argmax(1) == y).float().mean()
    broken = (model(attacked).argmax(1) == y).float().mean()
    assert broken < at_random - 0.5
    assert not torch.equal(model[0](attacked), model[0](x))
