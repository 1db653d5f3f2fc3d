"""Pooling as maxima and sums of shifted slices.

On a CPU, gradients of XLA's reduce-window are 3 to 100 times slower.

Short windows are unrolled, axis by axis. A long window along an axis is combined from windows of
half its length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet.ops.geometry import (
    Geometry,
    pad_spatial,
    resolve_padding,
    slice_windows,
    split_windows,
)
from jaxnet.ops.pool_geometry import counts_along, pool_geometry

__all__ = ["avg_pool", "max_pool", "sum_pool"]

# Taps per window: a larger window is pooled axis by axis, with h + w slices instead of h w. This is
# faster from 9 taps on.
AT_ONCE = 4
# Taps along one axis: longer windows are combined from windows of half the length, with 2 log2(w)
# slices instead of w.
LONG = 4


def max_pool(
    x: jax.Array,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> jax.Array:
    """Take the largest element of each window, y[n, o, c] = max over w of x[n, o s + w d - lo, c].

    The gradient goes to one element of each window: the first of the largest in row-major order, as
    in PyTorch and in XLA's own gradient of a window maximum (`jnp.max` shares it equally). Padding
    is never the largest. A window with a NaN gives NaN.

    Args:
      x: real numbers of any dtype, [N, *spatial, C].
      window: the size along each spatial axis; one int for all of them, or one per axis.
      strides: s, the step between windows; the window by default, so windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), "SAME_LOWER", an
        int, or (before, after) per spatial axis.
      dilation: d, the step between the elements of a window; one int for all axes, or one per axis.
      ceil_mode: True rounds the number of windows up (`pool_geometry`).

    Returns:
      y [N, *outputs, C] in the dtype of x, with outputs = floor((size + before + after - (window -
      1) d - 1) / s) + 1.

    Raises:
      TypeError: x holds complex numbers or booleans.
      ValueError: shapes or options do not fit.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"max_pool: x must hold real numbers, got {x.dtype}")
    g = pool_geometry("max_pool", x.shape, window, strides, padding, dilation, ceil_mode)
    for part in _by_axis(g):
        x = _window_max(x, part)
    return x


def avg_pool(
    x: jax.Array,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_padding: bool = False,
) -> jax.Array:
    """Take the mean of each window, y[n, o, c] = mean over w of x[n, o s + w d - lo, c].

    The mean is over the elements of x, and padding does not count, as in TensorFlow, in Keras and
    in PyTorch with count_include_pad=False. The mean of a constant is therefore that constant, also
    at the edges. Flax and PyTorch count the zeros by default.

    Args:
      x: floating or complex numbers, [N, *spatial, C].
      window: the size along each spatial axis; one int for all of them, or one per axis.
      strides: s, the step between windows; the window by default, so windows do not overlap.
      padding: "VALID" (whole windows only), "SAME" (ceil(size / stride) outputs), "SAME_LOWER", an
        int, or (before, after) per spatial axis.
      dilation: d, the step between the elements of a window; one int for all axes, or one per axis.
      ceil_mode: True rounds the number of windows up (`pool_geometry`).
      count_padding: True counts the zeros of the padding, as PyTorch's count_include_pad.

    Returns:
      y [N, *outputs, C] in the dtype of x, with outputs = floor((size + before + after - (window -
      1) d - 1) / s) + 1.

    Raises:
      TypeError: x holds integers or booleans.
      ValueError: shapes or options do not fit.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"avg_pool: x must be floating, got {x.dtype}; convert it, as in x.astype(jnp.float32)"
        )
    g = pool_geometry("avg_pool", x.shape, window, strides, padding, dilation, ceil_mode)
    ends = list(g.sizes)
    starts = [0] * g.rank
    if count_padding:
        plain = resolve_padding("avg_pool", padding, g.sizes, g.window, g.strides, g.dilation)
        starts = [-lo for lo, _ in plain]
        ends = [size + hi for size, (_, hi) in zip(g.sizes, plain, strict=True)]
    narrow = x.dtype in (jnp.bfloat16, jnp.float16)
    total = _sums(x.astype(jnp.float32) if narrow else x, g)
    # The number of elements of each window that count is a product over the axes, which is known at
    # trace time. A window with gaps may have none.
    counts = functools.reduce(np.multiply.outer, counts_along(g, starts, ends))
    scale = lax.broadcast_in_dim(
        jnp.asarray(1 / np.maximum(counts, 1), total.dtype), total.shape, range(1, g.rank + 1)
    )
    return (total * scale).astype(x.dtype)


def sum_pool(
    x: jax.Array,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None = None,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> jax.Array:
    """Take the sum of each window, y[n, o, c] = sum over w of x[n, o s + w d - lo, c].

    Args:
      x: floating or complex numbers, [N, *spatial, C].
      window: as in `max_pool`.
      strides: as in `max_pool`.
      padding: as in `max_pool`.
      dilation: as in `max_pool`.
      ceil_mode: as in `max_pool`.

    Returns:
      y [N, *outputs, C] in the dtype of x.

    Raises:
      ValueError: shapes or options do not fit.
    """
    g = pool_geometry("sum_pool", x.shape, window, strides, padding, dilation, ceil_mode)
    return _sums(x, g)


def _sums(x, g: Geometry):
    for part in [g] if g.apart else _by_axis(g):
        x = _window_sum(x, part)
    return x


def _by_axis(g: Geometry) -> list[Geometry]:
    """The pooling in one step, or in one step per axis. The last axis comes first, so the first of
    the largest elements is the first in row-major order.
    """
    if len(g.taps) <= AT_ONCE:
        return [g]
    parts = []
    for axis in reversed(range(g.rank)):
        here = [i == axis for i in range(g.rank)]
        parts.append(
            g._replace(
                sizes=g.sizes[: axis + 1] + g.outputs[axis + 1 :],
                window=tuple(w if h else 1 for w, h in zip(g.window, here, strict=True)),
                strides=tuple(s if h else 1 for s, h in zip(g.strides, here, strict=True)),
                padding=tuple(p if h else (0, 0) for p, h in zip(g.padding, here, strict=True)),
                dilation=tuple(d if h else 1 for d, h in zip(g.dilation, here, strict=True)),
            )
        )
    return parts


def _halves(g: Geometry) -> list[Geometry]:
    """Split a pooling with a long window along one axis into steps of two taps each.

    The maximum over 2 m elements is that of two maxima over m. The last two windows may overlap,
    because an element may count twice. Without gaps (d = 1), for x from 0 to n - 1, the maxima over
    m elements are at positions -lo to n + hi - m, and windows with at least one element of x are at
    positions -(m - 1) to n - 1. Only positions in both ranges are kept, so every window has an
    element of x.
    """
    axis = max(range(g.rank), key=lambda i: g.window[i])
    taps, size, (lo, hi), gap = g.window[axis], g.sizes[axis], g.padding[axis], g.dilation[axis]

    def positions(m: int) -> tuple[int, int]:
        reach = (m - 1) * gap
        return max(-reach, -lo), min(size - 1, size + hi - 1 - reach)

    def step(m: int, apart: int, strides) -> Geometry:
        """From the maxima over m elements to those over m + apart."""
        (first, last), (start, end) = positions(m), positions(m + apart)
        if m + apart == taps:
            start, end = -lo, size + hi - 1 - (taps - 1) * gap
        pads = first - start, end + apart * gap - last
        return g._replace(
            sizes=_with(g.sizes, axis, last - first + 1),
            window=_with(g.window, axis, 2),
            strides=strides,
            padding=_with(g.padding, axis, pads),
            dilation=_with(g.dilation, axis, apart * gap),
        )

    steps, m = [], 1
    while 2 * m < taps:
        steps.append(step(m, m, (1,) * g.rank))
        m *= 2
    return [*steps, step(m, taps - m, g.strides)]


def _with(values: tuple, axis: int, value) -> tuple:
    return (*values[:axis], value, *values[axis + 1 :])


def _window_sum(x, g: Geometry):
    if g.apart:
        return split_windows(x, g).sum(g.tap_axes)
    axis = max(range(g.rank), key=lambda i: g.window[i])
    if g.window[axis] <= LONG:
        return functools.reduce(jnp.add, slice_windows(x, g))
    padded = pad_spatial(x, g.tight_padding)
    total = _running_sum(padded, g.window[axis], axis + 1, g.dilation[axis])
    return lax.slice_in_dim(total, 0, None, g.strides[axis], axis=axis + 1)


def _running_sum(x, taps: int, axis: int, gap: int):
    """The sums of `taps` elements along an axis, `gap` apart, each computed from two sums of half
    as many.
    """
    if taps == 1:
        return x
    half, apart = _running_sum(x, taps // 2, axis, gap), taps // 2 * gap
    total = lax.slice_in_dim(half, 0, -apart, axis=axis) + lax.slice_in_dim(
        half, apart, None, axis=axis
    )
    if taps % 2 == 0:
        return total
    return lax.slice_in_dim(total, 0, -gap, axis=axis) + lax.slice_in_dim(
        x, (taps - 1) * gap, None, axis=axis
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _window_max(x, g: Geometry):
    if g.apart:
        return split_windows(x, g, _least(x.dtype)).max(g.tap_axes)
    if max(g.window) > LONG:
        return _max_by_halves(x, g)
    return functools.reduce(jnp.maximum, slice_windows(x, g, _least(x.dtype)))


def _max_by_halves(x, g: Geometry):
    return functools.reduce(_window_max, _halves(g), x)


@_window_max.defjvp
def _window_max_jvp(g: Geometry, primals, tangents):
    """The tangent of the largest element. It is linear in the tangents, so JAX derives all modes
    from it; its transpose sends a cotangent to that element.

    Elements are compared with each other, never with the result: if another program computes the
    result once more, it may differ from every element in its last bit. The gradient of `jnp.max`
    may be lost in this way.
    """
    if max(g.window) > LONG:
        return jax.jvp(lambda x: _max_by_halves(x, g), primals, tangents)
    (x,), (tangent,) = primals, tangents
    y = _window_max(x, g)
    # The padding must be less than every element, including -inf. Masking it instead would be three
    # times slower.
    if max(max(g.padding)) > 0 and jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.maximum(x, jnp.finfo(x.dtype).min)
    largest, *others = slice_windows(x, g, _least(x.dtype))
    if len(others) == 1:
        second = _is_larger(others[0], largest)
        return y, lax.select(second, *reversed(slice_windows(tangent, g)))
    taken = jnp.zeros_like(largest, jnp.int8 if len(g.taps) <= 127 else jnp.int32)
    for tap, window in enumerate(others, 1):
        larger = _is_larger(window, largest)
        largest = lax.select(larger, window, largest)
        taken = lax.select(larger, lax.full_like(taken, tap), taken)
    windows = slice_windows(tangent, g)
    none = lax.full_like(windows[0], 0)
    parts = [lax.select(taken == tap, w, none) for tap, w in enumerate(windows)]
    return y, functools.reduce(jnp.add, parts)


def _is_larger(window, largest):
    """Whether an element replaces the largest so far. NaN always does."""
    return (window > largest) | (window != window)


def _least(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
