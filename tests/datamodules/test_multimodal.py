"""Pairs of modalities: classes, splits, seeds, missing modalities, and the command line."""

import pytest
import torch
from torch.utils.data import Dataset

from sg_lightning.datamodules import Digits, MultimodalDigits, Paired
from sg_lightning.datamodules.base import SampleData
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.evaluation import evaluate
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import Budget, JointBudget


class Numbered(Dataset):
    """Samples that say their own number, so that a pair can be traced."""

    def __init__(self, numbers, labels):
        self.numbers, self.labels = numbers, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((2,), float(self.numbers[index])), self.labels[index]

    def __getitems__(self, indices):
        index = torch.as_tensor(indices)
        return self.numbers[index].float().unsqueeze(1).expand(-1, 2).clone(), self.labels[index]

    def part(self, index):
        return Numbered(self.numbers[index], self.labels[index])


class Source(SampleData):
    """A data set of so many samples per class; the numbers of test samples begin at 1,000."""

    domain, input_shape = Counts(), (2,)
    in_features, mean = 2, (0.5,)

    def __init__(self, per_class, num_classes, *, budgets=None, lacks=(), **options):
        super().__init__(8, **options)
        self.num_classes, self.per_class, self.lacks = num_classes, per_class, lacks
        self.budgets = budgets or {"flips": Budget((1, 2), 1), "retime_inf": Budget((1,), 1)}

    def read(self):
        labels = torch.arange(self.num_classes).repeat(self.per_class)
        labels = labels[~torch.isin(labels, torch.tensor(self.lacks))]
        numbers = torch.arange(1, len(labels) + 1)
        return Numbered(numbers, labels), Numbered(numbers + 1000, labels)

    def augmented(self, x, noise):
        return x + 0.25


def paired(**options):
    sources = {"events": Source(10, 10, val_fraction=0.2), "audio": Source(6, 20, val_fraction=0.5, seed=1)}
    return Paired(sources, **{"batch_size": 16, **options})


def places(samples):
    x, y = samples.__getitems__(list(range(len(samples))))
    return {name: part[:, 0].long().tolist() for name, part in x.items()}, y


def test_pairs_show_one_class_of_one_split():
    data = paired()
    assert data.num_classes == 10
    for split, (events, audio) in {
        "train": (data.sources["events"].train_set, data.sources["audio"].train_set),
        "val": (data.sources["events"].val_set, data.sources["audio"].val_set),
        "test": (data.sources["events"].test_set, data.sources["audio"].test_set),
    }.items():
        numbers, labels = places(getattr(data, f"{split}_set"))
        assert numbers["events"] == events.numbers.tolist()  # each once, in its order
        theirs = dict(zip(audio.numbers.tolist(), (audio.labels % 10).tolist(), strict=True))
        assert [theirs[number] for number in numbers["audio"]] == labels.tolist() == events.labels.tolist()


def test_partners_are_used_equally_often_and_both_languages_are():
    numbers, labels = places(paired().test_set)
    audio = torch.tensor(numbers["audio"])
    for label in range(10):
        counts = audio[labels == label].bincount()
        assert set(counts[counts > 0].tolist()) == {1}  # ten images, twelve utterances
    labels_of = paired().sources["audio"].test_set.labels
    assert len({int(labels_of[number - 1001]) for number in numbers["audio"]}) == 20


def test_pairing_follows_the_seed():
    assert places(paired(seed=1).test_set)[0] == places(paired(seed=1).test_set)[0]
    assert places(paired(seed=1).test_set)[0]["audio"] != places(paired(seed=2).test_set)[0]["audio"]
    train = paired().train_set
    part = train.part(torch.tensor([3, 1]))
    assert places(part)[0] == {name: [found[3], found[1]] for name, found in places(train)[0].items()}
    one, label = train[3]
    assert (int(one["events"][0]), int(label)) == (places(train)[0]["events"][3], int(places(train)[1][3]))


def test_what_data_say_of_themselves():
    data = paired()
    assert data.domain == {"events": Counts(), "audio": Counts()}
    assert data.sizes == {name: {"in_features": 2, "mean": [0.5]} for name in ("events", "audio")}
    assert list(data.budgets) == ["events_flips", "events_retime_inf", "audio_flips", "audio_retime_inf", "joint"]
    assert data.budgets["joint"] == JointBudget(
        (0.5, 1), 1, "The headline budgets of events_flips, audio_flips at once.", of=("events_flips", "audio_flips")
    )


def test_missing_modalities_are_silent_where_networks_are_judged():
    data = paired(missing=("audio",))
    assert set(places(data.test_set)[0]["audio"]) == set(places(data.val_set)[0]["audio"]) == {0}
    assert 0 not in places(data.train_set)[0]["audio"]
    assert list(data.budgets) == ["events_flips", "events_retime_inf"]


def test_training_samples_lose_one_modality_at_most():
    data = paired(drop=0.5)
    x, _ = data.train_set.__getitems__(list(range(80)))
    noise = SampleGenerator.from_ids(0, list(range(80)))
    changed = data.augmented(x, noise)
    there = torch.stack([part.bool().any(1) for part in changed.values()], 1)
    assert bool(there.any(1).all())
    assert 20 < int((~there).sum()) < 60
    assert bool((~there).any(0).all())
    kept = there[:, 0]
    assert torch.equal(changed["events"][kept], x["events"][kept] + 0.25)  # and are augmented as their data set does
    again = data.augmented({k: v[5:9] for k, v in x.items()}, noise.select(torch.arange(5, 9)))
    assert all(torch.equal(again[k], changed[k][5:9]) for k in again)
    assert all(bool(part.bool().all()) for part in paired().augmented(x, noise).values())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Paired({"image": Digits()}), ValueError, "at least two modalities"),
        (lambda: Paired({"image": Digits(), "more": paired()}), TypeError, "the source of 'more' must be a data module"),
        (lambda: Paired({"image": Digits(), "more": None}), TypeError, "the source of 'more' must be a data module"),
        (lambda: paired(num_classes=11), ValueError, "num_classes must be an integer from 2 to 10, got 11"),
        (lambda: paired(drop=1.5), ValueError, r"drop must be a chance in \[0, 1\], got 1.5"),
        (lambda: paired(missing=("events", "audio")), ValueError, "but not all"),
        (lambda: paired(missing=("touch",)), ValueError, "missing must name some of events, audio"),
        (lambda: MultimodalDigits(modalities=("image",)), ValueError, "at least two of image, events, audio"),
        (lambda: MultimodalDigits(modalities=("image", "touch")), ValueError, "at least two of image, events, audio"),
        (lambda: Paired({"a": Source(5, 4), "b": Source(5, 4, lacks=(2,))}).train_set, ValueError,
         "'b' has no training sample of class 2, so 'a' finds no partner"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.fixture(scope="module")
def digits():
    return MultimodalDigits()


def test_embedded_digits(digits):
    x, y = next(iter(digits.test_dataloader()))
    assert {name: tuple(part.shape) for name, part in x.items()} == {
        "image": (64, 1, 8, 8), "events": (64, 6, 2, 16, 16), "audio": (64, 50, 70),
    }  # fmt: skip
    assert digits.domain == {"image": Box(), "events": Counts(), "audio": Binary()}
    for name, part in x.items():
        digits.domain[name].check(part, name)
    assert y.dtype == torch.int64
    assert len(digits.test_set) == 497
    assert torch.equal(x["image"], next(iter(Digits().test_dataloader()))[0])
    assert digits.budgets["joint"].of == ("image_linf", "events_flips", "audio_flips")


def test_one_drawing_never_trains_one_modality_and_judges_another(digits):
    # Images and events are of the same drawings: their splits must be one.
    images, events = digits.sources["image"], digits.sources["events"]
    assert torch.equal(images.val_set.labels, events.val_set.labels)
    assert torch.equal(images.split(range(1300))[0], events.split(range(1300))[0])


def test_data_and_budgets_go_to_evaluate(digits):
    model = lambda x: (
        x["image"].flatten(1)[:, :10]
        + x["events"].sum((2, 3, 4)).repeat(1, 2)[:, :10] * 1e-3
        + (x["audio"].sum(1)[:, :10] * 1e-3)
    )
    result = evaluate(model, digits, "quick", max_samples=4, check_samples_count=0, progress=False)
    assert result.norms[-1] == "joint"
    assert {norm.split("_")[0] for norm in result.norms} == {"image", "events", "audio", "joint"}
