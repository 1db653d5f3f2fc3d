"""Stretches of a long sequence, read where they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Windows"]


class Windows:
    """The windows of a sequence as the rows of an array [N, length, ...] that is never made.

    Row i is `sequence[i * stride : i * stride + length]`, N = 1 + (len(sequence) - length) // stride. Reading rows copies just
    those, so that the sequence may be a memory map larger than memory. For language models take length = context + 1, and
    in the loss `tokens[:, :-1]` as input and `tokens[:, 1:]` as target.

    Args: sequence: array or memory map [T, ...]; length, stride: in elements; the stride is the length unless given.
    Raises: ValueError for a sequence shorter than one window.

    >>> Windows(np.arange(10), 4, stride=3)[np.array([0, 2])]
    array([[0, 1, 2, 3],
           [6, 7, 8, 9]])
    """

    def __init__(self, sequence: Any, length: int, *, stride: int | None = None):
        stride = length if stride is None else stride
        if length < 1 or stride < 1:
            raise ValueError(f"Windows: length and stride must be at least 1, got {length} and {stride}")
        if len(sequence) < length:
            raise ValueError(f"Windows: a window of {length} does not fit into a sequence of {len(sequence)}")
        self.sequence, self.length, self.stride = sequence, length, stride
        self.shape = (1 + (len(sequence) - length) // stride, length, *sequence.shape[1:])
        self.dtype = sequence.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The windows of these rows: an int, a slice, or integers [B]."""
        n = len(self)
        rows = np.arange(*rows.indices(n)) if isinstance(rows, slice) else np.asarray(rows)
        if rows.size and not (-n <= rows.min() and rows.max() < n):
            raise IndexError(f"Windows: rows must be within -{n}..{n - 1}, got {rows.min()}..{rows.max()}")
        starts = np.where(rows < 0, rows + n, rows).astype(np.int64) * self.stride
        return np.asarray(self.sequence[starts[..., None] + np.arange(self.length)])
