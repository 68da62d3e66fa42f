"""Iterations of an attack captured in CUDA graphs: launched as one, where each kernel launched alone waits for Python."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sg_lightning.attacks.estimators import Memory

Body = Callable[[], None]
Record = Callable[[Callable[..., list[Tensor]], list[Tensor]], Body]
Key = tuple[Any, ...]

_PATIENCE = 2  # times that an iteration runs as it is before it is captured, which costs about four of them
_TOLERANCE = 1e-3  # of the largest value: how far a replay may be from the iteration as it is


class State:
    """The tensors in the attributes of some objects: all that an iteration reads and changes, but for the model's own.

    Attributes that hold a tensor, a dict of tensors or an estimator's memory count.

    Args:
        objects: Their numbers and names do not change: other numbers are another iteration.
        meters: Their numbers count what iterations cost.
    """

    def __init__(self, objects: Sequence[Any], meters: Sequence[Any]) -> None:
        self.objects, self.meters = objects, meters
        self._owners = [*objects, *meters]

    def tensors(self) -> dict[Key, Tensor]:
        """Return all tensors by owner and name."""
        found: dict[Key, Tensor] = {}
        for number, owner in enumerate(self._owners):
            for name, part in vars(owner).items():
                if isinstance(part, Tensor):
                    found[number, name] = part
                elif isinstance(part, dict | Memory):
                    values = part.values if isinstance(part, Memory) else part
                    found.update({(number, name, key): value for key, value in values.items()})
        return found

    def bind(self, tensors: dict[Key, Tensor]) -> None:
        """Put tensors in their places."""
        for key, tensor in tensors.items():
            owner, name = self._owners[key[0]], key[1]
            if len(key) == 2:
                setattr(owner, name, tensor)
            else:
                part = getattr(owner, name)
                (part.values if isinstance(part, Memory) else part)[key[2]] = tensor

    def fixed(self) -> Hashable:
        """Return what the code of an iteration may depend on beside the values of the tensors."""
        shapes = [(key, t.shape, t.dtype, t.device, t.stride()) for key, t in self.tensors().items()]
        plain = [
            (name, part) for owner in self.objects for name, part in vars(owner).items()
            if isinstance(part, int | float | str)
        ]  # fmt: skip
        return (*(type(owner) for owner in self.objects), *shapes, *plain)

    @property
    def costs(self) -> list[int]:
        """The numbers of the meters."""
        return [part for owner in self.meters for part in vars(owner).values() if isinstance(part, int)]

    @costs.setter
    def costs(self, values: Sequence[int]) -> None:
        left = list(values)
        for owner in self.meters:
            for name, part in vars(owner).items():
                if isinstance(part, int):
                    setattr(owner, name, left.pop(0))


@dataclass
class _Captured:
    """A captured iteration, which reads and writes ``places``, and what one costs."""

    places: dict[Key, Tensor]
    replay: Body
    costs: list[int]


class Graphs:
    """The captured iterations of one run of an attack, while which the model's weights stay where they are.

    Args:
        record: Captures a function of tensors, which may change them in place, and returns what runs it again on the same
            tensors and writes its results into them.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.replays = 0
        self.capturing = False
        self.failed = False
        self._seen: Counter[Hashable] = Counter()
        self._held: dict[Hashable, _Captured] = {}

    def run(self, body: Body, key: Hashable, state: State) -> None:
        """Run an iteration: the first times as it is, then captured.

        Args:
            body: The iteration.
            key: What its code depends on beside ``state``.
            state: What it reads and changes.
        """
        if self.failed:
            body()
            return
        key = (key, state.fixed())
        captured = self._held.get(key)
        if captured is not None:
            self._replay(captured, state)
        elif self._seen[key] < _PATIENCE:
            self._seen[key] += 1
            body()
        else:
            captured = self._capture(body, state)
            if captured is None:
                self.failed = True
            else:
                self._held[key] = captured

    def _replay(self, captured: _Captured, state: State) -> None:
        places, costs = captured.places, state.costs
        moved = {key: t for key, t in state.tensors().items() if t is not places[key]}
        # An attribute may still hold what lies in another's place, which is about to be overwritten.
        taken = {place.untyped_storage().data_ptr() for place in places.values()}
        moved = {key: t.clone() if t.untyped_storage().data_ptr() in taken else t for key, t in moved.items()}
        for key, t in moved.items():
            places[key].copy_(t)
        captured.replay()
        state.bind(places)
        state.costs = [held + more for held, more in zip(costs, captured.costs, strict=True)]
        self.replays += 1

    def _capture(self, body: Body, state: State) -> _Captured | None:
        """Run the iteration as it is, capture it, and keep that if its first replay finds the same."""
        before = {key: t.clone() for key, t in state.tensors().items()}
        costs = state.costs
        body()
        after, spent = {key: t.clone() for key, t in state.tensors().items()}, state.costs
        captured, problem = None, "its state has no fixed form"
        places: dict[Key, Tensor] = {}
        if after.keys() == before.keys():

            def pure(*inputs: Tensor) -> list[Tensor]:
                state.bind(dict(zip(places, inputs, strict=True)))
                body()
                known = {id(t): place for place, t in enumerate(inputs)}
                found = enumerate(state.tensors().values())
                return [t.clone() if known.get(id(t), place) != place else t for place, t in found]

            try:
                self.capturing = True
                places.update({key: t.clone() for key, t in before.items()})
                own = [b - a for a, b in zip(costs, spent, strict=True)]
                captured = _Captured(places, self.record(pure, list(places.values())), own)
                state.bind({key: t.clone() for key, t in before.items()})
                self._replay(captured, state)
                problem = _difference(places, after)
            except Exception as error:  # noqa: BLE001 - the iteration has been done; what reads values cannot be captured
                problem = str(error).split("\n")[0]
            finally:
                self.capturing = False
        if problem:
            warnings.warn(f"an attack goes on without CUDA graphs: {problem}", stacklevel=2)
            captured = None
        state.bind(after)
        state.costs = spent
        return captured


def recorder(wanted: bool, device: torch.device | None) -> Record | None:
    """Return what captures iterations on a device, if that is wanted.

    Raises:
        ValueError: if it is wanted and the device is no GPU with CUDA.
    """
    if wanted and (device is None or device.type != "cuda"):
        raise ValueError(
            f"cuda_graphs=True captures attacks on a GPU, but the model is on {device or 'no device'}: move it to 'cuda' "
            "(Trainer(accelerator='gpu')), or leave cuda_graphs out"
        )
    return cuda_graph if wanted else None


def _difference(found: dict[Key, Tensor], expected: dict[Key, Tensor]) -> str:
    """Say where a replay went wrong, or nothing."""
    for key, t in expected.items():
        one, two = found[key].double(), t.double()
        scale = float(two[torch.isfinite(two)].abs().amax()) if bool(torch.isfinite(two).any()) else 0.0
        if not torch.allclose(one, two, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True):
            return f"a replay differs from the iteration as it is in {key[1]!r}"
    return ""


def cuda_graph(function: Callable[..., list[Tensor]], places: list[Tensor]) -> Body:
    """Capture a function in a CUDA graph; see :class:`Graphs`."""
    with torch.cuda.device(places[0].device):
        return _captured(function, places)


def _captured(function: Callable[..., list[Tensor]], places: list[Tensor]) -> Body:
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    mode = torch.cuda.get_sync_debug_mode()
    stream.wait_stream(before)
    try:
        # What is set up once, such as the workspaces of libraries, is set up outside the graph; and a capture that fails
        # leaves torch in a bad state, so what reads values is found here.
        _watch_host(2)
        with torch.cuda.stream(stream):
            function(*places)
    finally:
        _watch_host(mode)
        before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as those that load data, may go on calling CUDA.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for place, found in zip(places, function(*places), strict=True):
                if found is not place:
                    place.copy_(found)
    finally:
        torch.cuda.set_stream(before)  # which a failed capture does not do
    return graph.replay


def _watch_host(mode: int) -> None:
    """Set what happens when the GPU has to wait for the host: 2 is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
