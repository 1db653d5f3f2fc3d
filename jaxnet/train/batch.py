"""Examples, their weights and their number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.sharding import first_rows

__all__ = ["Uneven", "Weighted", "check_weights", "examples", "unweighted"]


class Weighted(NamedTuple):
    """Examples with weights: as data for training, as one batch, or as the value of a loss.

    Attributes:
      batch: the examples, leaves [B, ...]; in a loss, its values [B].
      weights: numbers [B], at least 0, with a finite sum; the mean of a value is sum(w x) / sum(w).
    """

    batch: Any
    weights: Any


def unweighted(batch: Any) -> tuple[Any, Any]:
    """Split a batch into (examples, weights). The weights are None if the batch has none."""
    return (batch.batch, batch.weights) if isinstance(batch, Weighted) else (batch, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uneven:
    """A batch, or its rows, in epochs whose last batch is shorter.

    Attributes:
      batch: leaves [B, ...], or [steps, B, ...] for several.
      last: whether only the first `rest` examples count, bool [] or [steps].
      rest: the length of the last batch.
    """

    batch: Any
    last: Any
    rest: int = dataclasses.field(metadata={"static": True})

    def short(self) -> Any:
        """The last batch of an epoch."""
        return jax.tree.map(lambda leaf: first_rows(leaf, self.rest), self.batch)

    def true(self) -> Any:
        """The batch with its true length. `last` must not be traced."""
        return self.short() if self.last else self.batch


def examples(data: Any) -> int:
    """Count the examples: the length of the leading axis that all leaves share.

    Args:
      data: a pytree of arrays, or of specs of arrays.

    Returns:
      The number of examples.

    Raises:
      ValueError: the lengths differ or are zero, a leaf has no leading axis, or weights do not have
        the shape [B].
      TypeError: a leaf is a Python list instead of an array.
    """
    _check_lists(data)
    lengths = {}
    for path, leaf in tree.flatten(data).items():
        if not shape_of(leaf):
            raise ValueError(
                f"data: every leaf needs a leading axis of examples, '{path}' is a scalar "
                f"({type(leaf).__name__}); stack single examples with np.stack and numbers with "
                "np.asarray"
            )
        lengths[path] = int(shape_of(leaf)[0])
    if len(set(lengths.values())) > 1:
        raise ValueError(f"data: all leaves must have the same number of examples, got {lengths}")
    n = next(iter(lengths.values()), 0)
    if not n:
        raise ValueError("data: there are no examples")
    if n >= 2**31:
        raise ValueError(
            f"data: rows are counted in int32, at most 2**31 - 1 of them, got {n}; split the data"
        )
    for path, (_, weights) in _weighted_nodes(data):
        check_shape(f"data: '{path}'", weights, n)
    return n


def check_weights(data: Any, *, some: bool = True) -> None:
    """Raise ValueError unless all weights in the data are at least 0 and have a finite sum.

    Weights that are traced, or not in memory, are not checked here.

    Args:
      data: a pytree, which may hold `Weighted` nodes.
      some: whether the sum must be above 0. A single batch may have a sum of 0.
    """
    for path, (_, weights) in _weighted_nodes(data):
        if isinstance(weights, jax.core.Tracer) or not isinstance(weights, np.ndarray | jax.Array):
            continue
        values = np.asarray(weights)
        if values.dtype.kind not in "biuf" and not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(f"data: '{path}' must be real numbers, got {values.dtype}")
        values = values.astype(np.float64)
        bad = np.flatnonzero(~(values >= 0) | np.isinf(values))
        if bad.size:
            raise ValueError(
                f"data: '{path}' must be at least 0 and finite, got {values.flat[bad[0]]} in row "
                f"{bad[0]}"
            )
        total = float(values.sum())
        if total > float(np.finfo(np.float32).max) or (some and total == 0):
            raise ValueError(
                f"data: '{path}' must have a finite sum above 0, got {total:g}; rescale them"
            )


def check_shape(what: str, weights: Any, n: int) -> None:
    """Raise ValueError unless weights are one number per example, [n]."""
    if shape_of(weights) != (n,):
        raise ValueError(
            f"{what} must be one number per example, [{n}], got shape {list(shape_of(weights))}"
        )


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array or a number, without reading it."""
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def _weighted_nodes(data: Any) -> Iterator[tuple[str, Weighted]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        data, is_leaf=lambda node: isinstance(node, Weighted)
    )
    for path, node in leaves:
        if isinstance(node, Weighted):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield f"{name}/weights".lstrip("/"), node


# A list of more arrays than this, all of one shape, is a list of examples.
_MANY = 16


def _check_lists(data: Any) -> None:
    """Raise TypeError for a Python list of examples, which JAX treats as a container of as many
    leaves.
    """
    stack = [("", data)]
    while stack:
        path, node = stack.pop()
        name = f"'{path}'" if path else "it"
        if isinstance(node, list) and node:
            first = node[0]
            if isinstance(first, bool | int | float | str | np.generic):
                raise TypeError(
                    f"data: {name} is a list of {len(node)} numbers; make an array of it, with "
                    "np.asarray"
                )
            same = len({np.shape(x) for x in node if hasattr(x, "shape")}) == 1 and hasattr(
                first, "shape"
            )
            if len(node) > _MANY and same:
                raise TypeError(
                    f"data: {name} is a list of {len(node)} arrays {list(np.shape(first))}; make "
                    "one array of it, with np.stack"
                )
            many = len(node) > _MANY or any(not np.ndim(leaf) for leaf in jax.tree.leaves(first))
            if len(node) > 1 and many and isinstance(first, tuple | list | dict):
                raise TypeError(
                    f"data: {name} is a list of {len(node)} examples, each a "
                    f"{type(first).__name__}; make a {type(first).__name__} of arrays, one per "
                    "field, with np.stack"
                )
        if isinstance(node, dict):
            stack += [(f"{path}/{key}".lstrip("/"), child) for key, child in node.items()]
        elif isinstance(node, list | tuple):
            names = getattr(node, "_fields", range(len(node)))
            stack += [
                (f"{path}/{key}".lstrip("/"), child) for key, child in zip(names, node, strict=True)
            ]
