"""The IDX format of arrays, in which MNIST is published.

    bytes 0-1   zero
    byte  2     type: 08 uint8, 09 int8, 0B int16, 0C int32, 0D float32, 0E float64
    byte  3     number of dimensions, n
    then        n sizes, each a big-endian uint32
    then        the elements, big-endian, the last axis fastest; and nothing after them

The file may be gzipped.

Source: Y. LeCun, C. Cortes & C. J. C. Burges, http://yann.lecun.com/exdb/mnist/, end of the page.
"""

import contextlib
import errno
import gzip
import io
import math
import os
import pathlib
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file, gzipped or not: the content decides, not the name.

    As with gzip itself, zero bytes may pad the end of a gzipped file. A header that declares more
    data than the file has takes no memory.

    Args:
      path: the file.

    Returns:
      A writable array [...] of the file's type in native byte order. A file without dimensions
      gives an array of shape [].

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, cut off, too long, not IDX, damaged (as far as gzip's checksum
        or the sizes show it, because plain IDX has no checksum), or a pipe or a device, which might
        never end.
    """
    path = pathlib.Path(path)
    with open(path, "rb", opener=_without_waiting) as raw:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(
                f"{path}: expected a file on a disk, got a pipe or a device; copy its bytes into "
                "a file first"
            )
        size = status.st_size
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not gzipped:
            return _parse(raw, size, path)
        try:
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                return _parse(unpacked, size * _DEFLATE_RATIO, path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _bad(
                path, "a whole gzip stream", f"{size:,} bytes that do not unpack ({error})"
            ) from error


def write_idx(path: str | os.PathLike[str], array: Any) -> None:
    """Write an array as an IDX file, gzipped if the name ends in `.gz`.

    The file appears whole or not at all, and a file that it replaces stays until then. Equal arrays
    give equal bytes (gzip's time stamp is 0; the compressed size depends on the zlib in use).

    Args:
      path: the file.
      array: an array [...] of dtype uint8, int8, int16, int32, float32 or float64, in any byte
        order and memory layout.

    Raises:
      TypeError: the array has another dtype.
      ValueError: an axis has 2**32 elements or more.
      OSError: the file cannot be written, or a pipe, a device or a folder has that name.
    """
    path, array = pathlib.Path(path), np.asarray(array)
    codes = {np.dtype(name): code for code, name in TYPES.items()}
    code = codes.get(array.dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(map(str, codes))
        raise TypeError(
            f"{path}: IDX holds {known}, got {array.dtype}; cast first, as in "
            "array.astype(np.int32)"
        )
    if max(array.shape, default=0) >= 2**32:
        raise ValueError(
            f"{path}: IDX axes are at most {2**32 - 1:,} long, got shape {array.shape}; split "
            "the array"
        )
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content += array.astype(array.dtype.newbyteorder(">")).tobytes()
    with replacing(path) as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                packed.write(content)
        else:
            file.write(content)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`. It is renamed to `path` if the block succeeds, else
    deleted.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(
            errno.EEXIST, "this is not a file on a disk, and will not be replaced", str(path)
        )
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            # The sync precedes the rename: a crash must not leave the new name on missing bytes.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking: a named pipe would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


# At best deflate packs 258 bytes into 2 bits (https://zlib.net/zlib_tech.html).
_DEFLATE_RATIO = 1032
_CHUNK = 1 << 20


def _parse(file: io.BufferedIOBase, most: int, path: pathlib.Path) -> np.ndarray:
    """The array in `file`, whose content cannot be longer than `most` bytes."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES:
        types = " ".join(f"{code:02x}" for code in TYPES)
        raise _bad(
            path, f"an IDX header (00 00, a type out of {types}, the dimensions)", _start(magic)
        )
    dtype, ndim = np.dtype(TYPES[magic[2]]).newbyteorder(">"), magic[3]
    sizes = file.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise _bad(path, f"{ndim} sizes of 4 bytes in the header", f"{len(sizes)} bytes")
    shape = struct.unpack(f">{ndim}I", sizes)
    # These are Python integers, so the product cannot overflow.
    length = math.prod(shape) * dtype.itemsize
    expected = f"{length:,} bytes of elements ({dtype.name} of shape {shape}, says the header)"
    if length > most:
        raise _bad(path, expected, f"a file that can hold at most {most:,}")
    body = _read_at_most(file, length + 1)
    if len(body) != length:
        raise _bad(path, expected, f"{len(body):,}" if len(body) < length else "more than that")
    try:
        array = np.ndarray(shape, dtype, buffer=body)
    except ValueError as error:
        # It has more axes than NumPy allows, or sizes such as (0, 2**32 - 1, 2**32 - 1, 2**32 - 1).
        raise _bad(path, "a shape that NumPy can hold", f"{shape} ({error})") from error
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(file: io.BufferedIOBase, length: int) -> bytearray:
    # The buffer grows with the bytes that are read. One read(length) would allocate the size that
    # the header claims.
    body = bytearray()
    while len(body) < length and (chunk := file.read(min(_CHUNK, length - len(body)))):
        body += chunk
    return body


def _start(magic: bytes) -> str:
    return f"a file that starts with {magic.hex(' ')}" if magic else "an empty file"


def _bad(path: pathlib.Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected}, got {got}; it is damaged or not IDX: fetch or write it again"
    )
