"""Look into a file without making its tree: the contents of its header, and its checksums."""

import os
from typing import Any, NamedTuple

from jaxnet.checkpoint import structure
from jaxnet.checkpoint.container import Content, opened, read_content, steadily
from jaxnet.checkpoint.engines import engine_of
from jaxnet.checkpoint.protocol import Source

__all__ = ["Info", "Leaf", "info_of", "inspect", "verify"]


class Leaf(NamedTuple):
    """One array of a file.

    Attributes:
      path: its path in the tree, such as 'params/head/kernel'.
      shape: its shape in the tree.
      dtype: the name of its dtype; `key<...>` for random keys.
      nbytes: the number of bytes that it takes in the file.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Info(NamedTuple):
    """The header of a file.

    Attributes:
      path: the file.
      version: the version of the format; None if another program wrote the safetensors file.
      metadata: the metadata of the user.
      leaves: the arrays.
      scalars: Python scalars and strings by path.
      nbytes: the number of bytes of the file and of its parts; with Orbax, of the file and of the
        arrays.
    """

    path: str
    version: int | None
    metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    scalars: dict[str, Any]
    nbytes: int


def inspect(path: str | os.PathLike[str]) -> Info:
    """Read the header of a checkpoint or of any other safetensors file.

    The time does not depend on the size of the file. Of a file at a URL, the whole object is
    fetched.

    Args:
      path: the file.

    Returns:
      Paths, shapes and dtypes of the arrays, the Python values, and the metadata.

    Raises:
      CheckpointError: the header is damaged. The bytes of the arrays are not read: `verify` reads
        them.
      OSError: the file is missing or cannot be opened.
    """
    with opened(path) as (file, fd, size):
        return info_of(file, size, read_content(file, fd, size))


def verify(path: str | os.PathLike[str]) -> Info:
    """Read a whole file, and check its structure and all checksums.

    This takes a few MB of memory and needs neither JAX nor NumPy. (Arrays that Orbax wrote need
    memory for one block, and TensorStore and NumPy.) Files of other programs have no checksums, so
    only their headers and lengths are checked.

    Args:
      path: the file.

    Returns:
      The result of `inspect`.

    Raises:
      CheckpointError: the file is damaged or not a checkpoint.
      OSError: the file is missing or cannot be opened.
    """

    def read(file: str, fd: int, size: int) -> Info:
        content = read_content(file, fd, size)
        header = content.header
        engine_of(header).reader(Source(file, fd, header), header.tensors, None, {})
        return info_of(file, size, content)

    return steadily(path, read)


def info_of(file: str, size: int, content: Content) -> Info:
    """The result of `inspect` for a file of `size` bytes with this content."""
    header, tensors = content.header, content.tensors
    specs = structure.specs_in_file(content.leaves, tensors)
    leaves = tuple(
        Leaf(name, specs[name].shape or (), specs[name].dtype, tensors[name].nbytes)
        for name in content.leaves
        if name in tensors
    )
    if header.manifest is None:
        return Info(file, None, header.metadata, leaves, content.scalars, size)
    if header.parts:
        size += sum(nbytes for _, nbytes in header.parts.files)
    if header.orbax:
        size += sum(t.nbytes for t in header.tensors)
    version, metadata = header.manifest["version"], header.manifest["metadata"]
    return Info(file, version, metadata, leaves, content.scalars, size)
