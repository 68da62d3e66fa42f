import ctypes
import logging

import pytest
import torch

from sg_lightning.neurons import inductor, paths
from sg_lightning.neurons.inductor import Compiled, Kind

pytestmark = pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
FACTOR = 1.7
KINDS = [Kind(torch.float32), Kind(torch.bfloat16), Kind(torch.float32, True), Kind(torch.float32), Kind(torch.float32)]


def made():
    factor = FACTOR

    def body(x, unused, leak, state, out):
        total = leak * state + factor * x
        out.copy_(total)

    return body


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


def checked(compiled, size):
    """Call it on parts of larger tensors, each run on what the one before left, and compare with eager code."""
    body = made()
    x, out = torch.randn(5, size), torch.full((5, size), torch.nan)
    unused, leak, state = torch.zeros(size, dtype=torch.bfloat16), torch.tensor(0.5), torch.randn(size)
    at = [row.data_ptr() for row in out]
    columns = [
        [row.data_ptr() for row in x[1:4]], unused.data_ptr(), leak.data_ptr(), [state.data_ptr(), *at[2:4]], at[2:5],
    ]  # fmt: skip
    compiled(size, columns)
    expected = torch.empty_like(out)
    for t, before in ((1, state), (2, expected[2]), (3, expected[3])):
        body(x[t], unused, leak, before, expected[t + 1])
    torch.testing.assert_close(out[2:], expected[2:])
    assert bool(out[:2].isnan().all())


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_go_straight_to_the_kernel_for_all_sizes(threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = Compiled(made(), KINDS, "test")
        assert compiled.direct
        monkeypatch.setattr(compiled, "_guarded", None)
        for size in (0, 1, 5, 64, 257, 100_003):
            checked(compiled, size)
        with pytest.raises(ValueError, match="several lengths"):
            compiled(4, [[1, 2], 3, 4, [5], [6, 7]])
    finally:
        torch.set_num_threads(before)


def test_it_is_made_under_inference_mode_and_called_outside():
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        compiled = Compiled(made(), KINDS, "test")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert compiled.direct
    checked(compiled, 100)


def guarded(caplog, why):
    with caplog.at_level(logging.INFO):
        compiled = Compiled(made(), KINDS, "test")
    assert not compiled.direct
    assert f"keeps the guards of torch.compile: {why}" in caplog.text
    for size in (0, 2, 100, 257):
        checked(compiled, size)


def test_a_kernel_that_cannot_be_found_is_called_through_torch_compile(caplog, monkeypatch):
    monkeypatch.setattr(inductor, "_is_kernel", lambda value: False)
    guarded(caplog, "it was made of 0 kernels")


def test_code_for_one_size_keeps_the_guards(caplog, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, **settings: compile(body, **{**settings, "dynamic": False}))
    guarded(caplog, "it is for one size only")


def test_a_bit_that_differs_keeps_the_guards(caplog, monkeypatch):
    class Off:
        def __init__(self, path):
            self.kernel = ctypes.PyDLL(path)["kernel"]

        def __getitem__(self, name):
            def called(*args):
                self.kernel(*(ctypes.c_void_p(a) for a in args[:-1]), ctypes.c_int64(args[-1] - 1))  # all but the last

            return called

    monkeypatch.setattr(inductor.ctypes, "CDLL", Off)
    guarded(caplog, "its results differ")


def test_a_backend_that_fails_is_replaced_by_torchs(caplog, monkeypatch):
    def fails(self, graph, examples):
        raise TypeError("compile_fx() got an unexpected keyword argument 'inner_compile'")

    monkeypatch.setattr(Compiled, "_backend", fails)
    guarded(caplog, "it was made of 0 pieces")


def test_a_fault_of_the_function_comes_up(monkeypatch):
    def body(x, out):
        out.copy_(x.nonsense())

    with pytest.raises(Exception, match="nonsense"):
        Compiled(body, [Kind(torch.float32)] * 2, "test")
