"""Sizes of a tree: counts, bytes and norms."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.numerics import euclidean
from jaxnet.tree.leaves import flatten

__all__ = ["align", "bytes_of", "count", "norm", "norms", "table"]


def count(tree: Any) -> int:
    """Count the numbers in a tree.

    Args:
      tree: any pytree.

    Returns:
      The sum of the sizes of its leaves.

    Example:
      >>> count({"kernel": np.zeros((2, 3)), "bias": np.zeros(3)})
      9
    """
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Count the bytes of a tree in memory. An element of a dtype below 8 bits takes a whole byte.

    Args:
      tree: any pytree.

    Returns:
      The number of bytes of its leaves.
    """
    return sum(math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(tree))


def norm(tree: Any) -> jax.Array:
    """Compute the Euclidean norm of all numbers together, sqrt(sum |x|^2), in at least float32.

    Squares of very large and very small numbers neither overflow nor vanish. The gradient at zero
    is zero.

    Args:
      tree: a pytree of arrays of any shape.

    Returns:
      The norm, a scalar.
    """
    return euclidean(jax.tree.leaves(tree))


def norms(tree: Any) -> dict[str, jax.Array]:
    """Compute the Euclidean norm of each leaf, as `norm` does.

    Args:
      tree: a pytree of arrays of any shape.

    Returns:
      {path: norm}, with a scalar per leaf.
    """
    return {path: euclidean([leaf]) for path, leaf in flatten(tree).items()}


def table(tree: Any) -> str:
    """Print path, shape, dtype, count, bytes and Euclidean norm of each leaf, and the totals.

    Leaves without values (`jax.ShapeDtypeStruct`) and leaves that are not numbers have no norm.

    Args:
      tree: any pytree.

    Returns:
      The table as text.
    """
    rows = [("path", "shape", "dtype", "count", "bytes", "norm")]
    for path, leaf in flatten(tree).items():
        shape = "x".join(map(str, np.shape(leaf))) or "-"
        sizes = f"{count(leaf):,}", f"{bytes_of(leaf):,}"
        rows.append((path or ".", shape, str(_dtype(leaf)), *sizes, _norm_text(leaf)))
    rows.append(("total", "", "", f"{count(tree):,}", f"{bytes_of(tree):,}", ""))
    return align(rows, left=3)


def align(rows: list[tuple[str, ...]], left: int) -> str:
    """Rows of words as a table with a rule under the header. The first `left` columns are aligned
    on the left, the others on the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        sized = enumerate(zip(row, widths, strict=True))
        cells = [word.ljust(w) if i < left else word.rjust(w) for i, (word, w) in sized]
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _norm_text(leaf: Any) -> str:
    kinds = np.number, np.bool_
    has_numbers = any(jnp.issubdtype(_dtype(leaf), kind) for kind in kinds)
    if isinstance(leaf, jax.ShapeDtypeStruct) or not has_numbers:
        return "-"
    return f"{float(euclidean([leaf])):.4g}"
