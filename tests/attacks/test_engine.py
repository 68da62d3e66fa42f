"""The engine: closed forms on a linear model, invariances, the untouched model, bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from sg_lightning.attacks import (
    APGD,
    BPTT,
    FGSM,
    PGD,
    PGD0,
    RFGSM,
    SAPGD,
    SPGD,
    MultiTargeted,
    Oracle,
    RandomNoise,
    load_suite,
    suite_names,
    verify,
)
from sg_lightning.attacks.answers import all_finite_all_zero
from sg_lightning.domains import Binary, Box, Counts
from sg_lightning.neurons import LIF, surrogates
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, L1, L2, Budget, EventFlips, Joint, Linf

N = 48


class Linear(nn.Module):
    """Two logits whose difference is w.x (times a scale), so that the best attack has a closed form."""

    def __init__(self, scale=1.0, seed=0):
        super().__init__()
        w = torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w[:5] = 0.0  # dead pixels
        self.w = nn.Parameter(w)
        self.scale = scale

    def forward(self, x):
        margin = (x.flatten(1) * self.w.to(x.dtype)).sum(1) * self.scale
        return torch.stack([margin, torch.zeros_like(margin)], 1)


class Spiking(nn.Module):
    """A spiking network with batch norm and dropout, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.fire = nn.Linear(N, 32), nn.BatchNorm1d(32), LIF(beta=0.8)
        self.first.weight.data *= 6  # so that it fires
        self.frozen, self.drop, self.last = nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 3)
        self.double()

    def forward(self, x):
        current = self.norm(self.first(x.flatten(1))).expand(4, -1, -1)
        return self.last(self.drop(self.frozen(self.fire(current).mean(0))))


def images(n=6, binary=False, dtype=torch.float64):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x.round() if binary else x).to(dtype)


def optimum(threat, w, x):
    """Return the largest fall of w.x for one sample, by independent numpy arithmetic."""
    room = np.where(w > 0, x, 1 - x)
    gain, eps = np.abs(w), threat.budget
    if threat.norm == "linf":
        return (gain * np.minimum(eps, room)).sum()
    if threat.norm == "l1":
        total = 0.0
        for i in np.argsort(-gain):
            spent = min(eps, room[i])
            total, eps = total + gain[i] * spent, eps - spent
        return total
    if threat.norm == "l2":
        low, high = 0.0, 1e9
        for _ in range(300):
            t = (low + high) / 2
            low, high = (t, high) if np.linalg.norm(np.minimum(t * gain, room)) < eps else (low, t)
        return (gain * np.minimum(low * gain, room)).sum()
    if threat.norm == "l0":
        pixels = (gain * room).reshape(3, 16).sum(0) if threat.unit == "pixels" else gain * room
        return np.sort(pixels)[::-1][: threat.count].sum()
    flips = np.sort(-w * (1 - 2 * x))[::-1][: threat.count]
    return flips[flips > 0].sum()


CASES = [(Linf(0.1), 1 - 1e-5), (Linf(0.4), 1 - 1e-5), (L2(0.5), 0.995), (L2(2.0), 0.995), (L1(1.0), 0.99), (L1(5.0), 0.99),
         (L0(3), 1 - 1e-9), (L0(4, unit="cells"), 1 - 1e-9), (EventFlips(6), 1 - 1e-9)]  # fmt: skip


@pytest.mark.parametrize(("threat", "bar"), CASES, ids=lambda v: str(getattr(v, "key", "")))
@pytest.mark.parametrize("attack", [FGSM, lambda t: PGD(t, steps=100)], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("scale", [1e-2, 1e-8])
def test_closed_form_on_a_linear_model(threat, bar, attack, scale):
    model = Linear(scale)
    x = images(binary=threat.norm == "flips")
    y = torch.zeros(len(x), dtype=torch.int64)
    result = attack(threat).run(Oracle(model), x, y, goal="loss", generator=SampleGenerator.from_ids(0, range(len(x))))
    w = model.w.detach().numpy()
    for k in range(len(x)):
        fall = float(((x[k] - result.x_adv[k]).flatten() * model.w).sum())
        assert fall >= bar * optimum(threat, w, x[k].flatten().numpy())


def test_binary_images_with_integer_l1_budget():
    x, model = images(binary=True, dtype=torch.float32), Linear()
    y = torch.zeros(len(x), dtype=torch.int64)
    for eps in (1, 2, 3):
        result = PGD(L1(eps), steps=100).run(Oracle(model), x, y, goal="loss")
        fall = ((x - result.x_adv).flatten(1) * model.w.float()).sum(1)
        best = [optimum(L1(eps), model.w.detach().numpy(), one.flatten().double().numpy()) for one in x]
        assert bool((fall >= 0.99 * torch.tensor(best)).all())
        assert bool(L1(eps).contains(result.x_adv, x).all())


def test_huge_logits_do_not_stop_the_attack():
    x = images()
    model = Linear(1e3)
    y = (model(x)[:, 0] < model(x)[:, 1]).long()
    weak = (PGD(Linf(0.2), steps=20).run(Oracle(Linear()), x, y)).success
    assert torch.equal(PGD(Linf(0.2), steps=20, loss="margin").run(Oracle(model), x, y).success, weak)
    # Cross-entropy itself still works at margins of several tens in a float32 model.
    assert torch.equal(PGD(Linf(0.2), steps=20).run(Oracle(Linear(8.0)), x.float(), y).success, weak)
    assert bool(weak.any())


ATTACKS = [FGSM(Linf(0.05)), RFGSM(Linf(0.05)), PGD(Linf(0.03), steps=6, restarts=3), PGD(L2(0.2), steps=6, restarts=2),
           PGD(L1(0.6), steps=6, restarts=2), PGD(L0(1), steps=6, restarts=2), PGD(Linf(0.03), momentum=0.9), RandomNoise(L2(3.0)),
           APGD(Linf(0.03), steps=8, restarts=2), APGD(L2(0.2), steps=8, loss="dlr"), APGD(L1(0.6), steps=20),
           APGD(Linf(0.03), steps=6, loss="margin", targets=2), SAPGD(Linf(0.03), steps=8, restarts=2),
           MultiTargeted(Linf(0.03), steps=6, targets=2), SPGD(L0(1), steps=8),
           SPGD(L0(2, unit="cells"), steps=6, restarts=2, variant="projected"), PGD0(L0(2), steps=8)]  # fmt: skip


def spiking_case(n=24):
    model = Spiking().eval()
    x = images(n)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name}-{a.threat.norm}")
def test_results_do_not_depend_on_batching_or_early_drop(attack):
    model, x, y = spiking_case()
    ids = torch.arange(24)
    whole = attack.run(Oracle(model), x, y, generator=SampleGenerator.from_ids(0, ids))
    assert 0 < int(whole.success.sum()) < 24 or isinstance(attack, RandomNoise | FGSM)
    kept = attack.run(Oracle(model), x, y, generator=SampleGenerator.from_ids(0, ids), early_drop=False)
    chunked = attack.run(Oracle(model, batch_size=5), x, y, generator=SampleGenerator.from_ids(0, ids))
    order = torch.randperm(24)
    shuffled = attack.run(Oracle(model), x[order], y[order], generator=SampleGenerator.from_ids(0, order))
    for other, index in ((kept, ids), (chunked, ids), (shuffled, order)):
        assert torch.equal(other.success, whole.success[index])
        assert torch.equal(other.iterations, whole.iterations[index])
        assert torch.allclose(other.x_adv, whole.x_adv[index], atol=1e-9)
    parts = [attack.run(Oracle(model), x[i], y[i], generator=SampleGenerator.from_ids(0, i)) for i in ids.split(7)]
    assert torch.equal(torch.cat([p.success for p in parts]), whole.success)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.name}-{a.threat.norm}")
def test_examples_hold_up_when_verified(attack):
    model, x, y = spiking_case()
    result = attack.run(Oracle(model), x, y)
    verdict = verify(Oracle(model), attack.threat, x, result.x_adv, y)
    assert bool(verdict.inside.all())
    assert torch.equal(verdict.misclassified, result.success)
    assert not verify(Oracle(model), attack.threat, x, result.x_adv * torch.nan, y).counts.any()


def test_more_steps_and_restarts_never_hurt():
    model, x, y = spiking_case()
    noise = SampleGenerator.from_ids(0, range(24))
    one = PGD(Linf(0.02), steps=5).run(Oracle(model), x, y, generator=noise)
    three = PGD(Linf(0.02), steps=5, restarts=3).run(Oracle(model), x, y, generator=noise)
    assert bool((three.success >= one.success).all())
    assert bool((three.loss >= one.loss)[~three.success].all())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_model_is_left_exactly_as_it_was(context):
    model = Spiking().train()
    model.frozen.eval()
    model.last.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    with context():
        x, y = images(8), torch.zeros(8, dtype=torch.int64)
        kept, rng = x.clone(), torch.get_rng_state()
        result = PGD(Linf(0.1), steps=3).run(Oracle(model), x, y, generator=SampleGenerator.from_ids(0, range(8)))
        assert torch.equal(x, kept)
        assert torch.equal(rng, torch.get_rng_state())
    assert not result.x_adv.is_inference()
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.last.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_model_is_left_alone_after_an_exception_too(mode):
    class Explodes(Spiking):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("boom")

    model = Explodes().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        PGD(Linf(0.1)).run(Oracle(model, mode=mode, estimator=BPTT(surrogates.Atan(2.0))), images(), torch.zeros(6).long(),
                           generator=SampleGenerator.from_ids(0, range(6)))  # fmt: skip
    assert all(m.training for m in model.modules())
    assert model.fire.attack_rule is None
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_estimator_changes_the_gradient_only():
    model, x, y = spiking_case()
    plain, swapped = Oracle(model), Oracle(model, estimator=BPTT(surrogates.Atan(5.0)))
    from sg_lightning.attacks.losses import cross_entropy

    a, b = plain.value_and_grad(x, y, cross_entropy), swapped.value_and_grad(x, y, cross_entropy)
    assert torch.equal(a.logits, b.logits)
    assert not torch.allclose(a.grad, b.grad)
    assert model.fire.attack_rule is None
    with pytest.raises(ValueError, match="no spiking neuron"):
        Oracle(Linear(), estimator=BPTT(surrogates.Atan(5.0)))


def test_gradients_are_counted_and_bad_ones_marked():
    class Rooted(Linear):
        def forward(self, x):
            return super().forward(x) + x.flatten(1)[:, :1].sqrt()  # infinite slope at 0

    x = images()
    x[2] = 0.0
    x[4, 0, 0, 0] = 0.0
    y = Rooted()(x).argmax(1)
    oracle = Oracle(Rooted())
    result = PGD(Linf(0.01), random_start=False).run(oracle, x, y)
    assert result.invalid.tolist() == [False, False, True, False, True, False]
    assert not result.success[result.invalid].any()
    assert oracle.health.nonfinite >= 2
    with pytest.raises(FloatingPointError, match="2 of 6 samples"):
        PGD(Linf(0.01), random_start=False).run(Oracle(Rooted(), on_nonfinite="raise"), x, y)

    class Flat(Linear):
        def forward(self, x):
            return super().forward(x.round()) + 0 * x.flatten(1)[:, :1]

    oracle = Oracle(Flat())
    assert not PGD(Linf(0.01), random_start=False).run(oracle, x, Flat()(x).argmax(1)).invalid.any()
    assert oracle.health.share_zero == 1.0


def test_wrong_samples_are_returned_as_they_are():
    model, x, y = spiking_case()
    result = PGD(Linf(0.1)).run(Oracle(model), x, (y + 1) % 3)
    assert bool(result.success.all())
    assert torch.equal(result.x_adv, x)
    assert result.iterations.tolist() == [0] * 24


def test_training_goal_keeps_the_highest_loss():
    model, x, y = spiking_case()
    wrong = (y + 1) % 3
    oracle = Oracle(model)
    result = PGD(Linf(0.1), steps=5).run(oracle, x, wrong, goal="loss")
    from sg_lightning.attacks.losses import cross_entropy

    assert torch.allclose(result.loss, cross_entropy(oracle.logits(result.x_adv), wrong))
    assert bool((result.loss > cross_entropy(oracle.logits(x), wrong)).all())


def test_random_models_are_judged_by_majority():
    class Noisy(Linear):
        stochastic = True

        def forward(self, x):
            return super().forward(x + 0.3 * torch.randn_like(x))

    x = images(40)
    y = Linear()(x).argmax(1)
    oracle = Oracle(Noisy(), votes=101, eot=2)
    assert oracle.stochastic
    tiny = PGD(Linf(1e-6), steps=5).run(oracle, x, y)
    single = (Oracle(Noisy()).misclassified(x, y)).double().mean()
    assert float(tiny.success.double().mean()) < float(single)  # one noisy error is no success
    assert oracle.counts.backwards == 40 * 5 * 2


def test_call_is_like_other_libraries_and_follows_the_seed():
    model, x, y = spiking_case()
    attack = PGD(Linf("8/255"), steps=3)
    torch.manual_seed(1)
    first = attack(model, x, y)
    torch.manual_seed(1)
    assert torch.equal(first, attack(model, x, y))
    assert not torch.equal(first, attack(model, x, y))
    assert attack(lambda z: model(z), x[:1], y[:1]).shape == x[:1].shape


def test_joint_attack_on_a_dict():
    model = Linear()
    both = lambda z: model(z["image"]) + model(z["events"])
    x = {"image": images(), "events": images(binary=True)}
    threat = Joint({"image": Linf(0.1), "events": EventFlips(3)})
    result = PGD(threat, steps=10).run(Oracle(both), x, torch.zeros(6).long(), goal="loss")
    assert bool(threat.contains(result.x_adv, x).all())
    assert bool((result.loss > 0).all())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: (x.flatten(1), None), TypeError, "returned a tuple"),
        (lambda x: x.flatten(1).softmax(1), ValueError, "probabilities"),
        (lambda x: x, ValueError, "expected float logits"),
        (lambda x: x.flatten(1)[:, :1], ValueError, "at least 2 classes"),
        (lambda x: x.flatten(1).detach(), ValueError, "does not depend on its input"),
    ],
)
def test_bad_models_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        FGSM(Linf(0.1)).run(Oracle(model), images(), torch.zeros(6).long())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(), torch.full((6,), 2), "label 2 is no class"),
        (images(), torch.full((6,), -1), "labels must be >= 0"),
        (images(), torch.zeros(5).long(), "expected labels"),
        (images(), torch.zeros(6), "dtype int64"),
        (images() * torch.nan, torch.zeros(6).long(), "NaN"),
        (images(0), torch.zeros(0).long(), "at least one"),
    ],
)
def test_bad_batches_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        PGD(Linf(0.1)).run(Oracle(Linear()), x, y)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PGD(Linf(0.1), steps=0), ValueError, "steps must be"),
        (lambda: PGD(Linf(0.1), restarts=1.5), ValueError, "restarts must be"),
        (lambda: PGD(Linf(0.1), momentum=1.0), ValueError, "momentum must be"),
        (lambda: PGD(Linf(0.1), step_size=0), ValueError, "step_size"),
        (lambda: PGD(Linf(0.1), loss="hinge"), ValueError, "unknown loss 'hinge'; known losses: ce, margin"),
        (lambda: PGD(0.1), TypeError, "threat model such as"),
        (lambda: RFGSM(L2(0.1)), TypeError, "L-infinity only"),
        (lambda: RFGSM(Linf(0.1), alpha=0.2), ValueError, "alpha must lie"),
        (lambda: RandomNoise(Linf(0.1), draws=0), ValueError, "draws"),
        (lambda: Oracle(Linear(), eot=0), ValueError, "eot must be"),
        (lambda: Oracle(Linear(), mode="test"), ValueError, "mode must be"),
        (lambda: Oracle("net"), TypeError, "callable"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


BUDGETS = {"linf": Budget(eps=("1/255", "8/255"), headline="8/255"), "l0": Budget(eps=(1, 2), headline=1)}


def test_suites_resolve_and_hash_their_content():
    assert suite_names() == ["assg", "basic", "paper-sr", "quick", "standard", "thorough"]
    quick, basic = load_suite("quick", BUDGETS, Box()), load_suite("basic", BUDGETS, Box())
    assert [e.threat.key for e in quick.entries] == ["linf_8_255", "l0_1"]
    assert [e.threat.key for e in basic.entries] == ["linf_1_255", "linf_8_255", "l0_1", "l0_2"]
    assert [a.name for a in basic.entries[0].attacks] == ["fgsm", "pgd-10", "pgd-40x2"]
    assert quick.hash == load_suite("quick", dict(BUDGETS), Box()).hash != basic.hash
    other = {**BUDGETS, "l0": Budget(eps=(1, 3), headline=1)}
    assert load_suite("basic", other, Box()).hash != basic.hash
    events = load_suite("quick", {"flips": Budget(eps=(3,), headline=3)}, Counts())
    assert events.entries[0].threat.domain == Counts()
    assert load_suite("quick", {"flips": Budget(eps=(3,), headline=3)}).entries[0].threat.domain == Binary()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attacks: []", "needs a list"),
        ("- pgd", "needs a list"),
        ("attacks: [{attack: pgd}]\nsteps: 3", "unknown keys"),
        ("attacks: [{attack: pdg}]", "unknown attack 'pdg'; known attacks: fgsm"),
        ("attacks: [{attack: pgd, step: 3}]", "no setting \\['step'\\]"),
        ("attacks: [{attack: pgd, only: [l7]}]", "unknown norms"),
        ("norms: [l2]\nattacks: [{attack: pgd}]", "budgets are given only for linf, l0"),
        ("eps: large\nattacks: [{attack: pgd}]", "eps must be"),
        ("attacks: [", "not valid YAML"),
    ],
)
def test_bad_suites_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_suite(path, BUDGETS, Box())
    with pytest.raises(ValueError, match="no suite file"):
        load_suite(tmp_path / "none.yaml", BUDGETS)


def test_own_suite_with_attacks_per_norm(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("eps: headline\nattacks:\n  - {attack: rfgsm, only: [linf]}\n  - {attack: pgd, steps: 7}\n")
    suite = load_suite(path, BUDGETS, Box())
    assert [[a.name for a in e.attacks] for e in suite.entries] == [["rfgsm", "pgd-7"], ["pgd-7"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whose_gradient_is_not_finite_or_zero_everywhere(dtype):
    inf, nan, tiny = torch.inf, torch.nan, torch.finfo(dtype).tiny
    cases = [
        ([0.0, -0.0, 0.0], True, True), ([0.0, tiny, 0.0], True, False), ([-tiny, 0.0, 0.0], True, False),
        ([1.0, nan, -2.0], False, False), ([0.0, 0.0, nan], False, False), ([1.0, inf, 0.0], False, False),
        ([-inf, 0.0, 0.0], False, False), ([nan, inf, 0.0], False, False), ([3.0, -1.0, 2.0], True, False),
    ]  # fmt: skip
    values = torch.tensor([case[0] for case in cases], dtype=dtype)
    expected = [torch.tensor([case[i] for case in cases]) for i in (1, 2)]
    for grads in ([values], [values.unsqueeze(1)], [values[:, :2].view(-1, 2, 1, 1), values[:, 2]]):
        for found, wanted in zip(all_finite_all_zero(grads), expected, strict=True):
            assert torch.equal(found, wanted)
    nothing = torch.zeros(9, 0, dtype=dtype)
    for found, wanted in zip(all_finite_all_zero([values, nothing]), expected, strict=True):  # an empty modality
        assert torch.equal(found, wanted)
    assert all(bool(found.all()) and found.shape == (9,) for found in all_finite_all_zero([nothing]))


@pytest.mark.parametrize("write", [lambda x: x.detach().clamp_(0, 0.5), lambda x: x.detach().mul_(0.5)])
def test_models_that_write_to_their_input_are_refused(write):
    from sg_lightning.attacks.losses import cross_entropy

    def model(x):
        write(x)
        return x.flatten(1) @ torch.ones(4, 3)

    oracle, x = Oracle(model), torch.rand(2, 4)
    with pytest.raises(ValueError, match="writes to its input"):
        oracle.value_and_grad(x, torch.tensor([0, 1]), cross_entropy)
    with pytest.raises(ValueError, match="writes to its input"):
        oracle.logits(x)
