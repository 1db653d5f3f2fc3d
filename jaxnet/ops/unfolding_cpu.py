"""Changes of variables for `convolution_cpu`: windows unfolded into features, loops over taps.

Each form takes `inner`, the map of the convolution over the remaining axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet.ops.geometry import Geometry, pad_spatial, slice_windows, split_windows
from jaxnet.ops.trilinear import others, shape_of

# Windows with more taps are combined from short ones.
WRITTEN_OUT = 5

# (role, a, b, *, geometry) -> the map of the convolution called `role`
Inner = Callable[..., jax.Array]


def substitute(role: str, a, b, g: Geometry, maps, inner):
    """The map of T called `role`, computed by that of T'. `maps` are X, K and Y by role, and
    inner(role, a', b') is the map of T'.
    """
    mapped = [maps[name](operand) for name, operand in zip(others(role), (a, b), strict=True)]
    spec = jax.ShapeDtypeStruct(shape_of(role, a, b, g), a.dtype)
    return jax.linear_transpose(maps[role], spec)(inner(role, *mapped))[0]


def unfolded(role: str, a, b, g: Geometry, inner: Inner, *, axes: int):
    """Unfold the windows along the first `axes` axes into features, which leaves a convolution over
    the other axes.

    x [N, I.., rest, C] -> [N O.., rest, w.. C]; kernel [w.., rest, C, F] -> [rest, w.. C, F]; y ->
    [N O.., rest, F].
    """
    first, rest = g.axes(slice(axes)), g.axes(slice(axes, None))

    def unfold(x):
        if first.apart:
            x = jnp.moveaxis(split_windows(x, first), first.tap_axes, range(-axes - 1, -1))
            patches = x.reshape(*x.shape[: x.ndim - axes - 1], math.prod(x.shape[-axes - 1 :]))
        else:
            patches = side_by_side(x, first)
        return joined(patches, axes)

    def flatten(k):
        k = k.reshape(math.prod(first.window), *k.shape[axes:])
        return jnp.moveaxis(k, 0, -3).reshape(*rest.window, k.shape[0] * k.shape[-2], k.shape[-1])

    maps = {"input": unfold, "kernel": flatten, "output": lambda y: joined(y, axes)}
    return substitute(role, a, b, g, maps, functools.partial(inner, geometry=rest))


def side_by_side(x, g: Geometry):
    """The elements of each window side by side, as features: [N, I, .., C] -> [N, O, .., w C]."""
    taps, step = g.window[0], g.dilation[0]
    if g.rank > 1 or taps <= WRITTEN_OUT:
        return jnp.concatenate(slice_windows(x, g), -1)
    # A long window consists of short ones, which takes about 2 sqrt(w) slices instead of w and
    # compiles faster.
    few, channels, reach = math.isqrt(taps), x.shape[-1], (g.outputs[0] - 1) * g.strides[0] + 1
    x = pad_spatial(x, g.tight_padding)
    short = Geometry((x.shape[1],), (few,), (1,), ((0, 0),), (step,))
    x = jnp.concatenate(slice_windows(x, short), -1)

    def at(tap):
        return lax.slice_in_dim(x, tap * step, tap * step + reach, g.strides[0], axis=1)

    whole = [at(tap) for tap in range(0, taps - few + 1, few)]
    rest = taps % few
    if rest:
        last = at(taps - few)
        whole.append(lax.slice_in_dim(last, (few - rest) * channels, few * channels, axis=-1))
    return jnp.concatenate(whole, -1)


def joined(x, axes: int):
    """The first `axes` spatial axes joined with the batch."""
    return x.reshape(math.prod(x.shape[: axes + 1]), *x.shape[axes + 1 :])


def by_taps(role: str, a, b, g: Geometry, inner: Inner):
    """Loop over the taps of the first axis; each tap is a convolution over the other axes.

    This serves long windows: neither the program nor the patches grow with the window.
    """
    first, rest = g.axes(slice(1)), g.axes(slice(1, None))
    (taps,), (outputs,) = first.window, first.outputs
    (stride,), (step,) = first.strides, first.dilation
    reach = (outputs - 1) * stride + 1

    def rows(x, tap):
        x = lax.dynamic_slice_in_dim(x, tap * step, reach, axis=1, allow_negative_indices=False)
        return joined(lax.slice_in_dim(x, 0, reach, stride, axis=1), 1)

    def part(k, tap):
        return lax.dynamic_index_in_dim(k, tap, keepdims=False, allow_negative_indices=False)

    def zeros(images, *shape):
        return jnp.zeros((images.shape[0], *shape), images.dtype)

    if role == "kernel":
        x, y = pad_spatial(a, first.tight_padding), joined(b, 1)
        return lax.map(lambda tap: inner(role, rows(x, tap), y, geometry=rest), jnp.arange(taps))
    if role == "output":
        x, k = pad_spatial(a, first.tight_padding), b

        def add_output(tap, y):
            return y + inner(role, rows(x, tap), part(k, tap), geometry=rest).reshape(y.shape)

        return lax.fori_loop(0, taps, add_output, zeros(x, *g.outputs, k.shape[-1]))
    k, y = a, b
    ((before, after),) = first.tight_padding
    padded = g.sizes[0] + before + after
    cotangent = joined(y, 1)

    def add_input(tap, x):
        found = inner(role, part(k, tap), cotangent, geometry=rest)
        found = found.reshape(x.shape[0], outputs, *x.shape[2:])
        apart = [(0, 0, stride - 1 if i == 1 else 0) for i in range(x.ndim)]
        found = lax.pad(found, jnp.zeros((), x.dtype), apart)
        old = lax.dynamic_slice_in_dim(x, tap * step, reach, axis=1, allow_negative_indices=False)
        return lax.dynamic_update_slice_in_dim(x, old + found, tap * step, axis=1)

    x = lax.fori_loop(0, taps, add_input, zeros(y, padded, *g.sizes[1:], k.shape[-2]))
    return pad_spatial(x, ((-before, -after),))


def unfolded_planes(role: str, a, b, g: Geometry):
    """`unfolded` for few features. Each feature of each tap is a separate plane, [w C, N O].

    It serves the gradients only. The gradient of the kernel is planes y. The gradient of the input
    folds kernel y^T back from planes.
    """

    def stack(plane):
        return jnp.stack(slice_windows(plane, g))

    def unfold(x):
        windows = jax.vmap(stack, in_axes=-1, out_axes=1)(x)
        return windows.reshape(windows.shape[0] * windows.shape[1], math.prod(windows.shape[2:]))

    def inner(role, a, b):
        return jnp.matmul(a, b if role == "kernel" else b.T, precision=g.precision)

    maps = {
        "input": unfold,
        "kernel": lambda k: k.reshape(math.prod(k.shape[:-1]), k.shape[-1]),
        "output": lambda y: joined(y, g.rank),
    }
    return substitute(role, a, b, g, maps, inner)


def product(role: str, a, b, *, geometry: Geometry):
    """A convolution without spatial axes: y = x k."""
    if role == "output":
        left, right = a, b
    else:
        left, right = (b, a.T) if role == "input" else (a.T, b)
    return jnp.matmul(left, right, precision=geometry.precision)
