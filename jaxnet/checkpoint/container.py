"""Open a checkpoint file, and check its header before anything in it is used."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxnet.checkpoint import atomic, encoding, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import DTYPES
from jaxnet.checkpoint.errors import RESTORE, CheckpointError, Misfit
from jaxnet.checkpoint.format import Header
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.tensors import Tensor

__all__ = [
    "Content",
    "check_names",
    "opened",
    "read_content",
    "read_into",
    "replace",
    "replaced",
    "steadily",
]

# The most times that a file may be replaced while it is read.
TRIES = 100


class Content(NamedTuple):
    """The checked header of a file.

    Attributes:
      header: the header itself.
      node: the structure of the tree.
      leaves: the leaves of the structure by name.
      tensors: the tensors by the names of their leaves, which may differ from the names in files of
        other programs.
      structured: whether the file records the containers of the tree.
    """

    header: Header
    node: Node
    leaves: dict[str, Node]
    tensors: dict[str, Tensor]
    structured: bool

    @property
    def scalars(self) -> dict[str, Any]:
        """The Python scalars by name."""
        return {name: n.value for name, n in self.leaves.items() if name not in self.tensors}


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Open a file for reading and yield its name, descriptor and size.

    Raises:
      CheckpointError: it is not a regular file.
      OSError: it cannot be opened, or it is a folder.
    """
    file = os.fsdecode(path)
    if places.is_url(file):
        # Objects are usually small: the arrays are in the folder of Orbax.
        with tempfile.TemporaryFile() as copy:
            copy.write(content := places.fetch(file))
            copy.flush()
            yield file, copy.fileno(), len(content)
        return
    # O_NONBLOCK keeps a named pipe from blocking until there is a writer.
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, this is a folder", file)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(file, None, "not a regular file: copy it into one first")
        yield file, fd, status.st_size
    finally:
        os.close(fd)


def steadily(path: str | os.PathLike[str], read: Callable[[str, int, int], Any]) -> Any:
    """Call `read(file, descriptor, size)`, again if another save replaces the file meanwhile, and
    return its result.

    A save deletes the parts and the Orbax folder of the file that it replaces. A reader of the old
    file may then find them missing or truncated, and must start again with the new file.
    """
    tries = 0
    while True:
        with opened(path) as (file, fd, size):
            try:
                return read(file, fd, size)
            except Misfit:
                raise
            except CheckpointError as e:
                if not replaced(file, fd, size):
                    raise
                tries += 1
                if tries == TRIES:
                    text = f"it was replaced {tries} times while it was read, at last: {e}"
                    raise CheckpointError(file, None, text) from e


def replaced(file: str, fd: int, size: int) -> bool:
    """Whether the path no longer leads to the open file.

    While the file is open, its inode number is not reused.
    """
    if places.is_url(file):
        return places.fetch(file) != os.pread(fd, size, 0)
    return not os.path.samestat(os.stat(file), os.fstat(fd))


def replace(target: str, content: bytes) -> None:
    """Write a file durably, replacing an existing one. `target` is a result of `places.real`."""
    if places.is_url(target):
        return places.put(target, content)
    with atomic.replacing(target, target) as fd:
        atomic.write(fd, memoryview(content))


def check_names(file: str, nodes: dict[str, Node], header: int) -> None:
    """Raise CheckpointError if `read_content` would refuse these names.

    Args:
      file: how errors name the file.
      nodes: the leaves by name.
      header: the number of bytes of the header.
    """
    if (size := sum(map(len, nodes))) > (most := _longest_names(header)):
        text = (
            f"the paths of its leaves together have {size:,} characters, at most {most:,} are "
            "possible here: shorten the keys of nested dicts"
        )
        raise CheckpointError(file, None, text)


def _longest_names(header: int) -> int:
    """The most characters that all paths in a file may have together, from the bytes of its header.

    Without a limit, nested dicts with long keys could turn a header of a few kB into paths of
    several GB.
    """
    return (4 << 20) + 16 * header


def read_content(file: str, fd: int, size: int) -> Content:
    """Read and check the header of an open file.

    Args:
      file: how errors name the file.
      fd: its descriptor.
      size: its number of bytes.

    Returns:
      The content of the header.

    Raises:
      CheckpointError: it is damaged or not a safetensors file.
    """
    first = bytearray(min(8, size))
    read_into(file, fd, memoryview(first), 0)
    raw = bytearray(fmt.header_length(file, bytes(first), size))
    read_into(file, fd, memoryview(raw), 8)
    header = fmt.read_header(file, bytes(raw), size)
    if header.manifest is None:
        return _foreign(header)
    node = encoding.from_json(file, header.manifest.get("tree"))
    try:
        leaves = structure.leaves(node, _longest_names(header.data))
    except ValueError as e:
        text = f"{e}, too many for its header of {header.data:,} bytes; {RESTORE}"
        raise CheckpointError(file, None, text) from e
    tensors = {t.name: t for t in header.tensors}
    structure.check_arrays(file, leaves, tensors)
    return Content(header, node, leaves, tensors, True)


def _foreign(header: Header) -> Content:
    """The content of a file of another program."""
    paths = structure.foreign_paths([t.name for t in header.tensors])
    placed = list(zip(paths, header.tensors, strict=True))
    node = structure.nest({path: Node("jax", DTYPES.get(t.code, t.code)) for path, t in placed})
    tensors = {structure.leaf_name(path): t for path, t in placed}
    return Content(header, node, structure.leaves(node), tensors, False)


def read_into(file: str, fd: int, data: memoryview, position: int) -> None:
    """Fill `data` with the bytes of an open file from a position on."""
    while data:
        try:
            got = os.preadv(fd, [data], position)
        except OSError as e:
            text = f"cannot be read at byte {position} ({e}): restore it from a copy"
            raise CheckpointError(file, None, text) from e
        if got == 0:
            text = f"ends at byte {position}, before its data does: it is being changed"
            raise CheckpointError(file, None, text)
        data, position = data[got:], position + got
