"""The protocol of engines: what a module must offer to write checkpoints and to read them.

An engine brings the bytes of tensors to the disk and back. There are three: `single` (all tensors
in the file itself), `parts` (a file per process) and `orbax` (a folder that Orbax writes). Each
module has its `ENGINE`, an `Engine` of two functions; `engines` has the table of all three.

All engines share everything else: a `Job` has been checked before an engine sees it, the file at
the path always holds the structure, the metadata and the checksums, and `outside` knows and deletes
all files that engines put beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jaxnet.checkpoint.format import Header
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.tensors import Tensor

__all__ = ["Engine", "Job", "Reader", "Source", "Writer"]


class Job(NamedTuple):
    """A checked tree that is ready to be written.

    Attributes:
      file: the path as the user gave it, for errors.
      target: the path of the file to replace, a result of `places.real`.
      tensors: the tensors, placed as in one file.
      manifest: the manifest of version 1 without `crc32`.
      nodes: the nodes of all leaves by name.
      leaves: the arrays by name.
    """

    file: str
    target: str
    tensors: list[Tensor]
    manifest: dict[str, Any]
    nodes: dict[str, Node]
    leaves: dict[str, Any]


class Source(NamedTuple):
    """An open file whose header has been checked.

    Attributes:
      file: the path of the file, for errors and for the files beside it.
      fd: its descriptor.
      header: its header.
    """

    file: str
    fd: int
    header: Header


# (number of bytes) -> memory to read into, a NumPy array uint8 [bytes].
Allocate = Callable[[int], Any]
# For each tensor the blocks that are needed, as slices; None if all of it is.
Needed = Mapping[str, Sequence[tuple[slice, ...]] | None]


class Writer(Protocol):
    """The function of an engine that writes."""

    def __call__(self, job: Job, *, snapshot: bool) -> Callable[[], None]:
        """Return a function that writes a checkpoint, and that is called once.

        When that function returns, the checkpoint is on the disk and older files beside it are
        deleted. The file at the path is renamed into place after everything else is synced, and
        this rename replaces the old checkpoint. If anything fails before, the old checkpoint is
        unchanged and unfinished files are deleted.

        Args:
          job: the tree to write.
          snapshot: True if its arrays may be donated or changed after this call, so the engine must
            write copies.

        Returns:
          The function that writes.

        Raises:
          CheckpointError: the engine cannot store the tree.
          ImportError: the engine needs a package that is missing.
        """
        ...


class Reader(Protocol):
    """The function of an engine that reads."""

    def __call__(
        self,
        source: Source,
        tensors: Sequence[Tensor],
        allocate: Allocate | None,
        needed: Needed,
    ) -> dict[str, Any]:
        """Read the bytes of tensors, and check every byte that is read.

        Memory is allocated only after the files are known to hold so many bytes.

        Args:
          source: the open file.
          tensors: the tensors to read, from `source.header.tensors`.
          allocate: makes the memory to read into; None to check the bytes alone.
          needed: the blocks that this process needs. Other blocks need not be read or checked.

        Returns:
          The bytes of each tensor by name, uint8 [bytes]; empty without `allocate`.

        Raises:
          CheckpointError: bytes are missing or do not match their checksum.
          OSError: bytes outside the file cannot be read now.
          ImportError: the engine needs a package that is missing.
        """
        ...


class Engine(NamedTuple):
    """The two functions that an engine must offer.

    Attributes:
      writer: the function that writes.
      reader: the function that reads.
    """

    writer: Writer
    reader: Reader
