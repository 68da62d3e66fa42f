"""What every backbone promises: shapes, isolation of samples, time folding, twins, clear errors."""

import copy

import jsonargparse
import pytest
import torch
from torch import nn

from sg_lightning import backbones
from sg_lightning.backbones import VGG, Backbone, ConvNet, SEWResNet, SpikingMLP, WideResNet
from sg_lightning.backbones.base import OverTime, over_time
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.encoding import Direct, Frames, Latency, Poisson
from sg_lightning.neurons import LIF, LeakyIntegrator, SpikingNeuron, surrogates

NEURON = {"beta": 0.9, "surrogate": surrogates.Atan(2.0)}


def make(kind: str, **options) -> Backbone:
    """Build a small member of each family whose default structure is kept."""
    options.setdefault("neuron", LIF(**NEURON))
    builders = {
        "convnet": lambda: ConvNet(5, 2, 8, channels=(6, 8), hidden=12, **options),
        "vgg5": lambda: VGG("vgg5", 5, 2, 8, head=(24, 24), **options),
        "vgg11": lambda: VGG("vgg11", 5, 2, 8, head=(24, 24), **options),
        "wide_resnet": lambda: WideResNet(10, 1, 5, 2, 8, pool=2, **options),
        "sew18": lambda: SEWResNet("sew_resnet18", 5, 2, 9, **options),
        "sew19": lambda: SEWResNet("sew_resnet19", 5, 2, 6, **options),
        "vgg_dvs": lambda: VGG("vgg_dvs", 5, 2, 17, **{"encoding": Frames(3), **options}),
        "frames": lambda: ConvNet(5, 2, 9, channels=(6, 8), hidden=12, **{"encoding": Frames(4), **options}),
        "mlp": lambda: SpikingMLP(9, (14, 12), 5, **{"time_steps": 6, **options}),
        "recurrent": lambda: SpikingMLP(9, (14, 12), 5, **{"time_steps": 6, "recurrent": True, **options}),
    }
    return builders[kind]()


IMAGES = ["convnet", "vgg5", "vgg11", "wide_resnet", "sew18", "sew19"]
FRAMES = ["vgg_dvs", "frames"]
RASTERS = ["mlp", "recurrent"]
KINDS = [*IMAGES, *FRAMES, *RASTERS]


def inputs(net: Backbone, size: int, *, density: float = 0.5) -> torch.Tensor:
    x = torch.rand(size, *net.input_shape)
    if net.domain == Counts():
        return torch.poisson(x)
    return (x < density).float() if net.domain == Binary() else x


def rates(net: nn.Module, x: torch.Tensor) -> list[float]:
    """Measure the mean spikes per neuron and step of every spiking layer."""
    found: list[float] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: found.append(float(out.mean())))
        for module in net.modules()
        if isinstance(module, SpikingNeuron)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def settled(net: Backbone) -> Backbone:
    """Give batch norm the statistics of data, so that a fresh network fires in evaluation mode too."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    net.train()
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for _ in range(4):
            net(inputs(net, 32))
    for norm in norms:  # training divides by the deviation over steps too; make up for the lost currents
        norm.momentum = 0.1
        norm.weight.data.mul_(2.0)
        norm.bias.data.fill_(0.3)
    return net.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_and_output(kind):
    net = make(kind)
    assert isinstance(net, Backbone)
    assert net.num_classes == 5
    assert net.spiking
    assert net.time_steps == {
        "convnet": 4,
        "sew18": 4,
        "sew19": 4,
        "mlp": 6,
        "recurrent": 6,
        "vgg_dvs": 3,
        "frames": 4,
    }.get(kind, 8)
    assert net.domain == (Binary() if kind in RASTERS else Counts() if kind in FRAMES else Box(0, 1))
    out = net(inputs(net, 3))
    assert out.shape == (3, 5)
    assert out.isfinite().all()
    assert not any(b.requires_grad for b in net.buffers())


@pytest.mark.parametrize("spiking", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_depends_on_itself_only(kind, spiking):
    net = settled(make(kind, spiking=spiking))
    x = inputs(net, 4).requires_grad_()
    out = net(x)
    for i in range(4):
        (grad,) = torch.autograd.grad(out[i].pow(2).sum(), x, retain_graph=True)
        touched = grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [j == i for j in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_fires_in_the_tests(kind):
    net = settled(make(kind))
    found = rates(net, inputs(net, 16))
    layers = {
        "convnet": 3,
        "vgg5": 5,
        "vgg11": 10,
        "vgg_dvs": 8,
        "frames": 3,
        "wide_resnet": 7,
        "sew18": 20,
        "sew19": 20,
    }
    assert len(found) == layers.get(kind, 2)
    assert all(0.02 < rate < 0.9 for rate in found), found


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_remembered_and_batch_order_is_free(kind):
    net = settled(make(kind)).double()
    x = inputs(net, 6).double()
    with torch.no_grad():
        first = net(x)
        net(inputs(net, 2).double())
        assert torch.equal(net(x), first)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(net(x[order]), first[order])
        torch.testing.assert_close(net(x[:1]), first[:1])


def lif_step(current, carried, neuron):
    """Advance a LIF with reset to zero by one step, in plain operations: an independent re-computation."""
    membrane = float(neuron.beta) * carried + current
    spikes = (membrane > float(neuron.threshold)).to(current.dtype)
    return spikes, membrane * (1 - spikes)


class Stepper:
    """Run a backbone's layers one time step at a time, keeping each neuron's state by hand."""

    def __init__(self):
        self.state, self.spikes = {}, {}

    def layers(self, sequence, x):
        for layer in sequence:
            x = self.layer(layer, x)
        return x

    def layer(self, layer, x):
        if not isinstance(layer, SpikingNeuron):
            return layer(x)
        if hasattr(layer, "recurrent"):
            before = self.spikes.get(layer, torch.zeros_like(x))
            x = x + layer.recurrent(before)
        spikes, self.state[layer] = lif_step(x, self.state.get(layer, torch.zeros_like(x)), layer)
        self.spikes[layer] = spikes
        return spikes

    def sew_block(self, block, x):
        return self.layers(block.body, x) + (x if block.skip is None else self.layers(block.skip, x))

    def block(self, block, x):
        active = self.layers(block.enter, x)
        skip = x if block.skip is None else block.skip(active)
        return block.mix[0] * skip + block.mix[1] * self.layers(block.body, active)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_time_equals_stepping_over_time(kind):
    net = settled(make(kind)).double()
    x = inputs(net, 5).double()
    stepper, logits = Stepper(), []
    with torch.no_grad():
        for step in range(net.time_steps):
            now = x[:, step] if kind in (*RASTERS, *FRAMES) else (x - net.mean) / net.std
            if kind == "wide_resnet":
                now = net.stem(now)
                for block in net.blocks:
                    now = stepper.block(block, now)
                now = stepper.layers(net.tail, now)
            elif kind.startswith("sew"):
                now = stepper.layers(net.stem, now)
                for block in net.blocks:
                    now = stepper.sew_block(block, now)
                now = stepper.layers(net.tail, now)
            else:
                now = stepper.layers(net.features, now)
            logits.append(net.head(now))
        torch.testing.assert_close(net(x), torch.stack(logits).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", IMAGES)
def test_sharing_the_first_layer_over_time_changes_nothing_but_the_running_variance(kind):
    class Repeated(Direct):
        """The same sequence, but with memory of its own: no layer can notice that it repeats."""

        def forward(self, x):
            return super().forward(x).contiguous()

    net = make(kind, encoding=Direct(3)).double()
    plain = copy.deepcopy(net)
    plain.encoding = Repeated(3)
    x = inputs(net, 8).double()
    out, expected = net(x), plain(x)
    torch.testing.assert_close(out, expected)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-7, atol=1e-9)

    shared, folded = (next(m for m in n.modules() if isinstance(m, nn.BatchNorm2d)) for n in (net, plain))
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    n = 8 * first(x).shape[2] ** 2
    torch.testing.assert_close(shared.running_mean, folded.running_mean)
    variance = [(m.running_var - 0.9) / 0.1 for m in (shared, folded)]  # running_var starts at 1, momentum 0.1
    torch.testing.assert_close(variance[0], variance[1] * (3 * n - 1) / (3 * (n - 1)))


def test_first_convolution_runs_once_for_all_steps():
    net = make("convnet", encoding=Direct(4))
    seen = []
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    net(inputs(net, 3))
    assert seen == [3, 12]
    seen.clear()
    net.encoding = Poisson(4)
    net(inputs(net, 3))
    assert seen == [12, 12]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("encoding", [Poisson(3), Latency(3)])
def test_spiking_encodings_give_input_gradients(kind, encoding):
    net = settled(make(kind, encoding=encoding))
    assert net.time_steps == 3
    x = inputs(net, 2).requires_grad_()
    (grad,) = torch.autograd.grad(net(x).pow(2).sum(), x)
    assert (grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ann_twin_shares_every_weight(kind):
    net, twin = make(kind), make(kind, spiking=False)
    assert twin.time_steps == 1
    assert not twin.spiking
    assert twin.input_shape == net.input_shape
    assert not any(isinstance(m, SpikingNeuron) for m in twin.modules())
    theirs = twin.state_dict()
    ours = {k: v for k, v in net.state_dict().items() if k in theirs}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    extra = {k.rsplit(".", 1)[-1] for k in net.state_dict() if k not in theirs}
    feedback = {"weight"} if kind == "recurrent" else set()
    assert extra <= {"beta", "threshold"} | feedback
    twin.load_state_dict(ours)
    assert twin(inputs(net, 2)).shape == (2, 5)


def test_ann_twin_by_hand():
    twin = make("mlp", spiking=False)
    x = inputs(twin, 3)
    first, _, second, _ = twin.features
    expected = twin.head(second(first(x.sum(1)).relu()).relu())
    torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts(kind):
    net = settled(make(kind))
    x = inputs(net, 3)
    net(x).sum().backward()
    clone = copy.deepcopy(net)
    fresh = make(kind).eval()
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(clone(x), expected)
        assert torch.equal(fresh(x), expected)
        next(clone.parameters()).add_(1.0)
        assert torch.equal(net(x), expected)


def test_neurons_are_separate_copies_of_the_template():
    neuron = LIF(beta=0.7, threshold=0.8, learn_beta=True, fire_at_threshold=True)
    for kind in KINDS:
        found = [m for m in make(kind, neuron=neuron).modules() if isinstance(m, SpikingNeuron)]
        assert all(m is not neuron for m in found)
        assert len({m.beta.data_ptr() for m in found}) == len(found)
        assert all(m.beta.item() == pytest.approx(0.7) and m.beta.requires_grad for m in found)
        assert all(m.threshold.item() == pytest.approx(0.8) and not m.threshold.requires_grad for m in found)
        assert all(m.dynamics == neuron.dynamics for m in found)


@pytest.mark.parametrize("kind", IMAGES)
def test_fresh_networks_fire_in_training_mode(kind):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = {
            "convnet": lambda: ConvNet(),
            "vgg5": lambda: VGG("vgg5", in_channels=1, input_size=8, head=(256, 256)),
            "vgg11": lambda: VGG("vgg11", in_channels=1, input_size=16, head=(256, 256)),
            "wide_resnet": lambda: WideResNet(in_channels=1, input_size=16, pool=4),
            "sew18": lambda: SEWResNet(in_channels=1, input_size=33),
            "sew19": lambda: SEWResNet("sew_resnet19", in_channels=1, input_size=8),
        }[kind]()
        found = rates(net.train(), inputs(net, 16))
    assert all(0.02 <= rate <= 0.5 for rate in found), found


@pytest.mark.parametrize("recurrent", [False, True])
def test_fresh_mlp_fires_on_sparse_rasters(recurrent):
    net = SpikingMLP(recurrent=recurrent)
    found = rates(net, inputs(net, 8, density=0.05))
    assert all(0.02 <= rate <= 0.5 for rate in found), found


@pytest.mark.parametrize("kind", IMAGES)
def test_normalisation_is_inside(kind):
    mean, std = (0.3, 0.6), (0.2, 0.5)
    net = settled(make(kind, mean=mean, std=std))
    plain = make(kind).eval()
    state = net.state_dict()
    plain.load_state_dict({**state, "mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)})
    x = inputs(net, 3)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(2)], 1)
    torch.testing.assert_close(net(x), plain(by_hand))
    assert {"mean", "std"} <= set(state)


class TestBadInput:
    """Each wrong call gives one clear error."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_wrong_shapes(self, kind):
        net = make(kind)
        shape = net.input_shape
        wanted = r"built for inputs of shape \(B, " + ", ".join(map(str, shape)) + r"\), got"
        for bad in (shape, (2, *shape[:-1]), (2, *shape, 1), (2, shape[0] + 1, *shape[1:]), (2, *shape[:-1], 5)):
            with pytest.raises(ValueError, match=wanted):
                net(torch.zeros(bad))
        with pytest.raises(ValueError, match=r"needs floating-point inputs, got torch\.uint8"):
            net(torch.zeros(2, *shape, dtype=torch.uint8))
        with pytest.raises(TypeError, match="needs a tensor, got dict"):
            net({"image": torch.zeros(2, *shape)})

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: VGG("vgg11", input_size=7), "vgg11 halves the image 3 times.*at least 8, got 7"),
            (lambda: VGG("vgg16", input_size=28), "vgg16 halves the image 5 times.*at least 32, got 28"),
            (lambda: VGG("vgg12"), "unknown VGG 'vgg12'; choose one of vgg5, vgg11, vgg13, vgg16, vgg_dvs"),
            (lambda: VGG(head=8), r"head must list at least one width"),
            (lambda: VGG(head=(0,)), r"head\[0\] must be an integer >= 1, got 0"),
            (lambda: ConvNet(input_size=3), "ConvNet halves the image 2 times.*at least 4, got 3"),
            (lambda: ConvNet(channels=()), "channels must list at least one width"),
            (lambda: ConvNet(channels=64), "channels must list at least one width"),
            (lambda: ConvNet(hidden=0), "hidden must be an integer >= 1, got 0"),
            (lambda: ConvNet(num_classes=0), "num_classes must be an integer >= 1, got 0"),
            (lambda: ConvNet(in_channels=0), "in_channels must be an integer >= 1, got 0"),
            (lambda: ConvNet(input_size=0), "input_size must be an integer >= 1, got 0"),
            (lambda: ConvNet(time_steps=0), "time_steps must be an integer >= 1, got 0"),
            (lambda: ConvNet(time_steps=4, encoding=Direct(5)), "time_steps=4 but the encoding has time_steps=5"),
            (lambda: ConvNet(time_steps=4, encoding=Frames(5)), "time_steps=4 but the encoding has time_steps=5"),
            (lambda: ConvNet(encoding=Frames(5), mean=0.1), "frames of events are not normalised .* but mean=0.1"),
            (lambda: ConvNet(encoding=Frames(5), std=0.5), "frames of events are not normalised .* std=0.5"),
            (lambda: ConvNet(std=0.0), "std must be above 0, got 0.0"),
            (lambda: ConvNet(mean=(0.1, 0.2)), "mean has 2 values for 1 channels"),
            (lambda: ConvNet(mean=float("nan")), "mean must be finite"),
            (lambda: ConvNet(neuron=LIF(torch.tensor([0.5, 0.6]))), "neuron has per-channel values"),
            (lambda: WideResNet(depth=18), r"depth must be 10, 16, 22, 28.*got 18"),
            (lambda: WideResNet(depth=4), r"depth must be 10, 16, 22, 28.*got 4"),
            (lambda: WideResNet(widen=0), "widen must be an integer >= 1, got 0"),
            (lambda: WideResNet(input_size=8), "maps of 2 x 2 of images of 8 x 8.*multiple of 32, or give pool=2"),
            (lambda: WideResNet(input_size=34), "maps of 9 x 9 of images of 34 x 34.*give pool=9"),
            (lambda: WideResNet(pool=0), "pool must be an integer >= 1, got 0"),
            (
                lambda: SEWResNet("sew_resnet20"),
                "unknown SEWResNet 'sew_resnet20'; choose one of sew_resnet18, sew_resnet19",
            ),
            (lambda: SEWResNet(input_size=0), "input_size must be an integer >= 1, got 0"),
            (lambda: SpikingMLP(0), "in_features must be an integer >= 1, got 0"),
            (lambda: SpikingMLP(hidden=()), "hidden must list at least one width"),
            (lambda: SpikingMLP(time_steps=0), "time_steps must be an integer >= 1, got 0"),
        ],
    )
    def test_impossible_networks(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()

    def test_neuron_of_another_kind(self):
        with pytest.raises(TypeError, match=r"neuron must be a LIF.*got ReLU"):
            ConvNet(neuron=nn.ReLU())


@pytest.mark.parametrize(("given", "steps"), [({}, 4), ({"time_steps": 7}, 7)])
def test_frames_take_their_number_from_the_network(given, steps):
    net = ConvNet(encoding=Frames(), **given)
    assert (net.time_steps, net.input_shape) == (steps, (steps, 1, 8, 8))
    twin = ConvNet(encoding=Frames(), spiking=False, **given)
    assert (twin.time_steps, twin.input_shape) == (1, (steps, 1, 8, 8))


def test_twin_sees_the_sum_of_the_frames():
    twin = make("frames", spiking=False).eval()
    image = ConvNet(5, 2, 9, channels=(6, 8), hidden=12, spiking=False).eval()
    image.load_state_dict(twin.state_dict())
    x = inputs(twin, 3)
    torch.testing.assert_close(twin(x), image(x.sum(1)))


@pytest.mark.parametrize("kind", FRAMES)
def test_a_spike_moved_in_time_changes_the_output_of_the_network_but_not_of_its_twin(kind):
    net, twin = settled(make(kind)), make(kind, spiking=False).eval()
    x = inputs(net, 4)
    moved = x.roll(1, dims=1)
    assert (net(x) != net(moved)).any(1).all()
    torch.testing.assert_close(twin(x), twin(moved))


def test_readout_of_the_mlp():
    mean = settled(make("mlp"))
    last = make("mlp", readout=LeakyIntegrator(beta=0.8, readout="last")).eval()
    last.load_state_dict(mean.state_dict(), strict=False)
    x = inputs(mean, 4)
    with torch.no_grad():
        outputs = over_time(mean.head, mean.features(x.transpose(0, 1)))
        membrane = torch.zeros(4, 5)
        for output in outputs:
            membrane = 0.8 * membrane + output
        torch.testing.assert_close(mean(x), outputs.mean(0))
        torch.testing.assert_close(last(x), membrane)


def test_over_time_keeps_constant_sequences_constant():
    layers = OverTime(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.rand(5, 3).expand(7, 5, 3)
    out = layers(x)
    assert out.stride(0) == 0
    torch.testing.assert_close(out, layers(x.contiguous()))


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (
            {
                "class_path": "VGG",
                "init_args": {
                    "name": "vgg5",
                    "input_size": 8,
                    "head": [16],
                    "mean": [0.5, 0.4, 0.3],
                    "std": 0.2,
                    "encoding": {"class_path": "sg_lightning.encoding.Poisson", "init_args": {"time_steps": 3}},
                },
            },
            3,
        ),
        (
            {
                "class_path": "ConvNet",
                "init_args": {
                    "channels": [4, 4],
                    "neuron": {"class_path": "sg_lightning.neurons.LIF", "init_args": {"surrogate": "atan"}},
                },
            },
            4,
        ),
        ({"class_path": "ConvNet", "init_args": {"encoding": None, "neuron": {"class_path": "LIF"}, "mean": 0}}, 4),
        (
            {
                "class_path": "VGG",
                "init_args": {
                    "name": "vgg_dvs",
                    "in_channels": 2,
                    "time_steps": 3,
                    "encoding": {"class_path": "sg_lightning.encoding.Frames"},
                },
            },
            3,
        ),
        ({"class_path": "WideResNet", "init_args": {"depth": 10, "widen": 1, "time_steps": 2}}, 2),
        ({"class_path": "SpikingMLP", "init_args": {"hidden": [5], "recurrent": True, "time_steps": 9}}, 9),
    ],
)
def test_built_from_plain_configuration(config, steps):
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Backbone, "backbone")
    build = getattr(parser, "instantiate", parser.instantiate_classes)  # the second name is deprecated since 4.49
    net = build(parser.parse_object({"backbone": config})).backbone
    assert type(net).__name__ == config["class_path"]
    assert net.time_steps == steps
    assert net(inputs(net, 2)).shape == (2, net.num_classes)


def test_own_backbone():
    class Linear(Backbone):
        def __init__(self):
            super().__init__(num_classes=3, input_shape=(4,), time_steps=1, spiking=False, domain=Box(-1, 1))
            self.layer = nn.Linear(4, 3)

        def logits(self, x):
            return self.layer(x)

    net, x = Linear(), torch.rand(2, 4)
    assert torch.equal(net(x), net.layer(x))
    with pytest.raises(ValueError, match=r"Linear was built for inputs of shape \(B, 4\), got \(2, 5\)"):
        net(torch.rand(2, 5))
    with pytest.raises(TypeError, match="abstract"):
        Backbone(num_classes=3, input_shape=(4,), time_steps=1, spiking=False, domain=Box())


def test_public_names():
    assert set(backbones.__all__) == {
        "Backbone",
        "ConvNet",
        "FusionNet",
        "SEWResNet",
        "SpikingMLP",
        "VGG",
        "WideResNet",
        "recompute",
    }
