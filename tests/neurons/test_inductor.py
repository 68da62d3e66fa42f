import logging

import pytest
import torch

from sg_lightning.neurons import inductor, paths
from sg_lightning.neurons.inductor import Compiled

pytestmark = pytest.mark.skipif(not paths.has_compiler(), reason="needs a C++ compiler")
ARGUMENTS = {"steps": 3, "factor": 1.7}


def made():
    steps, factor = ARGUMENTS["steps"], ARGUMENTS["factor"]

    def body(x, extra, leak, rows):
        total = torch.zeros_like(x[0])
        for t in range(steps):
            total = leak * total + factor * x[t]
            if extra is not None:
                total = total + extra[t]
            rows[t].copy_(total)
        return total, None, total.square()

    return body


def checked(compiled, size, *, extra=False):
    """Call it on parts of larger tensors and compare with the same arithmetic in eager code."""
    body = made()
    whole = torch.randn(5, size)
    x, more = whole[1:4], torch.randn(4, size)[1:] if extra else None
    out = torch.full((5, size), torch.nan)
    rows, expected_rows = list(out[2:].unbind(0)), list(torch.empty(3, size).unbind(0))
    leak = torch.tensor(0.5)
    found = compiled(size, x, more, leak, rows)
    expected = body(x, more, leak, expected_rows)
    assert found[1] is None
    for a, b in zip((found[0], found[2], *rows), (expected[0], expected[2], *expected_rows), strict=True):
        torch.testing.assert_close(a, b)
    assert bool(out[:2].isnan().all())


@pytest.mark.parametrize(("extra", "part"), [(False, 65_536), (True, 65_536), (True, 70)])
def test_calls_go_straight_to_the_code_for_all_sizes(extra, part, monkeypatch):
    """Also where the first call, which compiles, was made in copies of a part."""
    monkeypatch.setattr(inductor, "_PART", part)
    torch._dynamo.reset()
    compiled = Compiled(made(), "test")
    checked(compiled, 100, extra=extra)
    assert compiled.direct
    calls = []
    code = compiled._code
    compiled._code = lambda inputs: calls.append(1) or code(inputs)
    for size in (100, 257, 64, 1000):
        checked(compiled, size, extra=extra)
    assert len(calls) == 4


def test_code_that_cannot_be_reached_is_called_through_torch_compile(caplog):
    torch._dynamo.reset()
    compiled = Compiled(made(), "test")
    compiled._guarded = torch.compile(made(), fullgraph=True, dynamic=True)  # says nothing of what it makes
    with caplog.at_level(logging.INFO):
        checked(compiled, 100)
    assert not compiled.direct
    assert "keeps the guards of torch.compile: it was made of 0 pieces" in caplog.text
    checked(compiled, 257)


def test_a_backend_that_fails_is_replaced_by_torchs(monkeypatch):
    torch._dynamo.reset()

    def fails(self, graph, examples):
        raise TypeError("compile_fx() got an unexpected keyword argument 'inner_compile'")

    monkeypatch.setattr(Compiled, "_backend", fails)
    compiled = Compiled(made(), "test")
    checked(compiled, 100)
    assert not compiled.direct
    checked(compiled, 257)


def test_a_bit_that_differs_keeps_the_guards(monkeypatch):
    torch._dynamo.reset()
    arrange = Compiled._arrange

    def off(self, size, args, found):
        arrange(self, size, args, found)
        code = self._code
        self._code = lambda inputs: [t.nextafter(torch.tensor(torch.inf)) for t in code(inputs)]

    monkeypatch.setattr(Compiled, "_arrange", off)
    compiled = Compiled(made(), "test")
    checked(compiled, 100)
    assert not compiled.direct
    checked(compiled, 257)
