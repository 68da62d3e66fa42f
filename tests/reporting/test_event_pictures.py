import io

import numpy as np
import pytest
import torch

from sg_lightning.reporting import animation, examples_figure
from sg_lightning.reporting.pictures import pooled

Image = pytest.importorskip("PIL.Image")


def example(clean, adversarial, norm="flips"):
    size = float((clean != adversarial).sum()) if torch.is_tensor(clean) else 3.0
    return {
        "norm": norm, "eps": "2%", "clean": clean, "adversarial": adversarial, "label": 3, "predicted": 8, "size": size,
    }  # fmt: skip


def raster():
    generator = torch.Generator().manual_seed(0)
    clean = (torch.rand(100, 210, generator=generator) < 0.05).float()
    adversarial = clean.clone()
    adversarial[10, :5] = 1 - adversarial[10, :5]
    return clean, adversarial


def frames():
    generator = torch.Generator().manual_seed(0)
    clean = torch.poisson(torch.full((5, 2, 16, 16), 0.15), generator=generator)
    adversarial = clean.clone()
    adversarial[2, 1, 3, 4] += 2
    row, column = clean[1, 0].nonzero()[0].tolist()
    adversarial[1, 0, row, column] -= 1
    return clean, adversarial


@pytest.fixture
def with_examples(make_result, truth):
    def build(*examples):
        right = truth["vanilla"]
        result = make_result(right["clean"], {"linf": right["linf"]})
        result.examples = list(examples)
        return result

    return build


def test_changed_spikes_of_a_raster_are_marked_and_counted(with_examples):
    clean, adversarial = raster()
    figure = examples_figure(with_examples(example(clean, adversarial)))
    first, second, third = figure.axes
    added = {tuple(p) for p in third.collections[0].get_offsets().tolist()}
    gone = {tuple(p) for p in third.collections[1].get_offsets().tolist()}
    assert added == {(10.0, float(c)) for c in range(5) if clean[10, c] == 0}
    assert gone == {(10.0, float(c)) for c in range(5) if clean[10, c] == 1}
    assert f"+{len(added)} −{len(gone)}, size" in third.get_title()
    assert len(first.collections) == 0
    assert len(second.collections) == 2


def test_events_that_only_moved_in_time_are_marked(with_examples):
    clean, _ = frames()
    adversarial = clean.clone()
    step, polarity, row, column = clean[:4].nonzero()[0].tolist()
    adversarial[step, polarity, row, column] -= 1
    adversarial[step + 1, polarity, row, column] += 1
    adversarial[2, 1, 15, 15] += 60  # hides nothing: the scale is that of the clean frames
    figure = examples_figure(with_examples(example(clean, adversarial, "retime_0")))
    shown = [axes.images[0] for axes in figure.axes[:3]]
    assert shown[0].get_clim() == shown[1].get_clim()
    assert shown[1].get_clim()[1] < 60
    marks = np.asarray(shown[2].get_array())
    assert marks[row, column] == 3
    assert marks[15, 15] == 1
    assert (marks > 0).sum() == 2
    assert figure.axes[2].get_title().endswith("+61 −1, size 3")


def test_pooling_keeps_the_mean_of_every_block():
    plane = np.arange(7 * 9, dtype=float).reshape(7, 9)
    found = pooled(plane, (4, 3))
    assert found.shape == (4, 3)
    assert found[0, 0] == plane[:2, :3].mean()
    assert found[3, 2] == plane[6:, 6:].mean()
    assert np.array_equal(pooled(plane, (7, 9)), plane)


def test_of_a_dictionary_the_attacked_modality_is_drawn(with_examples):
    clean, adversarial = raster()
    image = torch.rand(1, 8, 8)
    figure = examples_figure(
        with_examples(example({"image": image, "audio": clean}, {"image": image, "audio": adversarial}))
    )
    assert "3 (audio)" in figure.axes[0].get_title()
    assert figure.axes[2].get_title().count("−") == 1


def test_the_animation_shows_every_step_and_marks_what_changed(with_examples):
    clean, adversarial = frames()
    gif = Image.open(io.BytesIO(animation(with_examples(example(*raster()), example(clean, adversarial)), width=32)))
    assert gif.n_frames == 5
    assert gif.size == (3 * 32 + 12, 32)
    gif.seek(2)
    step = np.asarray(gif.convert("RGB")).astype(int)
    changed = step[:, 76:]
    assert tuple(changed[3 * 2, 4 * 2]) == (178, 24, 43)
    assert (changed != 255).any(-1).sum() == 4  # one pixel, twice as large in both directions
    gif.seek(1)
    changed = np.asarray(gif.convert("RGB")).astype(int)[:, 76:]
    assert {tuple(c) for c in changed.reshape(-1, 3).tolist()} == {(255, 255, 255), (33, 102, 172)}


def test_without_event_frames_there_is_no_animation(with_examples):
    assert animation(with_examples(example(*raster()), example(torch.rand(1, 8, 8), torch.rand(1, 8, 8)))) is None
