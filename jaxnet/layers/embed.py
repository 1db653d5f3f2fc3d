"""Vectors for integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers

__all__ = ["embed"]


@interned
def embed(
    vocabulary: int,
    features: int,
    *,
    embedding_init: Callable = initializers.fan_in_normal,
    dtype: Any = None,
) -> Layer:
    """Look up a learned vector for each integer, y = E[ids].   ids [...] -> y [..., features].

    Parameters: embedding [vocabulary, features].
    An id that is not in 0 .. vocabulary - 1 gives NaN, so that it cannot pass for another.

    Args:
      embedding_init: (key, shape, dtype) -> array; by default normal with deviation 1 / sqrt(features).
      dtype: of the embedding; float32 by default (float64 under `jax_enable_x64`).

    Raises: TypeError for ids that are not integers.
    """
    for name, size in [("vocabulary", vocabulary), ("features", features)]:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"embed: {name} must be a positive int, got {size!r}")
    label = f"embed({vocabulary}, {features})"

    def init(key, ids):
        check_input(label, ids, rank=0, kind=jnp.integer)
        return {"embedding": embedding_init(key, (vocabulary, features), dtype or jnp.result_type(float))}

    def fn(params, ids):
        check_input(label, ids, rank=0, kind=jnp.integer)
        rows = params["embedding"].at[ids]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    return layer(init, fn, label=label)
