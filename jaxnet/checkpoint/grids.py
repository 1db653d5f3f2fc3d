"""How a tensor is cut into blocks that lie in several places: the cells of a grid."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxnet.checkpoint.dtypes import BITS
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.tensors import Tensor

__all__ = ["Grid", "Piece", "cuts_of", "overlap", "place_of"]


class Grid(NamedTuple):
    """The blocks of a tensor that Orbax has written.

    Attributes:
      cuts: for each axis, the indices at which blocks begin.
      crcs: the CRC-32s of each block, in row-major order.
    """

    cuts: list[list[int]]
    crcs: list[str]

    def blocks(self, tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor, str]]:
        """Yield each block: the index at which it begins, the block as a tensor, its CRC-32s."""
        ends = [[*cut[1:], size] for cut, size in zip(self.cuts, tensor.shape, strict=True)]
        spans = [list(zip(cut, end, strict=True)) for cut, end in zip(self.cuts, ends, strict=True)]
        for span, crc in zip(itertools.product(*spans), self.crcs, strict=True):
            shape = tuple(end - start for start, end in span)
            nbytes = math.prod(shape) * BITS[tensor.code] // 8
            block = Tensor(tensor.name, tensor.code, shape, 0, nbytes)
            yield tuple(start for start, _ in span), block, crc


class Piece(NamedTuple):
    """A block of a tensor in one of several files.

    Attributes:
      part: the number of the file.
      tensor: the block as a tensor of that file.
      start: the index in the whole tensor at which the block begins.
    """

    part: int
    tensor: Tensor
    start: tuple[int, ...]


def place_of(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The slices of a block that begins at this index."""
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))


def overlap(whole: Tensor, block: Tensor, start: Sequence[int], other: Sequence[slice]) -> bool:
    """Whether a block that begins at `start` has elements in another one.

    The other block is given as slices, and may omit trailing axes.
    """
    ranges = [axis.indices(size)[:2] for axis, size in zip(other, whole.shape, strict=False)]
    return all(
        a < high and low < a + n
        for (low, high), a, n in zip(ranges, start, block.shape, strict=False)
    )


def cuts_of(file: str, whole: Tensor, found: list[Piece]) -> list[list[int]]:
    """The indices at which the pieces of a tensor begin, for each axis.

    Args:
      file: how errors name the checkpoint.
      whole: the tensor.
      found: its pieces.

    Returns:
      The cuts, as `Grid` has them.

    Raises:
      CheckpointError: the pieces do not fill the tensor exactly.
    """
    cuts = _cuts(whole, found)
    if cuts is None:
        where = [f"{p.tensor.code}{list(p.tensor.shape)} at {list(p.start)}" for p in found[:20]]
        where += ["..."] if len(found) > 20 else []
        text = (
            f"its pieces do not fill {whole.code}{list(whole.shape)}: they are "
            f"{', '.join(where) or 'missing'}"
        )
        raise CheckpointError(file, whole.name, f"{text} (did all processes save the same tree?)")
    return cuts


def _cuts(whole: Tensor, found: list[Piece]) -> list[list[int]] | None:
    """`cuts_of`, or None unless the pieces form a grid, as those of every sharding do."""
    rank = len(whole.shape)
    for p in found:
        if p.tensor.code != whole.code or not len(p.start) == len(p.tensor.shape) == rank:
            return None
    cuts = [sorted({p.start[axis] for p in found}) for axis in range(rank)]
    cells = {p.start for p in found}
    # Compare the counts before the product: a few pieces on a diagonal would span a grid of
    # astronomically many cells.
    if not len(found) == len(cells) == math.prod(map(len, cuts)):
        return None
    if cells != set(itertools.product(*cuts)) or any(cut[:1] != [0] for cut in cuts):
        return None
    ends = [
        dict(itertools.pairwise([*cut, size])) for cut, size in zip(cuts, whole.shape, strict=True)
    ]
    for p in found:
        for start, size, end in zip(p.start, p.tensor.shape, ends, strict=True):
            if start + size != end[start]:
                return None
    return cuts
