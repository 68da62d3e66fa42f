import numpy as np
import pytest
import torch

from sg_lightning.datamodules.sparse import SparseSamples


def dense(n, shape, *, counts, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, size=(n, *shape)) * (rng.random((n, *shape)) < 0.2)
    x[1] = 0  # a sample without any event
    return torch.from_numpy(x if counts else np.minimum(x, 1))


def sparse(x, *, counts):
    flat = x.flatten(1)
    sample, cell = flat.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(sample, minlength=len(x)).cumsum(0)])
    values = flat[sample, cell].to(torch.uint8) if counts else None
    return SparseSamples(cell.int(), values, offsets, torch.arange(len(x)), tuple(x.shape[1:]))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 4)])
def test_batches_parts_and_single_samples_are_the_dense_ones(shape, counts):
    x = dense(9, shape, counts=counts)
    samples = sparse(x, counts=counts)
    order = [4, 1, 8, 0]
    batch, labels = samples.__getitems__(order)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, x[order].float())
    assert labels.tolist() == order
    assert torch.equal(samples[3][0], x[3].float())
    part = samples.part(torch.tensor(order))
    assert torch.equal(part.__getitems__([3, 1])[0], x[[0, 1]].float())
    assert part.part(torch.tensor([2])).labels.tolist() == [8]


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="2 labels need 3 ascending offsets"):
        SparseSamples(torch.zeros(3, dtype=torch.int32), None, torch.tensor([0, 3]), torch.tensor([0, 1]), (4,))
    with pytest.raises(ValueError, match="3 cells need as many counts, got 2"):
        SparseSamples(
            torch.zeros(3, dtype=torch.int32), torch.ones(2), torch.tensor([0, 1, 3]), torch.tensor([0, 1]), (4,)
        )
