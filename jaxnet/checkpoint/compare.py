"""Describe the values of a file by a few numbers, and compare two files.

Leaves are read one at a time, so large files need little memory.
"""

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxnet.checkpoint import scalars
from jaxnet.checkpoint.inspection import Info, inspect
from jaxnet.checkpoint.opening import lazy
from jaxnet.checkpoint.structure import Spec

__all__ = ["Difference", "Statistics", "differences", "statistics"]

# Elements that are compared at a time, in float64.
BLOCK = 1 << 20


class Statistics(NamedTuple):
    """Numbers that describe an array.

    Attributes:
      min: the least finite element; None if no element is finite.
      max: the greatest finite element, or None.
      mean: the mean of the finite elements, or None.
      std: the standard deviation of the finite elements, or None.
      nonfinite: how many elements are NaN or infinite.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    nonfinite: int


class Difference(NamedTuple):
    """How one leaf differs.

    Attributes:
      path: the path of the leaf.
      what: 'only in A', 'only in B', 'shape', 'dtype' or 'values'.
      a: the spec or the value in A, if it is there.
      b: the spec or the value in B, if it is there.
      differing: for arrays of one shape, the number of elements with other values or, if the dtypes
        are equal, other bits.
      largest: for numbers, max |a - b|.
      relative: for numbers, |a - b| / |a| in Euclidean norms; inf if a is zero.
    """

    path: str
    what: str
    a: str | None
    b: str | None
    differing: int | None = None
    largest: float | None = None
    relative: float | None = None


def statistics(x: Any) -> Statistics | None:
    """Describe an array of real numbers; None for everything else."""
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.kind == "c":
        return None
    count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    with np.errstate(all="ignore"):
        for block in _finite(x):
            count, total = count + block.size, total + float(block.sum())
            low, high = min(low, float(block.min())), max(high, float(block.max()))
        if not count:
            return Statistics(None, None, None, None, x.size)
        for block in _finite(x):
            squares += float(((block - total / count) ** 2).sum())
    return Statistics(low, high, total / count, math.sqrt(squares / count), x.size - count)


def differences(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> list[Difference]:
    """The leaves in which two files differ.

    Containers and metadata are not compared.

    Args:
      a: the file A.
      b: the file B.

    Returns:
      The differences in the order of A; then the leaves that only B has.

    Raises:
      CheckpointError: as `jaxnet.checkpoint.load`.
      OSError: as `jaxnet.checkpoint.load`.
    """
    ours, theirs = _leaves(inspect(a)), _leaves(inspect(b))
    found = [
        Difference(path, "only in A", str(spec), None)
        for path, spec in ours.items()
        if path not in theirs
    ]
    with lazy(a) as x, lazy(b) as y:
        for path in ours:
            if path in theirs and (
                line := _difference(path, ours[path], theirs[path], x[path], y[path])
            ):
                found.append(line)
    return found + [
        Difference(path, "only in B", None, str(spec))
        for path, spec in theirs.items()
        if path not in ours
    ]


def _difference(path: str, a: Spec, b: Spec, x: Any, y: Any) -> Difference | None:
    """How two leaves of one path differ, if they do."""
    what = "shape" if a.shape != b.shape else "dtype" if a != b else "values"
    if a.shape is None and what == "values":
        # The texts tell -0.0 from 0.0 and show NaN as equal to NaN.
        texts = scalars.show(x), scalars.show(y)
        return Difference(path, what, *texts) if texts[0] != texts[1] else None
    if a.shape is None or what == "shape":
        return Difference(path, what, str(a), str(b))
    if a.dtype.startswith("key<") or b.dtype.startswith("key<"):
        words = [_words(x), _words(y)] if what == "values" else []
        numbers = (int((words[0] != words[1]).any(axis=1).sum()) if words else None, None, None)
    else:
        numbers = _distance(np.asarray(x), np.asarray(y))
    return (
        Difference(path, what, str(a), str(b), *numbers) if numbers[0] or what != "values" else None
    )


def _leaves(info: Info) -> dict[str, Spec]:
    arrays = {leaf.path: Spec(leaf.dtype, leaf.shape) for leaf in info.leaves}
    return arrays | {path: Spec(type(x).__name__, None) for path, x in info.scalars.items()}


def _words(keys: jax.Array) -> np.ndarray:
    """The data of random keys, one key per row."""
    data = np.asarray(jax.random.key_data(keys))
    return data.reshape(-1, data.shape[-1])


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[int, float, float]:
    """How many elements differ, the largest difference, and the relative one."""
    differing, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for start in range(0, a.size, BLOCK):
        x, y = (array.reshape(-1)[start : start + BLOCK] for array in (a, b))
        wide, other = _wide(x), _wide(y)
        with np.errstate(all="ignore"):
            equal = (wide == other) | np.isnan(wide) & np.isnan(other)
            # The result is NaN if only one of the two is NaN, and inf if they are infinite with
            # different signs.
            apart = np.where(equal, 0, abs(wide - other))
            apart[np.isnan(apart)] = math.inf
            differ = (_bits(x) != _bits(y)).any(axis=1) if a.dtype == b.dtype else ~equal
            differing, largest = differing + int(differ.sum()), max(largest, float(apart.max()))
            squares += float((apart**2).sum())
            norm += float((abs(wide[np.isfinite(wide)]) ** 2).sum())
    return differing, largest, math.sqrt(squares / norm) if norm else math.inf if squares else 0.0


def _finite(x: Any) -> Iterator[np.ndarray]:
    """The finite elements of an array in float64, by blocks that have some."""
    flat = np.asarray(x).reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = _wide(flat[start : start + BLOCK])
        block = block[np.isfinite(block)]
        if block.size:
            yield block


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8).reshape(x.size, x.dtype.itemsize)
