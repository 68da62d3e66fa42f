"""The neuron as operators: what torch's tools say of them, ``torch.compile``, and which path is chosen when."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.library import opcheck

from sg_lightning.backbones import VGG, ConvNet, SpikingMLP
from sg_lightning.neurons import LIF, LeakyIntegrator, compiled, operators, paths, use_path
from sg_lightning.neurons.base import Dynamics
from sg_lightning.neurons.surrogates import Atan, Surrogate, Triangular


def currents(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype) * 0.8 + 0.3


@pytest.mark.parametrize("rule", [Atan(2.0), Triangular(1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamics", [Dynamics("zero"), Dynamics("subtract", True, True, True)], ids=lambda d: d.code)
def test_opcheck(dynamics, dtype, rule):
    x = currents(5, 7).to(dtype).requires_grad_()
    for beta in (torch.tensor(0.8), torch.rand(7)):
        beta.requires_grad_()
        theta = torch.tensor(0.9, requires_grad=True)
        for keep in (True, False):
            leaves = (x, beta, theta) if keep else tuple(t.detach() for t in (x, beta, theta))
            opcheck(operators.lif, (*leaves, dynamics.code, rule.code, keep, "eager"))
        u = operators.lif(x, beta, theta, dynamics.code, rule.code, True, "eager")[1].detach()
        g, h = torch.randn_like(x), torch.randn_like(u)
        # Rough surrogates have a part of their double backward only, which opcheck cannot ask for alone.
        needs = (g, h, u) if not rule.smooth else (g.requires_grad_(), h.requires_grad_(), u.requires_grad_())
        last = (dynamics.code, rule.code)
        plain = (beta, theta) if rule.smooth else (beta.detach(), theta.detach())
        opcheck(operators.lif_backward, (*needs, *plain, *last, True, True, True, dtype, "eager"))
        fixed = (u.detach(), beta.detach(), theta.detach())
        opcheck(operators.lif_backward, (None, h.detach(), *fixed, *last, True, False, False, dtype, "eager"))
        w, v = torch.randn_like(g).detach(), torch.randn(())
        opcheck(operators.lif_double_backward, (w, None, v, g.detach(), None, *fixed, *last))


def test_operator_and_direct_call_are_one():
    x, beta, theta = (t.requires_grad_() for t in (currents(5, 7), torch.rand(7), torch.rand(7) + 0.5))
    found = []
    for call in (operators.lif, operators.run):
        s, u = call(x, beta, theta, "subtract+reset_delay", Atan(2.0).code, True, "eager")
        first = torch.autograd.grad((s + u).square().sum(), [x, beta, theta], create_graph=True)
        found.append([s, u, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), [x, beta, theta])])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_membranes_that_were_not_kept_are_an_error():
    x = currents(5, 7).requires_grad_()
    s, u = operators.lif(x, torch.tensor(0.8), torch.tensor(0.9), "zero", Atan(2.0).code, False, "auto")
    assert u.numel() == 0
    with pytest.raises(RuntimeError, match="keep=False"):
        s.sum().backward()


NETS = {
    "mlp": lambda: SpikingMLP(20, (16, 16), num_classes=4, time_steps=6, neuron=LIF(0.9, 0.5)),
    "convnet": lambda: ConvNet(num_classes=4, input_size=8, channels=(6,), hidden=12, time_steps=3),
    "vgg": lambda: VGG("vgg5", num_classes=4, input_size=16, time_steps=2, neuron=LIF(0.9, learn_beta=True)),
}


@pytest.mark.parametrize("name", NETS)
def test_networks_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    net = NETS[name]()
    x = torch.rand(3, *net.input_shape, requires_grad=True)
    fast = torch.compile(net, fullgraph=True, backend="aot_eager")
    parameters = [x, *net.parameters()]
    plain, found = (torch.autograd.grad(f(x).square().sum(), parameters, allow_unused=True) for f in (net, fast))
    for one, two in zip(found, plain, strict=True):
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert plain[0].abs().max() > 0
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == net(x).dtype
    # An attack's surrogate is part of what was compiled, never forgotten.
    neurons = [m for m in net.modules() if isinstance(m, LIF)]
    for neuron in neurons:
        neuron.attack_rule = Atan(0.5)
    swapped, own = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (fast, net))
    torch.testing.assert_close(swapped, own, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
def test_inductor_and_compiled_neurons_together():
    """Compiled neurons run inside a compiled network."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 40), LIF(0.9, 0.5), torch.nn.Linear(40, 3))
    x = torch.rand(4, 3, 10)
    with use_path("compiled"):
        fast = torch.compile(net, fullgraph=True)
        plain, found = (torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (net, fast))
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with a compiler, and no work done so far."""
    monkeypatch.setattr(paths, "has_compiler", lambda: True)
    monkeypatch.setattr(paths, "_work", type(paths._work)())
    monkeypatch.setattr(compiled, "broken", {})


def test_auto_compiles_when_the_work_pays_for_it(cpu, monkeypatch):
    neuron = LIF(0.9)
    small, large = torch.zeros(4, 2, 10), torch.zeros(8, 2, 20_000)
    assert neuron.path(small).path == "eager"
    assert neuron.path(large).path == "eager"
    assert "too little work so far" in neuron.path(large).why
    monkeypatch.setattr(paths, "_PATIENCE", 2 * large.numel())
    with torch.no_grad():
        neuron(large)
        assert neuron.path(large).path == "eager"
        neuron(large)
        assert neuron.path(large).path == "compiled"
        assert LIF(0.9, reset="none").path(large).path == "eager"  # another kind
        assert neuron.path(small).path == "compiled"  # the kind counts, not the layer
        torch.use_deterministic_algorithms(True)
        try:
            assert "deterministic" in neuron.path(large).why
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(paths, "has_compiler", lambda: False)
        assert "no C++ compiler" in neuron.path(large).why


def test_a_broken_compiler_is_told_once_and_costs_nothing_but_speed(cpu, monkeypatch, caplog):
    def broken(*args, **settings):
        raise RuntimeError("cc1plus: out of cheese")

    monkeypatch.setattr(paths, "_PATIENCE", 0)
    monkeypatch.setattr(torch, "compile", lambda body, **settings: broken)
    compiled._forward.cache_clear()
    compiled._backward.cache_clear()
    neuron, x = LIF(0.77), currents(8, 2, 20_000).requires_grad_()
    with caplog.at_level(logging.WARNING):
        spikes = neuron(x)
        (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert len([r for r in caplog.records if "out of cheese" in r.message]) == 1
    assert "out of cheese" in neuron.path(x).why
    twin = LIF(0.77, backend="reference")
    assert torch.equal(spikes, twin(x))
    torch.testing.assert_close(grad, torch.autograd.grad(twin(x).sum(), x)[0])
    with use_path("compiled"), pytest.raises(RuntimeError, match="out of cheese"):
        neuron(x)
    compiled._forward.cache_clear()
    compiled._backward.cache_clear()


@dataclass(frozen=True)
class Table(Surrogate):
    """Not one loop over neurons."""

    name = "table"
    height: float = 1.0

    def derivative(self, z):
        levels = self.height * torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0], dtype=z.dtype)
        return levels[torch.bucketize(z, torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=z.dtype))]


@pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
def test_kernels_out_of_reach_are_left_for_eager_code_unless_asked_for(cpu, monkeypatch):
    """An odd surrogate is more than one kernel; other neurons go on compiled."""
    monkeypatch.setattr(paths, "_PATIENCE", 0)
    x = currents(4, 2, 50).requires_grad_()
    odd, other = LIF(0.81, surrogate=Table()), LIF(0.81, surrogate=Atan(2.0))

    def grads(neuron):
        return torch.autograd.grad((neuron(x) * torch.arange(50)).sum(), x)[0]

    with use_path("eager"):
        expected = [grads(odd), grads(other)]
    for _ in range(2):
        assert torch.equal(grads(odd), expected[0])
    assert [kind[2] for kind in compiled.broken] == [odd.surrogate.code]
    assert "cannot be called by address" in compiled.broken[next(iter(compiled.broken))]
    torch.testing.assert_close(grads(other), expected[1])
    assert len(compiled.broken) == 1
    with use_path("compiled"):
        torch.testing.assert_close(grads(odd), expected[0])


@pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
def test_compiled_code_on_any_layout_and_size():
    """Rows may be anywhere, or all the same; layers may be of one neuron or none."""
    torch.manual_seed(0)
    neuron = LIF(
        0.8, 0.7, "subtract", reset_delay=True, surrogate=Atan(2.0), learn_beta=True, learn_threshold=True
    ).double()

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64) * 0.8 + 0.3

    def run(path, x, g):
        with use_path(path):
            s, u = neuron.forward_membrane(x)
            pulled = torch.autograd.grad([s, u], [x, neuron.beta, neuron.threshold], [g, g], retain_graph=True)
            with torch.no_grad():
                return s, u, *pulled, *torch.autograd.grad(s, [neuron.beta], g), neuron(x)

    for steps, shape in ((1, (1, 1)), (2, (1, 1)), (3, (2, 5)), (4, (3, 0)), (5, (2, 3, 4, 4)), (4, (4, 4))):
        whole = drawn(steps, *shape)
        layouts = [
            whole, whole[:1].expand_as(whole), drawn(steps, *shape, 2)[..., 0], drawn(2 * steps, *shape)[::2],
            drawn(*shape, steps).movedim(-1, 0), drawn(steps, 1, *shape[1:]).expand_as(whole),
        ]  # fmt: skip
        for x in layouts:
            x = x.detach().requires_grad_()
            for g in (
                torch.randn(x.shape),
                torch.randn(1, *shape).expand_as(x),
                torch.randn(*shape, steps).movedim(-1, 0),
            ):
                for found, wanted in zip(run("compiled", x, g.double()), run("eager", x, g.double()), strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    channels_last = (
        currents(3, 2 * 5, 4, 4).view(3, 2, 5, 4, 4).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    )
    vector = LIF(torch.rand(5), torch.rand(5) + 0.5, surrogate=Atan(2.0)).double()
    with use_path("compiled"):
        spikes = vector(channels_last)
    assert torch.equal(spikes, vector(channels_last.contiguous()))


@pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
def test_compiled_code_leaves_tensors_without_memory_to_eager_code(monkeypatch):
    """Or it would read what is not there: addresses tell nothing of modes, wrappers and tracing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(compiled, "_rest", {})
    neuron, x = LIF(0.9, 0.5), torch.rand(4, 2, 100)
    expected = neuron(x)
    with use_path("compiled"), torch.no_grad():
        with torch.device("meta"):  # where torch makes tensors that nobody placed
            assert torch.equal(neuron(x), expected)
        assert torch.equal(torch.func.functionalize(neuron)(x), expected)
        with pytest.raises(RuntimeError, match="vmap"):  # eager code cannot, either
            torch.func.vmap(neuron, 1, 1)(x.unsqueeze(2))
        assert torch.equal(neuron(torch._neg_view(-x)), expected)
        assert not neuron(torch._efficientzerotensor((4, 2, 100))).any()
        assert torch.equal(torch.jit.trace(neuron, x, check_trace=False)(x.flip(2)), expected.flip(2))
        assert torch.equal(make_fx(neuron)(x)(x.flip(2)), expected.flip(2))
        with FakeTensorMode() as mode:
            assert LIF(0.9, 0.5)(mode.from_tensor(x)).shape == x.shape


def test_use_path_for_a_block_or_for_good():
    before = paths.wanted()
    with use_path("reference"):
        assert LIF().path(torch.zeros(2, 1, 3)) == ("reference", "asked for")
        with use_path("eager"):
            assert LIF().path(torch.zeros(2, 1, 3)) == ("eager", "asked for")
            assert LIF(backend="reference").path(torch.zeros(2, 1, 3)).path == "reference"
        assert paths.wanted() == "reference"
    assert paths.wanted() == before
    use_path("eager")
    assert paths.wanted() == "eager"
    use_path(before)
    with pytest.raises(ValueError, match=r"unknown path 'fast'.*auto, reference, eager, compiled, triton"):
        use_path("fast")
    assert paths.wanted() == before


def test_paths_that_the_machine_does_not_offer():
    if not os.environ.get("TRITON_INTERPRET"):
        with use_path("triton"), pytest.raises(RuntimeError, match=r"triton.*not possible here"):
            LIF()(torch.zeros(2, 1, 3))


def test_environment_variable_and_imports():
    """The variable chooses; importing the neurons imports neither Triton nor torch's compiler."""
    code = (
        "import sys, torch; before = set(sys.modules); from sg_lightning.neurons import LIF; x = torch.zeros(2, 1, 3); "
        "new = set(sys.modules) - before; "
        "print(LIF().path(x).path, LIF()(x).sum().item(), *(name for name in ('triton', 'torch._inductor', 'torch._dynamo') if name in new))"
    )
    for value, expected in (("eager", "eager"), ("reference", "reference"), ("fast", None)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, paths.VARIABLE: value}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if expected is None:
            assert "unknown path 'fast' in the environment variable SG_LIGHTNING_NEURONS" in done.stderr
        else:
            assert done.stdout.split() == [expected, "0.0"]


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_ahead_without_contraction(capability):
    """For GPUs that are not here; contraction of multiply-add would show as fma, as it does for plain products."""
    pytest.importorskip("triton")
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sg_lightning.neurons import triton_kernels as kernels

def build(kernel, constants, types, **options):
    names = kernel.arg_names
    types = {{n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}}
    constants = {{(names.index(n),): value for n, value in constants.items()}}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options=dict(kernels.OPTIONS, **options))

numbers = dict.fromkeys(["steps", "size", "x_stride", "g_stride"], "i32")
forward = dict(RESET="subtract", LATE=True, EQUAL=False, KEEP=True, BETAS=True, THETAS=False, BLOCK=kernels.BLOCK, ROUNDED=True)
for half in ("*fp32", "*bf16"):
    built = build(kernels.forward_kernel, forward, dict(numbers, x=half, spikes=half))
    assert built.asm["cubin"] and "fma" not in built.asm["ptx"]
assert "fma" in build(kernels.forward_kernel, dict(forward, ROUNDED=False), numbers).asm["ptx"]
build(kernels.forward_kernel, dict(forward, size=1, steps=1), numbers)  # Triton makes 1 a constant
for make in kernels._RULES.items():
    name, a, b = make[1](make[0]())
    backward = dict(
        RESET="zero", LATE=False, ATTACHED=True, EQUAL=False, RULE=name, A=a, B=b, HAS_G=True, HAS_H=True, NEED_X=True,
        NEED_BETA=True, NEED_THETA=True, BETAS=False, THETAS=True, BLOCK=kernels.BLOCK,
    )
    assert build(kernels.backward_kernel, backward, dict(numbers, g="*bf16", dx="*bf16")).asm["cubin"]
build(kernels.backward_kernel, dict(backward, size=1, steps=1, g_stride=1), numbers)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "ptxas" in done.stderr and "not found" in done.stderr:
        pytest.skip("this Triton comes without ptxas")
    assert done.returncode == 0, done.stderr[-2000:]


def test_readout_keeps_one_membrane_for_backward():
    kept = []
    x = currents(20, 2, 30).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LeakyIntegrator(0.9)(x)
    assert sum(t.untyped_storage().nbytes() for t in kept if t.numel() > 1) <= x.numel() * 4


SEEN_THROUGH = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from torch._dynamo.backends.common import aot_autograd
from sg_lightning.neurons import LIF, operators, paths, triton_kernels, use_path
from sg_lightning.neurons.surrogates import Surrogate
from dataclasses import dataclass

class Driver:  # torch asks it for what the kernels write to
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
paths.without_triton = lambda device: ""
graphs = []

def look(graph, inputs):
    graphs.append(graph.graph)
    values = [node.meta["val"] if hasattr(node, "meta") else node for node in graph.graph.output_node().args[0]]
    return lambda *_: [v if not isinstance(v, torch.Tensor) else torch.zeros(v.shape, dtype=v.dtype) for v in values]

def traced(neuron):
    graphs.clear()
    torch._dynamo.reset()
    x = torch.rand(5, 3, 40, requires_grad=True)
    with use_path("triton"):
        fast = torch.compile(lambda x: neuron(2 * x) + 1, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
        fast(x).sum().backward()
    return graphs

found = [
    (set(node.kwargs["tensors_to_clone"]), node.kwargs["kwargs"], node.kwargs["grid"])
    for graph in traced(LIF(0.8, 0.9, learn_beta=True, learn_threshold=True)) for node in graph.nodes
    if "triton_kernel_wrapper_functional" in str(node.target)
]
assert [written for written, _, _ in found] == [{"spikes", "membranes"}, {"dx", "dbeta", "dtheta"}], found
assert not any("sg_lightning" in str(node.target) for graph in graphs for node in graph.nodes)
assert all(grid == [(1, 1, 1)] and kernel["size"] == 120 and kernel["steps"] == 5 for _, kernel, grid in found)

@dataclass(frozen=True)
class Mine(Surrogate):
    name = "mine"
    width: float = 1.0
    def derivative(self, z):
        return torch.ones_like(z)

names = [str(node.target) for graph in traced(LIF(0.8, surrogate=Mine())) for node in graph.nodes]
assert "sg_lightning.lif.default" in names and "sg_lightning.lif_backward.default" in names, names
"""


def test_a_compiler_sees_the_triton_kernels():
    """The graph that Inductor gets holds the kernels, knows what they write to, and no closed operator."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SEEN_THROUGH], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiled_code_refuses_what_it_would_read_beyond_the_end_of():
    dynamics, rule, x = LIF().dynamics, Atan(2.0), torch.zeros(4, 70)
    leak, short = torch.tensor(0.9), torch.full((69,), 0.9)
    for beta, theta in ((short, leak), (leak, short), (leak.double(), leak)):
        with pytest.raises(ValueError, match="a neuron on the CPU needs"):
            compiled.forward(x, beta, theta, dynamics, True)
    for g, h in ((x[:3], None), (None, x[:, :69]), (None, x.double())):
        with pytest.raises(ValueError, match="a neuron on the CPU needs"):
            compiled.backward(g, h, x, leak, leak, dynamics, rule, (True, False, False), torch.float32)
