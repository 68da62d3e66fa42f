"""Read recordings of event cameras from their original files; errors name the file and the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sg_lightning._optional import require
from sg_lightning.datamodules.slicing import Events

Integers = NDArray[np.int64]
_OVERFLOW_ROW = 240  # .bin files: no event, time goes on
_OVERFLOW_TIME = 1 << 13


def read_bin(path: Path, height: int, width: int) -> Events:
    """Read a recording of N-MNIST or N-Caltech101: 40 bits an event.

    Column and row take 8 bits each, polarity 1, the time in microseconds 23. Row 240 is no pixel: all times after it
    are later by 8,192.

    Args:
        path: The ``.bin`` file.
        height: Rows of the sensor.
        width: Columns of the sensor.

    Raises:
        ValueError: naming file and byte, if it is empty or truncated, an event lies outside the sensor, or time runs
            backwards.

    Source:
        Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using saccades", 2015, and the
        description of the format that comes with the data.
    """
    data = path.read_bytes()
    _check_whole(path, len(data), 0, 5)
    raw = np.frombuffer(data, np.uint8).reshape(-1, 5).astype(np.int64)
    t = (raw[:, 2] & 127) << 16 | raw[:, 3] << 8 | raw[:, 4]
    overflow = raw[:, 1] == _OVERFLOW_ROW
    t += overflow.cumsum() * _OVERFLOW_TIME
    real = (~overflow).nonzero()[0]
    events = Events(raw[real, 0], raw[real, 1], raw[real, 2] >> 7, t[real])
    return _checked(path, events, height, width, lambda k: f"byte {5 * real[k]}")


def read_aedat2(path: Path, height: int = 128, width: int = 128) -> Events:
    """Read a recording of CIFAR10-DVS: AEDAT 2.0 of a DVS128 camera, 64 bits an event after lines that start with #.

    The address (big-endian) has column, row and polarity in bits 1-7, 8-14 and 0, counted from the right and from the
    bottom, 0 for brighter; the camera lay on its side. An address with bit 15 is a signal of the camera and left out.
    The time is in microseconds.

    Args:
        path: The ``.aedat`` file.
        height: Rows of the sensor.
        width: Columns of the sensor.

    Raises:
        ValueError: naming file and byte, if it is something else, empty or truncated, an event lies outside the sensor,
            or time runs backwards.

    Source:
        Li et al., "CIFAR10-DVS: an event-stream dataset for object classification", 2017; iniVation's description of
        AEDAT 2.0; the orientation is that of the authors' own reader (dat2mat.m).
    """
    data = path.read_bytes()
    if len(data) == 0:
        raise _damaged(path, "byte 0", "it is empty")
    if not data.startswith(b"#!AER-DAT2"):
        raise _damaged(path, "byte 0", f"AEDAT 2.0 starts with #!AER-DAT2.0, this with {data[:12]!r}")
    start = 0
    while data[start : start + 1] == b"#":
        line = data.find(b"\n", start)
        start = line + 1 if line >= 0 else len(data)
    _check_whole(path, len(data), start, 8)
    raw = np.frombuffer(data, ">u4", offset=start).reshape(-1, 2).astype(np.int64)
    real = (raw[:, 0] & 0x8000 == 0).nonzero()[0]
    address = raw[real, 0]
    wrong = (address > 0x7FFF).nonzero()[0]
    if len(wrong):
        k = wrong[0]
        raise _damaged(path, f"byte {start + 8 * real[k]}", f"address {address[k]:#x} is no pixel of a DVS128")
    column, row = address >> 1 & 127, address >> 8
    events = Events(127 - row, 127 - column, 1 - (address & 1), raw[real, 1])
    return _checked(path, events, height, width, lambda k: f"byte {start + 8 * real[k]}")


def read_aedat4(path: Path, height: int = 128, width: int = 128) -> Events:
    """Read a recording of CIFAR10-DVS as tonic downloads it: AEDAT 4, through the package ``aedat``.

    Args:
        path: The ``.aedat4`` file.
        height: Rows of the sensor.
        width: Columns of the sensor.

    Raises:
        ValueError: naming file and event, if it is something else, empty or truncated, an event lies outside the sensor,
            or time runs backwards.
        ImportError: without the package.
    """
    aedat = require("aedat", "events", "reading AEDAT 4 files")
    try:
        packets = [packet["events"] for packet in aedat.Decoder(str(path)) if "events" in packet]
    except Exception as error:  # the package's own exceptions have no common class
        raise _damaged(path, f"of {path.stat().st_size} bytes", f"it is no whole AEDAT 4 file ({error})") from error
    if not packets:
        raise _damaged(path, f"of {path.stat().st_size} bytes", "it holds no events")
    raw = np.concatenate(packets)
    events = Events(*(raw[name].astype(np.int64) for name in ("x", "y", "on", "t")))
    return _checked(path, events, height, width, lambda k: f"event {k}")


def read_npy(path: Path, height: int = 128, width: int = 128) -> Events:
    """Read one labelled interval of DVS Gesture as tonic downloads it: an array (E, 4) of x, y, polarity, milliseconds.

    Args:
        path: The ``.npy`` file.
        height: Rows of the sensor.
        width: Columns of the sensor.

    Raises:
        ValueError: naming file and byte, if it is something else, empty or truncated, an event lies outside the sensor,
            or time runs backwards.
    """
    try:
        raw = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(path, f"of {path.stat().st_size} bytes", f"it is no whole .npy file ({error})") from error
    if raw.ndim != 2 or raw.shape[1] != 4 or raw.dtype.kind not in "iuf" or len(raw) == 0:
        raise _damaged(
            path, f"of {path.stat().st_size} bytes", f"expected numbers (E, 4) with E > 0, got {raw.dtype} {raw.shape}"
        )
    stride = raw.strides[0]
    where: Callable[[int], str] = lambda k: f"byte {raw.offset + stride * k}"
    x, y, p, t = np.asarray(raw).T.astype(np.int64)
    return _checked(path, Events(x, y, p, t * 1000), height, width, where)


def _check_whole(path: Path, size: int, start: int, width: int) -> None:
    """Raise ``ValueError`` if what follows ``start`` is not a positive number of events of ``width`` bytes."""
    if size == start:
        raise _damaged(path, f"byte {start}", "it is empty" if start == 0 else "no event follows its header")
    left = (size - start) % width
    if left:
        raise _damaged(path, f"byte {size - left}", f"it is truncated, its last event has {left} of {width} bytes")


def _checked(path: Path, events: Events, height: int, width: int, where: Callable[[int], str]) -> Events:
    if len(events) == 0:
        raise _damaged(path, f"of {path.stat().st_size} bytes", "it holds no events")
    outside = (events.x < 0) | (events.x >= width) | (events.y < 0) | (events.y >= height)
    for wrong, why in (
        (outside, "the event at x={x}, y={y} lies outside the sensor of {height} x {width} pixels (height x width)"),
        ((events.p < 0) | (events.p > 1), "the polarity {p} is neither 0 nor 1"),
        (np.diff(events.t, prepend=events.t[:1]) < 0, "time runs backwards, to {t} us"),
    ):
        if wrong.any():
            k = int(wrong.argmax())
            values = {name: int(getattr(events, name)[k]) for name in "xypt"}
            raise _damaged(path, where(k), why.format(**values, height=height, width=width))
    return events


def _damaged(path: Path, where: str, why: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read, {where}: {why}; put a good copy in its place, or remove it to leave the recording out"
    )
