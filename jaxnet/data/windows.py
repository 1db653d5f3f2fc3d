"""Windows of a long sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxnet.checks import size_of

__all__ = ["Windows"]


class Windows:
    """The windows of a sequence, as the rows of an array [N, length, ...] that is never in memory.

    Row i is `sequence[i * stride : i * stride + length]`, and N = 1 + (T - length) // stride.
    Indexing copies only the requested rows, so the sequence may be a memory map that is larger than
    the memory. For a language model, take length = context + 1, and in the loss `tokens[:, :-1]` as
    input and `tokens[:, 1:]` as target.

    Args:
      sequence: an array, memory map or h5py dataset, [T, ...]. Lists, series and tensors are
        converted to arrays by position.
      length: the length of a window, in elements.
      stride: the distance between the starts of two windows; `length` by default.

    Attributes:
      shape: the shape of the array, (N, length, ...).
      dtype: its dtype.

    Raises:
      ValueError: the sequence is shorter than one window, or a size is not a positive int.

    Example:
      >>> Windows(np.arange(10), 4, stride=3)[np.array([0, 2])]
      array([[0, 1, 2, 3],
             [6, 7, 8, 9]])
    """

    def __init__(self, sequence: Any, length: int, *, stride: int | None = None):
        length = size_of("Windows: length", length)
        stride = length if stride is None else size_of("Windows: stride", stride)
        in_memory = any(hasattr(sequence, name) for name in ("to_numpy", "numpy", "__dlpack__"))
        in_memory = in_memory and not isinstance(sequence, np.ndarray)
        if in_memory or isinstance(sequence, list | tuple):
            sequence = np.asarray(sequence)
        if len(sequence) < length:
            raise ValueError(
                f"Windows: a window of {length} does not fit into a sequence of {len(sequence)}"
            )
        self.sequence: Any = sequence
        self.length: int = length
        self.stride: int = stride
        n = 1 + (len(sequence) - length) // stride
        self.shape: tuple[int, ...] = (n, length, *sequence.shape[1:])
        self.dtype: Any = sequence.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray[Any, Any]:
        """The windows of these rows: an int, a slice, integers [B], or a mask of all rows."""
        n = len(self)
        rows = np.arange(*rows.indices(n)) if isinstance(rows, slice) else np.asarray(rows)
        if rows.dtype == bool and rows.shape == (n,):
            rows = np.flatnonzero(rows)
        if rows.dtype.kind not in "iu" and rows.size:
            raise IndexError(
                f"Windows: rows must be integers, or a mask [{n}], got "
                f"{rows.dtype}{list(rows.shape)}"
            )
        if rows.size and not (-n <= rows.min() and rows.max() < n):
            raise IndexError(
                f"Windows: rows must be within -{n}..{n - 1}, got {rows.min()}..{rows.max()}"
            )
        starts = np.where(rows < 0, rows + n, rows).astype(np.int64) * self.stride
        places = starts[..., None] + np.arange(self.length)
        if isinstance(self.sequence, np.ndarray):
            return np.asarray(self.sequence[places])
        # h5py datasets require increasing indices.
        wanted, inverse = np.unique(places, return_inverse=True)
        return np.asarray(self.sequence[wanted])[inverse.reshape(places.shape)]
