"""Biases of scores by the positions of query and key."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer, no_params
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, rows

__all__ = ["alibi", "relative_bias"]


@interned
def alibi(heads: int) -> Layer:
    """Bias scores by the distance: -slope_h |position of the query - position of the key|.

    The slopes are 2^(-8 h / heads) for h = 1 .. heads if `heads` is a power of two. Otherwise those
    of the next lower power n are followed by every other slope of 2n heads. The bias is float32.

    Source: Press, Smith & Lewis, "Train Short, Test Long", ICLR 2022.

    Args:
      heads: the number of heads.

    Returns:
      The layer, (queries [..., T], keys [..., S]) -> bias [..., heads, T, S], of integer positions.

    Raises:
      ValueError: `heads` is not a positive integer.
      TypeError: in `apply`, the positions are not integers.
    """
    heads = size_of("alibi: heads", heads)
    slopes = np.asarray(_slopes(heads))

    def fn(params, queries, keys):
        distance = jnp.abs(_distances("alibi", queries, keys))
        by_head = jnp.asarray(-slopes, jnp.result_type(float)).reshape(heads, 1, 1)
        distance = jnp.expand_dims(distance, -3).astype(by_head.dtype)
        by_head = by_head.reshape((1,) * (distance.ndim - 3) + by_head.shape)
        return by_head * distance

    return layer(no_params, fn, label=f"alibi({heads})")


def _slopes(heads: int) -> list[float]:
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes if power == heads else slopes + _slopes(2 * power)[::2][: heads - power]


@interned
def relative_bias(
    heads: int,
    *,
    buckets: int = 32,
    distance: int = 128,
    bidirectional: bool = True,
    embedding_init: Callable[..., Any] = initializers.fan_in_normal,
    dtype: Any = None,
) -> Layer:
    """Bias scores by a learned number for each head and each bucket of distances.

    Parameters: embedding E [buckets, heads].

    Half of the buckets are for single distances, the rest grow as the logarithm up to `distance`,
    beyond which all distances share the last one. With `bidirectional`, half of the buckets are for
    keys behind the query.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (T5), JMLR 21, 2020. T5 does
    not scale its scores: `scale=1`.

    Args:
      heads: the number of heads.
      buckets: the number of buckets.
      distance: the distance from which all keys share a bucket.
      bidirectional: whether keys behind the query have their own buckets.
      embedding_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      dtype: the dtype of the embedding; float32 by default (float64 under `jax_enable_x64`).

    Returns:
      The layer, (queries [..., T], keys [..., S]) -> bias [..., heads, T, S], of integer positions.

    Raises:
      ValueError: a number is not a positive integer, or there are too few buckets.
      TypeError: in `apply`, the positions are not integers.
    """
    heads = size_of("relative_bias: heads", heads)
    buckets = size_of("relative_bias: buckets", buckets)
    distance = size_of("relative_bias: distance", distance)
    exact = buckets // (4 if bidirectional else 2)
    if exact < 1 or distance <= exact:
        raise ValueError(
            f"relative_bias: there must be at least {4 if bidirectional else 2} buckets, and "
            f"distance must exceed the {exact} exact ones, got {buckets=} and {distance=}"
        )
    label = f"relative_bias({heads})"

    def init(key, queries, keys):
        _check_positions(label, queries, keys)
        shape = (buckets, heads)
        return {"embedding": embedding_init(key, shape, dtype or jnp.result_type(float))}

    def fn(params, queries, keys):
        check_real(label, params)
        table = params["embedding"]
        ahead = _distances(label, queries, keys)
        places = _bucket(ahead, buckets, distance, exact, bidirectional)
        return jnp.moveaxis(rows(table, places, computed_dtype(params, table)), -1, -3)

    return dataclasses.replace(layer(init, fn, label=label), wide=("embedding",))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _bucket(ahead, buckets, distance, exact, bidirectional):
    """The bucket of each distance, as T5 numbers them."""
    half = buckets // 2 if bidirectional else buckets
    first = jnp.where(ahead > 0, half, 0) if bidirectional else jnp.zeros_like(ahead)
    away = jnp.abs(ahead) if bidirectional else jnp.maximum(-ahead, 0)
    ratio = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(distance / exact)
    large = exact + (ratio * (half - exact)).astype(ahead.dtype)
    return first + jnp.where(away < exact, away, jnp.minimum(large, half - 1))


def _distances(label: str, queries, keys):
    """keys - queries, [..., T, S]."""
    _check_positions(label, queries, keys)
    q, k = jnp.expand_dims(jnp.asarray(queries), -1), jnp.expand_dims(jnp.asarray(keys), -2)
    rank = max(q.ndim, k.ndim)
    q, k = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (q, k))
    return k - q


def _check_positions(label: str, queries, keys):
    for positions in (queries, keys):
        check_input(label, positions, kind=jnp.integer)
