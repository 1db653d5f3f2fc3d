"""The three maps of `convolution` in the forms that XLA runs fast on a CPU, inside and outside of
loops.

XLA has fast convolutions on a CPU (YNNPACK's and Eigen's), but only in one order of axes: images
[N, H, W, C], kernels [h, w, C, F]. XLA reorders convolutions in other orders, such as the gradients
that autodiff writes, only in the outermost computation. In the body of a loop it uses a loop nest
that is 10 to 100 times slower. Therefore the gradients are written here in that order, with
explicit transposes (`_canonical`).

Faster ways to compute T are changes of variables: if T(x, k, y) = T'(X x, K k, Y y) with linear
maps X, K and Y, then each partial derivative of T is that of T' at the mapped operands, mapped back
by the transpose of the third map:

    dT/dx (k, y) = X^T dT'/dx' (K k, Y y),    and the two others likewise.

One triple (X, K, Y) thus serves all three maps, and no index arithmetic is written twice
(`unfolding_cpu.substitute`).
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax

from jaxnet.ops.depthwise_cpu import featurewise
from jaxnet.ops.geometry import Geometry, is_static
from jaxnet.ops.trilinear import lax_convolution, others, plain
from jaxnet.ops.unfolding_cpu import by_taps, product, substitute, unfolded, unfolded_planes

# The rules were measured with benchmarks/convolution.py, on one core of an AVX-512 machine.
# Features: so few leave most of a vector register idle in XLA's convolutions.
FEW = 4
# Features: if neither side has more, XLA takes Eigen's convolution, which is the slower one.
SMALL = 16
# Taps along an axis: up to this number, unfolded windows of few features beat XLA's convolution in
# every map.
SHORT = 5
# Taps along an axis: more are never unrolled, which bounds the size of the program.
LONG = 32
# Taps in a window: more are never unrolled at once.
MANY = 25
# Images that the gradient of a kernel takes at a time.
CHUNK = 8
# Numbers: unfolded windows larger than this (64 MB) cost more than they gain.
LARGE = 2**24
# The assumed number of images if the size of the batch is not known.
TYPICAL = 32


def convolution(role: str, a, b, *, geometry: Geometry):
    """The map called `role`, in the form that was fastest for these shapes.

    The recursion ends, because each rule removes the groups, an axis, or few output features, and
    none adds them.
    """
    g, dtype = geometry, a.dtype
    # Sums are in float32, as in XLA's own convolutions.
    if dtype in (jnp.bfloat16, jnp.float16):
        wide_a, wide_b = a.astype(jnp.float32), b.astype(jnp.float32)
        return convolution(role, wide_a, wide_b, geometry=g).astype(dtype)
    known = dtype in (jnp.float32, jnp.float64) and all(map(is_static, g.sizes))
    if not known or _is_empty(a, b, g):
        return plain(role, a, b, geometry=g)
    if g.rank == 0:
        return product(role, a, b, geometry=g)
    first, met = g.met
    if met != g:
        taps = functools.partial(_taps_from, first=first, window=met.window)
        maps = {"input": _same, "output": _same, "kernel": taps}
        return substitute(role, a, b, g, maps, functools.partial(convolution, geometry=met))
    channels, features = _features(role, a, b, g)
    if g.groups > 1:
        return (_depthwise if channels == 1 and features <= FEW else _grouped)(role, a, b, g)
    # The patches of windows that do not overlap are no larger than x.
    if g.apart:
        return _unfolded_whole(role, a, b, geometry=g)
    if g.rank > 2 and g.window[0] <= SHORT:
        return unfolded(role, a, b, g, convolution, axes=1)
    # Loops within loops would make a long program of more than three axes.
    if g.rank > 2:
        return by_taps(role, a, b, g, convolution) if g.rank == 3 else plain(role, a, b, geometry=g)
    if features <= FEW < channels and max(g.strides) == 1:
        return _adjoint(role, a, b, g)
    return _in_the_plane(role, a, b, g)


def _same(x):
    return x


def _taps_from(k, first, window):
    """The part of a kernel whose taps meet the input. The other taps only meet padding."""
    ends = [start + w for start, w in zip(first, window, strict=True)]
    return lax.slice(k, [*first, 0, 0], [*ends, *k.shape[-2:]])


def _in_the_plane(role: str, a, b, g: Geometry):
    """One or two spatial axes, one group."""
    channels, features = _features(role, a, b, g)
    strided = max(g.strides) > 1
    sizes, window, outputs = math.prod(g.sizes), math.prod(g.window), math.prod(g.outputs)
    # If the kernel is larger than the image, XLA exchanges them, which gives a slow memory order.
    image = {"kernel": sizes, "output": sizes, "input": min(sizes, outputs)}[role]
    slow = (outputs if role == "kernel" else window) > image
    if a.dtype == jnp.float64:
        slow = slow or not _fast_in_float64(role, a, b, g)
    few = channels <= FEW and role != "output" and not strided
    cheap = window <= MANY and _batch(role, a, b) * outputs * window * channels <= LARGE
    if cheap and (few or (slow and role == "kernel")):
        return unfolded_planes(role, a, b, g)
    if cheap and slow:
        return _unfolded_whole(role, a, b, geometry=g)
    if max(channels, features) <= SMALL and _unfolds(role, g):
        return unfolded(role, a, b, g, convolution, axes=1)
    if slow and role != "kernel" and g.rank == 2 and g.window[1] <= LONG:
        return by_taps(role, a, b, g, _unfolded_whole)
    return _canonical(role, a, b, g) if g.rank == 2 else _with_a_row(role, a, b, g)


def _unfolded_whole(role: str, a, b, *, geometry: Geometry):
    """Unfold the windows along all axes, which leaves one matrix product."""
    return unfolded(role, a, b, geometry, convolution, axes=geometry.rank)


def _unfolds(role: str, g: Geometry) -> bool:
    """Whether unfolding the windows along the first axis into features pays for few features.

    Windows of three give three times the features.
    """
    first, *rest = g.window
    if first <= SHORT:
        wide = first > 1 or g.rank == 1
        return wide and (role == "output" or (role == "input" and max(g.strides) == 1))
    return first <= LONG and min(rest, default=0) > SHORT


def _features(role: str, a, b, g: Geometry) -> tuple[int, int]:
    """The numbers of input and output features per group."""
    if role == "kernel":
        return a.shape[-1] // g.groups, b.shape[-1] // g.groups
    kernel = a if role == "input" else b
    return kernel.shape[-2], kernel.shape[-1] // g.groups


def _batch(role: str, a, b) -> int:
    size = (b if role == "input" else a).shape[0]
    return size if is_static(size) else TYPICAL


def _is_empty(a, b, g: Geometry) -> bool:
    return 0 in a.shape or 0 in b.shape or 0 in g.outputs


# XLA's own convolution


def _canonical(role: str, a, b, g: Geometry):
    """All three maps as convolutions in the order of axes that XLA has fast code for; two spatial
    axes, one group.

    input   x[n, i] = sum over o, w with o s + w d - lo = i of k[w] y[n, o]. With y spread out by s
            (zeros between, y'[o s] = y[o]) and w' = W - 1 - w counted from the end of the window,
            that is, with the kernel flipped and C and F exchanged,
            x[n, i] = sum over w' of y'[n, i + w' d - ((W - 1) d - lo)] k'[w']: a convolution of y'
            with stride 1, dilation d and (W - 1) d - lo zeros before. The zeros after it bring the
            outputs to the size of x.
    kernel  k[w] = sum over n, o of x[n, o s + w d - lo] y[n, o]: the sum runs over images and
            outputs, so they are the features and the window, and C is the batch. w is the position,
            so its step d is the stride, and s the dilation.
    """
    if role == "output":
        return lax_convolution(a, b, g)
    if role == "input":
        k, y = a, b
        spread = g._replace(sizes=g.outputs, strides=(1, 1), padding=g.pullback_padding)
        flipped = jnp.flip(k, (0, 1)).swapaxes(2, 3)
        return lax_convolution(y, flipped, spread, lhs_dilation=g.strides)
    turned = g._replace(
        window=g.outputs, strides=g.dilation, padding=g.tight_padding, dilation=g.strides
    )

    def kernel_of(x, y):
        k = lax_convolution(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), turned)
        return k.transpose(1, 2, 0, 3)

    x, y = a, b
    batch, features = y.shape[0], y.shape[-1]
    if not is_static(batch) or features <= SMALL:
        return kernel_of(x, y)
    together = next((n for n in range(CHUNK, 1, -1) if batch % n == 0), batch)
    if together >= batch:
        return kernel_of(x, y)
    # A few images at a time: the transposed images are still in the cache when they are used.
    parts = batch // together
    x, y = (images.reshape(together, parts, *images.shape[1:]) for images in (x, y))

    def add_part(i, total):
        part = (lax.dynamic_index_in_dim(images, i, axis=1, keepdims=False) for images in (x, y))
        return total + kernel_of(*part)

    zeros = jnp.zeros((*g.window, x.shape[-1], features), x.dtype)
    return lax.fori_loop(0, parts, add_part, zeros)


def _fast_in_float64(role: str, a, b, g: Geometry) -> bool:
    """Whether YNNPACK takes this map in float64. Eigen does not, so the alternative is the loop
    nest.
    """
    channels, features = _features(role, a, b, g)
    # In `_canonical`, the images are the features of the map to the kernel.
    if role == "kernel":
        channels = _batch(role, a, b)
    return max(channels, features) > SMALL and not (role == "input" and max(g.strides) > 1)


# Changes of variables to another convolution


def _with_a_row(role: str, a, b, g: Geometry):
    """One spatial axis: images of height 1."""
    image = g._replace(
        sizes=(1, *g.sizes),
        window=(1, *g.window),
        strides=(1, *g.strides),
        padding=((0, 0), *g.padding),
        dilation=(1, *g.dilation),
    )
    maps = {
        "input": lambda x: x[:, None],
        "kernel": lambda k: k[None],
        "output": lambda y: y[:, None],
    }
    return substitute(role, a, b, g, maps, functools.partial(_canonical, g=image))


def _adjoint(role: str, a, b, g: Geometry):
    """Input and output exchanged: with stride 1, T(x, k, y) = T*(y, flipped k, x), as in
    `_canonical`.

    So few output features become few input features.
    """
    exchanged = {"input": "output", "kernel": "kernel", "output": "input"}
    operands = {
        exchanged[name]: operand for name, operand in zip(others(role), (a, b), strict=True)
    }
    if role != "kernel":
        operands["kernel"] = _flip(operands["kernel"], g)
    a, b = (operands[name] for name in others(exchanged[role]))
    adjoint = g._replace(sizes=g.outputs, padding=g.pullback_padding)
    result = convolution(exchanged[role], a, b, geometry=adjoint)
    return _flip(result, g) if role == "kernel" else result


def _flip(k, g: Geometry):
    return jnp.flip(k, range(g.rank)).swapaxes(-1, -2)


def _grouped(role: str, a, b, g: Geometry):
    """One group after the other. Each is a separate convolution in its best form."""

    def split(a):
        """[..., G c] -> [G, ..., c]."""
        return jnp.moveaxis(a.reshape(*a.shape[:-1], g.groups, a.shape[-1] // g.groups), -2, 0)

    def one(operands):
        return convolution(role, *operands, geometry=g._replace(groups=1))

    result = jnp.moveaxis(lax.map(one, (split(a), split(b))), 0, -2)
    return result.reshape(*result.shape[:-2], result.shape[-2] * result.shape[-1])


def _depthwise(role: str, a, b, g: Geometry):
    """One input feature in each group: sums of products, feature by feature, without matrix
    products.

    m output features per group are the same as m groups with one, for an x that is repeated m
    times.
    """
    repeats = (b if role != "input" else a).shape[-1] // g.groups
    maps = {
        "input": lambda x: jnp.repeat(x, repeats, axis=-1) if repeats > 1 else x,
        "kernel": lambda k: k[..., 0, :],
        "output": lambda y: y,
    }
    return substitute(role, a, b, g, maps, functools.partial(featurewise, g=g))
