"""Pooling that tells where the largest elements are, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import ops
from jaxnet.core import Layer, check_input, describe, interned, layer, no_params
from jaxnet.layers.pool import pool_options, pooling
from jaxnet.layers.spatial import (
    check_spatial,
    pads_along,
    sizes_along,
    spatial_window,
    telling_how_read,
)
from jaxnet.mixed import widened

__all__ = ["max_pool_with_indices", "max_unpool"]


@interned
def max_pool_with_indices(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Layer:
    """Take the largest element of each window, as `max_pool`, and its position.

    The index of position (h, w) is h W + w, for spatial axes of sizes H and W; in general, the
    position in row-major order over the spatial axes. Of equal elements, the first one counts, as
    in PyTorch.

    Twins: torch.nn.MaxPool2d with return_indices=True.

    Args:
      window: as in `max_pool`.
      strides: as in `max_pool`.
      padding: as in `max_pool`.
      dilation: as in `max_pool`.
      ceil_mode: as in `max_pool`.

    Returns:
      The layer, x [..., *spatial, C] -> (y [..., *outputs, C], indices int32 [..., *outputs, C]).

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of floats.
    """
    name = "max_pool_with_indices"
    options = pool_options(name, window, strides, padding, dilation, ceil_mode)
    values = pooling(options, ops.max_pool, jnp.floating)
    indices = pooling(options, _positions, jnp.floating)

    def fn(params, x):
        return values(params, x), indices(params, lax.stop_gradient(x))

    return layer(no_params, fn, label=options["label"])


def _positions(x, **options):
    """The positions of the largest elements. The derivative of a maximum in the direction of the
    coordinates is the coordinate of the element that was taken.
    """
    x, sizes = widened(x), x.shape[1:-1]
    _, derivative = jax.linearize(lambda x: ops.max_pool(x, **options), x)
    found: Any = 0
    for axis, size in enumerate(sizes):
        # Coordinates are exact in float32, positions need not be. The zeros have the sharding of x.
        coordinates = lax.broadcasted_iota(jnp.int32, (1, *sizes, x.shape[-1]), axis + 1)
        along = derivative(jnp.zeros_like(x) + coordinates.astype(x.dtype)).astype(jnp.int32)
        found = found * size + along
    return found


@interned
def max_unpool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: int | Sequence[tuple[int, int]] = 0,
    output_size: int | Sequence[int] | None = None,
) -> Layer:
    """Put each element back to its position; all other elements are zero.

    y[indices[o, c], c] = x[o, c], the inverse of `max_pool_with_indices` but for the elements that
    it left out. Indices behind the last position are ignored.

    Twins: torch.nn.MaxUnpool2d.

    Args:
      window: that of the pooling.
      strides: those of the pooling; the window by default.
      padding: that of the pooling, an int or (before, after) per spatial axis.
      output_size: the size of y along each spatial axis; one int for all, or one per axis. By
        default (size - 1) strides + window - before - after.

    Returns:
      The layer, (x [..., *spatial, C], indices [..., *spatial, C]) -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or the shape of
        `indices` is not that of x.
      TypeError: in `apply`, x is not an array of floats, or `indices` not one of integers.
    """
    window, text = spatial_window("max_unpool", "window", window)
    rank, label = len(window), f"max_unpool({text})"
    strides = window if strides is None else sizes_along(f"{label}: strides", strides, rank)
    pads = pads_along(f"{label}: padding", padding, rank)
    if isinstance(pads, str):
        raise ValueError(
            f"{label}: padding must be an int or (before, after) per spatial axis, got {padding!r}"
        )
    wanted = (
        None if output_size is None else sizes_along(f"{label}: output_size", output_size, rank)
    )

    def outputs(sizes):
        if wanted is not None:
            return wanted
        facts = zip(sizes, strides, window, pads, strict=True)
        found = tuple((n - 1) * s + w - lo - hi for n, s, w, (lo, hi) in facts)
        if min(found) < 1:
            raise ValueError(
                f"{label}: nothing is left of spatial axes {sizes} with {padding=}; take less "
                "padding, or give output_size"
            )
        return found

    def fn(params, x, indices):
        check_spatial(label, x, rank)
        check_input(f"{label}: indices", indices, kind=jnp.integer)
        if x.shape != indices.shape:
            raise ValueError(
                f"{label}: the indices must have the shape of x, got {describe(x)} and "
                f"{describe(indices)}"
            )
        with telling_how_read(x, rank):
            sizes = outputs(x.shape[-rank - 1 : -1])
        return _put(x, indices, sizes, rank)

    return layer(no_params, fn, label=label)


def _put(x, indices, sizes: tuple[int, ...], rank: int):
    """x [..., *spatial, C] at the positions of `indices` in zeros [..., *sizes, C]."""
    batch, channels = x.shape[: -rank - 1], x.shape[-1]
    flat = (math.prod(batch), math.prod(x.shape[-rank - 1 : -1]), channels)

    def put(values, at):
        zeros = jnp.zeros(math.prod(sizes), values.dtype)
        return zeros.at[at].set(values, mode="drop", wrap_negative_indices=False)

    each = jax.vmap(jax.vmap(put, in_axes=-1, out_axes=-1))
    return each(x.reshape(flat), indices.reshape(flat)).reshape(*batch, *sizes, channels)
