"""Data files: download with a checksum, unpack, and read the original formats of MNIST and CIFAR."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class RemoteFile:
    """A file to download: where from, and the MD5 sum of its content."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rsplit("/", 1)[-1]


def download(file: RemoteFile, folder: Path) -> Path:
    """Download a file unless it is there, with a progress bar; a file that is there is complete.

    Raises:
        OSError: without network or a writable folder.
        ValueError: if the content is not the expected one.
    """
    path = folder / file.name
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(part), progress=True)
        digest = _md5(part)
        if digest != file.md5:
            raise ValueError(
                f"{file.url} gave a file with MD5 {digest} instead of {file.md5}: the download was damaged or the file "
                f"replaced; try again later, or put a good copy at {path}"
            )
        part.replace(path)
    except (URLError, OSError) as error:
        raise OSError(
            f"cannot download {file.url} ({getattr(error, 'reason', error)}); check the network, or download it "
            f"elsewhere and put it at {path}"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path) -> Path:
    """Unpack ``name.zip`` or ``name.gz`` beside it to ``name``, unless that is there; what is there is complete.

    Raises:
        OSError: if there is no room.
        ValueError: naming the file, if it is truncated, damaged or lacks ``name``.
    """
    target = archive.with_suffix("")
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    try:
        with ExitStack() as stack:
            source: Any
            if archive.suffix == ".zip":
                inside = stack.enter_context(zipfile.ZipFile(archive))
                names = [name for name in inside.namelist() if name.rsplit("/", 1)[-1] == target.name]
                if not names:
                    raise _damaged(archive, f"it lacks {target.name}")
                source = stack.enter_context(inside.open(names[0]))
            else:
                source = gzip.open(archive)  # noqa: SIM115 - the stack closes it
                stack.callback(source.close)
            shutil.copyfileobj(source, stack.enter_context(part.open("wb")), 1 << 20)
        part.replace(target)
    except (EOFError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(archive, f"its compression is broken: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Read an IDX file of bytes, gzipped or not, with so many dimensions.

    Raises:
        ValueError: naming the file, if it is truncated, damaged or something else.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"its compression is broken: {error}") from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, 8, dimensions)):
        raise _damaged(path, f"it does not start like an IDX file of bytes with {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) - head != int(np.prod(shape)):
        raise _damaged(
            path, f"its header promises {int(np.prod(shape))} values of shape {shape}, it holds {len(data) - head}"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_cifar(source: Path, names: tuple[str, ...], label: str) -> tuple[Bytes, Bytes]:
    """Read batches of CIFAR's Python version, from its archive or from the folder that it unpacks to.

    Args:
        source: ``cifar-10-python.tar.gz`` or ``cifar-10-batches-py``.
        names: Names of the batch files, e.g. ``data_batch_1``.
        label: Key of the labels, e.g. ``labels``.

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        ValueError: naming the file, if it is truncated, damaged or something else.
    """
    blobs = {name: (source / name).read_bytes() for name in names} if source.is_dir() else _unpack(source, names)
    images, labels = [], []
    for name, blob in blobs.items():
        where = source / name
        try:
            content = _PlainUnpickler(io.BytesIO(blob), encoding="bytes").load()
            data, y = np.asarray(content[b"data"]), np.asarray(content[label.encode()])
        except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _damaged(where, f"it is no CIFAR batch: {error!r}") from error
        if data.dtype != np.uint8 or data.shape != (len(y), 3072):
            raise _damaged(where, f"expected uint8 data of shape ({len(y)}, 3072), got {data.dtype} {data.shape}")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(y.astype(np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def _unpack(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                file = tar.extractfile(member) if name in names else None
                if file is not None:
                    blobs[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(archive, f"its archive is broken: {error}") from error
    missing = [name for name in names if name not in blobs]
    if missing:
        raise _damaged(archive, f"it lacks {', '.join(missing)}")
    return {name: blobs[name] for name in names}


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain values only: a pickle from elsewhere may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        # A batch written again by Python 3 holds empty names as bytes().
        known = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("__builtin__", "bytes")}
        if (module, name) in known:
            return super().find_class(module, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no CIFAR batch does")


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} cannot be read: {why}; delete it to download it again")
