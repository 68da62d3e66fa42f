import pytest
import torch
from torch import nn

from sg_lightning.attacks import APGD, ASSG, PGD, Oracle
from sg_lightning.backbones import ConvNet
from sg_lightning.threats import Linf


class Small(nn.Module):
    """A machine on which only so many samples fit at once."""

    def __init__(self, net, most):
        super().__init__()
        self.net, self.most, self.sizes = net, most, []

    def forward(self, x):
        self.sizes.append(len(x))
        z = self.net(x)
        if len(x) > self.most:  # late, when the neurons have done their part
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return z


def case():
    torch.manual_seed(0)
    net = ConvNet(channels=(4, 8), hidden=16, time_steps=2).double()
    x = torch.rand(11, 1, 8, 8, dtype=torch.float64)
    net.train()(x)
    net.eval()
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("estimator", [None, ASSG()])
def test_parts_shrink_until_they_fit_and_the_result_is_the_same(estimator):
    net, x, y = case()
    attack = APGD(Linf(0.05), steps=6, estimator=estimator)
    noise = torch.Generator().manual_seed(0)
    whole = attack.run(Oracle(net), x, y, generator=noise)
    small, oracle = Small(net, 4), Oracle(Small(net, 4))
    oracle = Oracle(small)
    parts = attack.run(oracle, x, y, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parts.success, whole.success)
    torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=1e-9)
    assert sum(size > 4 for size in small.sizes) == 2  # 11, 6; then never again
    assert oracle.room.samples == 3
    assert oracle.counts.forwards == sum(size for size in small.sizes if size <= 4)


def test_a_single_sample_that_does_not_fit_and_other_errors_are_told():
    net, x, _ = case()
    with pytest.raises(torch.OutOfMemoryError):
        Oracle(Small(net, 0)).logits(x)

    def broken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Oracle(broken).logits(x)


def test_compiled_models_are_asked_for_few_batch_sizes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    x = torch.rand(11, 1, 8, 8, dtype=torch.float64)
    y = net(x).argmax(1)
    sizes = []

    def backend(graph, inputs):
        sizes.extend(len(value) for value in inputs if value.shape[1:] == x.shape[1:])
        return graph

    attack = PGD(Linf(0.1), steps=12, step_size=0.01)
    plain, noise = attack.run(Oracle(net), x, y, generator=torch.Generator().manual_seed(0)), torch.Generator()
    found = attack.run(Oracle(torch.compile(net, backend=backend, dynamic=False)), x, y, generator=noise.manual_seed(0))
    assert len(set(plain.iterations.tolist())) > 4  # samples break one after the other
    assert torch.equal(found.success, plain.success)
    torch.testing.assert_close(found.x_adv, plain.x_adv, rtol=0, atol=1e-9)
    assert set(sizes) <= {1, 2, 4, 8, 16}
    assert len(set(sizes)) > 1
