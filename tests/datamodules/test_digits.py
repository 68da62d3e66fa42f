"""The embedded digits: the real data, a fixed test split, seeded loaders, clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import SequentialSampler

from sg_lightning import datamodules
from sg_lightning.datamodules import Digits
from sg_lightning.datamodules.base import SeededShuffle
from sg_lightning.threats import make_threat

DATA = Path(datamodules.__file__).parent / "data"
FIRST_TEST_LABELS = [1, 1, 7, 8, 9, 0, 1, 3, 5, 6, 9, 5]


def everything(loader) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def keys(x: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in x]


def test_data_is_scikit_learns():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(DATA / "digits.npz") as data:
        assert sorted(data) == ["images", "labels", "test"]
        assert np.array_equal(data["images"], source.images)
        assert np.array_equal(data["labels"], source.target)
        assert len(data["test"]) == len(set(data["test"].tolist())) == 497
    assert (DATA / "digits.npz").stat().st_size < 60_000
    notice = (DATA / "digits.LICENSE.txt").read_text()
    assert "CC BY 4.0" in notice
    assert "Alpaydin" in notice
    assert "Kaynak" in notice


def test_splits_cover_the_data_once():
    digits = Digits(val_fraction=0.1)
    parts = [
        everything(loader()) for loader in (digits.train_dataloader, digits.val_dataloader, digits.test_dataloader)
    ]
    assert [len(y) for _, y in parts] == [1170, 130, 497]
    with np.load(DATA / "digits.npz") as data:
        images = data["images"].astype(np.float32)[:, None] / 16
    assert sorted(key for x, _ in parts for key in keys(x)) == sorted(image.tobytes() for image in images)


def test_what_a_batch_is():
    digits = Digits(batch_size=50)
    assert isinstance(digits, LightningDataModule)
    digits.prepare_data()
    digits.setup("test")
    x, y = next(iter(digits.test_dataloader()))
    assert x.shape == (50, *digits.input_shape)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    every_x, every_y = everything(digits.test_dataloader())
    digits.domain.check(every_x)
    assert every_x.min() == 0
    assert every_x.max() == 1
    assert set(every_y.tolist()) == set(range(digits.num_classes))


def test_labels_belong_to_the_images():
    # Ridge regression on pixels reads a digit far above chance only if images and labels were kept together.
    digits = Digits()
    (train_x, train_y), (test_x, test_y) = everything(digits.train_dataloader()), everything(digits.test_dataloader())
    design = torch.cat([train_x.flatten(1), torch.ones(len(train_x), 1)], 1).double()
    targets = torch.nn.functional.one_hot(train_y, 10).double()
    weights = torch.linalg.solve(design.T @ design + torch.eye(65, dtype=torch.float64), design.T @ targets)
    test_design = torch.cat([test_x.flatten(1), torch.ones(len(test_x), 1)], 1).double()
    assert ((test_design @ weights).argmax(1) == test_y).double().mean() > 0.9


def test_test_split_is_fixed_and_balanced():
    first = everything(Digits(seed=0).test_dataloader())
    for other in (Digits(seed=1), Digits(seed=0, val_fraction=0.5), Digits(7, seed=123)):
        again = everything(other.test_dataloader())
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    counts = first[1].bincount()
    assert counts.min() >= 48
    assert counts.max() <= 51
    # A change of the shipped split would silently change every published figure.
    assert first[1][:12].tolist() == FIRST_TEST_LABELS


def test_validation_split_follows_the_seed():
    a, b, c = (keys(everything(Digits(seed=s).val_dataloader())[0]) for s in (0, 0, 1))
    assert a == b
    assert set(a) != set(c)
    train = keys(everything(Digits(seed=0).train_dataloader())[0])
    assert set(a).isdisjoint(train)  # no image occurs twice in the data


def test_training_order_is_shuffled_and_seeded():
    digits = Digits(seed=5)
    loader = digits.train_dataloader()
    assert isinstance(loader.sampler, SeededShuffle)
    first, second = everything(loader)[0], everything(loader)[0]
    assert not torch.equal(first, second)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(everything(Digits(seed=5).train_dataloader())[0], first)
    assert not torch.equal(everything(Digits(seed=6).train_dataloader())[0][:50], first[:50])
    for loader in (digits.val_dataloader(), digits.test_dataloader(), digits.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)


def test_workers_give_the_same_batches():
    plain, workers = Digits(200, seed=3), Digits(200, seed=3, num_workers=2)
    assert torch.equal(everything(plain.train_dataloader())[0], everything(workers.train_dataloader())[0])


def test_budgets_are_usable_threats():
    assert set(Digits.budgets) == {"linf", "l2", "l1", "l0"}
    for norm, budget in Digits.budgets.items():
        assert budget.headline in budget.eps
        assert len(budget.reason) > 20
        values = [make_threat(norm, eps, Digits.domain).budget for eps in budget.eps]
        assert values == sorted(values)
        assert values[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, r"batch_size must be an integer >= 1, got 2\.5"),
        ({"num_workers": -1}, "num_workers must be an integer >= 0, got -1"),
        ({"val_fraction": 0.0}, r"val_fraction must be above 0 and below 1 .* got 0\.0"),
        ({"val_fraction": 1.0}, r"val_fraction must be above 0 and below 1 .* got 1\.0"),
        ({"val_fraction": -0.2}, r"val_fraction must be above 0 and below 1 .* got -0\.2"),
        ({"val_fraction": 1e-5}, r"leave images on both sides of 1300, got 1e-05"),
        ({"val_fraction": float("nan")}, "val_fraction must be above 0 and below 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_generating_script_writes_the_shipped_file(tmp_path):
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "scripts" / "make_digits.py"
    code = (
        f"import runpy, pathlib; g = runpy.run_path({str(script)!r}); "
        f"f = g['main'].__globals__; f['TARGET'] = pathlib.Path({str(tmp_path / 'digits.npz')!r}); g['main']()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ})
    with np.load(tmp_path / "digits.npz") as new, np.load(DATA / "digits.npz") as shipped:
        assert sorted(new) == sorted(shipped)
        assert all(np.array_equal(new[name], shipped[name]) for name in new)
