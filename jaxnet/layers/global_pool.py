"""Pooling over all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, interned, layer, no_params
from jaxnet.layers.pool import exponent, power, root
from jaxnet.layers.spatial import check_spatial
from jaxnet.mixed import widened

__all__ = ["global_avg_pool", "global_lp_pool", "global_max_pool"]


@interned
def global_max_pool(rank: int = 2) -> Layer:
    """Take the largest element of each feature over the `rank` axes before the last.

    Equal largest elements share the gradient equally, as with `jax.numpy.max`. x may hold integers.

    Twins: keras.layers.GlobalMaxPooling2D.

    Args:
      rank: the number of spatial axes: 1 for sequences, 2 for images, 3 for volumes. All axes
        before those are batch axes.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., C].

    Raises:
      ValueError: `rank` is not a positive integer; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of real numbers.
    """
    return _global("global_max_pool", jnp.max, jnp.number, rank)


@interned
def global_avg_pool(rank: int = 2) -> Layer:
    """Take the mean of each feature over the `rank` axes before the last.

    Twins: keras.layers.GlobalAveragePooling2D.

    Args:
      rank: the number of spatial axes: 1 for sequences, 2 for images, 3 for volumes. All axes
        before those are batch axes.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., C].

    Raises:
      ValueError: `rank` is not a positive integer; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of floats.
    """
    return _global("global_avg_pool", jnp.mean, jnp.floating, rank)


@interned
def global_lp_pool(p: float, rank: int = 2) -> Layer:
    """Take the norm of each feature over the `rank` axes before the last.

    y[c] = (sum over i of |x[i, c]|^p)^(1 / p). The gradient at zero is zero.

    Source: the operator GlobalLpPool of ONNX.

    Args:
      p: the exponent, a finite number of at least 1.
      rank: the number of spatial axes: 1 for sequences, 2 for images, 3 for volumes. All axes
        before those are batch axes.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., C].

    Raises:
      ValueError: `p` or `rank` is out of range; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of floats.
    """
    p = exponent("global_lp_pool", p)

    def norm(x, axis):
        return root(power(widened(x), p).sum(axis), p).astype(x.dtype)

    return _global("global_lp_pool", norm, jnp.floating, rank, f"{p:g}, ")


def _global(name: str, reduce: Callable[..., Any], kind, rank: int, before: str = "") -> Layer:
    rank = size_of(f"{name}: rank", rank)
    label = f"{name}({before}{rank})"

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        if 0 in x.shape[-rank - 1 : -1]:
            raise ValueError(f"{label}: there must be something to pool over, got {describe(x)}")
        return reduce(x, axis=tuple(range(-rank - 1, -1)))

    return layer(no_params, fn, label=label)
