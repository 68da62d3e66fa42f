"""CIFAR, MNIST and Fashion-MNIST from small files in the exact original formats, whole and damaged ones."""

import gzip
import io
import pickle
import struct
import tarfile
import urllib.error

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from sg_lightning.datamodules import CIFAR10, CIFAR100, MNIST, FashionMNIST
from sg_lightning.datamodules.files import RemoteFile, download
from sg_lightning.datamodules.pixels import augmented
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import make_threat

RNG = np.random.default_rng(0)
IDX = {
    "train-images-idx3-ubyte": (40, 28, 28),
    "train-labels-idx1-ubyte": (40,),
    "t10k-images-idx3-ubyte": (12, 28, 28),
    "t10k-labels-idx1-ubyte": (12,),
}


def write_idx(folder, packed=True):
    """Write the four files of MNIST: magic number, sizes (big-endian), bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for name, shape in IDX.items():
        high = 256 if "images" in name else 10
        content[name] = RNG.integers(0, high, shape, dtype=np.uint8)
        blob = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content[name].tobytes()
        path = folder / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(blob) if packed else blob)
    return content


def write_cifar(folder, classes=10, packed=True):
    """Write the Python version of CIFAR: pickled dicts with bytes keys, in an archive or a folder."""
    ten = classes == 10
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    inside = "cifar-10-batches-py" if ten else "cifar-100-python"
    key = b"labels" if ten else b"fine_labels"
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for name in names:
        images, labels = RNG.integers(0, 256, (8, 3072), dtype=np.uint8), RNG.integers(0, classes, 8).tolist()
        batch = {b"batch_label": name.encode(), key: labels, b"data": images, b"filenames": [b"a.png"] * 7 + [b""]}
        content[name] = (images, labels, pickle.dumps(batch, protocol=2))
    if packed:
        archive = folder / ("cifar-10-python.tar.gz" if ten else "cifar-100-python.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            for name, (_, _, blob) in content.items():
                info = tarfile.TarInfo(f"{inside}/{name}")
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))
    else:
        (folder / inside).mkdir()
        for name, (_, _, blob) in content.items():
            (folder / inside / name).write_bytes(blob)
    return content


def everything(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def make(kind, folder, **options):
    data = kind(folder, batch_size=4, val_fraction=0.25, download=False, **options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
@pytest.mark.parametrize(("packed", "flat"), [(True, True), (False, False)])
def test_idx_files(tmp_path, kind, packed, flat):
    content = write_idx(tmp_path if flat else tmp_path / kind.__name__ / "raw", packed)
    data = make(kind, tmp_path)
    x, y = everything(data.test_dataloader())
    assert torch.equal((x * 255).round().byte().squeeze(1), torch.from_numpy(content["t10k-images-idx3-ubyte"]))
    assert y.tolist() == content["t10k-labels-idx1-ubyte"].tolist()
    assert x.dtype == torch.float32
    data.domain.check(x)
    seen = [everything(loader()) for loader in (data.train_dataloader, data.val_dataloader)]
    assert [len(labels) for _, labels in seen] == [30, 10]
    pixels = torch.cat([images for images, _ in seen]).mul(255).round().byte().flatten(1)
    assert sorted(map(bytes, pixels.numpy())) == sorted(map(bytes, content["train-images-idx3-ubyte"].reshape(40, -1)))


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_files(tmp_path, kind, classes, packed):
    content = write_cifar(tmp_path, classes, packed)
    data = make(kind, tmp_path)
    images, labels, _ = content["test_batch" if classes == 10 else "test"]
    x, y = everything(data.test_dataloader())
    assert x.shape[1:] == data.input_shape == (3, 32, 32)
    assert torch.equal((x * 255).round().byte().flatten(1), torch.from_numpy(images))
    assert y.tolist() == labels
    assert data.num_classes == classes
    assert len(data.train_set) + len(data.val_set) == (40 if classes == 10 else 8)


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100, MNIST, FashionMNIST])
def test_every_budget_is_a_threat(kind):
    for norm, budget in kind.budgets.items():
        assert [str(make_threat(norm, eps, kind.domain).eps) for eps in budget.eps] == [str(e) for e in budget.eps]
        assert budget.reason


def test_splits_and_orders_follow_the_seed(tmp_path):
    write_idx(tmp_path)
    one, same, other = (make(MNIST, tmp_path, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.val_set.images, same.val_set.images)
    assert not torch.equal(one.val_set.images, other.val_set.images)
    assert torch.equal(one.test_set.images, other.test_set.images)
    loader, again = one.train_dataloader(), same.train_dataloader()
    first, second = everything(loader)[0], everything(loader)[0]
    assert not torch.equal(first, second)
    again.sampler.set_epoch(1)  # what Lightning does when it resumes in epoch 1
    assert torch.equal(everything(again)[0], second)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks train-images-idx3-ubyte.gz, .* data_dir="):
        make(MNIST, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks cifar-10-python.tar.gz"):
        make(CIFAR10, tmp_path)


def test_truncated_and_foreign_idx_files(tmp_path):
    write_idx(tmp_path, packed=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"t10k-images.*promises 9408 values .* it holds 9403; delete it"):
        make(MNIST, tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="does not start like an IDX file"):
        make(MNIST, tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="does not start like an IDX file"):
        make(MNIST, tmp_path)
    path.unlink()
    packed = gzip.compress(whole)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="compression is broken"):
        make(MNIST, tmp_path)


def test_images_and_labels_must_fit(tmp_path):
    write_idx(tmp_path, packed=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 3) + bytes(3))
    with pytest.raises(ValueError, match="12 images but its labels number 3"):
        make(MNIST, tmp_path)
    path.write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 12) + bytes([77] * 12))
    with pytest.raises(ValueError, match="go up to 77, expected 0 to 9"):
        make(MNIST, tmp_path)


def test_damaged_cifar_files(tmp_path):
    write_cifar(tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz cannot be read: its archive is broken"):
        make(CIFAR10, tmp_path)
    archive.unlink()
    write_cifar(tmp_path, packed=False)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"data_batch_3 cannot be read: it is no CIFAR batch"):
        make(CIFAR10, tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    write_cifar(tmp_path, packed=False)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"builtin.*print, which no CIFAR batch does"):
        make(CIFAR10, tmp_path)


def test_download_checks_the_sum_and_leaves_nothing_half(tmp_path, monkeypatch):
    file = RemoteFile("https://example.org/some/file.bin", "5d41402abc4b2a76b9719d911017c592")  # MD5 of b"hello"

    def serve(content):
        def get(url, target, progress):
            assert url == file.url
            with open(target, "wb") as out:
                out.write(content)

        monkeypatch.setattr(torch.hub, "download_url_to_file", get)

    serve(b"hullo")
    with pytest.raises(ValueError, match="instead of 5d41402abc4b2a76b9719d911017c592"):
        download(file, tmp_path)
    assert list(tmp_path.iterdir()) == []
    serve(b"hello")
    assert download(file, tmp_path).read_bytes() == b"hello"
    serve(b"other")
    assert download(file, tmp_path).read_bytes() == b"hello"  # complete files stay


def test_no_network_and_no_room(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        OSError, match=r"cannot download .*train-images.* \(Name or service not known\); check the network"
    ):
        MNIST(tmp_path).prepare_data()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        MNIST(tmp_path).prepare_data()


def test_shifts_and_mirrors_are_those_of_each_image():
    torch.manual_seed(0)
    x = torch.rand(256, 2, 6, 5)
    padded = torch.nn.functional.pad(x, [1, 1, 1, 1])
    found = set()
    noise = SampleGenerator.draw(256)
    for image, before in zip(augmented(x, 1, True, noise), padded, strict=True):
        matches = []
        for row in range(3):
            for column in range(3):
                view = before[:, row : row + 6, column : column + 5]
                matches += [(row, column, m) for m in (False, True) if torch.equal(image, view.flip(-1) if m else view)]
        assert matches
        found.add(matches[0])
    assert len(found) == 18  # every shift, mirrored or not
    assert augmented(x, 0, False, noise) is x


def test_training_batches_are_augmented_and_others_not(tmp_path):
    write_cifar(tmp_path)
    seen = {}

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3072, 10)

        def training_step(self, batch, index):
            seen.setdefault("train", []).append(batch[0])
            return self.layer(batch[0].flatten(1)).logsumexp(1).mean()

        def validation_step(self, batch, index):
            seen.setdefault("val", []).append(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    for augment in (True, False):
        seen.clear()
        data = CIFAR10(tmp_path, batch_size=4, val_fraction=0.25, download=False, augment=augment)
        trainer = L.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(Net(), data)
        assert torch.equal(torch.cat(seen["val"]), everything(data.val_dataloader())[0])
        plain = everything(data.train_dataloader())[0]
        assert torch.equal(torch.cat(seen["train"]), plain) is not augment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"val_fraction": 2}, "val_fraction"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10(**options)
