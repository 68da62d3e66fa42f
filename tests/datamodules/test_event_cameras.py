"""N-MNIST, DVS Gesture, CIFAR10-DVS and N-Caltech101 from small folders of files in the original formats."""

import importlib.util
import io
import shutil
import tarfile
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml

from sg_lightning import datamodules
from sg_lightning.attacks import PGD, Oracle
from sg_lightning.datamodules import CIFAR10DVS, NMNIST, DVSGesture, NCaltech101, event_cameras
from sg_lightning.datamodules.neuromorphic import NDA
from sg_lightning.datamodules.slicing import Events, Slicing
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import EventFlips, make_threat

SPEC = importlib.util.spec_from_file_location("event_writers", Path(__file__).with_name("event_writers.py"))
write = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write)

KINDS = [NMNIST, DVSGesture, CIFAR10DVS, NCaltech101]
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def files(kind, count=60):
    """Return a small data set, bytes by path."""
    side = min(kind.sensor)
    if kind is NMNIST:
        names = [f"{part}/{k % 10}/{k:05d}.bin" for part, n in (("Train", 20), ("Test", 10)) for k in range(n)]
        make = write.bin_bytes
    elif kind is DVSGesture:
        users = [
            ("ibmGestureTrain", "user01_fluorescent"),
            ("ibmGestureTrain", "user02_lab"),
            ("ibmGestureTest", "user24_led"),
        ]
        names = [f"{part}/{user}/{k}.npy" for part, user in users for k in range(11)]
        make = write.npy_bytes
    elif kind is CIFAR10DVS:
        names = [f"{name}/cifar10_{name}_{k}.aedat{4 if k % 2 else ''}" for name in kind.classes for k in range(10)]
        make = None
    else:
        names = [f"Caltech101/{name}/image_{k:04d}.bin" for name in kind.classes for k in range(10)]
        make = write.bin_bytes
    found = {}
    for name in names:
        events = write.random_events(count, side, side)
        if kind is CIFAR10DVS:
            make = write.aedat4_bytes if name.endswith("4") else lambda *e: write.aedat2_bytes(*e)[0]
        found[name] = make(*events)
    return found


def made(kind, folder, **options):
    data = kind(**{"data_dir": folder, "batch_size": 4, "val_fraction": 0.25, "download": False, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def everything(samples):
    return samples.__getitems__(range(len(samples)))


@EACH
def test_every_set_loads(tmp_path, kind):
    write.put(tmp_path / kind.tonic_name, files(kind))
    data = made(kind, tmp_path)
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (4, *data.input_shape) == (4, 10, 2, data.input_size, data.input_size)
    assert (data.in_channels, data.time_steps) == (2, 10)
    assert x.dtype == torch.float32
    data.domain.check(x)
    test, labels = everything(data.test_set)
    assert test.flatten(1).sum(1).tolist() == [60] * len(labels)
    assert {*labels.tolist()} == {*range(data.num_classes)}
    sizes = {NMNIST: (15, 5, 10), DVSGesture: (16, 6, 11), CIFAR10DVS: (68, 22, 10), NCaltech101: (682, 227, 101)}[kind]
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == sizes
    assert made(kind, tmp_path / kind.tonic_name).folder == tmp_path / kind.tonic_name


@EACH
def test_every_budget_is_a_threat(kind):
    data = kind()
    for norm, budget in data.budgets.items():
        assert [str(make_threat(norm, eps, data.domain).eps) for eps in budget.eps] == [str(e) for e in budget.eps]
        assert budget.reason
    assert "retime_inf" in data.budgets
    assert kind(time_steps=3).budgets["retime_inf"].eps == (1, 2)
    assert "retime_inf" not in kind(time_steps=1).budgets


@pytest.mark.parametrize("frames", ["number", "time"])
@pytest.mark.parametrize("values", ["counts", "binary"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("size", [12, 5])
def test_frames_are_those_of_a_loop(frames, values, merge, size):
    rng = np.random.default_rng(1)
    x, y, p, t = write.random_events(203, 10, 12, 1000, rng)
    t = t + 77
    slicing = Slicing(4, frames, values, merge)
    cells, counts = slicing.cells(Events(x, y, p, t), (10, 12), size)
    got = slicing.samples([(cells, counts)], torch.tensor([3]), size)[0][0]
    wanted = torch.zeros(4, 1 if merge else 2, size, size)
    for k in range(203):
        if frames == "number":
            step = next(s for s in range(4) if k < -(-203 * (s + 1) // 4))
        else:
            step = int((t[k] - t[0]) / (t[-1] - t[0] + 1) * 4)
        wanted[step, 0 if merge else p[k], int(y[k] / 10 * size), int(x[k] / 12 * size)] += 1
    assert torch.equal(got, wanted if values == "counts" else wanted.clamp_max(1))
    if frames == "number" and values == "counts":
        assert got.sum((1, 2, 3)).tolist() == [51, 51, 51, 50]
    assert bool(slicing.domain.contains(got.unsqueeze(0)).all())


def test_more_events_in_a_cell_than_fit_are_refused():
    zeros = np.zeros(32_768, np.int64)
    with pytest.raises(ValueError, match="a cell counts 32768 events, at most 32767 fit: take more time_steps"):
        Slicing(1).cells(Events(zeros, zeros, zeros, zeros), (2, 2), 2)
    assert Slicing(2).cells(Events(zeros, zeros, zeros, zeros), (2, 2), 2)[1].tolist() == [16_384, 16_384]


def test_bad_arguments_are_named():
    for options, why in (
        ({"time_steps": 0}, "time_steps must be an integer >= 1, got 0"),
        ({"frames": "events"}, "frames must be one of number, time, got 'events'"),
        ({"values": "real"}, "values must be one of counts, binary, got 'real'"),
        ({"size": 0}, "size must be an integer >= 1"),
        ({"size": 35}, "size must be at most 34"),
        ({"denoise": 0}, "denoise must be a time in whole microseconds >= 1"),
        ({"val_fraction": 1.0}, "leave recordings on both sides"),
    ):
        with pytest.raises(ValueError, match=why):
            NMNIST(**options)


def test_the_order_of_nmnist_is_that_of_its_numbers(tmp_path):
    write.put(tmp_path, files(NMNIST))
    assert made(NMNIST, tmp_path).test_set.labels.tolist() == list(range(10))


@pytest.mark.parametrize("kind", [CIFAR10DVS, NCaltech101])
def test_classes_are_balanced_and_every_run_has_the_same_test_part(tmp_path, kind):
    write.put(tmp_path, files(kind, 8))  # ten of each class
    one, other = made(kind, tmp_path, seed=0), made(kind, tmp_path, seed=1)
    assert torch.bincount(one.test_set.labels).tolist() == [1] * kind.num_classes
    assert torch.equal(everything(one.test_set)[0], everything(other.test_set)[0])
    assert one.test_set.labels.tolist() != sorted(one.test_set.labels.tolist())  # the first samples are of many classes
    assert not torch.equal(one.val_set.labels, other.val_set.labels)
    both = torch.cat([everything(part)[0].flatten(1) for part in (one.train_set, one.val_set, one.test_set)])
    assert len(both.unique(dim=0)) == 10 * kind.num_classes


def test_the_cache_notices_what_changes(tmp_path, monkeypatch):
    write.put(tmp_path, files(NMNIST))
    read = []
    plain = event_cameras.read_bin
    monkeypatch.setattr(event_cameras, "read_bin", lambda path, *size: read.append(path) or plain(path, *size))

    def count(**options):
        read.clear()
        data = made(NMNIST, tmp_path, **options)
        return len(read), everything(data.test_set)[0]

    first, x = count()
    again, same = count()
    assert (first, again) == (30, 0)
    assert torch.equal(x, same)
    for options in (
        {"time_steps": 5},
        {"frames": "time"},
        {"values": "binary"},
        {"merge_polarity": True},
        {"size": 17},
    ):
        assert count(**options)[0] == 30, options
    assert count(seed=3, batch_size=7)[0] == 0
    assert count(cache=False)[0] == 30
    (tmp_path / "Test/3/00003.bin").write_bytes(write.bin_bytes(*write.random_events(9, 34, 34)))
    changed, y = count()
    assert changed == 10  # the test part
    assert y[3].sum() == 9
    shutil.move(tmp_path / "Test/3/00003.bin", tmp_path / "Test/4/00003.bin")
    assert count()[0] == 10
    assert made(NMNIST, tmp_path).test_set.labels.tolist() == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]


@EACH
def test_a_damaged_recording_is_named(tmp_path, kind):
    content = files(kind)
    write.put(tmp_path, content)
    name = list(content)[3]
    (tmp_path / name).write_bytes(content[name][:-1])
    with pytest.raises(ValueError, match=f"{tmp_path / name} cannot be read, .*byte"):
        made(kind, tmp_path)


def test_mislabelled_folders_and_files_are_named(tmp_path):
    for kind, wrong, why in (
        (
            NMNIST,
            "Train/10/00001.bin",
            "Train/10 has recordings, but '10' is no class of the set; its classes are 0, 1",
        ),
        (
            CIFAR10DVS,
            "plane/a.aedat",
            "plane has recordings, but 'plane' is no class of the set; its classes are airplane",
        ),
        (NCaltech101, "Caltech101/Faces/a.bin", r"'Faces' is no class .* are BACKGROUND_Google, .*, \.\.\."),
        (DVSGesture, "ibmGestureTest/user24_led/11.npy", "11.npy is named after no class: .* 0.npy to 10.npy"),
    ):
        folder = tmp_path / kind.__name__
        write.put(folder, {**files(kind, 5), wrong: b"whatever"})
        with pytest.raises(ValueError, match=why):
            made(kind, folder)


@EACH
def test_missing_recordings_are_named(tmp_path, kind):
    data = kind(tmp_path, download=False, cache=False)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no recordings of {kind.__name__}: pass data_dir="):
        data.setup("fit")


def test_a_part_without_recordings_is_named(tmp_path):
    write.put(tmp_path, {name: blob for name, blob in files(NMNIST).items() if name.startswith("Train")})
    (tmp_path / "Test").mkdir()
    with pytest.raises(FileNotFoundError, match="has no test recordings of NMNIST"):
        made(NMNIST, tmp_path)


def test_denoising_drops_isolated_events(tmp_path):
    pytest.importorskip("tonic")
    events = [10, 11, 30, 20, 20], [10, 10, 30, 20, 21], [1] * 5, [50_000, 50_500, 60_000, 70_000, 90_000]
    content = {f"{part}/{k}/{k}.bin": write.bin_bytes(*events) for part in ("Train", "Test") for k in range(10)}
    write.put(tmp_path, content)
    x, _ = made(NMNIST, tmp_path, denoise=1000, merge_polarity=True, time_steps=1).test_set[0]
    assert x.nonzero().tolist() == [[0, 0, 10, 10], [0, 0, 10, 11]]  # the first: tonic's clock starts full
    plain, _ = made(NMNIST, tmp_path, merge_polarity=True, time_steps=1).test_set[0]
    assert plain.sum() == 5


@pytest.mark.parametrize("kind", [NMNIST, CIFAR10DVS])
def test_attacked_counts_stay_whole_and_are_not_cut_at_one(tmp_path, kind):
    write.put(tmp_path, files(kind, 400))
    data = made(kind, tmp_path, size=6, time_steps=4)
    x, _ = next(iter(data.val_dataloader()))
    assert x.max() > 2
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), data.num_classes))
    y = model(x).argmax(1)
    for norm, budget in data.budgets.items():
        threat = make_threat(norm, budget.eps[-1], data.domain)
        x_adv = PGD(threat, steps=5).run(Oracle(model), x, y).x_adv
        assert bool(threat.contains(x_adv, x).all()), norm
        assert torch.equal(x_adv, x_adv.round())
        assert (x_adv - x).any(), norm
        # A cell that held several events holds several still, but for the few that the budget may take.
        assert (x_adv.clamp_max(1) - x.clamp_max(1)).abs().sum() < (x - x.clamp_max(1)).sum()
    grown = EventFlips("50%", data.domain, mode="add").maximise_linear(x, torch.ones_like(x) * (x == x.max()))
    assert grown.max() > x.max()


# --- augmentation ---


def noise_of(size, seed=0):
    return SampleGenerator.from_ids(seed, torch.arange(size))


def frames(size=64, side=24, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).poisson(0.7, (size, 3, 2, side, side))).float()


def kind_of(noise, size):
    return noise.fork("kind").uniform(torch.empty(size, 1), 0, 4).floor().squeeze(1)


def test_without_strength_nothing_changes():
    x = frames()
    assert torch.equal(NDA(roll=0, degrees=0, cut=0, mirror=False)(x, noise_of(64)), x)


def test_augmented_frames_stay_whole_and_belong_to_the_sample():
    x, noise = frames(), noise_of(64)
    y = NDA()(x, noise)
    assert torch.equal(y, y.round())
    assert y.min() == 0
    assert not torch.equal(x, y)
    assert torch.equal(NDA()(x[10:20], noise.select(torch.arange(10, 20))), y[10:20])
    assert torch.equal(NDA()((x > 0).float(), noise), (y > 0).float())
    moved = NDA()(x[:, :1].expand_as(x), noise)
    assert torch.equal(moved, moved[:, :1].expand_as(x))  # all frames of a sample alike
    assert set(kind_of(noise, 64).tolist()) == {0, 1, 2, 3}


def test_roll_mirror_and_cutout():
    x, noise = frames(), noise_of(64)
    kind = kind_of(noise, 64)
    y = NDA(roll=5 / 24, mirror=False)(x, noise)
    shifts = set()
    for k in (kind == 0).nonzero().squeeze(1):
        found = [(a, b) for a in range(-5, 6) for b in range(-5, 6) if torch.equal(x[k].roll((a, b), (2, 3)), y[k])]
        assert len(found) == 1
        shifts |= {*found[0]}
    assert min(shifts) < -2
    assert max(shifts) > 2
    for k in (kind == 3).nonzero().squeeze(1):
        gone = (x[k] != y[k]).any(0).any(0).nonzero()
        top, left = gone.amin(0)
        bottom, right = gone.amax(0) + 1
        assert y[k][..., top:bottom, left:right].sum() == 0
        assert max(bottom - top, right - left) <= 8
    mirrored = NDA(roll=0, degrees=0, cut=0)(x, noise)
    flipped = [torch.equal(mirrored[k], x[k].flip(-1)) for k in range(64)]
    assert 16 < sum(flipped) < 48
    assert all(f or torch.equal(mirrored[k], x[k]) for k, f in enumerate(flipped))


def test_rotation_and_shear_are_those_of_torch():
    x, noise = frames(), noise_of(64)
    policy = NDA(degrees=30, mirror=False)
    y, kind = policy(x, noise), kind_of(noise, 64)
    angle = noise.fork("angle").uniform(torch.empty(64, 1), -1, 1).squeeze(1) * torch.pi / 6
    for k in ((kind == 1) | (kind == 2)).nonzero().squeeze(1):
        c, s, t = angle[k].cos(), angle[k].sin(), angle[k].tan()
        matrix = [[c, s, 0], [-s, c, 0]] if kind[k] == 1 else [[1, -t, 0], [0, 1, 0]]
        grid = torch.nn.functional.affine_grid(torch.tensor([matrix]), (1, 6, 24, 24), align_corners=False)
        wanted = torch.nn.functional.grid_sample(x[k].view(1, 6, 24, 24), grid, mode="nearest", align_corners=False)
        assert (wanted.view_as(y[k]) == y[k]).float().mean() > 0.99  # points half-way between cells may round otherwise


def test_only_training_batches_of_who_wants_it_are_augmented(tmp_path):
    write.put(tmp_path, files(NMNIST))
    plain, wanting = made(NMNIST, tmp_path), made(NMNIST, tmp_path, augment=True)
    x, _ = everything(plain.train_set)
    assert torch.equal(plain.augmented(x, noise_of(len(x))), x)
    assert torch.equal(wanting.augmented(x, noise_of(len(x))), NMNIST.nda(x, noise_of(len(x))))
    assert not NMNIST.nda.mirror
    assert not DVSGesture.nda.mirror


# --- download ---


@pytest.fixture
def served(tmp_path):
    """A folder that a server on loopback hands out, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def archives(kind):
    """Return what tonic downloads, by the prefix of its class attributes."""
    content = files(kind)
    if kind is NMNIST:
        return {
            f"{part.lower()}_": write.zipped({n: b for n, b in content.items() if n.startswith(part)})
            for part in ("Train", "Test")
        }
    if kind is DVSGesture:
        found = {}
        for part in ("Train", "Test"):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w:gz") as tar:
                for name, blob in content.items():
                    if part in name:
                        info = tarfile.TarInfo(name)
                        info.size = len(blob)
                        tar.addfile(info, io.BytesIO(blob))
            found[f"{part.lower()}_"] = file.getvalue()
        return found
    if kind is CIFAR10DVS:
        inner = {
            f"{c}.zip": write.zipped({n: b for n, b in content.items() if n.startswith(c + "/")}) for c in kind.classes
        }
        return {"": write.zipped(inner)}
    return {"": write.zipped({"N-Caltech101-archive/Caltech101.zip": write.zipped(content)})}


@EACH
def test_tonic_downloads_and_unpacks(tmp_path, served, monkeypatch, kind):
    tonic = pytest.importorskip("tonic.datasets")
    folder, address = served
    theirs = getattr(tonic, kind.tonic_name)
    for prefix, blob in archives(kind).items():
        (folder / f"{prefix}archive").write_bytes(blob)
        monkeypatch.setattr(theirs, f"{prefix}url", f"{address}/{prefix}archive")
        monkeypatch.setattr(theirs, f"{prefix}md5" if prefix else "file_md5", md5(blob).hexdigest())
    data = made(kind, tmp_path / "data", download=True)
    assert data.folder == tmp_path / "data" / kind.tonic_name
    assert everything(data.test_set)[0].flatten(1).sum(1).unique().tolist() == [60]
    for path in folder.iterdir():
        path.unlink()
    assert len(made(kind, tmp_path / "data", download=True).test_set) == len(
        data.test_set
    )  # nothing is asked for again


def test_a_download_that_fails_says_why(tmp_path, served, monkeypatch):
    tonic = pytest.importorskip("tonic.datasets")
    folder, address = served
    monkeypatch.setattr(tonic.NMNIST, "train_url", f"{address}/train")
    with pytest.raises(OSError, match=r"cannot download NMNIST .*check the network, or unpack the original files into"):
        NMNIST(tmp_path).prepare_data()
    (folder / "train").write_bytes(b"something else")
    with pytest.raises(OSError, match="cannot download NMNIST"):
        NMNIST(tmp_path).prepare_data()


def test_without_the_package_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tonic.datasets", None)
    with pytest.raises(ImportError, match=r"needs tonic: pip install 'sg-lightning\[events\]'"):
        NMNIST(tmp_path).prepare_data()


# --- configs ---


@pytest.mark.parametrize("name", ["nmnist", "dvs_gesture", "cifar10_dvs", "n_caltech101", "saccade_digits"])
def test_every_config_makes_its_data(tmp_path, name):
    config = yaml.safe_load((Path(__file__).parents[2] / f"configs/data/{name}.yaml").read_text())["data"]
    kind = getattr(datamodules, config["class_path"].rsplit(".", 1)[-1])
    options = config["init_args"]
    if name == "saccade_digits":
        data = kind(**options)
    else:
        write.put(tmp_path, files(kind))
        data = made(kind, tmp_path, **{**options, "data_dir": tmp_path, "val_fraction": 0.25})
    x, _ = next(iter(data.test_dataloader()))
    assert x.shape[1:] == data.input_shape == (options["time_steps"], 2, data.input_size, data.input_size)
    assert data.input_size == options.get("size", data.input_size)
