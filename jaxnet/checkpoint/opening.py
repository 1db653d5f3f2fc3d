"""One leaf of a large file: a mapping that reads what is looked up, and nothing else."""

import contextlib
import difflib
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxnet.checkpoint.container import opened, read_content, replaced
from jaxnet.checkpoint.file import read_tensors
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.words import shown


@contextlib.contextmanager
def lazy(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """Open a file for reading single leaves, whatever its size.

        with lazy("run/state.safetensors") as leaves:
            kernel = leaves["params/head/kernel"]

    Returns: a context manager that gives a read-only mapping from the paths that `inspect` shows to
    NumPy arrays, typed random keys and Python scalars. Opening costs the header. A leaf is read and
    checked when it is first looked up; its array is a read-only view of the memory-mapped file, so
    that it takes no memory that the system could not reclaim. Arrays stay valid after the block,
    look-ups do not. Saving over the file does them no harm: they show what was in it when it was
    opened.

    A leaf is not checked twice, and a program that cuts the file short in place, instead of
    replacing it as `save` does, would crash its readers: `load(path, pattern=...)` makes copies and
    has neither weakness. Of a checkpoint that several processes or Orbax have written, each look-up
    reads a copy.

    Raises:
      CheckpointError: the header is damaged or, when it is looked up, the leaf.
      KeyError: there is no such leaf.
      OSError: the file is missing or cannot be opened.
    """
    with opened(path) as (file, fd, size):
        leaves = _Leaves(file, fd, size)
        try:
            yield leaves
        finally:
            leaves.map = None  # views keep the map alive for themselves; the last of them closes it


class _Leaves(Mapping[str, Any]):
    def __init__(self, file: str, fd: int, size: int):
        self.file, self.fd, self.size, self.content = file, fd, size, read_content(file, fd, size)
        self.map: mmap.mmap | None = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        self.checked = set()

    def __getitem__(self, path: str) -> Any:
        import numpy as np

        from jaxnet.checkpoint import arrays

        header, _, nodes, tensors, _ = self.content
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
        if header.outside:  # its bytes are in other files
            try:
                raw = read_tensors(self.file, self.fd, header, [tensor], arrays.empty)[tensor.name]
            except CheckpointError as e:
                if not replaced(self.file, self.fd, self.size):
                    raise
                text = (
                    "the file was replaced after it was opened, and its arrays are gone: open it "
                    "again"
                )
                raise CheckpointError(self.file, path, text) from e
        else:
            # Reads check the bytes, because a bad disk under a memory map kills the process.
            if path not in self.checked:
                read_tensors(self.file, self.fd, header, [tensor], None)
                self.checked.add(path)
            raw = np.frombuffer(self.map, np.uint8)[
                header.data + tensor.start : header.data + tensor.stop
            ]
        array = arrays.from_bytes(self.file, path, node, tensor.shape, raw)
        array.flags.writeable = False
        kind = "numpy" if node.kind == "jax" else node.kind
        return arrays.place(
            self.file, nodes, {path: array}, {path: arrays.Target(kind, node.value)}
        )[path]

    def __contains__(self, path: object) -> bool:
        return path in self.content.leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self.content.leaves)

    def __len__(self) -> int:
        return len(self.content.leaves)
