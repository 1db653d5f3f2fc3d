"""Pooling: one number for each window, or for all of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from jaxnet import ops
from jaxnet.core import Layer, check_input, layer

__all__ = ["avg_pool", "global_avg_pool", "global_max_pool", "max_pool"]


def max_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer:
    """The largest element of each window.   [..., *spatial, C] -> [..., *outputs, C]

    The gradient goes to the first of the largest, in row-major order. Padding never wins. All axes before the spatial ones
    are batch axes.

    Args:
      window: an int for images (two spatial axes), or its size along each spatial axis: (2,) for sequences, (2, 2, 2) for
        volumes.
      strides: the step between windows; the window by default, so that windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), an int, or (before, after) for each axis.

    Raises: ValueError for too few axes or options that do not fit.
    """
    return _pool("max_pool", ops.max_pool, window, strides, padding, kind=object)


def avg_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
) -> Layer:
    """The mean of each window over the elements that are in x, not of padding.   [..., *spatial, C] -> [..., *outputs, C]

    Args, Raises: as `max_pool`; TypeError for inputs that are not floats.
    """
    return _pool("avg_pool", ops.avg_pool, window, strides, padding, kind=jnp.floating)


def global_max_pool(rank: int = 2) -> Layer:
    """The largest element of each feature over the last `rank` spatial axes.   [..., *spatial, C] -> [..., C]"""
    return _global("global_max_pool", jnp.max, rank, kind=object)


def global_avg_pool(rank: int = 2) -> Layer:
    """The mean of each feature over the last `rank` spatial axes.   [..., *spatial, C] -> [..., C]"""
    return _global("global_avg_pool", jnp.mean, rank, kind=jnp.floating)


def _pool(name: str, pool: Callable, window, strides, padding, kind) -> Layer:
    window = (window, window) if isinstance(window, int) else tuple(window)
    label = f"{name}({window[0] if len(window) == 2 and len(set(window)) == 1 else window})"
    rank = len(window)

    def fn(params, x):
        check_input(label, x, rank=rank + 1, kind=kind)
        batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
        y = pool(x.reshape(-1, *image), window, strides=strides, padding=padding)
        return y.reshape(*batch, *y.shape[1:])

    return layer(None, fn, label=label)


def _global(name: str, reduce: Callable, rank: int, kind) -> Layer:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name}: rank must be a positive int, the number of spatial axes, got {rank!r}")

    def fn(params, x):
        check_input(f"{name}({rank})", x, rank=rank + 1, kind=kind)
        return reduce(x, axis=tuple(range(-rank - 1, -1)))

    return layer(None, fn, label=f"{name}({rank})")
