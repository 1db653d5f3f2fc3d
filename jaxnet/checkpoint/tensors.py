"""Tensors as the header of a file lists them, with their checksums."""

import math
import re
import zlib
from typing import Any, NamedTuple

from jaxnet.checkpoint.dtypes import BITS

__all__ = ["CHUNK", "Tensor", "are_crcs", "are_sizes", "crc_start", "crcs", "layout"]

# Bytes under one CRC-32, which finds every burst up to 32 bits and misses one other damage in 2^32.
CHUNK = 64 << 20


class Tensor(NamedTuple):
    """One entry of the header.

    Attributes:
      name: the `structure.leaf_name` of the leaf.
      code: the name of the type in safetensors.
      shape: the shape in the file.
      start: the position of its first byte, counted from the first byte after the header.
      stop: the position after its last byte.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def chunks(self) -> int:
        """The number of its CRC-32s. An empty tensor has one, too, which guards its name."""
        return max(1, -(-self.nbytes // CHUNK))


def layout(tensors: list[tuple[str, str, tuple[int, ...]]]) -> list[Tensor]:
    """Place tensors, given as (name, code, shape), one after the other.

    Tensors with large elements come first, so each tensor is aligned to its elements.
    """
    placed, start = [], 0
    for name, code, shape in sorted(tensors, key=lambda t: -BITS[t[1]]):
        stop = start + math.prod(shape) * BITS[code] // 8
        placed.append(Tensor(name, code, shape, start, stop))
        start = stop
    return placed


def crc_start(tensor: Tensor, chunk: int) -> int:
    """The CRC-32 that the bytes of a chunk continue.

    It covers name, type, shape and the number of the chunk, so a change of these is found, too.
    """
    shape = ",".join(map(str, tensor.shape))
    return zlib.crc32(f"{tensor.name}\0{tensor.code}\0{shape}\0{chunk}\0".encode())


def crcs(tensor: Tensor, data: Any) -> str:
    """The CRC-32s of all chunks of a tensor with these bytes, in the form of a manifest."""
    parts = [data[i * CHUNK : (i + 1) * CHUNK] for i in range(tensor.chunks)]
    return "".join(f"{zlib.crc32(part, crc_start(tensor, i)):08x}" for i, part in enumerate(parts))


def are_crcs(value: Any, tensor: Tensor) -> bool:
    """Whether a value can be the CRC-32s of a tensor, by its form."""
    # The expected length may be greater than a regular expression can count.
    if not isinstance(value, str) or len(value) != 8 * tensor.chunks:
        return False
    return re.fullmatch("[0-9a-f]*", value) is not None


def are_sizes(value: Any) -> bool:
    """Whether a value of JSON is a list of sizes or positions."""
    if not isinstance(value, list):
        return False
    # A loop takes less time than all(...).
    for v in value:
        if type(v) is not int or not 0 <= v < 1 << 63:
            return False
    return True
