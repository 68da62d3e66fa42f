"""Write ``sg_lightning/datamodules/data/spoken_digits.npz``: spoken digits of a speech synthesiser, as cochlea spikes.

Run from the repository root with espeak-ng 1.51 installed: ``python scripts/make_spoken_digits.py`` (four minutes).
The same versions of espeak-ng, torch and numpy give the same file. Voices are divided into train and test here, once.
"""

from __future__ import annotations

import io
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch

from sg_lightning.cochlea import Cochlea

TARGET = Path(__file__).parent.parent / "sg_lightning" / "datamodules" / "data" / "spoken_digits.npz"
WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
ACCENTS = {"en": ("en-gb", "en-us", "en-gb-x-rp"), "de": ("de",)}  # each voice has one of each language
# Of espeak's variants those without sound effects. Twelve are left out because networks trained on the other voices knew
# fewer than three in four of their digits: Alicia, Andy, Jacky, Lee, anika, iven, kaukovalta, norbert, shelby, steph, travis,
# zac.
TRAIN = (
    "m1", "m2", "m3", "m5", "m6", "m8", "f1", "f3", "f4", "klatt", "klatt3", "klatt4", "klatt5", "klatt6", "Alex", "Denis",
    "Gene", "Henrique", "Hugo", "Marco", "Mario", "Michael", "Mike", "Nguyen", "adam", "antonio", "aunty", "belinda",
    "benjamin", "boris", "caleb", "david", "ed", "edward", "grandma", "grandpa", "iven2", "john", "linda", "michel", "miguel",
    "pablo", "pedro", "quincy", "rob", "robert", "sandro", "victor",
)  # fmt: skip
TEST = ("m4", "m7", "f2", "f5", "klatt2", "Andrea", "Annie", "Diogo", "max", "paul")
TAKES = 2  # of each word by each voice, at rates and pitches of their own
RATES, PITCHES = (120, 201), (25, 76)  # words per minute; espeak's pitch, 0..99
CHANNELS, SAMPLE_RATE, SEED = 140, 16_000, 2026
STEP = 0.001  # seconds; times are stored in these


def speak(word: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """Return the waveform of a word at the sample rate of the cochlea, without silence around, with short fades."""
    command = ["espeak-ng", "-v", voice, "-s", str(rate), "-p", str(pitch), "--stdout", word]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(made)) as header:
        rate_made = header.getframerate()
    x = np.frombuffer(made, "<i2", offset=44) / 32768  # espeak cannot know the length when it writes the header
    size = round(len(x) * SAMPLE_RATE / rate_made)
    x = np.fft.irfft(np.fft.rfft(x)[: size // 2 + 1], size) * size / len(x)  # band-limited resampling
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    fade = np.linspace(0, 1, SAMPLE_RATE // 100)
    x[: len(fade)] *= fade
    x[-len(fade) :] *= fade[::-1]
    return x


def main() -> None:
    """Write the file and say what is in it."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    cochlea = Cochlea(CHANNELS, duration=1.5, sample_rate=SAMPLE_RATE)
    rows, gaps, counts, lengths = [], [], [], []
    for number, voice in enumerate((*TRAIN, *TEST)):
        for tongue, (language, words) in enumerate(WORDS.items()):
            accent = ACCENTS[language][number % len(ACCENTS[language])]
            for digit, word in enumerate(words):
                for _ in range(TAKES):
                    rate, pitch = int(rng.integers(*RATES)), int(rng.integers(*PITCHES))
                    x = speak(word, f"{accent}+{voice}", rate, pitch)
                    with torch.no_grad():
                        fired = cochlea.fire(torch.from_numpy(x).float()[None])[:, 0].t()
                    count = fired.sum(1).long().numpy()
                    step = fired.nonzero()[:, 1].numpy()  # by channel, then by time
                    gap = np.diff((step * (cochlea.dt / STEP)).astype(np.int64), prepend=0)
                    first = (count.cumsum() - count)[count > 0]
                    gap[first] = (step[first] * (cochlea.dt / STEP)).astype(np.int64)  # channels start from 0 each
                    gaps.append(gap)
                    counts.append(count)
                    lengths.append(len(x) / SAMPLE_RATE)
                    rows.append((digit, tongue, number, rate, pitch, number >= len(TRAIN)))
        print(f"{voice}: {np.sum(counts[-20 * TAKES :]) / (20 * TAKES):.0f} spikes", flush=True)
    gaps, counts = np.concatenate(gaps), np.stack(counts)
    if gaps.min() < 0 or gaps.max() >= 2**16 or counts.max() >= 2**8:
        raise ValueError("spikes do not fit their types")
    labels, languages, voices, rates, pitches, test = (np.array(column, np.uint8) for column in zip(*rows, strict=True))
    np.savez_compressed(
        TARGET, gaps=gaps.astype(np.uint16), counts=counts.astype(np.uint8), labels=labels, language=languages,
        speaker=voices, rate=rates, pitch=pitches, test=test.astype(bool), languages=np.array(list(WORDS)),
        voices=np.array((*TRAIN, *TEST)), step=STEP,
    )  # fmt: skip
    print(
        f"{TARGET}: {TARGET.stat().st_size:,} bytes, {len(rows)} utterances ({int(test.sum())} of them test) of "
        f"{min(lengths):.2f} to {max(lengths):.2f} s, 95 % below {np.quantile(lengths, 0.95):.2f} s, {len(gaps):,} spikes"
    )


if __name__ == "__main__":
    main()
