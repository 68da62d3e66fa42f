"""Samples on disk: found again for the same settings and files, made anew for others, never half."""

import os
from pathlib import Path

import pytest
import torch

from sg_lightning.datamodules.cache import cached
from sg_lightning.datamodules.sparse import SparseSamples


class Maker:
    def __init__(self, counts=True, empty=False):
        self.calls = 0
        self.counts = counts
        self.empty = empty

    def __call__(self):
        self.calls += 1
        cells = torch.tensor([] if self.empty else [1, 5, 2], dtype=torch.int32)
        counts = torch.ones(len(cells), dtype=torch.uint8) * 3 if self.counts else None
        offsets = torch.tensor([0, 0, 0] if self.empty else [0, 2, 3])
        speakers = {"speaker": torch.tensor([7, 9], dtype=torch.int16)}
        return SparseSamples(cells, counts, offsets, torch.tensor([1, 0]), (2, 3), speakers)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.h5"
    path.write_bytes(b"some data")
    return path


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_the_second_time_it_is_found(tmp_path, source, counts, empty):
    make = Maker(counts, empty)
    first, second = (cached(tmp_path / "cache", "train", {"steps": 2}, [source], make) for _ in range(2))
    assert make.calls == 1
    for samples in (first, second):
        batch, labels = samples.__getitems__([0, 1])
        assert torch.equal(batch, make().__getitems__([0, 1])[0])
        assert labels.tolist() == [1, 0]
        assert samples.extra["speaker"].tolist() == [7, 9]
        assert samples.part(torch.tensor([1])).extra["speaker"].tolist() == [9]
        assert (samples.counts is None) is not counts
    assert [path.name[:6] for path in (tmp_path / "cache").iterdir()] == ["train-"]


def test_other_settings_and_changed_files_are_noticed(tmp_path, source):
    make = Maker()
    cached(tmp_path, "train", {"steps": 2}, [source], make)
    cached(tmp_path, "train", {"steps": 3}, [source], make)
    assert make.calls == 2
    source.write_bytes(b"more data than before")
    cached(tmp_path, "train", {"steps": 2}, [source], make)
    assert make.calls == 3
    stat = source.stat()
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    cached(tmp_path, "train", {"steps": 2}, [source], make)
    assert make.calls == 4


@pytest.mark.parametrize("name", ["cells.npy", "offsets.npy", "about.json", "extra-speaker.npy"])
def test_a_damaged_entry_is_made_again(tmp_path, source, name):
    make = Maker()
    cached(tmp_path / "cache", "train", {}, [source], make)
    (entry,) = (tmp_path / "cache").iterdir()
    path = entry / name
    path.write_bytes(path.read_bytes()[:-3])
    samples = cached(tmp_path / "cache", "train", {}, [source], make)
    assert make.calls == 2
    assert samples.cells.tolist() == [1, 5, 2]
    cached(tmp_path / "cache", "train", {}, [source], make)
    assert make.calls == 2


def test_an_interrupted_build_leaves_nothing(tmp_path, source, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"cannot write the cache .*No space left.*cache=False"):
            cached(tmp_path / "cache", "train", {}, [source], Maker())
    assert list((tmp_path / "cache").iterdir()) == []

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", "train", {}, [source], stopped)
    assert list((tmp_path / "cache").iterdir()) == []


def test_settings_are_plain_values(tmp_path, source):
    with pytest.raises(TypeError):
        cached(tmp_path, "train", {"steps": object()}, [source], Maker())
