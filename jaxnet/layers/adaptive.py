"""Pooling to a given size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, interned, layer, no_params
from jaxnet.layers.spatial import check_spatial, over_batch
from jaxnet.mixed import widened

__all__ = ["adaptive_avg_pool", "adaptive_max_pool"]


@interned
def adaptive_avg_pool(size: int | Sequence[int | None]) -> Layer:
    """Take the mean of each of `size` bins per spatial axis.

    Bin i of m along an axis of n elements has the elements floor(i n / m) to ceil((i+1) n / m) - 1,
    as in PyTorch. Bins overlap by one element if m does not divide n.

    Twins: equinox.nn.AdaptiveAvgPool2d, keras.layers.AdaptiveAveragePooling2D,
    torch.nn.AdaptiveAvgPool2d.

    Args:
      size: the number of bins: an int for images (two spatial axes), or one per spatial axis, (7,)
        for sequences; None keeps the size of that axis.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *size, C].

    Raises:
      ValueError: `size` has the wrong form; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of floats.
    """

    def mean(windows, inside, axis):
        shares = jnp.asarray(1 / inside.sum(axis), windows.dtype)
        return jnp.where(inside, windows, 0).sum(axis) * shares

    def tiled(x, window):
        return ops.avg_pool(x, window)

    return _adaptive("adaptive_avg_pool", size, mean, tiled, jnp.floating)


@interned
def adaptive_max_pool(size: int | Sequence[int | None]) -> Layer:
    """Take the largest element of each of `size` bins per spatial axis.

    The bins are those of `adaptive_avg_pool`. The gradient goes to the first of the largest
    elements in row-major order, as in PyTorch. x may hold integers.

    Twins: equinox.nn.AdaptiveMaxPool2d, keras.layers.AdaptiveMaxPooling2D,
    torch.nn.AdaptiveMaxPool2d.

    Args:
      size: as in `adaptive_avg_pool`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *size, C].

    Raises:
      ValueError: `size` has the wrong form; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of real numbers.
    """

    def largest(windows, inside, axis):
        floating = jnp.issubdtype(windows.dtype, jnp.floating)
        least = -jnp.inf if floating else jnp.iinfo(windows.dtype).min
        # Each bin begins with elements, so of equal elements the first one is never padding.
        windows = jnp.where(inside, windows, jnp.asarray(least, windows.dtype))
        first = jnp.argmax(lax.stop_gradient(windows), axis, keepdims=True)
        taps = lax.broadcasted_iota(first.dtype, windows.shape, axis)
        # The sum has one element that is not zero.
        return jnp.where(taps == first, windows, 0).sum(axis, dtype=windows.dtype)

    return _adaptive("adaptive_max_pool", size, largest, ops.max_pool, jnp.number)


def _adaptive(
    name: str, size: Any, reduce: Callable[..., Any], tiled: Callable[..., Any], kind: Any
) -> Layer:
    try:
        sizes = (size, size) if np.ndim(size) == 0 else tuple(size)
        if not sizes:
            raise ValueError
        if size is None:
            raise TypeError
        sizes = tuple(None if n is None else size_of(name, n) for n in sizes)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: size must be a positive int, or one or None for each spatial axis as in "
            f"(7,), got {size!r}"
        ) from None
    rank = len(sizes)
    label = f"{name}({sizes[0] if sizes == sizes[:1] * 2 and sizes[0] else sizes})"

    def pooled(x):
        wanted = [m or n for m, n in zip(sizes, x.shape[1:-1], strict=True)]
        if all(n % m == 0 for n, m in zip(x.shape[1:-1], wanted, strict=True)):
            return tiled(x, [n // m for n, m in zip(x.shape[1:-1], wanted, strict=True)])
        dtype = x.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            x = widened(x)
        # The last axis comes first, so the first of the largest elements is the first in row-major
        # order.
        for axis in reversed(range(rank)):
            if wanted[axis] != x.shape[axis + 1]:
                x = _along(x, axis + 1, wanted[axis], reduce)
        return x.astype(dtype)

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        if 0 in x.shape[-rank - 1 : -1]:
            raise ValueError(f"{label}: there must be something to pool over, got {describe(x)}")
        return over_batch(pooled, x, rank)

    return layer(no_params, fn, label=label)


def _along(x, axis: int, bins: int, reduce: Callable[..., Any]):
    """Reduce the bins of one axis. `reduce` receives the elements of each bin along a new axis, and
    which of these are inside the bin.
    """
    size = x.shape[axis]
    starts = np.arange(bins) * size // bins
    ends = -(-np.arange(1, bins + 1) * size // bins)
    at = starts[:, None] + np.arange((ends - starts).max())
    taken = jnp.take(x, np.minimum(at, size - 1).reshape(-1), axis=axis, mode="clip")
    windows = taken.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])
    inside = at < ends[:, None]
    inside = inside.reshape((1,) * axis + inside.shape + (1,) * (x.ndim - axis - 1))
    return reduce(windows, inside, axis + 1)
