"""The gradient of an objective, in equal parts of the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.train.objective import Objective
from jaxnet.train.sharding import in_parts, zeros_like_spec
from jaxnet.train.weighted import unweighted

__all__ = ["Gradients", "one_part"]


class Gradients:
    """Compute gradients, one part of the batch after the other.

    Args:
      objective: the function to differentiate.
      parts: the number of equal parts of the batch.
    """

    def __init__(self, objective: Objective, parts: int):
        self.differentiate = jax.value_and_grad(objective, has_aux=True)
        self.parts = parts

    def __call__(
        self, params: Any, batch: Any, state: Any, key: jax.Array, scale: Any
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Return (gradients, new state, metrics).

        Args:
          params: the parameters.
          batch: leaves [B, ...], or `Weighted`.
          state: the state of the network.
          key: the PRNG key of the step.
          scale: the factor of the loss, a scalar, or None.
        """
        batch, weights = unweighted(batch)
        if self.parts == 1:
            (_, (state, metrics, _)), grads = self.differentiate(
                params, batch, weights, state, key, scale
            )
            return grads, state, metrics
        parts = jax.tree.map(lambda leaf: _parts_of(leaf, self.parts), (batch, weights))

        def add(carry, part):
            (state, total, sums), (i, part) = carry, part
            part_key = jax.random.fold_in(key, i)
            (_, (state, metrics, weight)), grads = self.differentiate(
                params, *part, state, part_key, scale
            )
            sums = jax.tree.map(
                lambda a, b: a + weight.astype(a.dtype) * b.astype(a.dtype), sums, (metrics, grads)
            )
            return (state, total + weight, sums), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        (_, (_, metrics, total)), grads = jax.eval_shape(
            lambda: self.differentiate(params, *first, state, key, scale)
        )
        like = (metrics, grads)
        zeros = jax.tree.map(
            lambda x: zeros_like_spec(x).astype(jnp.promote_types(x.dtype, jnp.float32)), like
        )
        (state, total, sums), _ = jax.lax.scan(
            add, (state, jnp.zeros_like(total), zeros), (jnp.arange(self.parts), parts)
        )
        divisor = jnp.where(total == 0, 1, total)
        metrics, grads = jax.tree.map(
            lambda a, x: (a / divisor.astype(a.dtype)).astype(x.dtype), sums, like
        )
        if "weight" in metrics:
            metrics["weight"] = total
        return grads, state, metrics


def one_part(leaf: Any, parts: int) -> Any:
    """The spec of one part of a batch. A leaf without a leading axis is returned unchanged."""
    if not getattr(leaf, "ndim", 0):
        return leaf
    return jax.ShapeDtypeStruct((_part_size(leaf, parts), *leaf.shape[1:]), leaf.dtype)


def _parts_of(leaf: jax.Array, parts: int) -> jax.Array:
    """A leaf [B, ...] in equal parts, [parts, B / parts, ...]."""
    _part_size(leaf, parts)
    return in_parts(leaf, parts)


def _part_size(leaf: Any, parts: int) -> int:
    if leaf.shape[0] % parts:
        raise ValueError(
            f"train_step: a batch of {leaf.shape[0]} does not divide into accumulate={parts} "
            "equal parts; use a divisor, or another batch size"
        )
    return leaf.shape[0] // parts
