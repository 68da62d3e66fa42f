import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_lightning.neurons import LIF, RecurrentLIF, SpikingNeuron, eager, fused
from sg_lightning.neurons.surrogates import (
    Atan,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Triangular,
)

RESETS = ("zero", "subtract", "none")
OPTIONS = [
    {"reset": r, "reset_delay": d, "detach_reset": a, "fire_at_threshold": f}
    for r, d, a, f in itertools.product(RESETS, (False, True), (False, True), (False, True))
]
RULES = [Triangular(1.0), Atan(2.0), FastSigmoid(5.0), Sigmoid(4.0), Rectangular(1.0), Gaussian(0.5), StraightThrough()]


def currents(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype) * 0.8 + 0.3


def assert_gradients_close(a, b, tolerance=1e-12):
    for one, two in zip(a, b, strict=True):
        scale = two.abs().max()
        assert (one - two).abs().max() <= tolerance * max(scale, 1e-30), (one - two).abs().max() / scale


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
def test_both_backends_equal_the_equations(options, vector, oracle):
    for rule in RULES:
        x = currents(6, 3, 4, 2).requires_grad_()
        beta = torch.rand(4, dtype=torch.float64) if vector else torch.tensor(0.8, dtype=torch.float64)
        theta = torch.rand(4, dtype=torch.float64) + 0.5 if vector else torch.tensor(0.9, dtype=torch.float64)
        neurons = [
            LIF(beta, theta, **options, surrogate=rule, learn_beta=True, learn_threshold=True, backend=backend)
            for backend in ("fused", "reference")
        ]
        g, h = torch.randn_like(x), torch.randn_like(x)
        view = (-1, 1) if vector else ()
        b, th = beta.clone().requires_grad_(), theta.clone().requires_grad_()
        s, u = oracle(x, b.view(view), th.view(view), rule, **options)
        assert 0.05 < s.mean() < 0.6
        expected = torch.autograd.grad((s * g).sum() + (u * h).sum(), [x, b, th], retain_graph=True)
        spikes_only = torch.autograd.grad((s * g).sum(), [x, b, th])
        for neuron in neurons:
            spikes, membrane = neuron.forward_membrane(x)
            assert torch.equal(spikes, s.detach().round())
            assert torch.equal(spikes, neuron(x))
            torch.testing.assert_close(membrane, u, rtol=1e-12, atol=1e-12)
            wanted = [x, neuron.beta, neuron.threshold]
            got = torch.autograd.grad((spikes * g).sum() + (membrane * h).sum(), wanted)
            assert_gradients_close(got, expected)
            assert_gradients_close(torch.autograd.grad((neuron(x) * g).sum(), wanted), spikes_only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_backends_agree_bit_for_bit_in_spikes(options, dtype):
    x = currents(9, 2, 3, 50, dtype=torch.float32).to(dtype)
    beta = torch.tensor([0.9, 0.5, 1.0])
    a = LIF(beta, 0.7, **options)
    b = LIF(beta, 0.7, **options, backend="reference")
    (s, u), (s2, u2) = a.forward_membrane(x), b.forward_membrane(x)
    assert torch.equal(s, s2)
    assert torch.equal(u, u2)
    assert s.dtype == dtype
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        assert torch.equal(a(x), s)


def test_blocks_and_chunks_change_nothing(options, monkeypatch):
    x = currents(7, 2, 5, 3).requires_grad_()
    neuron = LIF(torch.rand(5), torch.rand(5) + 0.5, **options, learn_beta=True, learn_threshold=True).double()
    wanted = [x, neuron.beta, neuron.threshold]
    g = torch.randn_like(x)

    def run():
        s, u = neuron.forward_membrane(x)
        return s, torch.autograd.grad((s * g).sum() + (u * g).sum(), wanted)

    whole = run()
    monkeypatch.setattr(eager, "_CPU_BLOCK", 7)
    monkeypatch.setattr(eager, "_CHUNK", 20)  # chunks of 2 steps and a rest of 1
    parts = run()
    assert torch.equal(whole[0], parts[0])
    assert_gradients_close(parts[1], whole[1], 1e-14)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(OPTIONS),
    st.sampled_from(RULES),
    st.integers(1, 6),
    st.integers(1, 3),
    st.floats(0, 1),
    st.floats(0.1, 2),
    st.integers(0, 10**6),
)
def test_fused_equals_reference_for_any_setting(options, rule, steps, batch, beta, theta, seed):
    torch.manual_seed(seed)
    x = (torch.randn(steps, batch, 5, dtype=torch.float64) * 2 * theta).requires_grad_()
    results = []
    for backend in ("fused", "reference"):
        kw = {"surrogate": rule, "learn_beta": True, "learn_threshold": True, "backend": backend}
        neuron = LIF(beta, theta, **options, **kw).double()
        s = neuron(x)
        g = torch.linspace(-1, 1, s.numel(), dtype=s.dtype).view_as(s)
        grads = torch.autograd.grad((s * g).sum(), [x, neuron.beta, neuron.threshold], materialize_grads=True)
        results.append((s, grads))
    assert torch.equal(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(1 + two.abs().max()))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_ties_at_the_threshold(backend):
    # Exact in binary: 0.5 + 0.5 = 1 reaches the threshold without crossing it.
    x = torch.tensor([0.5, 0.5, 0.25, 0.0]).view(4, 1)
    assert LIF(1.0, 1.0, backend=backend)(x).flatten().tolist() == [0, 0, 1, 0]
    assert LIF(1.0, 1.0, fire_at_threshold=True, backend=backend)(x).flatten().tolist() == [0, 1, 0, 0]


def test_gradients_at_ties(options, oracle):
    x = (torch.randint(-4, 9, (12, 20, 4)) / 8.0).double().requires_grad_()
    beta, theta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 1.0))
    s, u = oracle(x, beta, theta, Triangular(1.0), **options)
    assert (u == 1.0).sum() > 5
    g = torch.randn_like(s)
    expected = torch.autograd.grad((s * g).sum(), [x, beta, theta])
    for backend in ("fused", "reference"):
        neuron = LIF(0.5, 1.0, **options, learn_beta=True, learn_threshold=True, backend=backend).double()
        got = torch.autograd.grad((neuron(x) * g).sum(), [x, neuron.beta, neuron.threshold])
        assert_gradients_close(got, expected)


def test_resets_by_hand():
    x = torch.tensor([1.75, 0.0, 0.5]).view(3, 1)

    def run(**kw):
        s, u = LIF(1.0, 1.0, **kw).forward_membrane(x)
        return s.flatten().tolist(), u.flatten().tolist()

    assert run(reset="zero") == ([1, 0, 0], [1.75, 0.0, 0.5])
    assert run(reset="zero", reset_delay=True) == ([1, 0, 0], [1.75, 0.0, 0.5])
    assert run(reset="subtract") == ([1, 0, 1], [1.75, 0.75, 1.25])
    assert run(reset="subtract", reset_delay=True) == ([1, 0, 1], [1.75, 0.75, 1.25])
    assert run(reset="none") == ([1, 1, 1], [1.75, 1.75, 2.25])


def test_delayed_subtraction_leaks_before_it_subtracts():
    x = torch.tensor([2.0, 0.0]).view(2, 1)
    same = LIF(0.5, 1.0, "subtract").forward_membrane(x)[1].flatten().tolist()
    late = LIF(0.5, 1.0, "subtract", reset_delay=True).forward_membrane(x)[1].flatten().tolist()
    assert same == [2.0, 0.5 * (2.0 - 1.0)]
    assert late == [2.0, 0.5 * 2.0 - 1.0]


def test_one_gradient_by_hand():
    # u = (0.5, 0.75): no spike; d_2 = phi(-0.25) = 0.75, d_1 = phi(-0.5) + (0.5 - 0.5 u_1 phi(-0.5)) d_2.
    x = torch.tensor([0.5, 0.5], dtype=torch.float64).view(2, 1).requires_grad_()
    (grad,) = torch.autograd.grad(LIF(0.5, 1.0)(x).sum(), x)
    assert grad.flatten().tolist() == pytest.approx([0.5 + (0.5 - 0.5 * 0.5 * 0.5) * 0.75, 0.75])


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "transposed", "sliced"])
def test_any_memory_layout(layout):
    base = currents(4, 3, 5, 2, 2)
    x = {
        "channels_last": base.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 3)),
        "expanded": base[:1].expand(4, -1, -1, -1, -1),
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.cat([base, base], 3)[:, :, :, :2],
    }[layout].requires_grad_()
    beta, theta = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.3
    a, b = LIF(beta, theta, learn_beta=True), LIF(beta, theta, learn_beta=True, backend="reference")
    g = torch.randn(x.shape, dtype=x.dtype)
    sa, sb = a(x), b(x)
    assert torch.equal(sa, sb)
    assert_gradients_close(
        torch.autograd.grad((sa * g).sum(), [x, a.beta]), torch.autograd.grad((sb * g).sum(), [x, b.beta])
    )
    if layout == "channels_last":
        assert sa.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_only_the_membrane_is_kept_for_backward():
    kept = []
    x = currents(5, 2, 100, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LIF(0.9)(x)
    assert sum(t.untyped_storage().nbytes() for t in kept if t.numel() > 1) == x.numel() * 4
    kept.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        spikes, membrane = fused.simulate(x, *LIF(0.9).buffers(), LIF().dynamics, Atan())
    assert membrane is None
    assert not spikes.requires_grad
    assert not kept


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_autocast_keeps_the_membrane_in_float32(backend):
    neuron = LIF(0.9, 1.0, "subtract", learn_beta=True, learn_threshold=True, backend=backend)
    x = currents(20, 2, 30, dtype=torch.float32).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes, membrane = neuron.forward_membrane(x)
    full = LIF(0.9, 1.0, "subtract", learn_beta=True, learn_threshold=True)
    x32 = x.detach().float().requires_grad_()
    expected, u = full.forward_membrane(x32)
    assert (spikes.dtype, membrane.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(membrane, u)
    g = torch.randn_like(expected).bfloat16()
    got = torch.autograd.grad(spikes, [x, neuron.beta, neuron.threshold], g)
    want = torch.autograd.grad(expected, [x32, full.beta, full.threshold], g.float())
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(got[0].float(), want[0], rtol=1e-2, atol=1e-6)  # rounded to bfloat16 once
    assert_gradients_close(got[1:], want[1:], 1e-5)


def test_learned_beta_is_clamped_without_gradient_outside():
    x = currents(6, 2, 3)
    for value, inside in ((1.3, 1.0), (-0.2, 0.0)):
        for backend in ("fused", "reference"):
            neuron = LIF(0.5, learn_beta=True, backend=backend).double()
            with torch.no_grad():
                neuron.beta.fill_(value)
            spikes = neuron(x)
            assert torch.equal(spikes, LIF(inside).double()(x))
            assert torch.autograd.grad(spikes.sum(), neuron.beta)[0].item() == 0.0


def test_unused_gradients_are_not_computed():
    x = currents(3, 2, 4).requires_grad_()
    neuron = LIF(0.5, learn_beta=True).double()
    (only_beta,) = torch.autograd.grad(neuron(x.detach()).sum(), neuron.beta)
    both = torch.autograd.grad(neuron(x).sum(), [x, neuron.beta])
    torch.testing.assert_close(only_beta, both[1])
    neuron.beta.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(neuron(x).sum(), x)[0], both[0])


def test_streaming_in_pieces_equals_one_call(options):
    neuron = LIF(0.8, 0.9, **options, learn_beta=True).double()
    x = currents(8, 2, 4).requires_grad_()
    whole = neuron(x)
    first, state = neuron.forward_state(x[:3])
    second, state = neuron.forward_state(x[3:4], state)
    third, state = neuron.forward_state(x[4:], state)
    pieces = torch.cat([first, second, third])
    assert torch.equal(pieces, whole)
    assert state.shape == x.shape[1:]
    g = torch.randn_like(whole)
    assert_gradients_close(
        torch.autograd.grad((pieces * g).sum(), [x, neuron.beta]),
        torch.autograd.grad((whole * g).sum(), [x, neuron.beta]),
    )
    with pytest.raises(ValueError, match=r"state has shape \(1, 4\).*\(2, 4\)"):
        neuron.forward_state(x, torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_streaming_has_the_same_spikes_in_other_precisions(options, backend, dtype):
    neuron = LIF(0.83, 0.7, **options, backend=backend)
    x = currents(40, 3, 50).to(dtype)
    whole, state, pieces = neuron(x), None, []
    for piece in x.split(7):
        spikes, state = neuron.forward_state(piece, state)
        pieces.append(spikes)
    assert 0.02 < float(whole.float().mean()) < 0.9
    assert torch.equal(torch.cat(pieces), whole)
    assert pieces[0].dtype == dtype
    assert state.dtype == torch.float32


def test_streaming_with_feedback_equals_one_call(options):
    neuron = RecurrentLIF(4, 0.8, 0.9, **options, learn_beta=True).double()
    x = currents(8, 2, 4).requires_grad_()
    whole = neuron(x)
    first, state = neuron.forward_state(x[:3])
    second, state = neuron.forward_state(x[3:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    wanted = [x, neuron.beta, neuron.recurrent.weight]
    g = torch.randn_like(whole)
    assert_gradients_close(
        torch.autograd.grad((torch.cat([first, second]) * g).sum(), wanted),
        torch.autograd.grad((whole * g).sum(), wanted),
    )
    with pytest.raises(ValueError, match=r"state has shape \(2, 4\).*\(2, 2, 4\)"):
        neuron.forward_state(x, state[0])


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_attack_rule_changes_the_gradient_only(backend):
    neuron = LIF(0.9, surrogate=Triangular(1.0), backend=backend)
    x = currents(5, 2, 6, dtype=torch.float32).requires_grad_()
    spikes = neuron(x)
    own = torch.autograd.grad(spikes.sum(), x)[0]
    neuron.attack_rule = Atan(2.0)
    swapped = neuron(x)
    other = torch.autograd.grad(swapped.sum(), x)[0]
    neuron.attack_rule = None
    assert torch.equal(spikes, swapped)
    assert not torch.allclose(own, other)
    assert torch.equal(torch.autograd.grad(neuron(x).sum(), x)[0], own)
    assert torch.equal(other, torch.autograd.grad(LIF(0.9, surrogate=Atan(2.0), backend=backend)(x).sum(), x)[0])


def test_second_call_is_the_first_and_samples_are_independent():
    neuron = LIF(0.9)
    x = currents(5, 4, 3, dtype=torch.float32)
    first = neuron(x)
    assert torch.equal(neuron(x), first)
    assert torch.equal(neuron(x[:, 2:3]), first[:, 2:3])


def test_inference_mode_then_gradients():
    neuron = LIF(0.9)
    x = currents(5, 4, 3, dtype=torch.float32)
    with torch.inference_mode():
        quiet = neuron(x)
    x.requires_grad_()
    assert torch.equal(neuron(x), quiet)
    assert torch.autograd.grad(neuron(x).sum(), x)[0].abs().sum() > 0


def test_copies_checkpoints_and_settings():
    neuron = LIF(0.7, torch.tensor([1.0, 2.0]), "subtract", reset_delay=True, surrogate="gaussian", learn_beta=True)
    for other in (neuron.clone(), copy.deepcopy(neuron), LIF(**neuron.settings)):
        assert other.settings.keys() == neuron.settings.keys()
        assert (other.dynamics, other.surrogate) == (neuron.dynamics, neuron.surrogate)
        assert torch.equal(other.threshold, neuron.threshold)
        assert other.beta is not neuron.beta
        assert [n for n, _ in other.named_parameters()] == ["beta"]
    file = io.BytesIO()
    torch.save(neuron.state_dict(), file)
    file.seek(0)
    loaded = LIF(0.1, torch.ones(2), learn_beta=True)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.beta.item() == pytest.approx(0.7)
    assert "beta=0.7, learned" in repr(neuron)
    assert isinstance(neuron, SpikingNeuron)


def test_channels_repeats_scalars_to_learn_one_each():
    neuron = LIF(0.9, channels=3, learn_beta=True, learn_threshold=True)
    assert neuron.beta.shape == neuron.threshold.shape == (3,)
    grad = torch.autograd.grad(neuron(currents(6, 4, 3, 5, dtype=torch.float32)).sum(), neuron.beta)[0]
    assert len(set(grad.tolist())) == 3


NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.2}, r"beta must be in \[0, 1\], got 1.2"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"beta": NAN}, r"beta must be in \[0, 1\], got nan"),
        ({"beta": torch.tensor([0.5, NAN])}, r"beta must be in \[0, 1\], got nan"),
        ({"beta": torch.rand(2, 2)}, r"beta must be a number or a 1-d tensor.*\(2, 2\)"),
        ({"beta": torch.zeros(0)}, "beta is empty"),
        ({"threshold": 0.0}, "threshold must be finite and above 0, got 0"),
        ({"threshold": -1}, "threshold must be finite and above 0, got -1"),
        ({"threshold": NAN}, "threshold must be finite and above 0, got nan"),
        ({"threshold": math.inf}, "threshold must be finite and above 0, got inf"),
        ({"reset": "hard"}, "unknown reset 'hard'.*zero, subtract, none"),
        ({"surrogate": "relu"}, "unknown surrogate 'relu'"),
        ({"surrogate": torch.relu}, "surrogate must be a Surrogate"),
        ({"backend": "cuda"}, "unknown backend 'cuda'.*fused, reference"),
        ({"beta": torch.rand(3), "threshold": torch.ones(4)}, "beta has 3 values but threshold has 4"),
        ({"beta": torch.rand(3), "channels": 5}, "beta has 3 values but channels=5"),
        ({"channels": 0}, "channels must be a whole number above 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LIF(**arguments)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    ("beta", "x", "message"),
    [
        (0.9, torch.rand(5), r"time first: an input \(T, B, ...\), got shape \(5,\)"),
        (0.9, torch.rand(0, 2, 3), "at least one time step"),
        (0.9, torch.ones(2, 3, dtype=torch.int64), r"floating-point input, got torch.int64.*\.float\(\)"),
        (torch.rand(3), torch.rand(2, 2, 4), "beta has 3 values.* has 4 channels"),
        (torch.rand(3), torch.rand(2, 3), "beta has 3 values.* has no channel axis"),
    ],
)
def test_bad_inputs(backend, beta, x, message):
    with pytest.raises(ValueError, match=message):
        LIF(beta, backend=backend)(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_spikes_and_gradients_of_the_cpu(options):
    x = currents(9, 3, 4, 50, dtype=torch.float32).requires_grad_()
    neuron = LIF(torch.rand(4), torch.rand(4) + 0.5, **options, learn_beta=True)
    twin = copy.deepcopy(neuron).cuda()
    spikes, moved = neuron(x), twin(x.cuda())
    assert torch.equal(moved.cpu(), spikes)
    g = torch.randn_like(spikes)
    expected = torch.autograd.grad((spikes * g).sum(), [x, neuron.beta])
    got = torch.autograd.grad((moved * g.cuda()).sum(), [x, twin.beta])
    assert_gradients_close([t.cpu() for t in got], expected, 1e-5)


def test_empty_batch_passes():
    x = torch.rand(3, 0, 4, requires_grad=True)
    spikes = LIF(0.9)(x)
    assert spikes.shape == (3, 0, 4)
    assert torch.autograd.grad(spikes.sum(), x)[0].shape == (3, 0, 4)
