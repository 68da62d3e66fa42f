"""SHD and SSC from small files in their exact layout, whole and damaged ones, downloaded from a server on loopback."""

import gzip
import hashlib
import http.server
import importlib.util
import re
import threading
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sg_lightning.datamodules import SHD, SSC
from sg_lightning.datamodules.files import RemoteFile, unpack
from sg_lightning.domains import Binary, Counts
from sg_lightning.threats import make_threat

SIZES = {"train": 40, "test": 12, "valid": 8}


def write(path, size, classes=20, seed=0, speakers=True):
    """Write a file as the authors do: ragged float16 times and uint16 units, labels, speakers, names of the classes."""
    rng = np.random.default_rng(seed)
    trains = []
    for k in range(size):
        n = 0 if k == 1 else int(rng.integers(20, 200))  # one without any spike
        times = np.sort(rng.random(n) * 1.3).astype(np.float16)
        trains.append((times, rng.integers(0, 700, n).astype(np.uint16)))
    labels, who = (rng.integers(0, high, size).astype(np.uint16) for high in (classes, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, kind, column in (("times", np.float16, 0), ("units", np.uint16, 1)):
            data = file.create_dataset(f"spikes/{key}", (size,), dtype=h5py.vlen_dtype(kind))
            for k, train in enumerate(trains):
                data[k] = train[column]
        file["labels"] = labels
        file["extra/keys"] = np.array([f"class {k}".encode() for k in range(classes)])
        if speakers:
            file["extra/speaker"] = who
    return trains, labels, who


def write_set(folder, kind=SHD):
    classes = kind.num_classes
    return {
        part: write(folder / f"{kind.__name__.lower()}_{part}.h5", SIZES[part], classes, k, kind is SHD)
        for k, part in enumerate(kind.remote)
    }


def binned(times, units, steps, duration, group):
    """Count spikes by a plain loop."""
    x = np.zeros((steps, 700 // group))
    for time, unit in zip(times.tolist(), units.tolist(), strict=True):
        step = int(time / duration * steps)
        if step < steps:
            x[step, unit // group] += 1
    return x


@pytest.mark.parametrize(("kind", "flat"), [(SHD, True), (SHD, False), (SSC, False)])
@pytest.mark.parametrize("values", ["binary", "counts"])
@pytest.mark.parametrize("cache", [True, False])
def test_rasters_are_the_spikes_of_the_files(tmp_path, kind, flat, values, cache):
    content = write_set(tmp_path if flat else tmp_path / kind.__name__, kind)
    data = kind(tmp_path, 5, time_steps=20, duration=1.0, group=7, values=values, download=False, cache=cache)
    data.prepare_data()
    data.setup("fit")
    assert (data.input_shape, data.in_features, data.num_classes) == ((20, 100), 100, 20 if kind is SHD else 35)
    assert data.domain == (Binary() if values == "binary" else Counts())
    trains, labels, _ = content["test"]
    batches = list(data.test_dataloader())
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    wanted = torch.from_numpy(np.stack([binned(*train, 20, 1.0, 7) for train in trains])).float()
    assert torch.equal(x, wanted.clamp_max(1) if values == "binary" else wanted)
    assert wanted.max() > 1
    assert y.tolist() == labels.tolist()
    data.domain.check(x)
    sizes = [len(part) for part in (data.train_set, data.val_set, data.test_set)]
    assert sizes == ([36, 4, 12] if kind is SHD else [40, 8, 12])


def test_spikes_after_the_duration_are_left_out_and_none_before(tmp_path):
    content = write_set(tmp_path)
    times = [train[0] for train in content["test"][0]]
    for duration in (1.4, 0.5):
        data = SHD(tmp_path, duration=duration, values="counts", download=False, cache=False)
        x, _ = data.test_set.__getitems__(range(12))
        kept = sum((t.astype(np.float64) < duration).sum() for t in times)
        assert x.sum() == kept


def test_splits_by_seed_and_by_speaker(tmp_path):
    _, _, who = write_set(tmp_path)["train"]
    options = {"download": False, "cache": False, "time_steps": 10, "group": 100}
    one, same, other = (SHD(tmp_path, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(one.val_set.cells, same.val_set.cells)
    assert not torch.equal(one.val_set.labels, other.val_set.labels)
    data = SHD(tmp_path, val_speakers=(1, 3), **options)
    assert set(data.val_set.extra["speaker"].tolist()) == {1, 3}
    assert set(data.train_set.extra["speaker"].tolist()) == {0, 2}
    assert len(data.val_set) == np.isin(who, (1, 3)).sum()
    for bad in ((7,), (0, 1, 2, 3), ()):
        with pytest.raises(ValueError, match=r"val_speakers must be some of the speakers .*\[0, 1, 2, 3\], not all"):
            SHD(tmp_path, val_speakers=bad, **options).setup("fit")


def test_the_cache_notices_other_settings_and_files(tmp_path):
    write_set(tmp_path)

    def first(**options):
        data = SHD(tmp_path, download=False, **options)
        data.prepare_data()
        return data.test_set[0][0]

    plain = first()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert first(group=10).shape == (100, 70)
    assert first(values="counts").sum() >= plain.sum()
    assert first(duration=0.5).sum() < plain.sum()
    assert len(list((tmp_path / "cache").iterdir())) == 8
    assert torch.equal(first(), plain)
    (tmp_path / "shd_test.h5").unlink()
    write(tmp_path / "shd_test.h5", 12, seed=77)
    assert not torch.equal(first(), plain)


@pytest.mark.parametrize("packing", ["zip", "gz"])
def test_packed_files_are_unpacked_once(tmp_path, packing):
    write_set(tmp_path)
    for path in list(tmp_path.glob("*.h5")):
        if packing == "zip":
            with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(path, path.name)
        else:
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    data = SHD(tmp_path, download=False)
    data.prepare_data()
    assert len(data.test_set) == 12
    assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["shd_test.h5", "shd_train.h5"]


@pytest.mark.parametrize("packing", ["zip", "gz"])
def test_broken_archives_leave_nothing_half(tmp_path, packing):
    path = tmp_path / f"shd_train.h5.{packing}"
    if packing == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("other.h5", b"x")
        with pytest.raises(ValueError, match=r"shd_train.h5.zip cannot be read: it lacks shd_train.h5"):
            unpack(path)
        path.write_bytes(path.read_bytes()[:20])
    else:
        whole = gzip.compress(np.random.default_rng(0).bytes(5000))
        path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="its compression is broken"):
        unpack(path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def damage(path, key, sample, values):
    with h5py.File(path, "r+") as file:
        file[key][sample] = values


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("spikes/times", lambda v: v[:-1], r"sample 5 has \d+ times but \d+ units"),
        ("spikes/times", lambda v: np.append(v[:-1], np.nan), r"spike \d+ of sample 5 has a time that is not finite: nan"),
        ("spikes/times", lambda v: np.append([-0.25], v[1:]), "spike 0 of sample 5 has a time below 0: -0.25"),
        ("spikes/times", lambda v: v[::-1], "spike 1 of sample 5 has a time before that of the spike before it"),
        ("spikes/units", lambda v: np.append([700], v[1:]), "spike 0 of sample 5 has a unit that is not one of 0 to 699: 700"),
        ("labels", lambda v: 20, "sample 5 has label 20, expected 0 to 19; 1 such labels"),
    ],
)  # fmt: skip
def test_bad_values_are_named(tmp_path, key, change, message):
    write_set(tmp_path)
    path = tmp_path / "shd_train.h5"
    with h5py.File(path) as file:
        before = file[key][5]
    damage(path, key, 5, change(before))
    with pytest.raises(ValueError, match=rf"shd_train.h5 cannot be read: {message}"):
        SHD(tmp_path, download=False).prepare_data()
    assert not list((tmp_path / "cache").glob("shd_train*"))


def test_other_damage_is_named(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "shd_test.h5"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shd_test.h5 cannot be read: it is no whole file of spikes"):
            SHD(tmp_path, download=False).setup("test")
    with h5py.File(path, "w") as file:
        file["labels"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"it is no whole file of spikes: .*it lacks spikes/times, spikes/units"):
        SHD(tmp_path, download=False).setup("test")
    write(path, 0)
    with pytest.raises(ValueError, match="as many samples in all parts, at least one"):
        SHD(tmp_path, download=False).setup("test")
    write(path, 12)
    with h5py.File(path, "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros(11, np.uint16)
    with pytest.raises(ValueError, match=r"as many samples in all parts.*'spikes/units': 12, 'labels': 11"):
        SHD(tmp_path, download=False).setup("test")
    write(path, 12, classes=35)
    with pytest.raises(ValueError, match=r"names 35 classes, expected 20: is it another data set\?"):
        SHD(tmp_path, download=False).setup("test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shd_test.h5: pass data_dir="):
        SHD(tmp_path, download=False).setup("test")


def test_a_truncated_ragged_array_names_the_samples(tmp_path):
    """Ragged values lie in heaps after the table: a cut file may open and break on reading."""
    write(tmp_path / "shd_test.h5", 600)
    write(tmp_path / "shd_train.h5", 40)
    path = tmp_path / "shd_test.h5"
    blob = bytearray(path.read_bytes())
    place = blob.rfind(b"GCOL")  # the last heap of ragged values
    blob[place : place + 4] = b"XXXX"
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=r"shd_test.h5 cannot be read: samples \d+ to \d+ cannot be read"):
        SHD(tmp_path, download=False).setup("test")


@pytest.fixture
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_download_from_a_server(tmp_path, server, monkeypatch):
    folder, url = server
    write_set(folder)
    remote = {}
    for part in ("train", "test"):
        archive = folder / f"shd_{part}.h5.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as inside:
            inside.write(folder / f"shd_{part}.h5", f"shd_{part}.h5")
        remote[part] = RemoteFile(f"{url}/{archive.name}", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(SHD, "remote", remote)
    data = SHD(tmp_path / "data")
    data.prepare_data()
    assert [len(data.train_set), len(data.val_set), len(data.test_set)] == [36, 4, 12]
    assert {path.name for path in (tmp_path / "data/SHD").glob("*.h5")} == {"shd_train.h5", "shd_test.h5"}
    monkeypatch.setattr(SHD, "remote", {"train": RemoteFile(remote["train"].url, "0" * 32)})
    with pytest.raises(ValueError, match="instead of 00000000"):
        SHD(tmp_path / "other").prepare_data()
    assert not list((tmp_path / "other").rglob("*.h5*"))
    monkeypatch.setattr(SHD, "remote", {"train": RemoteFile(f"{url}/missing.h5.zip", "0" * 32)})
    with pytest.raises(OSError, match=r"cannot download .*missing.h5.zip \(File not found\)"):
        SHD(tmp_path / "third").prepare_data()


def test_the_official_files_and_sums():
    """As tonic has them; its text is read, because its import takes seconds."""
    (folder,) = importlib.util.find_spec("tonic").submodule_search_locations
    text = Path(folder, "datasets", "hsd.py").read_text()
    for kind in (SHD, SSC):
        for part, file in kind.remote.items():
            base, name = file.url.rsplit("/", 1)
            assert f'base_url = "{base}/"' in text
            assert re.search(rf'{part}_zip = "{name}"(.|\n)*?{part}_md5 = "{file.md5}"', text)


@pytest.mark.parametrize("kind", [SHD, SSC])
def test_every_budget_is_a_threat(kind):
    for values in ("binary", "counts"):
        data = kind(values=values)
        for norm, budget in data.budgets.items():
            assert [str(make_threat(norm, eps, data.domain).eps) for eps in budget.eps] == [str(e) for e in budget.eps]
            assert budget.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_steps": 0}, "time_steps must be an integer >= 1, got 0"),
        ({"group": 3}, r"group must divide the 700 channels, got 3; choose one of 1, 2, 4, 5, 7, 10"),
        ({"group": True}, "group must be an integer"),
        ({"duration": 0.0}, "duration must be a number of seconds above 0"),
        ({"duration": float("inf")}, "duration must be"),
        ({"values": "spikes"}, "values must be 'binary' or 'counts', got 'spikes'"),
        ({"val_fraction": 1.5}, "val_fraction"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SHD(**options)
