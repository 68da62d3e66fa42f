"""Recordings of event cameras, whole and damaged ones, from bytes in the exact original formats."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from sg_lightning.datamodules.event_files import read_aedat2, read_aedat4, read_bin, read_npy

SPEC = importlib.util.spec_from_file_location("event_writers", Path(__file__).with_name("event_writers.py"))
write = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write)

MAKE = {
    read_bin: write.bin_bytes,
    read_aedat2: lambda *events: write.aedat2_bytes(*events)[0],
    read_aedat4: write.aedat4_bytes,
    read_npy: write.npy_bytes,
}
SIDE = {read_bin: 34, read_aedat2: 128, read_aedat4: 128, read_npy: 128}
READERS = pytest.mark.parametrize("read", list(MAKE), ids=lambda read: read.__name__)


def read_as(read, path):
    return read(path, SIDE[read], SIDE[read])


def made(read, path, count=40, change=None):
    x, y, p, t = write.random_events(count, SIDE[read], SIDE[read])
    if read is read_npy:
        t = t // 1000 * 1000
    if change:
        change(x, y, p, t)
    path.write_bytes(MAKE[read](x, y, p, t))
    return x, y, p, t


def where(path, read, event):
    """Return what an error says of the place of an event."""
    if read is read_bin:
        return f"byte {5 * event}"
    if read is read_aedat2:
        return f"byte {write.aedat2_bytes(*[[]] * 4)[1] + 8 * event}"
    if read is read_npy:
        return f"byte {path.stat().st_size - 16 * (40 - event)}"
    return f"event {event}"


@READERS
def test_events_come_back(tmp_path, read):
    path = tmp_path / "recording"
    wanted = made(read, path)
    found = read_as(read, path)
    for name, values in zip("xypt", wanted, strict=True):
        assert getattr(found, name).tolist() == values.tolist(), name
    assert len(found) == 40


@READERS
def test_an_empty_file_is_named(tmp_path, read):
    path = tmp_path / "recording"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path} cannot be read, .*byte.*leave the recording out"):
        read_as(read, path)


@READERS
@pytest.mark.parametrize("cut", [1, 3])
def test_a_truncated_file_is_named(tmp_path, read, cut):
    path = tmp_path / "recording"
    made(read, path)
    path.write_bytes(path.read_bytes()[:-cut])
    place = {read_bin: "byte 195: ", read_aedat2: where(path, read_aedat2, 39)}.get(read, "bytes: ")
    with pytest.raises(ValueError, match=rf"{path} cannot be read, .*{place}"):
        read_as(read, path)


@pytest.mark.parametrize("read", [read_bin, read_aedat4, read_npy])  # the seven bits of AEDAT 2.0 hold no pixel outside
@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_event_outside_the_sensor_is_named(tmp_path, read, axis):
    path = tmp_path / "recording"

    def move(x, y, p, t):
        (x if axis == "x" else y)[7] = SIDE[read]

    x, y, *_ = made(read, path, change=move)
    wanted = f"{where(path, read, 7)}: the event at x={x[7]}, y={y[7]} lies outside the sensor of {SIDE[read]} x"
    with pytest.raises(ValueError, match=wanted):
        read_as(read, path)


@READERS
def test_time_that_runs_backwards_is_named(tmp_path, read):
    path = tmp_path / "recording"

    def jump(x, y, p, t):
        t[11:] = np.sort(t[11:])
        t[10] = t[11] + 5000

    *_, t = made(read, path, change=jump)
    with pytest.raises(ValueError, match=rf"{where(path, read, 11)}: time runs backwards, to {t[11]} us"):
        read_as(read, path)


def test_row_240_moves_the_clock_and_is_no_event(tmp_path):
    path = tmp_path / "a.bin"
    tick = write.bin_bytes([0], [240], [0], [0])
    path.write_bytes(
        write.bin_bytes([1], [2], [1], [8000]) + tick + write.bin_bytes([3], [4], [0], [100]) + tick * 2
        + write.bin_bytes([5], [6], [1], [7])
    )  # fmt: skip
    events = read_bin(path, 34, 34)
    assert events.t.tolist() == [8000, 100 + 8192, 7 + 3 * 8192]
    assert events.x.tolist() == [1, 3, 5]
    path.write_bytes(path.read_bytes() + write.bin_bytes([40], [6], [1], [8]))
    with pytest.raises(ValueError, match="byte 30: the event at x=40"):
        read_bin(path, 34, 34)
    path.write_bytes(tick)
    with pytest.raises(ValueError, match="of 5 bytes: it holds no events"):
        read_bin(path, 34, 34)


def test_addresses_of_aedat2(tmp_path):
    path = tmp_path / "a.aedat"
    blob, start = write.aedat2_bytes([3], [5], [1], [9])
    signal = (0x8000).to_bytes(4, "big") + (10).to_bytes(4, "big")
    path.write_bytes(blob + signal)
    assert len(read_aedat2(path)) == 1  # a signal is no event
    path.write_bytes(blob + signal + (0x10002).to_bytes(4, "big") + (11).to_bytes(4, "big"))
    with pytest.raises(ValueError, match=f"byte {start + 16}: address 0x10002 is no pixel"):
        read_aedat2(path)
    path.write_bytes(blob[:start])
    with pytest.raises(ValueError, match=f"byte {start}: no event follows its header"):
        read_aedat2(path)
    path.write_bytes(b"#!AER-DAT3.1\r\n" + blob)
    with pytest.raises(
        ValueError, match=re.escape("byte 0: AEDAT 2.0 starts with #!AER-DAT2.0, this with b'#!AER-DAT3.1'")
    ):
        read_aedat2(path)


def test_other_arrays_are_no_gestures(tmp_path):
    path = tmp_path / "0.npy"
    for array in (np.zeros((3, 5)), np.zeros((0, 4)), np.zeros((3, 4), bool)):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"expected numbers \(E, 4\) with E > 0"):
            read_npy(path)
    np.save(path, np.array([[1, 2, 2, 0]]))
    with pytest.raises(ValueError, match="byte 128: the polarity 2 is neither 0 nor 1"):
        read_npy(path)


def test_tonic_reads_the_same(tmp_path):
    io = pytest.importorskip("tonic.io")
    path = tmp_path / "a.bin"
    x, y, p, t = write.random_events(300, 34, 34, 8000)
    tick = write.bin_bytes([0], [240], [0], [0])
    path.write_bytes(write.bin_bytes(x, y, p, t) + tick + write.bin_bytes(x, y, p, t))
    theirs, ours = io.read_mnist_file(str(path), io.events_struct), read_bin(path, 34, 34)
    assert len(theirs) == len(ours) == 600
    for name in "xypt":
        assert np.array_equal(theirs[name], getattr(ours, name))
    path = tmp_path / "a.aedat4"
    path.write_bytes(write.aedat4_bytes(x, y, p, t))
    theirs, ours = io.read_aedat4(str(path)), read_aedat4(path)
    for name, column in zip(("x", "y", "on", "t"), (ours.x, ours.y, ours.p, ours.t), strict=True):
        assert np.array_equal(theirs[name], column)
