"""The entries of a header, as tuples, and the numbers of the format."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = [
    "ALIGNMENT",
    "BITS",
    "CHUNK",
    "Grid",
    "Header",
    "ORBAX",
    "Orbax",
    "PARTS",
    "Parts",
    "Tensor",
    "VERSION",
]

VERSION = 1  # of a file that holds a tree
PARTS = 2  # of one whose tensors are in parts, files like this
# The version of a file whose tensors are in a folder that Orbax has written. No greater version is
# known.
ORBAX = 3
# Bytes under one CRC-32, which finds every burst up to 32 bits and misses one other damage in 2^32.
CHUNK = 64 << 20
# The alignment of the first tensor's byte in the file.
ALIGNMENT = 64
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
}
BITS |= {
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


class Tensor(NamedTuple):
    """One entry of the header: `code` is safetensors' name of a type, `start` and `stop` count from
    the first datum.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def chunks(self) -> int:
        # An empty tensor has a chunk too, which guards its name.
        return max(1, -(-(self.stop - self.start) // CHUNK))


class Parts(NamedTuple):
    """Where the tensors of a file of version 2 are: the number of the save, and for each part its
    digest and bytes.
    """

    id: str
    files: list[tuple[str, int]]


class Grid(NamedTuple):
    """How a tensor is cut into blocks: the first index of each along each axis, and their CRC-32s
    in row-major order.
    """

    cuts: list[list[int]]
    crcs: list[str]

    def blocks(self, tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor, str]]:
        """Each block: where it begins, itself as a tensor of that name, and its CRC-32s."""
        ends = [[*cut[1:], size] for cut, size in zip(self.cuts, tensor.shape, strict=True)]
        spans = [list(zip(cut, end, strict=True)) for cut, end in zip(self.cuts, ends, strict=True)]
        for block, crc in zip(itertools.product(*spans), self.crcs, strict=True):
            shape = tuple(end - start for start, end in block)
            nbytes = math.prod(shape) * BITS[tensor.code] // 8
            yield (
                tuple(start for start, _ in block),
                Tensor(tensor.name, tensor.code, shape, 0, nbytes),
                crc,
            )


class Orbax(NamedTuple):
    """What a file of version 3 says of the folder with its tensors: the number of the save, and
    their blocks.
    """

    id: str
    grids: dict[str, Grid]


class Header(NamedTuple):
    """A checked header: the tensors in the order of their data; `manifest` is None for the file of
    another program.
    """

    tensors: list[Tensor]
    metadata: dict[str, str]
    manifest: dict[str, Any] | None
    data: int  # where the tensors' bytes begin
    parts: Parts | None = None
    orbax: Orbax | None = None

    @property
    def outside(self) -> Parts | Orbax | None:
        """What says where the tensors' bytes are, if they are not in the file itself."""
        return self.parts or self.orbax
