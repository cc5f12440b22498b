"""Files in MNIST's IDX format, from a folder or from the copy in the package."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.system.errors import UserError

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""MNIST's four files and the MD5 of their unpacked bytes, as published with the database."""

MAX_BYTES = 2**30
"""The most bytes read from a file, whatever its header says: 1.3 million images of 28x28 pixels."""


def find_idx(folders: Sequence[Path], name: str) -> Path | None:
    """Return the file with this name, raw or with ``.gz``, from the first folder that has it, or None."""
    paths = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((path for path in paths if path.is_file()), None)


def read_idx(path: Path, header_only: bool = False) -> NDArray[np.uint8]:
    """Read an IDX file of images or labels, raw or gzipped.

    Args:
        path: The file; ``images`` or ``labels`` in its name says which of them it must hold.
        header_only: Whether to read only the header.

    Returns:
        The array of :func:`parse_idx`; with ``header_only``, zeros of the shape in the header, which take no memory.

    Raises:
        UserError: If the file is damaged or not an IDX file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(16)
            shape = _shape(header, path.name)
            if header_only:
                return np.broadcast_to(np.uint8(0), shape)
            file.seek(0)  # read no more than the header says: a small .gz may hold any amount
            return parse_idx(file.read(min(16 + int(np.prod(shape, dtype=object)) + 1, MAX_BYTES)), path.name)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged or not an IDX file: {error}. Copy it again, or use another --data.data_dir (null: the "
            "package's own copy)"
        ) from error


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """Read the content of an IDX file, the format of http://yann.lecun.com/exdb/mnist.

    Args:
        content: The whole file, uncompressed.
        name: Name of the file; ``images`` or ``labels`` in the name says which of them it must hold.

    Returns:
        A writable uint8 array: images of shape (n, height, width), or labels of shape (n,).

    Raises:
        ValueError: If the content is damaged or does not match the name.
    """
    shape = _shape(content, name)
    header_size = 4 + 4 * len(shape)
    expected = header_size + int(np.prod(shape, dtype=object))
    if len(content) != expected or 0 in shape:
        found = "more" if len(content) > expected else len(content)
        raise ValueError(
            f"its header says {'x'.join(map(str, shape))} values, {expected} bytes in all, but it has {found}"
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=header_size).reshape(shape)


def _shape(content: bytes, name: str) -> tuple[int, ...]:
    kind, dimensions = ("images", 3) if "images" in name else ("labels", 1)
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"{len(content)} bytes are too few for an IDX header")
    magic, *shape = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
    if magic != 0x800 + dimensions:  # 08 for unsigned bytes, then the number of dimensions
        raise ValueError(f"magic number {magic:#010x} is not {0x800 + dimensions:#010x}, that of {kind}")
    return tuple(shape)


def embedded(name: str) -> bytes:
    """Return one of the package's own files, unpacked."""
    return gzip.decompress((Path(__file__).parent / "mnist" / f"{name}.gz").read_bytes())
