"""Write recordings in the original formats, byte for byte."""

import io
import struct
import zipfile

import numpy as np

RNG = np.random.default_rng(0)


def random_events(count, height, width, duration=300_000, rng=RNG):
    """Return columns, rows, polarities and times of some events."""
    x, y, p = (rng.integers(0, high, count) for high in (width, height, 2))
    return x, y, p, np.sort(rng.integers(0, duration, count))


def bin_bytes(x, y, p, t):
    """Five bytes an event; a time of 8,192 us and more past the last needs rows of 240 in between (not made here)."""
    return b"".join(
        bytes((a, b, c << 7 | d >> 16, d >> 8 & 255, d & 255)) for a, b, c, d in zip(x, y, p, t, strict=True)
    )


def aedat2_bytes(x, y, p, t):
    """Lines of comment, then eight bytes an event; the camera of CIFAR10-DVS lay on its side, 0 is brighter."""
    head = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# created by hand\r\n"
    words = [((127 - a) << 8 | (127 - b) << 1 | 1 - c, d) for a, b, c, d in zip(x, y, p, t, strict=True)]
    return head + b"".join(struct.pack(">II", int(a), int(d)) for a, d in words), len(head)


def npy_bytes(x, y, p, t):
    """What tonic's copy of DVS Gesture holds: one row an event, times in milliseconds."""
    file = io.BytesIO()
    np.save(file, np.stack([x, y, p, np.asarray(t) // 1000], axis=1).astype(np.int32))
    return file.getvalue()


def aedat4_bytes(x, y, p, t):
    """One packet of events, uncompressed, with the FlatBuffers that AEDAT 4 prescribes written out by hand.

    A table of one field is: size of what follows, offset of the root table, vtable (its size, the table's size, the place
    of each field), the table (distance back to the vtable, its fields).
    """
    info = (
        b'<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">'
        b'<node name="0" path="/mainloop/Recorder/outInfo/0/"><attr key="compression" type="string">NONE</attr>'
        b'<attr key="originalModuleName" type="string">capture</attr>'
        b'<attr key="originalOutputName" type="string">events</attr>'
        b'<attr key="typeDescription" type="string">Array of events (polarity ON/OFF).</attr>'
        b'<attr key="typeIdentifier" type="string">EVTS</attr>'
        b'<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">128</attr>'
        b'<attr key="sizeY" type="int">128</attr><attr key="source" type="string">DVS</attr></node></node></node></dv>'
    )
    # IOHeader: compression (int32), dataTablePosition (int64), infoNode (string).
    vtable = struct.pack("<5H", 10, 24, 20, 8, 4)
    text = struct.pack("<I", len(info)) + info + b"\0"
    table_at = 8 + 4 + 12  # identifier after the root offset, then the padded vtable
    table = struct.pack("<iiqii", table_at - 12, 24 - 4, -1, 0, 0)
    header = struct.pack("<I", table_at) + b"IOHE" + b"\0" * 4 + vtable + b"\0\0" + table + text
    header = struct.pack("<I", len(header)) + header
    # EventPacket: a vector of structs of 16 bytes.
    events = b"".join(struct.pack("<qhhB3x", *map(int, row)) for row in zip(t, x, y, p, strict=True))
    vtable = struct.pack("<3H", 6, 8, 4) + b"\0\0"
    packet = struct.pack("<I", 16) + b"EVTS" + vtable + struct.pack("<iI", 8, 8)
    packet += struct.pack("<I", 0) + struct.pack("<I", len(t)) + events
    packet = struct.pack("<I", len(packet)) + packet
    return b"#!AER-DAT4.0\r\n" + header + struct.pack("<II", 0, len(packet)) + packet


def zipped(files):
    """Return a zip archive of files by path."""
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return blob.getvalue()


def put(folder, files):
    """Write files by path."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
