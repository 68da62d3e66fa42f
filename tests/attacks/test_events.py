"""Attacks on events and spikes: exhaustive search on tiny models, references in plain loops, invariances."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sg_lightning.attacks import (
    FGSM,
    PGD,
    SDA,
    GreedyFlips,
    Oracle,
    RandomNoise,
    SpikeRetimingAttack,
    SwapFlips,
    UniversalFlips,
    make_attack,
    verify,
)  # fmt: skip
from sg_lightning.attacks.flips import with_events
from sg_lightning.backbones import SpikingMLP
from sg_lightning.datamodules import Digits
from sg_lightning.domains import Binary, Counts
from sg_lightning.neurons import LIF
from sg_lightning.sampling import SampleGenerator
from sg_lightning.threats import L0, EventFlips, SpikeRetiming

STEPS, LINES, CLASSES, SAMPLES = 6, 5, 3, 160


class Net(nn.Module):
    """A small spiking network over rasters (B, T, N) in float64."""

    def __init__(self, classes=CLASSES, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire, self.last = nn.Linear(LINES, 24), LIF(beta=0.8), nn.Linear(24, classes)
        self.first.weight.data *= 3
        self.scale = scale
        self.double()

    def forward(self, x):
        current = self.first(x.flatten(2).transpose(0, 1).to(self.first.weight.dtype))
        return self.last(self.fire(current).mean(0)) * self.scale


class Linear(nn.Module):
    """Two logits whose difference is linear in the raster."""

    def __init__(self, n, bias=0.0, seed=0):
        super().__init__()
        w = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.w, self.bias = nn.Parameter(w), bias

    def forward(self, x):
        margin = (x.flatten(1).double() * self.w).sum(1) + self.bias
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def rasters(n, high=2, share=0.4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, high, (n, STEPS, LINES), generator=generator) if high > 2 else torch.ones(n, STEPS, LINES)
    return (x * (torch.rand(n, STEPS, LINES, generator=generator) < share)).to(dtype)


def case(n=20, domain=Binary(), **settings):  # noqa: B008 - frozen
    model = Net(**settings).eval()
    x = rasters(n, 2 if domain.lattice == "binary" else 5)
    return model, x, model(x).argmax(1)


def ids(n):
    return SampleGenerator.from_ids(0, range(n))


def every_attack(domain):
    flips = EventFlips(2, domain)
    found = [GreedyFlips(flips, candidates=8), GreedyFlips(EventFlips("15%", domain), per_round=2), PGD(flips, steps=4),
             SwapFlips(EventFlips("15%", domain), steps=3, swaps=4, width=4, candidates=8),
             SpikeRetimingAttack(SpikeRetiming(1, domain), steps=6), PGD(SpikeRetiming(2, domain, "0"), steps=4),
             PGD(SpikeRetiming(3, domain, "1"), steps=4), SpikeRetimingAttack(SpikeRetiming("30%", domain, "1"), steps=6),
             SpikeRetimingAttack(SpikeRetiming(2, domain, "0"), steps=6)]  # fmt: skip
    return found if domain.lattice == "count" else [*found, SDA(EventFlips(4), rounds=6, first=3)]


ATTACKS = [*every_attack(Binary()), *every_attack(Counts())]
ALL = [*ATTACKS, UniversalFlips(EventFlips(2), steps=4)]


def name(attack):
    return f"{attack.name}-{attack.threat.key}-{attack.threat.domain.lattice}"


# --- what every attack must keep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=name)
def test_results_do_not_depend_on_batching_or_early_drop(attack):
    model, x, y = case(domain=attack.threat.domain)
    x[3] = 0.0
    y = model(x).argmax(1)
    whole = attack.run(Oracle(model), x, y, generator=ids(20))
    assert 0 < int(whole.success.sum()) < 20
    order = torch.randperm(20)
    kept = attack.run(Oracle(model), x, y, generator=ids(20), early_drop=False)
    chunked = attack.run(Oracle(model, batch_size=7), x, y, generator=ids(20))
    shuffled = attack.run(Oracle(model), x[order], y[order], generator=SampleGenerator.from_ids(0, order))
    for other, index in ((kept, torch.arange(20)), (chunked, torch.arange(20)), (shuffled, order)):
        assert torch.equal(other.success, whole.success[index])
        assert torch.equal(other.x_adv, whole.x_adv[index])
    parts = [
        attack.run(Oracle(model), x[i], y[i], generator=SampleGenerator.from_ids(0, i))
        for i in torch.arange(20).split(3)
    ]
    assert torch.equal(torch.cat([p.x_adv for p in parts]), whole.x_adv)


@pytest.mark.parametrize("attack", ALL, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_are_legal_and_hold_up(attack, dtype):
    model, x, y = case(domain=attack.threat.domain)
    x = x.to(dtype)
    x[0], x[1] = 0.0, 1.0  # no events; no empty bin
    kept = x.clone()
    for goal in ("success", "loss"):
        result = attack.run(Oracle(model), x, y, generator=ids(20), goal=goal)
        verdict = verify(Oracle(model), attack.threat, x, result.x_adv, y)
        assert result.x_adv.dtype == dtype
        assert bool(verdict.inside.all())
        assert torch.equal(verdict.misclassified, result.success)
        assert torch.equal(x, kept)
        clean = attack_loss(attack, model, x, y)
        if attack.kind != "universal" and getattr(attack, "random_start", False) is False:
            assert bool((result.loss >= clean - 1e-9)[~result.success].all())
    if attack.threat.domain.lattice == "count":
        assert float(result.x_adv.max()) > 1  # nothing is clamped to 1


def attack_loss(attack, model, x, y):
    from sg_lightning.attacks.losses import get_loss

    return get_loss(getattr(attack, "loss", "margin"))(model(x), y).double().detach()


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_no_budget_is_the_identity_and_wrong_samples_stay(attack):
    model, x, y = case(6, attack.threat.domain)
    nothing = attack.with_threat(attack.threat.with_eps(0))
    assert torch.equal(nothing.run(Oracle(model), x, y, generator=ids(6)).x_adv, x)
    result = attack.run(Oracle(model), x, (y + 1) % CLASSES, generator=ids(6))
    assert bool(result.success.all())
    assert torch.equal(result.x_adv, x)


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_model_is_untouched_also_after_an_exception(attack):
    class Explodes(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("boom")
            return super().forward(x)

    model = Explodes().train()
    x = rasters(4, 2 if attack.threat.domain.lattice == "binary" else 5)
    y = Net()(x).argmax(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        attack.run(Oracle(model), x, y, generator=ids(4), early_drop=False)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("attack", ALL, ids=name)
def test_bad_gradients_are_marked_and_flat_ones_survived(attack):
    class Rooted(Net):
        def forward(self, x):
            return super().forward(x) + x.flatten(1)[:, :1].sqrt()  # infinite slope at 0

    class Flat(Net):
        def forward(self, x):
            return super().forward(x).detach() + 0 * x.flatten(1)[:, :1]

    _, x, _ = case(6, attack.threat.domain)
    y = Rooted()(x).argmax(1)
    result = attack.run(Oracle(Rooted()), x, y, generator=ids(6))
    assert bool((result.invalid | result.success)[x[:, 0, 0] == 0].all())
    y = Net()(x).argmax(1)
    result = attack.run(Oracle(Flat()), x, y, generator=ids(6))
    assert not result.invalid.any()
    assert bool(attack.threat.contains(result.x_adv, x).all())


@pytest.mark.parametrize("attack", ATTACKS, ids=name)
def test_one_sample_two_classes_logits_of_any_size(attack):
    found = []
    for scale in (1.0, 1e-8):
        model, x, y = case(5, attack.threat.domain, classes=2, scale=scale)
        results = [attack.run(Oracle(model), x[k : k + 1], y[k : k + 1], generator=ids(5).select(torch.tensor([k]))) for k in range(5)]  # fmt: skip
        found.append([bool(r.success) for r in results])
    huge, x, y = case(5, attack.threat.domain, classes=2, scale=1e3)
    assert attack.threat.contains(attack.run(Oracle(huge), x, y, generator=ids(5)).x_adv, x).all()
    if getattr(attack, "loss", "margin") == "margin" and attack.kind != "pgd":
        assert found[0] == found[1]


# --- single events ---------------------------------------------------------------------------------------------------


def test_events_are_applied_to_copies():
    x = torch.tensor([[1.0, 0.0, 2.0]])
    assert with_events(x, torch.tensor([[[1], [3], [5], [6]]])).tolist() == [
        [[1, 1, 2], [0, 0, 2], [1, 0, 1], [1, 0, 2]]
    ]
    assert with_events(x, torch.tensor([[[1, 1, 5]]])).tolist() == [[[1, 2, 1]]]


def flipped(x, cells):
    z = x.clone()
    z.view(-1)[list(cells)] = 1 - z.view(-1)[list(cells)]
    return z


@pytest.mark.parametrize("attack", [GreedyFlips(EventFlips(2), candidates=4), GreedyFlips(EventFlips(2), candidates=None),
                                    SwapFlips(EventFlips(2), steps=2), FGSM(EventFlips(2), loss="margin")], ids=name)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_optimum_of_additive_models_by_exhaustive_search(attack, seed):
    model = Linear(10, bias=50.0, seed=seed)  # never misclassified: the loss is what counts
    x = (torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    result = attack.run(Oracle(model), x, torch.zeros(4).long(), goal="loss")
    for k in range(4):
        best = min(
            float(model(flipped(x[k], c)[None])[0, 0].detach()) for r in (0, 1, 2) for c in combinations(range(10), r)
        )
        assert float(model(result.x_adv[k : k + 1])[0, 0].detach()) == pytest.approx(best)


@pytest.mark.parametrize("mode", ["flip", "add", "delete"])
def test_greedy_finds_the_best_events_on_counts(mode):
    model = Linear(4, bias=90.0)
    x = torch.tensor([[[3.0], [0.0], [1.0], [2.0]], [[0.0], [0.0], [0.0], [0.0]]], dtype=torch.float64)
    threat = EventFlips(3, Counts(4), mode)
    result = GreedyFlips(threat).run(Oracle(model), x, torch.zeros(2).long(), goal="loss")
    for k in range(2):
        values = np.array(list(product(range(5), repeat=4)), dtype=float)
        change = values - x[k, :, 0].numpy()
        legal = np.abs(change).sum(1) <= 3
        legal &= (change >= 0).all(1) | (mode != "add")
        legal &= (change <= 0).all(1) | (mode != "delete")
        best = (values[legal] @ model.w.detach().numpy()).min() + 90
        assert float(model(result.x_adv[k : k + 1])[0, 0].detach()) == pytest.approx(best)


def test_a_budget_beyond_the_events_deletes_them_all_at_most():
    model, x, y = case(6)
    x[0] = 0.0
    every = EventFlips(1000, mode="delete")
    for attack in (GreedyFlips(every), SwapFlips(every), SDA(every, rounds=5), UniversalFlips(every), PGD(every)):
        result = attack.run(Oracle(model), x, y, generator=ids(6))
        assert bool((result.x_adv <= x).all())
    assert torch.equal(RandomNoise(EventFlips(1000, mode="delete"))(model, x, y), torch.zeros_like(x))


@torch.no_grad()
def test_greedy_makes_one_best_event_after_the_other():
    """Against a loop that tries every cell of every sample."""
    model, x, y = case(8)
    result = GreedyFlips(EventFlips(2), candidates=None).run(Oracle(model), x, y)
    margin = lambda z, label: float(
        model(z[None])[0].masked_fill(functional.one_hot(label, CLASSES).bool(), -torch.inf).max()
        - model(z[None])[0, label]
    )
    for k in range(8):
        point = x[k]
        for _ in range(2):
            options = [flipped(point, [c]) for c in range(point.numel()) if point.view(-1)[c] == x[k].view(-1)[c]]
            losses = [margin(z, y[k]) for z in options]
            if max(losses) < margin(point, y[k]) or margin(point, y[k]) > 0:
                break
            point = options[int(np.argmax(losses))]
        assert bool(result.success[k]) == (margin(point, y[k]) > 0)
        assert bool(result.success[k]) or margin(result.x_adv[k], y[k]) == pytest.approx(margin(point, y[k]), abs=1e-12)
    assert 0 < int(result.success.sum()) < 8


def test_swaps_only_improve_on_pgd():
    model, x, y = case(20)
    threat = EventFlips(2)
    before = PGD(threat, steps=3, random_start=False, loss="margin").run(Oracle(model), x, y)
    after = SwapFlips(threat, steps=3).run(Oracle(model), x, y)
    assert bool((after.success >= before.success).all())
    assert bool((after.loss >= before.loss)[~after.success].all())
    assert float((after.loss - before.loss)[~after.success].max()) > 0


# --- SDA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_sda_leaves_the_fewest_flips_on_additive_models(seed):
    x = (torch.rand(6, 5, 2, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    model = Linear(10, bias=3.0, seed=seed)
    y = model(x).argmax(1)
    result = SDA(EventFlips(10), rounds=5, first=3).run(Oracle(model), x, y)
    for k in range(6):
        fewest = next((r for r in range(11) for c in combinations(range(10), r) if int(model(flipped(x[k], c)[None]).argmax()) != y[k]), None)  # fmt: skip
        assert bool(result.success[k]) == (fewest is not None)
        if fewest is not None:
            assert int((result.x_adv[k] != x[k]).sum()) == fewest
    assert bool(result.success.any())


def reference_sda(model, x, y, rounds, first):
    """SDA of one sample, as published, where no gradient vanishes."""
    cw = lambda z: torch.relu(model(z[None])[0, y] - model(z[None])[0].masked_fill(functional.one_hot(y, CLASSES).bool(), -torch.inf).max())  # fmt: skip
    chosen, differences = set(), {}
    for n in range(1, rounds + 1):
        point = flipped(x, chosen).requires_grad_()
        loss = cw(point)
        (gradient,) = torch.autograd.grad(loss, point)
        slope, now = gradient.view(-1), point.detach().view(-1)
        favoured = [c for c in range(len(now)) if c not in chosen and (1 - 2 * now[c]) * slope[c] <= 0]
        for c in sorted(favoured, key=lambda c: -float(slope[c].abs()))[: n * first]:
            difference = float((cw(flipped(point.detach(), [c])) - loss).detach())
            if difference <= 0:
                differences[c] = difference
                chosen.add(c)
        if int(model(flipped(x, chosen)[None]).argmax()) != y:
            break
    else:
        return None
    order = sorted(chosen, key=lambda c: abs(differences[c]))
    low, high, kept = 0, len(order) - 1, chosen
    while low <= high:
        middle = (low + high) // 2
        rest = set(order[middle + 1 :])
        if int(model(flipped(x, rest)[None]).argmax()) != y:
            low, kept = middle + 1, rest
        else:
            high = middle - 1
    return flipped(x, kept)


def test_sda_equals_a_loop_over_the_published_steps():
    class Smooth(nn.Module):
        """Not additive, no spikes, so that no gradient vanishes and no two differences are equal."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(STEPS * LINES, 16), nn.Tanh(), nn.Linear(16, CLASSES)
            ).double()
            self.net[3].bias.data[0] += 0.7

        def forward(self, x):
            return self.net(x)

    model, x = Smooth(), rasters(16)
    y = model(x).argmax(1)
    result = SDA(EventFlips(STEPS * LINES), rounds=3, first=1).run(Oracle(model), x, y)
    expected = [reference_sda(model, x[k], y[k], 3, 1) for k in range(16)]
    assert 0 < sum(e is not None for e in expected) < 16
    assert result.success.tolist() == [e is not None for e in expected]
    for k, one in enumerate(expected):
        if one is not None:
            assert torch.equal(result.x_adv[k], one)
    # Within a budget the same search counts only where its example fits.
    tight = SDA(EventFlips(2), rounds=3, first=1).run(Oracle(model), x, y)
    assert tight.success.tolist() == [e is not None and int((e != x[k]).sum()) <= 2 for k, e in enumerate(expected)]


# --- retiming ----------------------------------------------------------------------------------------------------------


def reference_places(x, share, measure, budget, final):
    """Project the shares (T, N, K) of one raster (T, N), one spike at a time."""
    steps, width = x.shape
    z, moved = x.copy(), set()
    if measure != "inf":
        left = budget
        moves = [(s, n, t) for n in range(width) for s in range(steps) for t in range(steps) if x[s, n] and s != t]
        for s, n, t in sorted(moves, key=lambda m: -(share[m] + 1e-6 * (steps - 1 - abs(m[2] - m[0])))):
            cost = abs(t - s) if measure == "1" else 1
            if (s, n) in moved or z[t, n]:
                continue
            if cost > left:
                break
            z[t, n], z[s, n], left = x[s, n], 0.0, left - cost
            moved.add((s, n))
        return z
    spikes = [(s, n) for n in range(width) for s in range(steps) if x[s, n]]
    if not final:
        wishes = {}
        for s, n in spikes:
            k = int(np.argmax(share[s, n]))
            t = s + k - budget
            if 0 <= t < steps and not x[t, n] and share[s, n, k] > wishes.get((t, n), (0.0,))[0]:
                wishes[t, n] = (share[s, n, k], s)
        for (t, n), (_, s) in wishes.items():
            z[t, n], z[s, n] = x[s, n], 0.0
        return z
    while len(moved) < len(spikes):
        options = [
            (-share[s, n, k], n, s, k)
            for s, n in spikes for k in range(2 * budget + 1)
            if (s, n) not in moved and 0 <= s + k - budget < steps and (k == budget or not z[s + k - budget, n])
        ]  # fmt: skip
        _, n, s, k = min(options)
        z[s, n], z[s + k - budget, n] = 0.0, x[s, n]
        moved.add((s, n))
    return z


def reference_retiming(model, x, y, measure, budget, steps):
    """List the rasters that the published attack shows to the network, for one sample (T, N)."""
    length, width = x.shape
    source = torch.tensor(x)
    kinds = 2 * budget + 1 if measure == "inf" else length
    goal = torch.zeros(length, kinds, dtype=torch.int64)
    for s in range(length):
        goal[s] = torch.arange(kinds) + (s - budget if measure == "inf" else 0)
    logits = torch.zeros(length, width, kinds, dtype=torch.float64)
    if measure == "inf":
        logits[..., budget - 1 : budget + 2] = 4.0
    seen = []
    for _ in range(steps):
        logits.requires_grad_()
        share = logits.softmax(-1) * (source != 0).unsqueeze(-1)
        hard = torch.tensor(reference_places(x, share.detach().numpy(), measure, budget, final=False))
        seen.append(hard)
        soft, crowd = torch.zeros_like(source), torch.zeros_like(source)
        for s, k in product(range(length), range(kinds)):
            t = int(goal[s, k])
            if 0 <= t < length:
                soft[t] = soft[t] + share[s, :, k] * source[s]
                crowd[t] = crowd[t] + share[s, :, k]
        loss = functional.cross_entropy(model((hard + soft - soft.detach())[None]), y[None])
        loss = loss - 20 * (crowd - 1).relu().square().mean()
        distance = (goal - torch.arange(length).unsqueeze(1)).abs().unsqueeze(1)
        if measure == "1":
            loss = loss - 10 * ((share * distance).sum() - budget).relu() / budget
        elif measure == "0":
            loss = loss - 10 * ((share * (distance > 0)).sum() - budget).relu() / budget
        (slope,) = torch.autograd.grad(loss, logits)
        logits = (logits.detach() + slope.sign()).clamp(-10, 10)
    share = logits.softmax(-1) * (source != 0).unsqueeze(-1)
    seen.append(torch.tensor(reference_places(x, share.detach().numpy(), measure, budget, final=True)))
    return seen


@pytest.mark.parametrize(("measure", "budget"), [("inf", 1), ("inf", 2), ("1", 3), ("0", 2)])
@pytest.mark.parametrize("domain", [Binary(), Counts()], ids=["binary", "counts"])
def test_retiming_shows_the_network_what_the_published_attack_shows(measure, budget, domain):
    model, x, y = case(3, domain)
    attack = SpikeRetimingAttack(SpikeRetiming(budget, domain, measure), steps=5)
    for k in range(3):
        seen = []
        hook = model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()[0].clone()))
        attack.run(Oracle(model), x[k : k + 1], y[k : k + 1], early_drop=False)
        hook.remove()
        expected = reference_retiming(model, x[k].numpy(), y[k], measure, budget, 5)
        assert torch.equal(seen[0], x[k])
        assert all(torch.equal(a, b) for a, b in zip(seen[1:], expected, strict=True))


def test_retiming_defaults_are_those_of_the_paper():
    assert [SpikeRetimingAttack(SpikeRetiming(1, measure=m)).name for m in ("inf", "1", "0")] == ["retiming-20", "retiming-40", "retiming-40"]  # fmt: skip
    attack = make_attack(SpikeRetiming(1), "retiming")
    assert attack == SpikeRetimingAttack(SpikeRetiming(1), 20, 1.0, 1.0, 10.0, 20.0, 10.0)


# --- universal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flip", "add", "delete"])
def test_universal_flips_are_one_pattern(mode):
    model, x, y = case(40)
    result = UniversalFlips(EventFlips(3, mode=mode)).run(Oracle(model), x, y)
    changed = (result.x_adv != x).flatten(1)
    able = {"flip": torch.ones_like(x), "add": 1 - x, "delete": x}[mode].flatten(1).bool()
    pattern = changed.any(0)
    assert 0 < int(pattern.sum()) <= 3
    assert torch.equal(changed, pattern & able)
    assert int(result.success.sum()) > 0


def test_universal_pattern_shrinks_with_the_budget_of_a_sample():
    model, x, y = case(12)
    result = UniversalFlips(EventFlips("20%")).run(Oracle(model), x, y)
    changed = (result.x_adv != x).flatten(1)
    limits = EventFlips("20%").limits(x)
    assert torch.equal(changed.sum(1).double(), limits)
    largest = changed[limits.argmax()]
    assert bool((changed <= largest).all())


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GreedyFlips(L0(1)), TypeError, "use EventFlips"),
        (lambda: SpikeRetimingAttack(EventFlips(1)), TypeError, "use SpikeRetiming"),
        (lambda: SDA(EventFlips(1, Counts())), ValueError, "binary rasters"),
        (lambda: UniversalFlips(EventFlips(1, Counts())), ValueError, "binary rasters"),
        (lambda: GreedyFlips(EventFlips(1), candidates=0), ValueError, "candidates"),
        (lambda: GreedyFlips(EventFlips(1), per_round=0), ValueError, "per_round"),
        (lambda: SwapFlips(EventFlips(1), swaps=0), ValueError, "swaps"),
        (lambda: SDA(EventFlips(1), first=0), ValueError, "first"),
        (lambda: UniversalFlips(EventFlips(1), momentum=1.0), ValueError, "momentum"),
        (lambda: SpikeRetimingAttack(SpikeRetiming(1), steps=0), ValueError, "steps"),
        (lambda: SpikeRetimingAttack(SpikeRetiming(1), bound=0), ValueError, "bound"),
        (lambda: SpikeRetimingAttack(SpikeRetiming(1), budget_weight=-1), ValueError, "budget_weight"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- a trained network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Train on rasters drawn from the digits; return network and correctly classified test rasters."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    parts = []
    for part in Digits().read():
        images = torch.stack([part[k][0] for k in range(len(part))]).flatten(1)
        labels = torch.tensor([int(part[k][1]) for k in range(len(part))])
        parts.append(((torch.rand(len(images), 8, 64, generator=draw) < 0.6 * images.unsqueeze(1)).float(), labels))
    (x, y), (x_test, y_test) = parts
    model = SpikingMLP(64, (64,), 10, time_steps=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for index in torch.randperm(len(x), generator=draw).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    right = Oracle(model).correct(x_test, y_test)
    return model, x_test[right][:SAMPLES], y_test[right][:SAMPLES]


def broken(attack, trained):
    model, x, y = trained
    return float(attack.run(Oracle(model), x, y, generator=ids(SAMPLES)).success.double().mean())


@pytest.mark.parametrize("eps", [4, "6%"])
def test_strength_grows_from_random_to_swaps(trained, eps):
    threat = EventFlips(eps)
    random = broken(RandomNoise(threat), trained)
    one_shot = broken(FGSM(threat, loss="margin"), trained)
    greedy = broken(GreedyFlips(threat), trained)
    swap = broken(SwapFlips(threat, steps=10), trained)
    assert random + 0.1 < one_shot <= greedy <= swap
    assert random < broken(UniversalFlips(threat), trained) < one_shot


@pytest.mark.parametrize(("measure", "eps"), [("inf", 1), ("1", 12), ("0", "8%")])
def test_timing_alone_breaks_more_than_jitter(trained, measure, eps):
    threat = SpikeRetiming(eps, measure=measure)
    assert broken(RandomNoise(threat), trained) + 0.05 < broken(SpikeRetimingAttack(threat, steps=10), trained)
