"""Pooling: one number for each window, or for all of an image."""

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
    """The largest element of each window, y[o, c] = max over w of x[o s + w - lo, c].

    [..., *spatial, C] -> [..., *outputs, C]

    The gradient goes to the first of the largest, in row-major order, as in PyTorch. Padding never
    wins. All axes before the spatial ones are batch axes.

    Args:
      window: an int for images (two spatial axes), or its size along each spatial axis: (2,) for
        sequences, (2, 2, 2) for volumes.
      strides: s, the step between windows; the window by default, so that windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), an int, or
        (before, after) for each axis; smaller than the window.

    Raises: ValueError for options of the wrong form, a missing axis, or where no window fits.
    Numbers may be integers.
    """
    return _pool("max_pool", ops.max_pool, jnp.number, window, strides, padding)


def avg_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer:
    """The mean of each window, y[o, c] = mean over w of x[o s + w - lo, c].

    [..., *spatial, C] -> [..., *outputs, C]

    Only elements of x count, not padding: as in Keras, and in PyTorch with count_include_pad=False.

    Args, Raises: as `max_pool`; TypeError for inputs that are not floats.
    """
    return _pool("avg_pool", ops.avg_pool, jnp.floating, window, strides, padding)


def global_max_pool(rank: int = 2) -> Layer:
    """The largest element of each feature over the `rank` axes before the last.

    [..., *spatial, C] -> [..., C]

    The gradient is shared equally by the largest, as that of `jax.numpy.max`.

    Args, Raises: as `global_avg_pool`; numbers may be integers.
    """
    return _global("global_max_pool", jnp.max, jnp.number, rank)


def global_avg_pool(rank: int = 2) -> Layer:
    """The mean of each feature over the `rank` axes before the last.

    [..., *spatial, C] -> [..., C]

    Args: rank: 1 for sequences, 2 for images, 3 for volumes; all axes before those are batch axes.

    Raises: ValueError for a missing or an empty axis, TypeError for inputs that are not floats.
    """
    return _global("global_avg_pool", jnp.mean, jnp.floating, rank)


def _pool(name: str, pool: Callable[..., Any], kind, window, strides, padding) -> Layer:
    window, size = spatial_window(name, "window", window)
    rank, label = len(window), f"{name}({size})"
    strides = window if strides is None else sizes_along(f"{label}: strides", strides, rank)
    padding = pads_along(f"{label}: padding", padding, rank)

    def check_windows(sizes):
        pool_geometry(label, (1, *sizes, 1), window, strides, padding)

    check_windows((ENDLESS,) * rank)  # options of the wrong form fail here

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        with telling_how_read(x, rank):
            check_windows(x.shape[-rank - 1 : -1])
        return over_batch(
            functools.partial(pool, window=window, strides=strides, padding=padding), x, rank
        )

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
