"""The penalty on dictionaries of modalities: one modality, step sizes and walls of its own, against other derivations."""

import pytest
import torch
from torch import nn

from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.objectives import sparse_gradient_penalty
from sg_lightning.objectives.directions import ascend


class Net(nn.Module):
    """A smooth network in float64 in which modalities multiply."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.eye, self.ear, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.last((2 * self.eye(x["eye"])).tanh() * (1 + self.ear(x["ear"].flatten(1)).sigmoid()))


NET = Net()
X = {
    "eye": torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "ear": (torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(2)) < 0.5).double(),
}
Y = torch.tensor([0, 1, 2, 0, 1])


def gradients(penalty):
    return torch.autograd.grad(penalty, list(NET.parameters()))


@pytest.mark.parametrize("direction", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("modality", ["eye", "ear"])
def test_one_modality_is_the_network_with_the_others_put_in(direction, modality):
    options = {"direction": direction, "coordinates": 2 if direction in ("l1", "l0") else None, "difference": "central"}
    found = sparse_gradient_penalty(NET, X, Y, modality=modality, **options)
    alone = lambda part: NET({**X, modality: part})
    expected = sparse_gradient_penalty(alone, X[modality], Y, **options)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(a, b)
    if direction in ("linf", "l2"):  # the others may choose the same values
        assert not torch.allclose(found, sparse_gradient_penalty(NET, X, Y, **options))


@pytest.mark.parametrize("direction", ["linf", "l2"])
def test_step_sizes_by_modality_are_units_of_the_input(direction):
    sizes = {"eye": 0.02, "ear": 0.1}
    found = sparse_gradient_penalty(NET, X, Y, direction=direction, step_size=sizes)
    # In units in which both have the step size 0.1, the eye's numbers are five times as large.
    other_units = {"eye": X["eye"] * 5, "ear": X["ear"]}
    same_net = lambda u: NET({"eye": u["eye"] / 5, "ear": u["ear"]})
    torch.testing.assert_close(
        found, sparse_gradient_penalty(same_net, other_units, Y, direction=direction, step_size=0.1)
    )
    equal = sparse_gradient_penalty(NET, X, Y, direction=direction, step_size={"eye": 0.1, "ear": 0.1})
    torch.testing.assert_close(equal, sparse_gradient_penalty(NET, X, Y, direction=direction, step_size=0.1))


def test_room_has_the_walls_of_each_modality():
    x = {"eye": torch.tensor([[0.25, 0.5]]), "ear": torch.tensor([[3.0, 0.0]])}
    grad = {"eye": torch.tensor([[1.0, -1.0]]), "ear": torch.tensor([[-1.0, -1.0]])}
    step = ascend(x, grad, "l0", 1.0, 4, {"eye": Box(-1, 1), "ear": Counts()})
    # Room up to 1, down to -1; from 3 events down to none; from none there is no way down.
    assert torch.equal(step.delta["eye"], torch.tensor([[0.75, -1.5]]))
    assert torch.equal(step.delta["ear"], torch.tensor([[-3.0, 0.0]]))
    torch.testing.assert_close(step.slope, torch.tensor([0.75 + 1.5 + 3.0]))


def test_clamp_has_the_walls_of_each_modality():
    seen = []

    def net(x):
        seen.append(x)
        return NET(x)

    domain = {"eye": Box(-1, 2), "ear": Binary()}
    sparse_gradient_penalty(net, X, Y, step_size=0.7, domain=domain, clamp=True)
    moved = seen[-1]
    assert float(moved["eye"].detach().max()) > 1
    assert bool(((moved["ear"] >= 0) & (moved["ear"] <= 1)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "nose"}, "modality='nose', but the input has eye, ear"),
        ({"step_size": {"eye": 0.1}}, "step_size has eye, but the input has eye, ear"),
        ({"step_size": {"eye": 0.1, "ear": 0.0}}, "step_size must be finite and above 0"),
        ({"step_size": {}}, "step_size must be finite and above 0"),
        ({"step_size": {"eye": 0.1}, "modality": "eye"}, "step sizes by modality are for"),
        ({"step_size": {"eye": 0.1, "ear": 0.1}, "direction": "l1"}, "step sizes by modality are for"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_gradient_penalty(NET, X, Y, **options)


def test_a_single_tensor_has_no_modality():
    with pytest.raises(ValueError, match="modality='eye', but the input has a single tensor"):
        sparse_gradient_penalty(nn.Linear(3, 2), torch.rand(2, 3), torch.tensor([0, 1]), modality="eye")
