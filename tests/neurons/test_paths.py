"""One suite over all paths: the equations, bit-equal spikes, and which path is taken when."""

import itertools
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sg_lightning.neurons import LIF, Surrogate, compiled, eager, paths, use_path
from sg_lightning.neurons.surrogates import (
    Atan,
    Exponential,
    FastSigmoid,
    Gaussian,
    Rectangular,
    Sigmoid,
    StraightThrough,
    Triangular,
)

RULES = [
    Triangular(0.8), Atan(2.0), FastSigmoid(5.0), Sigmoid(4.0), Rectangular(0.9), Gaussian(0.5), StraightThrough(),
    Exponential(2.0, 0.7),
]  # fmt: skip
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
# Each value of each option in few compilations, which take seconds; `slow` has them all.
COMPILED = [
    ("zero", False, False, True, Triangular(0.8), False),
    ("zero", True, True, False, Atan(2.0), True),
    ("subtract", True, False, False, Gaussian(0.5), True),
]


def currents(*shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=torch.float64) * 0.8 + 0.3).to(dtype)


def assert_close(found, expected, tolerance):
    for one, two in zip(found, expected, strict=True):
        scale = max(float(two.abs().max()), 1e-30)
        assert (one - two).abs().max() <= tolerance * scale, ((one - two).abs().max() / scale).item()


@pytest.fixture
def chunked(monkeypatch):
    """Sequences of seven steps cross chunks and blocks on every path, and leave a rest of one."""
    monkeypatch.setattr(eager, "_CPU_BLOCK", 37)
    monkeypatch.setattr(eager, "_CHUNK", 80)
    if INTERPRETED:
        from sg_lightning.neurons import triton_kernels

        monkeypatch.setattr(triton_kernels, "BLOCK", 32)


@pytest.fixture
def uncompiled(monkeypatch, chunked):
    """The code that Inductor gets, run as it is."""

    def clear():
        compiled._forward.cache_clear()
        compiled._backward.cache_clear()

    clear()
    monkeypatch.setattr(torch, "compile", lambda body, **settings: body)
    yield
    clear()


def check_equations(path, options, rule, vector, oracle, steps=7):
    x = currents(steps, 4, 5, 6).requires_grad_()
    beta = torch.rand(5, dtype=torch.float64) if vector else torch.tensor(0.8, dtype=torch.float64)
    theta = torch.rand(5, dtype=torch.float64) + 0.5 if vector else torch.tensor(0.9, dtype=torch.float64)
    neuron = LIF(beta, theta, **options, surrogate=rule, learn_beta=True, learn_threshold=True)
    g, h = torch.randn_like(x), torch.randn_like(x)
    view = (-1, 1) if vector else ()
    b, th = beta.clone().requires_grad_(), theta.clone().requires_grad_()
    s, u = oracle(x, b.view(view), th.view(view), rule, **options)
    both = torch.autograd.grad((s * g).sum() + (u * h).sum(), [x, b, th], retain_graph=True)
    from_spikes = torch.autograd.grad((s * g).sum(), [x, b, th], retain_graph=True)
    assert 0.05 < s.mean() < 0.6
    with use_path(path):
        spikes, membranes = neuron.forward_membrane(x)
        wanted = [x, neuron.beta, neuron.threshold]
        assert torch.equal(spikes, s.detach().round())
        torch.testing.assert_close(membranes, u, rtol=1e-12, atol=1e-12)
        assert_close(torch.autograd.grad((spikes * g).sum() + (membranes * h).sum(), wanted), both, 1e-12)
        assert_close(torch.autograd.grad((neuron(x) * g).sum(), wanted), from_spikes, 1e-12)
        assert_close(torch.autograd.grad((neuron(x) * g).sum(), x), from_spikes[:1], 1e-12)


def check_bits(path, options, dtype):
    """Spikes and membranes are the reference's to the bit, with and without gradients; gradients to rounding."""
    neuron = LIF(torch.rand(5), torch.rand(5) + 0.5, **options, learn_beta=True, learn_threshold=True)
    neuron = neuron.double() if dtype == torch.float64 else neuron
    x = currents(7, 4, 5, 6, dtype=dtype).requires_grad_()
    g = torch.randn(x.shape).to(dtype)
    found = []
    for name in ("reference", path):
        with use_path(name):
            s, u = neuron.forward_membrane(x)
            grads = torch.autograd.grad((s * g).sum() + u.sum(), [x, neuron.beta, neuron.threshold])
            with torch.no_grad():
                assert torch.equal(neuron(x), s)
                assert torch.equal(neuron(x[:1].expand(7, -1, -1, -1))[0], s[0])
        found.append((s, u, [t.double() for t in grads]))
    (s, u, grads), (expected, membranes, wanted) = found[1], found[0]
    assert torch.equal(s, expected)
    assert torch.equal(u, membranes)
    assert (s.dtype, u.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    assert_close(grads, wanted, tolerance)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
@pytest.mark.parametrize("path", ["reference", "eager"])
def test_equations(options, path, vector, chunked, oracle):
    for rule in RULES:
        check_equations(path, options, rule, vector, oracle)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
def test_equations_of_the_code_that_is_compiled(options, vector, uncompiled, oracle):
    for rule in RULES:
        check_equations("compiled", options, rule, vector, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits(options, dtype, uncompiled):
    check_bits("eager", options, dtype)
    check_bits("compiled", options, dtype)


needs_compiler = pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize(("reset", "delay", "detach", "equal", "rule", "vector"), COMPILED, ids=str)
def test_equations_of_compiled_code(reset, delay, detach, equal, rule, vector, chunked, oracle):
    options = {"reset": reset, "reset_delay": delay, "detach_reset": detach, "fire_at_threshold": equal}
    check_equations("compiled", options, rule, vector, oracle)


@needs_compiler
@pytest.mark.parametrize(("reset", "dtype"), [("subtract", torch.float32), ("zero", torch.bfloat16)])
def test_compiled_code_rounds_as_the_reference(reset, dtype, chunked):
    """Where contraction of multiply-add, or another order, would show."""
    options = {"reset": reset, "reset_delay": True, "detach_reset": False, "fire_at_threshold": False}
    check_bits("compiled", options, dtype)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
def test_all_equations_of_compiled_code(options, vector, chunked, oracle):
    for rule in RULES:  # a rest of one step would double the compilations
        check_equations("compiled", options, rule, vector, oracle, steps=6)


only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the subprocess of test_triton_kernels")


@only_interpreted
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "per-channel"])
def test_interpreted_equations(options, vector, chunked, oracle):
    number = list(itertools.product(("zero", "subtract", "none"), *[(False, True)] * 3)).index(tuple(options.values()))
    rules = RULES if options == {**dict.fromkeys(options, False), "reset": "zero"} else [RULES[number % len(RULES)]]
    for rule in rules:
        check_equations("triton", options, rule, vector, oracle)


@only_interpreted
def test_interpreted_bits(options, chunked):
    check_bits("triton", options, torch.float32)
    if not options["fire_at_threshold"] and options["reset_delay"]:
        check_bits("triton", options, torch.bfloat16)


@only_interpreted
def test_interpreted_sizes(chunked):
    """One neuron, one step, no neuron, more than a block, an input that strides."""
    for shape in ((1, 1, 1), (3, 1, 1), (1, 1, 70), (4, 0, 3), (5, 1, 33)):
        neuron = LIF(0.8, 0.7, learn_beta=True)
        x = currents(*shape, dtype=torch.float32).requires_grad_()
        with use_path("triton"):
            spikes = neuron(x)
        twin = LIF(0.8, 0.7, learn_beta=True, backend="reference")
        assert torch.equal(spikes, twin(x))
        found, expected = (torch.autograd.grad(n(x).sum(), [x, n.beta]) for n in (neuron, twin))
        torch.testing.assert_close(found, expected)


@only_interpreted
@pytest.mark.parametrize("rule", [Triangular(0.8), Atan(2.0)], ids=str)
def test_interpreted_operators(rule, chunked):
    """Those that a compiler sees through are those that it does not, in values, gradients and their gradients."""
    from sg_lightning.neurons import operators, triton_operators

    x, beta, theta = (
        t.requires_grad_() for t in (currents(5, 70), torch.rand(70).double(), torch.rand(70).double() + 0.5)
    )
    g, h, w = torch.randn(3, 5, 70, dtype=torch.float64)
    found = []
    for call, path in ((operators.lif, "eager"), (triton_operators.lif, "triton")):
        s, u = call(x, beta, theta, "subtract+reset_delay", rule.code, True, path)
        first = torch.autograd.grad((s * g + u * h).sum(), [x, beta, theta], create_graph=rule.smooth)
        second = torch.autograd.grad((first[0] * w).sum(), [x, beta, theta]) if rule.smooth else ()
        silent = call(x.detach(), beta.detach(), theta.detach(), "zero", rule.code, False, path)
        assert silent[1].numel() == 0
        found.append([s, u, silent[0], *first, *second])
    assert_close(found[1], found[0], 1e-12)
    u = found[0][1].detach()
    for need in ((True, False, False), (False, True, True)):
        arguments = (None, h, u, beta.detach(), theta.detach(), "zero", rule.code, *need, torch.float64)
        one, two = operators.lif_backward(*arguments, "eager"), triton_operators.lif_backward(*arguments, "triton")
        assert_close([t for t in two if t.numel()], [t for t in one if t.numel()], 1e-12)


def test_triton_kernels():
    """In Triton's interpreter, which must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "75 passed" in done.stdout, done.stdout[-300:]


@dataclass(frozen=True)
class Ramp(Surrogate):
    """A surrogate that the library does not know."""

    name = "ramp"
    width: float = 1.0

    def derivative(self, z):
        return (1 + z / self.width).clamp(0, 2)


class Shifted(Surrogate):
    """One that is no dataclass."""

    name = "shifted"

    def derivative(self, z):
        return (z + 1).abs()


@pytest.mark.parametrize("rule", [Ramp(1.5), Shifted()])
def test_foreign_surrogates(rule, uncompiled):
    x = currents(6, 4, 20).requires_grad_()
    neuron = LIF(0.8, 0.9, surrogate=rule).double()
    grads = []
    for path in ("reference", "eager", "compiled"):
        with use_path(path):
            assert neuron.path(x).path == (path if isinstance(rule, Ramp) else "reference")
            grads.append(torch.autograd.grad(neuron(x).sum(), x)[0])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-12, atol=1e-14)


def test_a_class_may_be_defined_again():
    """As in a notebook: same name, another formula."""
    grads = []
    for factor in (1.0, 3.0):

        @dataclass(frozen=True)
        class Mine(Surrogate):
            name = "mine"
            width: float = 1.0

            def derivative(self, z):
                return torch.full_like(z, factor)  # noqa: B023

        x = torch.ones(1, 1, 3, requires_grad=True)
        grads.append(torch.autograd.grad(LIF(surrogate=Mine())(x).sum(), x)[0])
    assert torch.equal(grads[1], 3 * grads[0])


def test_a_neuron_from_another_process_works():
    stored = pickle.dumps(LIF(0.8, surrogate=Triangular(0.123456)))
    code = (
        "import pickle, sys, torch; n = pickle.loads(sys.stdin.buffer.read()); x = torch.ones(2, 1, 3).requires_grad_(); "
        "n(x).sum().backward(); print(n.surrogate.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=stored, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "Triangular(width=0.123456)"
