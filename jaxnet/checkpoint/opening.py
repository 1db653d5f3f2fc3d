"""Open a file for single leaves: a mapping that reads each leaf when it is looked up."""

import contextlib
import difflib
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxnet.checkpoint.container import opened, read_content, replaced
from jaxnet.checkpoint.engines import engine_of
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.protocol import Source
from jaxnet.checkpoint.words import shown

__all__ = ["lazy"]


@contextlib.contextmanager
def lazy(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """Open a file for reading single leaves, whatever its size.

        with lazy("run/state.safetensors") as leaves:
            kernel = leaves["params/head/kernel"]

    To open a file, only its header is read. A leaf is read and checked when it is first looked up;
    its array is a read-only view of the memory-mapped file, so the system can always reclaim its
    memory. Arrays stay valid after the block, look-ups do not. Saving over the file does not change
    them: they show the content of the file at the time when it was opened.

    A leaf is not checked twice, and a program that truncates the file in place, instead of
    replacing it as `save` does, would crash its readers: `load(path, pattern=...)` makes copies and
    has neither weakness. If several processes or Orbax have written the checkpoint, each look-up
    reads a copy.

    Args:
      path: the file.

    Yields:
      A read-only mapping from the paths that `inspect` shows to NumPy arrays of any shape, typed
      random keys and Python scalars.

    Raises:
      CheckpointError: the header is damaged or, when it is looked up, the leaf.
      KeyError: there is no such leaf.
      ValueError: a leaf is looked up after the block.
      OSError: the file is missing or cannot be opened.
    """
    with opened(path) as (file, fd, size):
        leaves = _Leaves(file, fd, size)
        try:
            yield leaves
        finally:
            # Views keep the map alive, and the last of them closes it.
            leaves.map = None


class _Leaves(Mapping[str, Any]):
    def __init__(self, file: str, fd: int, size: int):
        self.file, self.fd, self.size, self.content = file, fd, size, read_content(file, fd, size)
        self.map: mmap.mmap | None = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        self.source = Source(file, fd, self.content.header)
        self.reader = engine_of(self.content.header).reader
        self.checked = set()

    def __getitem__(self, path: str) -> Any:
        from jaxnet.checkpoint import arrays, placement

        nodes, tensors = self.content.leaves, self.content.tensors
        if self.map is None:
            raise ValueError(
                f"{shown(self.file)} has been closed: look leaves up inside the `with` block"
            )
        if path not in nodes:
            close = difflib.get_close_matches(path, nodes, n=3, cutoff=0.4) or list(nodes)[:3]
            raise KeyError(
                f"{shown(self.file)} has no leaf '{shown(path)}'; the nearest of {len(nodes)} "
                f"are {close}"
            )
        if path not in tensors:
            return nodes[path].value
        node, tensor = nodes[path], tensors[path]
        raw = self._copied(path) if self.source.header.outside else self._mapped(path)
        array = arrays.from_bytes(self.file, path, node, tensor.shape, raw)
        array.flags.writeable = False
        target = placement.Target("numpy" if node.kind == "jax" else node.kind, node.value)
        return placement.place(self.file, nodes, {path: array}, {path: target})[path]

    def _copied(self, path: str) -> Any:
        """The bytes of a tensor that lies outside the file."""
        from jaxnet.checkpoint import arrays

        tensor = self.content.tensors[path]
        try:
            return self.reader(self.source, [tensor], arrays.empty, {})[tensor.name]
        except CheckpointError as e:
            if not replaced(self.file, self.fd, self.size):
                raise
            text = (
                "the file was replaced after it was opened, and its arrays are gone: open it again"
            )
            raise CheckpointError(self.file, path, text) from e

    def _mapped(self, path: str) -> Any:
        """A view of the bytes of a tensor in the file."""
        import numpy as np

        tensor, data = self.content.tensors[path], self.source.header.data
        # Reads check the bytes, because a bad disk under a memory map kills the process.
        if path not in self.checked:
            self.reader(self.source, [tensor], None, {})
            self.checked.add(path)
        return np.frombuffer(self.map or b"", np.uint8)[data + tensor.start : data + tensor.stop]

    def __contains__(self, path: object) -> bool:
        return path in self.content.leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self.content.leaves)

    def __len__(self) -> int:
        return len(self.content.leaves)
