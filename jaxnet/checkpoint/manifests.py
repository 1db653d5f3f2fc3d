"""The manifest in the header of a file: its version, and where tensors outside the file lie."""

import contextlib
import itertools
import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxnet.checkpoint.dtypes import BITS
from jaxnet.checkpoint.errors import RESTORE, CheckpointError, Misfit
from jaxnet.checkpoint.grids import Grid
from jaxnet.checkpoint.tensors import Tensor, are_crcs, are_sizes, layout
from jaxnet.checkpoint.words import shown

__all__ = [
    "ORBAX",
    "PARTS",
    "VERSION",
    "Orbax",
    "Parts",
    "check_manifest",
    "check_version",
    "read_orbax_entry",
    "read_parts_entry",
]

# The version of a file that holds its tensors.
VERSION = 1
# The version of a file whose tensors are in parts, which are files of version 1.
PARTS = 2
# The version of a file whose tensors are in a folder of Orbax. No greater version is known.
ORBAX = 3


class Parts(NamedTuple):
    """Where the tensors of a file of version 2 are.

    Attributes:
      id: the number of the save.
      files: the digest and the number of bytes of each part.
    """

    id: str
    files: list[tuple[str, int]]


class Orbax(NamedTuple):
    """Where the tensors of a file of version 3 are.

    Attributes:
      id: the number of the save.
      grids: the blocks of each tensor by its name.
    """

    id: str
    grids: dict[str, Grid]


def check_version(file: str, version: Any) -> None:
    """Raise CheckpointError unless this code can read a version."""
    if type(version) is not int or version < 1:
        text = f"the manifest's version is {reprlib.repr(version)}, expected a number"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")
    if version > ORBAX:
        text = (
            f"it has format version {reprlib.repr(version)}, this jaxnet reads versions up to "
            f"{ORBAX}: install a newer jaxnet"
        )
        raise Misfit(file, None, text)


def check_manifest(file: str, manifest: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raise CheckpointError unless a manifest has metadata and the checksums of these tensors."""
    crcs = manifest.get("crc32")
    if not isinstance(crcs, list) or len(crcs) != len(tensors):
        text = f"the manifest must have one crc32 for each of {len(tensors)} tensors"
        raise CheckpointError(file, None, text)
    for t, crc in zip(tensors, crcs, strict=True):
        if not are_crcs(crc, t):
            text = f"its crc32 must be {8 * t.chunks} hexadecimal digits, got {reprlib.repr(crc)}"
            raise CheckpointError(file, t.name, text)
    if not isinstance(manifest.get("metadata"), dict):
        raise CheckpointError(file, None, "the manifest's metadata must be an object")


def read_parts_entry(
    file: str, manifest: dict[str, Any], own: list[Tensor]
) -> tuple[Parts, list[Tensor]]:
    """Check the entry `parts` of a manifest.

    Args:
      file: how errors name the file.
      manifest: the manifest of a file of version 2.
      own: the tensors in the file itself, of which there must be none.

    Returns:
      Where the tensors are; and the tensors, placed as in one file.

    Raises:
      CheckpointError: the entry is not well-formed.
    """
    with _well_formed(file, "parts"):
        entry = manifest["parts"]
        described = [(name, code, shape) for name, code, shape in entry["tensors"]]
        tensors = _placed(own, entry["id"], described)
        parts = Parts(entry["id"], [(digest, size) for digest, size in entry["files"]])
        for digest, size in parts.files:
            if not isinstance(digest, str) or not are_sizes([size]):
                raise ValueError("a part is not a digest and a size")
    if sum(t.nbytes for t in tensors) > sum(size for _, size in parts.files):
        text = "the tensors need more bytes than the parts have"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")
    return parts, tensors


def read_orbax_entry(
    file: str, manifest: dict[str, Any], own: list[Tensor]
) -> tuple[Orbax, list[Tensor]]:
    """Check the entry `orbax` of a manifest of version 3, as `read_parts_entry` does for parts."""
    with _well_formed(file, "orbax"):
        entry = manifest["orbax"]
        described = [(name, code, shape) for name, code, shape, _, _ in entry["tensors"]]
        tensors = _placed(own, entry["id"], described)
        grids = {name: Grid(cuts, crcs) for name, _, _, cuts, crcs in entry["tensors"]}
        for t in tensors:
            _check_grid(t, grids[t.name])
    return Orbax(entry["id"], grids), tensors


def _check_grid(tensor: Tensor, grid: Grid) -> None:
    """Raise ValueError unless a grid from a file fills its tensor and has its checksums."""
    name = shown(tensor.name)
    if len(grid.cuts) != len(tensor.shape) or not all(map(_is_cut, grid.cuts, tensor.shape)):
        raise ValueError(f"the blocks of '{name}' do not fill it")
    if math.prod(map(len, grid.cuts)) != len(grid.crcs):
        raise ValueError(f"'{name}' does not have one CRC-32 per block")
    for _, block, crc in grid.blocks(tensor):
        if not are_crcs(crc, block):
            raise ValueError(f"the CRC-32 of a block of '{name}' is {reprlib.repr(crc)}")


def _is_cut(cut: Any, size: int) -> bool:
    """Whether a value is the growing list of the indices at which blocks begin along an axis."""
    if not are_sizes(cut) or cut[:1] != [0]:
        return False
    return all(a < b for a, b in itertools.pairwise([*cut, max(size, 1)]))


@contextlib.contextmanager
def _well_formed(file: str, entry: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        text = f"the manifest's {entry} are not well-formed ({shown(e, 3000)})"
        raise CheckpointError(file, None, f"{text}; {RESTORE}") from e


def _placed(own: list[Tensor], number: Any, described: list[tuple[Any, Any, Any]]) -> list[Tensor]:
    """The tensors that a manifest describes. Raises ValueError if no writer can describe them."""
    names = {name for name, _, _ in described}
    if own or not re.fullmatch("[0-9a-f]{16}", number) or len(names) < len(described):
        raise ValueError("it has tensors itself, no number, or two tensors of one name")
    for name, code, shape in described:
        if not isinstance(name, str) or not isinstance(code, str) or not are_sizes(shape):
            raise ValueError("a tensor is not a name, a dtype and a shape")
    for _, code, shape in described:
        if code not in BITS or BITS[code] % 8 or len(shape) > 64:
            raise ValueError("a tensor has an unknown dtype or more than 64 axes")
    return layout([(name, code, tuple(shape)) for name, code, shape in described])
