"""Whether trees are finite, and the choice between two trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["all_finite", "keep"]


def all_finite(tree: Any) -> jax.Array:
    """Whether all float leaves of a tree are finite, bool []."""
    flags = [
        jnp.isfinite(x).all()
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.bool_(True)


def keep(good: jax.Array, new: Any, old: Any) -> Any:
    """The new tree if `good`, else the old one.

    Args:
      good: bool [].
      new: a tree of arrays.
      old: a tree with the same structure, shapes and dtypes.
    """

    def choose(a, b):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jnp.where(good, a, b)
        data = jnp.where(good, jax.random.key_data(a), jax.random.key_data(b))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))

    return jax.tree.map(choose, new, old)
