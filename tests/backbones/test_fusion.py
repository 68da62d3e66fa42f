"""Fusion of modalities: against formulas written out, and what every backbone promises."""

import copy

import jsonargparse
import pytest
import torch
from torch import nn

from sg_lightning import recipes
from sg_lightning.backbones import Backbone, ConvNet, FusionNet, SEWResNet, SpikingMLP
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.encoding import Frames
from sg_lightning.modules import SpikingClassifier
from sg_lightning.neurons import LIF, LeakyIntegrator, SpikingNeuron, surrogates

KINDS = ["late", "weighted", "concat", "gated"]
NEURON = {"beta": 0.9, "surrogate": surrogates.Atan(2.0)}


def encoders(**options):
    options.setdefault("neuron", LIF(**NEURON))
    return {
        "image": ConvNet(5, 1, 8, channels=(4, 6), hidden=9, **options),
        "events": ConvNet(5, 2, 8, channels=(4, 6), hidden=7, encoding=Frames(3), **options),
        "audio": SpikingMLP(6, (10,), 5, time_steps=4, readout=LeakyIntegrator(0.9), **options),
    }


def make(kind, **options):
    fusion = {"learn_weights": True} if kind == "weighted" else {"fusion": kind}
    torch.manual_seed(3)
    net = FusionNet(encoders(), num_classes=5, hidden=8, neuron=LIF(**NEURON), **fusion, **options)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.bias.data.fill_(0.6)  # so that fresh layers fire in evaluation mode
    return net.eval()


def inputs(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(size, 1, 8, 8, generator=generator),
        "events": torch.poisson(torch.rand(size, 3, 2, 8, 8, generator=generator), generator=generator),
        "audio": (torch.rand(size, 4, 6, generator=generator) < 0.5).float(),
    }


def converted(x, dtype=torch.float64):
    return {key: part.to(dtype) for key, part in x.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind):
    net, x = make(kind), inputs(6)
    assert isinstance(net, Backbone)
    assert net.domain == {"image": Box(), "events": Counts(), "audio": Binary()}
    assert net.input_shape == {"image": (1, 8, 8), "events": (3, 2, 8, 8), "audio": (4, 6)}
    assert (net.num_classes, net.time_steps, net.spiking) == (5, 4, True)
    out = net(x)
    assert out.shape == (6, 5)
    assert torch.equal(net(x), out)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    double = copy.deepcopy(net).double()
    torch.testing.assert_close(
        double({k: v[order] for k, v in converted(x).items()}), double(converted(x))[order], rtol=1e-9, atol=1e-9
    )
    parts = {key: part.requires_grad_() for key, part in inputs(4).items()}
    for i in range(4):
        grads = torch.autograd.grad(net(parts)[i].pow(2).sum(), list(parts.values()))
        for grad in grads:
            assert (grad.flatten(1).abs().sum(1) > 0).tolist() == [j == i for j in range(4)]


def test_late_fusion_is_the_mean_of_the_logits():
    net, x = make("late"), inputs(4)
    by_hand = torch.stack([net.encoders[name](part) for name, part in x.items()]).mean(0)
    torch.testing.assert_close(net(x), by_hand)
    weighted = make("weighted")
    torch.testing.assert_close(weighted(x), by_hand)
    weighted.fusion.scores.data = torch.tensor([0.0, 1.0, -0.5])
    shares = torch.tensor([0.0, 1.0, -0.5]).softmax(0)
    torch.testing.assert_close(
        weighted(x),
        sum(share * net.encoders[name](part) for share, (name, part) in zip(shares, x.items(), strict=True)),
    )


def test_concatenation_by_hand():
    net, x = make("concat"), inputs(4)
    rates = [net.encoders[name].embedding(part) for name, part in x.items()]
    assert [rate.shape[1] for rate in rates] == [9, 7, 10]
    assert all(float(rate.detach().min()) >= 0 and float(rate.detach().max()) <= 1 for rate in rates)
    current = net.fusion.hidden[0](torch.cat(rates, 1))
    membrane, spikes = torch.zeros_like(current), []
    for _ in range(4):
        membrane = 0.9 * membrane + current
        spikes.append((membrane > 1).float())
        membrane = membrane * (1 - spikes[-1])
    torch.testing.assert_close(net(x), net.fusion.head(torch.stack(spikes).mean(0)))


def test_gated_unit_by_its_formula():
    net, x = make("gated"), inputs(4)
    rates = [net.encoders[name].embedding(part) for name, part in x.items()]
    joined = torch.cat(rates, 1)
    hidden = torch.zeros(4, 8)
    for rate, value, gate in zip(rates, net.fusion.values, net.fusion.gates, strict=True):
        hidden += torch.sigmoid(joined @ gate.weight.T) * torch.tanh(rate @ value.weight.T)
    torch.testing.assert_close(net(x), hidden @ net.fusion.head.weight.T + net.fusion.head.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_modalities_have_no_say(kind):
    net, x = make(kind), inputs(4)
    expected = net({**x, "audio": torch.zeros_like(x["audio"])})
    torch.testing.assert_close(net({key: x[key] for key in ("image", "events")}), expected)
    assert not torch.allclose(net(x), expected)
    # Missing from some samples only: each is treated for itself.
    mixed = {**x, "audio": x["audio"].clone()}
    mixed["audio"][1] = 0
    out = net(mixed)
    torch.testing.assert_close(out[1], expected[1])
    torch.testing.assert_close(out[[0, 2, 3]], net(x)[[0, 2, 3]])
    # Whatever the encoder says of silence does not count.
    other = copy.deepcopy(net)
    for parameter in other.encoders["audio"].parameters():
        parameter.data.normal_()
    torch.testing.assert_close(other({key: x[key] for key in ("image", "events")}), expected)
    nothing = net({key: torch.zeros_like(part) for key, part in x.items()})
    assert bool(nothing.isfinite().all())
    assert torch.equal(nothing[0].expand(4, -1), nothing)


def test_late_fusion_of_one_modality_is_that_modality():
    net, x = make("weighted"), inputs(4)
    net.fusion.scores.data = torch.tensor([-80.0, 90.0, 3.0])
    torch.testing.assert_close(net({"image": x["image"]}), net.encoders["image"](x["image"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_twin(kind):
    net, twin = make(kind), make(kind, spiking=False)
    assert (twin.time_steps, twin.spiking) == (1, False)
    assert not any(isinstance(m, SpikingNeuron) for m in twin.modules())
    assert twin.input_shape == net.input_shape
    theirs = twin.state_dict()
    ours = {key: value for key, value in net.state_dict().items() if key in theirs}
    assert {k.rsplit(".", 1)[-1] for k in net.state_dict() if k not in theirs} <= {"beta", "threshold"}
    twin.load_state_dict(ours)
    assert twin(inputs(2)).shape == (2, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_used(kind):
    net = make(kind).train()
    net(inputs(8)).pow(2).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_rebuild_it(kind, tmp_path):
    module = SpikingClassifier(make(kind))
    again = recipes.build(recipes.describe(module.backbone)).eval()
    again.load_state_dict(module.backbone.state_dict())
    assert torch.equal(again(inputs(3)), module.backbone(inputs(3)))


def test_sizes_come_from_the_data():
    wide = {"image": {"in_channels": 2, "input_size": 16, "mean": [0.1, 0.2], "time_steps": 3, "in_features": 9},
            "audio": {"in_features": 9, "time_steps": 5}}  # fmt: skip
    net = FusionNet(encoders(), num_classes=7, sizes=wide)
    assert net.input_shape == {"image": (2, 16, 16), "events": (3, 2, 8, 8), "audio": (5, 9)}
    assert net.encoders["image"].mean.flatten().tolist() == pytest.approx([0.1, 0.2])
    assert [encoder.num_classes for encoder in net.encoders.values()] == [7, 7, 7]
    given = encoders()
    kept = FusionNet(given, num_classes=5, sizes={"audio": {"in_features": 6}})
    for name, encoder in given.items():  # nothing changes, so neither do the weights; but they are copies
        for a, b in zip(encoder.parameters(), kept.encoders[name].parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()


def test_built_from_plain_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Backbone, "backbone")
    build = getattr(parser, "instantiate", parser.instantiate_classes)
    config = {
        "class_path": "FusionNet",
        "init_args": {
            "fusion": "gated",
            "encoders": {
                "image": {"class_path": "ConvNet", "init_args": {"channels": [4], "hidden": 5}},
                "audio": {"class_path": "SpikingMLP", "init_args": {"hidden": [6]}},
            },
            "sizes": {"audio": {"in_features": 9, "time_steps": 5}},
        },
    }
    net = build(parser.parse_object({"backbone": config})).backbone
    assert net({"image": torch.rand(2, 1, 8, 8), "audio": torch.ones(2, 5, 9)}).shape == (2, 10)


class Own(Backbone):
    """An encoder that says nothing of its features."""

    def __init__(self, num_classes=5):
        super().__init__(num_classes=num_classes, input_shape=(4,), time_steps=1, spiking=False, domain=Box())
        self.layer = nn.Linear(4, num_classes)

    def logits(self, x):
        return self.layer(x)


def test_own_encoders():
    net = FusionNet({"image": SEWResNet("sew_resnet19", 5, 1, 8), "touch": Own()}, num_classes=5)
    assert net({"image": torch.rand(2, 1, 8, 8), "touch": torch.rand(2, 4)}).shape == (2, 5)
    with pytest.raises(NotImplementedError, match="the encoder of 'touch', Own, has no embedding"):
        FusionNet({"image": ConvNet(5), "touch": Own()}, "gated", num_classes=5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: FusionNet({"image": ConvNet()}), ValueError, "at least two modalities"),
        (lambda: FusionNet({"a": ConvNet(), "b": nn.ReLU()}), TypeError, "encoder of 'b' must be a Backbone, got ReLU"),
        (
            lambda: FusionNet(encoders(), "early"),
            ValueError,
            "unknown fusion 'early'; choose one of late, concat, gated",
        ),
        (lambda: FusionNet(encoders(), "gated", learn_weights=True), ValueError, "learn_weights is for fusion='late'"),
        (lambda: FusionNet(encoders(), sizes={"touch": {}}), ValueError, "sizes names touch, but the encoders are"),
        (lambda: FusionNet(encoders(), "concat", hidden=0), ValueError, "hidden must be an integer >= 1"),
        (lambda: FusionNet(encoders(), "concat", head_steps=0), ValueError, "head_steps must be an integer >= 1"),
        (lambda: FusionNet(encoders(), num_classes=0), ValueError, "num_classes must be an integer >= 1"),
        (lambda: make("late")(torch.rand(2, 3)), TypeError, "needs a dict of modalities, got Tensor"),
        (lambda: make("late")({}), ValueError, "was built for image, events, audio, got nothing"),
        (lambda: make("late")({**inputs(2), "touch": torch.rand(2, 3)}), ValueError, "got image, events, audio, touch"),
        (lambda: make("late")({"image": torch.rand(2, 1, 9, 9)}), ValueError, "ConvNet was built for inputs of shape"),
        (lambda: make("late")({**inputs(2), "image": torch.rand(3, 1, 8, 8)}), ValueError, "as many samples"),
    ],
)
def test_what_does_not_fit_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
