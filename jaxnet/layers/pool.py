"""Pooling: one number per window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import ops
from jaxnet.core import Layer, interned, layer, no_params
from jaxnet.layers.spatial import (
    ENDLESS,
    check_spatial,
    over_batch,
    pads_along,
    sizes_along,
    spatial_window,
    telling_how_read,
)
from jaxnet.mixed import widened
from jaxnet.ops.pool_geometry import pool_geometry

__all__ = ["avg_pool", "lp_pool", "max_pool", "min_pool"]


@interned
def max_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Layer:
    """Take the largest element of each window, y[o, c] = max over w of x[o s + w d - lo, c].

    The gradient goes to the first of the largest elements in row-major order, as in PyTorch.
    Padding is never the largest; a window with gaps that meets nothing else gives -inf. All axes
    before the spatial ones are batch axes. x may hold integers.

    Twins: flax.linen.max_pool, equinox.nn.MaxPool2d, keras.layers.MaxPooling2D, torch.nn.MaxPool2d.

    Args:
      window: an int for images (two spatial axes), or the size along each spatial axis: (2,) for
        sequences, (2, 2, 2) for volumes.
      strides: s, the step between windows; the window by default, so windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs, the odd element
        after), "SAME_LOWER" (the odd element before), an int, or (before, after) per spatial axis;
        smaller than the window.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      ceil_mode: True rounds the number of windows up instead of down. As in PyTorch and ONNX, a
        window that would start behind the input is left out.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of real numbers.
    """
    options = pool_options("max_pool", window, strides, padding, dilation, ceil_mode)
    return _pool(options, ops.max_pool, jnp.number)


@interned
def min_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Layer:
    """Take the smallest element of each window, y[o, c] = min over w of x[o s + w d - lo, c].

    The gradient goes to the first of the smallest elements in row-major order. Padding is never the
    smallest. x may hold integers.

    Twins: flax.linen.min_pool.

    Args:
      window: as in `max_pool`.
      strides: as in `max_pool`.
      padding: as in `max_pool`.
      dilation: as in `max_pool`.
      ceil_mode: as in `max_pool`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of real numbers.
    """
    options = pool_options("min_pool", window, strides, padding, dilation, ceil_mode)

    def smallest(x, **options):
        # The complement reverses the order of all integers, also of those without a sign.
        reverse = jnp.negative if jnp.issubdtype(x.dtype, jnp.floating) else jnp.invert
        return reverse(ops.max_pool(reverse(x), **options))

    return _pool(options, smallest, jnp.number)


@interned
def avg_pool(
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_padding: bool = False,
) -> Layer:
    """Take the mean of each window, y[o, c] = mean over w of x[o s + w d - lo, c].

    Padding does not count by default: the mean is over the elements of x, as in Keras, and in
    PyTorch with count_include_pad=False. With `count_padding`, the mean is over the elements of x
    and the zeros of the padding, but not over what `ceil_mode` adds, as in PyTorch and ONNX. All
    axes before the spatial ones are batch axes.

    Twins: flax.linen.avg_pool, equinox.nn.AvgPool2d, keras.layers.AveragePooling2D,
    torch.nn.AvgPool2d.

    Args:
      window: as in `max_pool`.
      strides: as in `max_pool`.
      padding: as in `max_pool`.
      dilation: as in `max_pool`.
      ceil_mode: as in `max_pool`.
      count_padding: True counts the zeros of the padding.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of floats.
    """
    options = pool_options("avg_pool", window, strides, padding, dilation, ceil_mode)

    def mean(x, **options):
        return ops.avg_pool(x, count_padding=bool(count_padding), **options)

    return _pool(options, mean, jnp.floating)


@interned
def lp_pool(
    p: float,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Layer:
    """Take the norm of each window, y[o, c] = (sum over w of |x[o s + w d - lo, c]|^p)^(1 / p).

    Padding is zero. The gradient of a window of zeros is zero. PyTorch does not take absolute
    values, so it agrees for even p, and for x >= 0; ONNX does.

    Source: the operator LpPool of ONNX.

    Twins: torch.nn.LPPool2d.

    Args:
      p: the exponent, a finite number of at least 1.
      window: as in `max_pool`.
      strides: as in `max_pool`.
      padding: as in `max_pool`.
      dilation: as in `max_pool`.
      ceil_mode: as in `max_pool`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or no window fits.
      TypeError: in `apply`, x is not an array of floats.
    """
    p = exponent("lp_pool", p)
    options = pool_options("lp_pool", window, strides, padding, dilation, ceil_mode, f"{p:g}, ")

    def norm(x, **options):
        return root(ops.sum_pool(power(widened(x), p), **options), p).astype(x.dtype)

    return _pool(options, norm, jnp.floating)


def exponent(name: str, p: Any) -> float:
    """The exponent of a norm as a float. Raises ValueError if it is not a number of at least 1."""
    is_number = isinstance(p, int | float | np.number) and not isinstance(p, bool)
    if not is_number or not 1 <= p < math.inf:
        raise ValueError(f"{name}: p must be a finite number of at least 1, got {p!r}")
    return float(p)


def power(x: jax.Array, p: float) -> jax.Array:
    """|x|^p of floats x [...]. Even powers need no absolute value, which has no derivative at 0."""
    return x ** int(p) if p % 2 == 0 else jnp.abs(x) ** (int(p) if p == int(p) else p)


def root(x: jax.Array, p: float) -> jax.Array:
    """x^(1 / p) of x >= 0 [...], with gradient 0 at 0."""
    positive = x > 0
    safe = jnp.where(positive, x, 1)
    return jnp.where(positive, jnp.sqrt(safe) if p == 2 else safe ** (1 / p), 0)


def pool_options(
    name: str, window, strides, padding, dilation, ceil_mode, before: str = ""
) -> dict[str, Any]:
    """Check the options of a pooling; returns them as `jaxnet.ops` takes them, and the label."""
    window, size = spatial_window(name, "window", window)
    rank, label = len(window), f"{name}({before}{size})"
    options: dict[str, Any] = dict(
        window=window,
        strides=window if strides is None else sizes_along(f"{label}: strides", strides, rank),
        padding=pads_along(f"{label}: padding", padding, rank),
        dilation=sizes_along(f"{label}: dilation", dilation, rank),
        ceil_mode=bool(ceil_mode),
    )
    # Options of the wrong form fail here. Whether a window fits depends on x.
    pool_geometry(label, (1, *(ENDLESS,) * rank, 1), **options)
    return options | {"label": label}


def pooling(
    options: dict[str, Any], pool: Callable[..., Any], kind: Any
) -> Callable[[Any, Any], Any]:
    """The function (params, x) of a pooling. `pool` is applied to x with one batch axis."""
    options = dict(options)
    label, rank = options.pop("label"), len(options["window"])

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        with telling_how_read(x, rank):
            pool_geometry(label, (1, *x.shape[-rank - 1 : -1], 1), **options)
        return over_batch(lambda x: pool(x, **options), x, rank)

    return fn


def _pool(options: dict[str, Any], pool: Callable[..., Any], kind: Any) -> Layer:
    return layer(no_params, pooling(options, pool, kind), label=options["label"])
