"""Learned vectors for integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, rows, scores

__all__ = ["embed"]


@interned
def embed(
    num_embeddings: int,
    features: int,
    *,
    embedding_init: Callable[..., Any] = initializers.fan_in_normal,
    dtype: Any = None,
) -> Layer:
    """Look up a learned vector for each integer, y = E[ids]; or score each vector, y = x E^T.

    Parameters: embedding E [num_embeddings, features].

    The vector of an id that is not in 0 .. num_embeddings - 1 is NaN, so that the mistake shows.

    With attend=True, the layer maps features back to a score per vector. In a network, one child
    does both, so the output weights are tied to the embedding::

        @wire(embed=embed(100, 16), body=...)
        def language_model(f, ids):
            return f.embed(f.body(f.embed(ids)), attend=True)

    Twins: flax.linen.Embed, equinox.nn.Embedding, keras.layers.Embedding, torch.nn.Embedding.

    Args:
      num_embeddings: the number of vectors.
      features: the length of a vector.
      embedding_init: (key, shape, dtype) -> array. By default normal, with standard deviation 1 /
        sqrt(features).
      dtype: the dtype of the embedding; float32 by default (float64 under `jax_enable_x64`).

    Returns:
      The layer, ids [...] -> y [..., features]; with attend=True, x [..., features] -> y [...,
      num_embeddings].

    Raises:
      ValueError: a size is not a positive integer.
      TypeError: `dtype` is not a float; in `init` and `apply`, the ids are not integers, or with
        attend=True, x is not in the dtype of the embedding.
    """
    num_embeddings = size_of("embed: num_embeddings", num_embeddings)
    features = size_of("embed: features", features)
    label = f"embed({num_embeddings}, {features})"
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{label}: the dtype of the embedding must be a float, got {jnp.dtype(dtype).name}"
        )

    def init(key, ids, attend=False):
        check_kind(ids, attend, None)
        shape = (num_embeddings, features)
        return {"embedding": embedding_init(key, shape, dtype or jnp.result_type(float))}

    def check_kind(x, attend, like):
        if attend:
            check_input(label, x, width=features, like=like)
        else:
            check_input(label, x, rank=0, kind=jnp.integer)

    def fn(params, ids, attend=False):
        check_real(label, params)
        table = params["embedding"]
        computed = computed_dtype(params, table)
        check_kind(ids, attend, jax.ShapeDtypeStruct(table.shape, computed))
        if attend:
            return scores(ids, table)
        outside = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        return rows(table, ids, computed, **outside)

    return dataclasses.replace(layer(init, fn, label=label), wide=("embedding",))
