"""Foreign libraries behind our interface: nothing that comes back is trusted, nothing of the model is touched.

Tests marked ``adapters`` need the libraries (``make test-adapters``); the others use a library of this file's own.
"""

import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from sg_lightning.attacks import BPTT, PGD, Oracle, load_suite, make_attack, verify
from sg_lightning.attacks.adapters import Advertorch, Foolbox, ForeignAttack, PyAutoAttack, Torchattacks
from sg_lightning.attacks.adapters import advertorch as advertorch_adapter
from sg_lightning.attacks.adapters import torchattacks as torchattacks_adapter
from sg_lightning.backbones import ConvNet
from sg_lightning.datamodules import Digits
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.evaluation import evaluate
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Joint, Linf

# ---------------------------------------------------------------- a library of our own


@dataclass(frozen=True)
class Fake(ForeignAttack):
    """A library whose attack is any function (shell, y, eps) -> points."""

    attack: object = None
    kind = "fake"
    package = "numpy"
    command = ""
    seen: list = field(default_factory=list, compare=False)

    @property
    def algorithms(self):
        return ("it",)

    def _perturb(self, algorithm, shell, y, eps, seed):
        self.seen.append((shell.unit, eps, seed))
        return self.attack(shell, y, eps)


def sign_step(shell, y, eps):
    """One backward() into whatever has a .grad, as several libraries do it."""
    x = shell.unit.clone().requires_grad_()
    nn.functional.cross_entropy(shell(x), y, reduction="sum").backward()
    return (x + eps * x.grad.sign()).clamp(0, 1).detach()


class Net(nn.Module):
    """A spiking network with batch norm and dropout."""

    def __init__(self, features, classes=3, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.fire = nn.Linear(features, 32), nn.BatchNorm1d(32), LIF(beta=0.8)
        self.first.weight.data *= 4
        self.frozen, self.drop, self.last = nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, classes)
        self.to(dtype)

    def forward(self, x):
        current = self.norm(self.first(x.flatten(1))).expand(4, -1, -1)
        return self.last(self.drop(self.frozen(self.fire(current).mean(0))))


def case(shape=(1, 6, 6), n=12, low=0.0, high=1.0, dtype=torch.float32):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * (high - low) + low
    model = Net(x[0].numel(), dtype=dtype).eval()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("spoil", [lambda p: p * torch.nan, lambda p: torch.full_like(p, torch.inf)])
def test_results_that_are_not_finite_never_count(spoil):
    model, x, y = case()
    result = Fake(Linf(0.5), attack=lambda shell, y, eps: spoil(sign_step(shell, y, eps))).run(Oracle(model), x, y)
    assert not result.success.any()
    assert not result.invalid.any()
    assert torch.equal(result.x_adv, x)


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.1), L1(0.5), L0(2)], ids=lambda t: t.norm)
def test_points_beyond_the_budget_are_projected(threat):
    model, x, y = case()
    far = Fake(threat, attack=lambda shell, y, eps: 1 - shell.unit).run(Oracle(model), x, y)
    assert bool(threat.contains(far.x_adv, x).all())
    assert torch.equal(far.success, model(far.x_adv).argmax(1) != y)


@pytest.mark.parametrize("threat", [Linf(0.6, Box(-1, 3)), L2(1.0, Box(-1, 3)), L1(4.0, Box(-1, 3)), L0(2, Box(-1, 3))],
                         ids=lambda t: t.norm)  # fmt: skip
def test_other_boxes_are_rescaled(threat):
    model, x, y = case(low=-1.0, high=3.0)
    attack = Fake(threat, attack=sign_step)
    result = attack.run(Oracle(model), x, y)
    unit, eps, _ = attack.seen[0]
    assert torch.allclose(unit, (x + 1) / 4)
    assert eps == threat.budget / (1 if threat.norm == "l0" else 4)
    assert bool(threat.contains(result.x_adv, x).all())
    if threat.norm == "linf":  # the sign step itself arrives: the point is what FGSM gives on the original box
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
        fell = result.success
        assert torch.allclose(result.x_adv[fell], (x + 0.6 * g.sign()).clamp(-1, 3)[fell], atol=1e-5)
        assert bool(fell.any())


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4), (4, 2, 3, 4)], ids=["vector", "raster", "image", "frames"])
def test_libraries_get_contiguous_float32_images(shape):
    model, x, y = case(shape, dtype=torch.float64)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    attack = Fake(L2(2.0), attack=sign_step)
    result = attack.run(Oracle(model), x, y)
    unit = attack.seen[0][0]
    assert unit.shape == {1: (12, 1, 1, 7), 2: (12, 1, 5, 7), 3: (12, 2, 3, 4), 4: (12, 8, 3, 4)}[len(shape)]
    assert unit.dtype == torch.float32
    assert unit.is_contiguous()
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == torch.float64


def test_what_the_library_leaves_alone_stays_to_the_bit():
    model, x, y = case(low=-0.7, high=1.9, dtype=torch.float64)
    threat = L0(1, Box(-0.7, 1.9))

    def one(shell, y, eps):
        moved = shell.unit.clone()
        moved[:, 0, 0, 0] = 1.0
        return moved

    result = Fake(threat, attack=one).run(Oracle(model), x, y, goal="loss")
    assert bool(((result.x_adv != x).flatten(1).sum(1) <= 1).all())
    assert bool((result.x_adv != x).any())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("fails", [False, True])
def test_model_and_random_states_are_left_as_they_were(context, fails):
    model, x, y = case()
    model.train()
    model.frozen.eval()
    model.last.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def rude(shell, y, eps):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        sys.settrace(None)
        shell.train()
        assert all(not p.requires_grad for p in shell.parameters())
        if fails:
            raise RuntimeError("boom")
        return sign_step(shell, y, eps)

    def tracer(frame, event, arg):
        return None

    held = sys.gettrace()
    sys.settrace(tracer)
    try:
        with context():
            states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
            noise = SampleGenerator.from_ids(0, range(12))
            try:
                Fake(Linf(0.1), attack=rude).run(Oracle(model), x.clone(), y, generator=noise)
                assert not fails
            except RuntimeError:
                assert fails
            assert sys.gettrace() is tracer
            now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
            assert torch.equal(states[0], now[0])
            assert states[1:] == now[1:]
    finally:
        sys.settrace(held)
    assert model.training
    assert not model.frozen.training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["last.weight"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_counts_and_gradient_health_reach_the_rows():
    class Dead(Net):
        """No gradient for the first sample of a batch, none that is finite for the second."""

        def forward(self, x):
            if not x.requires_grad:
                return super().forward(x)
            scale = torch.ones(len(x), *[1] * (x.dim() - 1))
            scale[0] = 0.0
            x.register_hook(lambda g: g * scale)
            if len(x) > 1:
                second = (torch.arange(len(x)) == 1).view(-1, 1, 1, 1)
                x.register_hook(lambda g: torch.where(second, torch.nan, g))
            return super().forward(x * 1.0)

    _, x, y = case()
    model = Dead(36).eval()
    y = model(x).argmax(1)
    oracle = Oracle(model)
    result = Fake(Linf(1e-6), attack=sign_step).run(oracle, x, y)
    assert result.gradients.tolist() == [1] * 12
    assert result.zero_gradients.tolist() == [1] + [0] * 11
    assert result.invalid.tolist() == [False, True] + [False] * 10
    assert result.queries.tolist() == [3] * 12  # clean, the library's, the check
    assert (oracle.counts.forwards, oracle.counts.backwards) == (36, 12)
    assert (oracle.health.total, oracle.health.zero, oracle.health.nonfinite) == (12, 1, 1)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        Fake(Linf(0.1), attack=sign_step).run(Oracle(model, on_nonfinite="raise"), x, y)


def test_only_standing_samples_are_sent_in_batches_of_the_oracle():
    model, x, y = case()
    y[:3] = (y[:3] + 1) % 3
    attack = Fake(Linf(0.05), attack=sign_step)
    result = attack.run(Oracle(model, batch_size=4), x, y)
    assert [len(unit) for unit, _, _ in attack.seen] == [4, 4, 1]
    assert bool(result.success[:3].all())
    assert result.iterations[:3].tolist() == [0] * 3
    none = Fake(Linf(0.0), attack=sign_step)
    assert torch.equal(none.run(Oracle(model), x, y).x_adv, x)
    assert none.seen == []


def test_same_noise_same_seed():
    model, x, y = case()
    attack = Fake(
        Linf(0.1), attack=lambda shell, y, eps: (shell.unit + eps * torch.randn_like(shell.unit).sign()).clamp(0, 1)
    )
    runs = [attack.run(Oracle(model), x, y, generator=SampleGenerator.from_ids(seed, range(12)), goal="loss").x_adv
            for seed in (0, 0, 1)]  # fmt: skip
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_estimator_is_in_force_and_averages_are_over_gradients():
    model, x, y = case()

    def gradient(estimator=None, eot=1):
        held = []

        def look(shell, y, eps):
            z = shell.unit.clone().requires_grad_()
            held.append(torch.autograd.grad(nn.functional.cross_entropy(shell(z), y, reduction="sum"), z)[0])
            return shell.unit

        Fake(Linf(0.1), attack=look, estimator=estimator).run(Oracle(model, eot=eot), x, y)
        return held[0]

    for estimator in (None, BPTT(surrogates.Atan(5.0))):
        z = x.clone().requires_grad_()
        with Oracle(model).attacking() if estimator is None else estimator.applied(model, None):
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
        assert torch.allclose(gradient(estimator), g, rtol=1e-4, atol=1e-7)
        assert torch.allclose(gradient(estimator, eot=3), g, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(), gradient(BPTT(surrogates.Atan(5.0))))


def test_graph_may_be_used_several_times_and_not_twice_in_depth():
    model, x, y = case()

    def per_class(shell, y, eps):
        z = shell.unit.clone().requires_grad_()
        logits = shell(z)
        rows = [torch.autograd.grad(logits[:, k].sum(), z, retain_graph=True)[0] for k in range(3)]
        total = torch.autograd.grad(logits.sum(), z, create_graph=True)[0]
        assert torch.allclose(sum(rows), total, atol=1e-5)
        with pytest.raises(RuntimeError):
            total.sum().backward()
        return shell.unit

    oracle = Oracle(model)
    result = Fake(Linf(0.1), attack=per_class).run(oracle, x, y)
    assert oracle.counts.backwards == 12 * 4
    assert result.gradients.tolist() == [4] * 12


def test_blind_attacks_need_no_gradient_and_others_say_so():
    _, x, y = case()

    def steps(z):
        return nn.functional.one_hot((z.flatten(1).sum(1) > 18).long(), 3).float() * 5

    blind = Fake(Linf(0.3), attack=lambda shell, y, eps: shell(shell.unit).detach().sum() * 0 + 1 - shell.unit)
    y = steps(x).argmax(1)
    assert bool(blind.run(Oracle(steps), x, y).success.any())
    with pytest.raises(ValueError, match="white-box attacks need a gradient"):
        Fake(Linf(0.3), attack=sign_step).run(Oracle(steps), x, y)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Advertorch(L1(1.0), "L1PGDAttack"), "6 % of the best"),
    (lambda: Advertorch(L2(1.0), "L2MomentumIterativeAttack"), "divides the perturbation by itself"),
    (lambda: Advertorch(L2(1.0), "ChooseBestAttack"), "all-zero images"),
    (lambda: Advertorch(L2(1.0), "LBFGSAttack"), "negates the loss but not the gradient"),
    (lambda: Advertorch(L0(1), "LocalSearchAttack", settings={"comply_with_foolbox": True}), "leaves the box"),
    (lambda: Advertorch(L2(1.0), "LinfPGDAttack"), "made for linf; for l2 choose one of: CarliniWagnerL2Attack"),
    (lambda: Advertorch(L2(1.0), "Nonsense"), "is unknown; for l2 choose"),
    (lambda: Torchattacks(L1(1.0), "FAB"), "made for linf l2; for l1 choose one of: EADL1"),
    (lambda: Torchattacks(L0(1), "JSMA"), r"\(label \+ 1\) % 10"),
    (lambda: Foolbox(Linf(0.1), "GenAttack"), "target label"),
    (lambda: PyAutoAttack(L0(1)), "linf, l2 and l1"),
    (lambda: PyAutoAttack(Linf(0.1), attacks=("apgd",)), "apgd-ce"),
    (lambda: PyAutoAttack(Linf(0.1), attacks="apgd-ce"), "a sequence of names"),
    (lambda: Advertorch(L0(1, domain=Counts(9)), "SinglePixelAttack"), "respect integers"),
    (lambda: Torchattacks(EventFlips(1, domain=Binary()), "PGD"), "respect integers"),
    (lambda: Foolbox(Linf(0.1, Box(0, float("inf"))), "PGD"), "two walls"),
    (lambda: Foolbox(Linf(0.1), "PGD", settings={"model": nn.Linear(2, 2)}), "plain values"),
])  # fmt: skip
def test_unsound_use_is_refused_before_anything_is_imported(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_several_modalities_are_refused():
    with pytest.raises(TypeError, match="a single tensor"):
        Torchattacks(Joint({"a": Linf(0.1), "b": Linf(0.1)}), "PGD")


ABSENT = [
    ("advertorch", lambda: Advertorch(Linf(0.1), "LinfPGDAttack"), r"sg-lightning\[attack-libraries\]"),
    ("torchattacks", lambda: Torchattacks(Linf(0.1), "PGD"), r"--no-deps torchattacks==3\.5\.1"),
    ("foolbox", lambda: Foolbox(Linf(0.1), "PGD"), r"sg-lightning\[attack-libraries\]"),
    ("pyautoattack", lambda: PyAutoAttack(Linf(0.1)), r"sg-lightning\[attack-libraries\]"),
]


@pytest.mark.parametrize(("name", "make", "command"), ABSENT, ids=[name for name, *_ in ABSENT])
def test_absent_library_is_one_sentence_with_the_command(name, make, command, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"^This adapter needs {name}: pip install .*{command}"):
        make()


# ---------------------------------------------------------------- the libraries themselves

ONE_PER_LIBRARY = {
    "advertorch": lambda threat: Advertorch(threat, {"linf": "LinfPGDAttack", "l2": "L2PGDAttack", "l1": "SparseL1DescentAttack"}[threat.norm]),
    "torchattacks": lambda threat: Torchattacks(threat, {"linf": "PGD", "l2": "APGD", "l1": "EADL1"}[threat.norm]),
    "foolbox": lambda threat: Foolbox(threat, {"linf": "PGD", "l2": "DDNAttack", "l1": "L1FMNAttack"}[threat.norm]),
    "pyautoattack": lambda threat: PyAutoAttack(threat, attacks=("apgd-ce", "square"), settings={"n_iter": 10, "n_queries": 30}),
}  # fmt: skip


@pytest.mark.adapters
@pytest.mark.parametrize("library", ONE_PER_LIBRARY)
@pytest.mark.parametrize(
    "threat", [Linf(0.3, Box(-1, 2)), L2(2.0, Box(-1, 2)), L1(6.0, Box(-1, 2))], ids=lambda t: t.norm
)
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (30,)], ids=["frames", "vector"])
def test_any_box_any_shape_under_inference_mode(library, threat, shape):
    model, x, y = case(shape, low=-1.0, high=2.0)
    model = Net(x[0].numel(), classes=5).eval()
    y = model(x).argmax(1)
    attack = ONE_PER_LIBRARY[library](threat)
    if library == "pyautoattack" and threat.norm != "linf":
        with pytest.raises(ValueError, match="at least 5 x 5"):
            PyAutoAttack(threat, attacks=("square",)).run(Oracle(model), x, y)
        attack = PyAutoAttack(threat, attacks=("apgd-ce",), settings={"n_iter": 10})
    state = torch.get_rng_state()
    with torch.inference_mode():
        result = attack.run(Oracle(model), x.clone(), y, generator=SampleGenerator.from_ids(0, range(12)))
        again = attack.run(Oracle(model), x.clone(), y, generator=SampleGenerator.from_ids(0, range(12)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(result.x_adv, again.x_adv)
    verdict = verify(Oracle(model), threat, x, result.x_adv, y)
    assert bool(verdict.inside.all())
    assert torch.equal(verdict.misclassified, result.success)
    assert bool(result.success.any())
    assert all(p.grad is None for p in model.parameters())


QUICK = {
    "max_iterations": 10, "binary_search_steps": 2, "n_iter": 5, "n_queries": 20, "round_ub": 5, "nb_sample": 8, "popsize": 4,
    "restarts": 2, "steps": 3, "nb_iter": 3, "noise_batch_size": 2, "max_pixels": 9,
}  # fmt: skip
THREATS = {"linf": Linf(0.1), "l2": L2(0.5), "l1": L1(2.0), "l0": L0(3)}
TABLES = [
    (maker, name, norm)
    for maker, table in ((Advertorch, advertorch_adapter.NORMS), (Torchattacks, torchattacks_adapter.NORMS))
    for name, norms in table.items()
    for norm in norms.split()
    if name != "AutoAttack"  # its parts are run one by one; together they take a minute
]


def quick(maker, name, norm):
    """Build an attack with as little work as its settings allow."""
    home = (
        advertorch_adapter.import_advertorch().attacks
        if maker is Advertorch
        else importlib.import_module(maker.package)
    )
    known = importlib.import_module("inspect").signature(getattr(home, name)).parameters
    return maker(THREATS[norm], name, settings={k: v for k, v in QUICK.items() if k in known})


@pytest.mark.adapters
@pytest.mark.parametrize(("maker", "name", "norm"), TABLES, ids=lambda v: getattr(v, "kind", v))
def test_every_class_that_is_offered_runs(maker, name, norm):
    model, x, y = case((3, 6, 6), n=4)
    model = Net(108, classes=10).eval()
    y = model(x).argmax(1)
    attack = quick(maker, name, norm)
    result = attack.run(Oracle(model), x, y)
    assert bool(attack.threat.contains(result.x_adv, x).all())
    assert torch.equal(model(result.x_adv).argmax(1) != y, result.success)
    assert bool((result.queries > 1).all())


@pytest.mark.adapters
def test_bad_settings_name_the_known_ones():
    with pytest.raises(ValueError, match=r"no setting \['stepps'\]; known: eps_iter, nb_iter, rand_init"):
        Advertorch(Linf(0.1), "LinfPGDAttack", settings={"stepps": 3})
    with pytest.raises(ValueError, match=r"no setting \['eps'\].*given by the adapter"):
        Torchattacks(Linf(0.1), "PGD", settings={"eps": 0.3})
    with pytest.raises(ValueError, match=r"no setting \['loss'\]"):
        PyAutoAttack(Linf(0.1), settings={"loss": "dlr"})
    with pytest.raises(ValueError, match=r"needs the settings \['steps'\]"):
        Foolbox(L2(0.1), "VirtualAdversarialAttack")
    with pytest.raises(ValueError, match="made for l2"):
        Foolbox(Linf(0.1), "DDNAttack")
    with pytest.raises(ValueError, match="is unknown; for linf choose"):
        Foolbox(Linf(0.1), "annotations")
    model, x, y = case()
    with pytest.raises(ValueError, match="at least 4 classes, this one has 3"):
        PyAutoAttack(Linf(0.1)).run(Oracle(model), x, y)
    with pytest.raises(ValueError, match="written for 3 channels"):
        Torchattacks(Linf(0.1), "TIFGSM").run(Oracle(model), x, y)


@pytest.mark.adapters
def test_refused_classes_do_what_we_say():
    attacks = advertorch_adapter.import_advertorch().attacks
    w = torch.linspace(-1, 1, 32)
    w[:4] = 0.0  # dead pixels

    def linear(x):
        margin = 1e-2 * (x.flatten(1) * w).sum(1)
        return torch.stack([margin, -margin], 1)

    x, y = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64)
    spoiled = attacks.L2MomentumIterativeAttack(linear, eps=0.5).perturb(x, y)
    assert bool(spoiled.isnan().flatten(1).any(1).all())
    weak = attacks.L1PGDAttack(linear, eps=2.0, nb_iter=100, eps_iter=0.05).perturb(x, y)
    best = L1(2.0).maximise_linear(x, -w.expand_as(x))
    assert float(((x - weak) @ w).mean()) < 0.5 * float(((x - best) @ w).mean())
    idle = attacks.ChooseBestAttack(linear, [type("Idle", (), {"perturb": lambda self, x, y: x, "targeted": False})()])
    right = (linear(x)[:, 0] > linear(x)[:, 1]).long() ^ 1
    assert not idle.perturb(x, right).any()


@pytest.mark.adapters
@pytest.mark.parametrize("broken", [False, True], ids=["absent", "broken"])
def test_advertorch_needs_no_torchvision(broken, tmp_path):
    """A torchvision that does not fit its torch raises RuntimeError on import."""
    if broken:
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    if not broken:
        code += "sys.modules['torchvision'] = None\n"
    code += (
        "from sg_lightning.attacks.adapters import Advertorch\n"
        "from sg_lightning.threats import L2\n"
        "Advertorch(L2(0.5), 'L2FABAttack')\n"
        "import torch.autograd.gradcheck\n"
        "assert not hasattr(sys.modules['torch.autograd.gradcheck'], 'zero_gradients')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.fixture(scope="module")
def trained():
    """An adversarially trained spiking network and its ANN twin, and 64 test digits."""
    data = Digits()
    data.setup("test")
    train = data.train_dataloader().dataset
    images, labels = (
        torch.stack([torch.as_tensor(s[i]) for s in (train[k] for k in range(len(train)))]) for i in (0, 1)
    )
    found = {}
    for spiking in (True, False):
        torch.manual_seed(0)
        model = ConvNet(channels=(8, 16), hidden=32, spiking=spiking)
        optimiser = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(6):
            for batch in torch.randperm(len(images)).split(64):
                x = PGD(Linf("2/16"), steps=3).run(Oracle(model), images[batch], labels[batch], goal="loss").x_adv
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x), labels[batch]).backward()
                optimiser.step()
        found["snn" if spiking else "ann"] = model.eval()
    test = [data.test_dataloader().dataset[k] for k in range(64)]
    return found, torch.stack([x for x, _ in test]), torch.tensor([int(y) for _, y in test])


@pytest.mark.adapters
@pytest.mark.parametrize("net", ["ann", "snn"])
@pytest.mark.parametrize("threat", [Linf("2/16"), L2(0.75)], ids=lambda t: t.norm)
def test_libraries_agree_with_our_pgd(trained, net, threat):
    models, x, y = trained
    model = models[net]

    def robust(attack):
        return 1 - float(
            attack.run(Oracle(model), x, y, generator=SampleGenerator.from_ids(0, range(64))).success.float().mean()
        )

    linf, step = threat.norm == "linf", 2.5 * threat.budget / 40
    ours = robust(PGD(threat, steps=40, step_size=step, random_start=False))
    theirs = {
        "advertorch": Advertorch(
            threat, "LinfPGDAttack" if linf else "L2PGDAttack", settings={"nb_iter": 40, "rand_init": False}
        ),
        "torchattacks": Torchattacks(threat, "PGD" if linf else "PGDL2", settings={"steps": 40, "random_start": False}),
        "foolbox": Foolbox(threat, "LinfPGD" if linf else "L2PGD", settings={"steps": 40, "random_start": False}),
    }
    found = {name: robust(attack) for name, attack in theirs.items()}
    clean = float((model(x).argmax(1) == y).float().mean())
    assert 0.1 < ours < clean - 0.1, (ours, clean)
    # They return the last iterate: on the rough loss of a spiking network the first success is often left again.
    assert all(ours <= other + 0.02 for other in found.values()), (ours, found)
    if net == "ann":
        assert all(other <= ours + 0.02 for other in found.values()), (ours, found)


@pytest.mark.adapters
def test_suites_and_evaluation_take_them_by_name(trained, tmp_path):
    models, x, y = trained
    suite = tmp_path / "foreign.yaml"
    suite.write_text(
        "eps: headline\ncontrol: false\nattacks:\n"
        "  - {attack: pgd, steps: 3}\n"
        "  - {attack: torchattacks, algorithm: APGD, settings: {steps: 5}, only: [linf, l2], estimators: [training, atan]}\n"
        "  - {attack: advertorch, algorithm: LinfPGDAttack, settings: {nb_iter: 4}, only: [linf]}\n"
        "  - {attack: foolbox, algorithm: LInfFMNAttack, settings: {steps: 5}, only: [linf]}\n"
        "  - {attack: pyautoattack, attacks: [apgd-ce, square], settings: {n_iter: 5, n_queries: 20}}\n"
    )
    budgets = {"linf": Budget(("2/16",), "2/16"), "l2": Budget((0.75,), 0.75)}
    resolved = load_suite(suite, budgets)
    assert json.loads(json.dumps(resolved.describe())) is not None
    names = [attack.name for attack in resolved.entries[0].attacks]
    assert names == [
        "pgd-3", "torchattacks:APGD(steps=5)", "torchattacks:APGD(steps=5)/atan2", "advertorch:LinfPGDAttack(nb_iter=4)",
        "foolbox:LInfFMNAttack(steps=5)", "pyautoattack:apgd-ce+square(n_iter=5,n_queries=20)",
    ]  # fmt: skip
    result = evaluate(models["snn"], (x[:16], y[:16]), resolved, budgets=budgets, progress=False, check_samples_count=8)
    assert result.union() <= result.accuracy("linf", "2/16")
    assert {row.attack for row in result.rows} >= set(names)
    with pytest.raises(ValueError, match="torchattacks has no setting"):
        make_attack(Linf(0.1), "torchattacks", algorithm="PGD", steps=4)
