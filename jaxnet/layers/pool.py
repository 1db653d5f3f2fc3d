"""Pooling: one number per window, or per image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, layer, no_params
from jaxnet.layers.spatial import (
    ENDLESS,
    check_spatial,
    over_batch,
    pads_along,
    sizes_along,
    spatial_window,
    telling_how_read,
)
from jaxnet.ops.pooling import pool_geometry

__all__ = ["avg_pool", "global_avg_pool", "global_max_pool", "max_pool"]


def max_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer:
    """Take the largest element of each window, y[o, c] = max over w of x[o s + w - lo, c].

    The gradient goes to the first of the largest elements in row-major order, as in PyTorch.
    Padding is never the largest. All axes before the spatial ones are batch axes. x may hold
    integers.

    Args:
      window: an int for images (two spatial axes), or the size along each spatial axis: (2,) for
        sequences, (2, 2, 2) for volumes.
      strides: s, the step between windows; the window by default, so windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), an int, or
        (before, after) per spatial axis; smaller than the window.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of real numbers.
    """
    return _pool("max_pool", ops.max_pool, jnp.number, window, strides, padding)


def avg_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer:
    """Take the mean of each window, y[o, c] = mean over w of x[o s + w - lo, c].

    Padding does not count: the mean is over the elements of x, as in Keras, and in PyTorch with
    count_include_pad=False. All axes before the spatial ones are batch axes.

    Args:
      window: an int for images (two spatial axes), or the size along each spatial axis: (2,) for
        sequences, (2, 2, 2) for volumes.
      strides: s, the step between windows; the window by default, so windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), an int, or
        (before, after) per spatial axis; smaller than the window.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of floats.
    """
    return _pool("avg_pool", ops.avg_pool, jnp.floating, window, strides, padding)


def global_max_pool(rank: int = 2) -> Layer:
    """Take the largest element of each feature over the `rank` axes before the last.

    Equal largest elements share the gradient equally, as with `jax.numpy.max`. x may hold integers.

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


def global_avg_pool(rank: int = 2) -> Layer:
    """Take the mean of each feature over the `rank` axes before the last.

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


def _pool(name: str, pool: Callable[..., Any], kind, window, strides, padding) -> Layer:
    window, size = spatial_window(name, "window", window)
    rank, label = len(window), f"{name}({size})"
    strides = window if strides is None else sizes_along(f"{label}: strides", strides, rank)
    padding = pads_along(f"{label}: padding", padding, rank)

    def check_windows(sizes):
        pool_geometry(label, (1, *sizes, 1), window, strides, padding)

    # Options of the wrong form fail here. Whether a window fits depends on x.
    check_windows((ENDLESS,) * rank)

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        with telling_how_read(x, rank):
            check_windows(x.shape[-rank - 1 : -1])
        pooled = functools.partial(pool, window=window, strides=strides, padding=padding)
        return over_batch(pooled, x, rank)

    return layer(no_params, fn, label=label)


def _global(name: str, reduce: Callable[..., Any], kind, rank: int) -> Layer:
    rank = size_of(f"{name}: rank", rank)
    label = f"{name}({rank})"

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        if 0 in x.shape[-rank - 1 : -1]:
            raise ValueError(f"{label}: there must be something to pool over, got {describe(x)}")
        return reduce(x, axis=tuple(range(-rank - 1, -1)))

    return layer(no_params, fn, label=label)
