"""Examples with weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.train.words import shape_of

__all__ = ["Weighted", "check_shape", "check_weights", "unweighted", "weighted_nodes"]


class Weighted(NamedTuple):
    """Examples with weights: as data for training, as one batch, or as the value of a loss.

    The mean of a value x is sum(w x) / sum(w).

    Attributes:
      batch: the examples, leaves [B, ...]; in a loss, its values [B].
      weights: numbers [B], at least 0, with a finite sum.
    """

    batch: Any
    weights: Any


def unweighted(batch: Any) -> tuple[Any, Any]:
    """Split a batch into (examples, weights). The weights are None if the batch has none."""
    return (batch.batch, batch.weights) if isinstance(batch, Weighted) else (batch, None)


def weighted_nodes(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the weights in a pytree with their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(
        data, is_leaf=lambda node: isinstance(node, Weighted)
    )
    for path, node in leaves:
        if isinstance(node, Weighted):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield f"{name}/weights".lstrip("/"), node.weights


def check_weights(data: Any, *, some: bool = True) -> None:
    """Raise ValueError unless all weights in the data are at least 0 and have a finite sum.

    Weights that are traced, or not in memory, are not checked here.

    Args:
      data: a pytree, which may hold `Weighted` nodes.
      some: whether the sum must be above 0. A single batch may have a sum of 0.
    """
    for path, weights in weighted_nodes(data):
        if isinstance(weights, jax.core.Tracer) or not isinstance(weights, np.ndarray | jax.Array):
            continue
        values = np.asarray(weights)
        if values.dtype.kind not in "biuf" and not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"data: '{path}' must be real numbers, got {values.dtype}; convert them first"
            )
        values = values.astype(np.float64)
        bad = np.flatnonzero(~(values >= 0) | np.isinf(values))
        if bad.size:
            raise ValueError(
                f"data: '{path}' must be at least 0 and finite, got {values.flat[bad[0]]} in row "
                f"{bad[0]}; give an example that must not count weight 0"
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
