"""Depthwise convolution on a CPU: sums of products, feature by feature, without matrix products.

T = sum over w of sum(x shifted to w * k[w] * y) for x [N, *spatial, C], k [*window, C] and y [N,
*outputs, C].

XLA fuses the products of unrolled taps and keeps all features of a few pixels in vector registers.
Its own convolution is 10 to 50 times slower. Larger windows use a loop over blocks of taps, so the
size of the program does not depend on the window.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnet.ops.geometry import Geometry, pad_spatial, slice_windows

# Measured with benchmarks/convolution.py, on one core of an AVX-512 machine.
# The most taps that the maps to input and output unroll.
AT_ONCE = 49
# The most rows plus taps per row: more make the program long.
IN_A_PROGRAM = 32
# The most taps with which XLA may fuse the operands. It computes a fused operand anew for each tap,
# which for windows of 7x7 takes four times as long as writing it to memory first.
FUSED = 25
# The number of taps per block of a larger window.
BLOCK = 24
# The number of taps whose sums the map to the kernel keeps at a time.
SUMS = 9


def featurewise(role: str, a, b, g: Geometry):
    """The map of T called `role`. Each feature is a group."""
    if math.prod(g.window) <= FUSED:
        return _map(role, a, b, g)
    a, b = lax.optimization_barrier((a, b))
    return lax.optimization_barrier(_map(role, a, b, g))


def _map(role: str, a, b, g: Geometry):
    if role == "kernel":
        return _kernel(a, b, g)
    if role == "output":
        return _output(a, b, g)
    # As in `convolution_cpu._canonical`: y spread out by the strides, the kernel flipped.
    k, y = a, b
    pads = [(lo, hi, s - 1) for (lo, hi), s in zip(g.pullback_padding, g.strides, strict=True)]
    y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    ones, none = (1,) * g.rank, ((0, 0),) * g.rank
    spread = g._replace(sizes=y.shape[1:-1], strides=ones, padding=none)
    return _output(y, jnp.flip(k, range(g.rank)), spread)


def _output(x, k, g: Geometry):
    *rows, row = g.window
    if math.prod(g.window) <= AT_ONCE and math.prod(rows) + row <= IN_A_PROGRAM:
        return _written_out(pad_spatial(x, g.tight_padding), k, _over_padded(g, g.window))
    x, block, counts = _in_blocks(x, g, BLOCK)
    extra = [
        (0, n * size - w, 0) for n, size, w in zip(counts, block.window, g.window, strict=True)
    ]
    k = lax.pad(k, jnp.zeros((), k.dtype), [*extra, (0, 0, 0)])

    def operands(i):
        weights = _cut(k, _starts(i, counts, block.window), (*block.window, k.shape[-1]))
        return _block_of(x, i, counts, block), weights

    def add_block(i, carry):
        # Slice the next operands here. XLA would otherwise fuse the slices into the products, which
        # makes them 10 times slower.
        total, (x, k) = carry
        return total + _written_out(x, k, block), operands(i + 1)

    start = jnp.zeros((x.shape[0], *g.outputs, x.shape[-1]), x.dtype)
    return lax.fori_loop(0, math.prod(counts), add_block, (start, operands(0)))[0]


def _written_out(x, k, g: Geometry):
    """The sum of the products of all taps. The rows of a window share one function, which keeps the
    program short.
    """
    taps, outputs, stride, step = g.window[-1], g.outputs[-1], g.strides[-1], g.dilation[-1]

    @jax.jit
    def row(x, k):
        starts = range(0, taps * step, step)
        ends = (start + (outputs - 1) * stride + 1 for start in starts)
        shifted = [
            lax.slice_in_dim(x, start, end, stride, axis=-2)
            for start, end in zip(starts, ends, strict=True)
        ]
        weights = (lax.slice_in_dim(k, tap, tap + 1) for tap in range(taps))
        axes = (x.ndim - 2, x.ndim - 1)
        pairs = zip(shifted, weights, strict=True)
        products = [part * lax.broadcast_in_dim(w, part.shape, axes) for part, w in pairs]
        return functools.reduce(jnp.add, products)

    k = k.reshape(math.prod(k.shape[:-2]), *k.shape[-2:])
    rows = slice_windows(x, g.axes(slice(-1)))
    return functools.reduce(jnp.add, [row(x, k[i]) for i, x in enumerate(rows)])


def _kernel(x, y, g: Geometry):
    x, block, counts = _in_blocks(x, g, SUMS)
    if max(counts) == 1:
        return _sums(x, y, block)
    parts = lax.map(
        lambda i: _sums(_block_of(x, i, counts, block), y, block), jnp.arange(math.prod(counts))
    )
    # [n, n', .., w, w', .., C] -> [n w, n' w', .., C]
    parts = parts.reshape(*counts, *parts.shape[1:])
    order = [
        axis for pair in zip(range(g.rank), range(g.rank, 2 * g.rank), strict=True) for axis in pair
    ]
    whole = [n * size for n, size in zip(counts, block.window, strict=True)]
    k = parts.transpose(*order, 2 * g.rank).reshape(*whole, x.shape[-1])
    return lax.slice(k, [0] * k.ndim, [*g.window, x.shape[-1]])


def _sums(x, y, g: Geometry):
    """For each tap, the sum over images and outputs of x shifted to it times y."""
    channels = x.shape[-1]
    # The last spatial axis and the features are one long axis; a step of d is one of d C.
    if g.strides[-1] == 1:
        size, step = g.sizes[-1] * channels, g.dilation[-1] * channels
        g = g._replace(sizes=(*g.sizes[:-1], size), dilation=(*g.dilation[:-1], step))
        x, y = (a.reshape(*a.shape[:-2], a.shape[-2] * channels) for a in (x, y))

    def add_image(i, sums):
        image, cotangent = (
            lax.dynamic_slice_in_dim(a, i, 1, allow_negative_indices=False) for a in (x, y)
        )
        windows = slice_windows(image, g)
        return [total + window * cotangent for total, window in zip(sums, windows, strict=True)]

    # Whole images are added first: XLA's reduction over images and outputs at once is 3 to 5 times
    # slower.
    start = [jnp.zeros((1, *y.shape[1:]), y.dtype)] * len(g.taps)
    sums = jnp.concatenate(lax.fori_loop(0, x.shape[0], add_image, start))
    sums = sums.reshape(len(g.taps), math.prod(y.shape[1:]) // channels, channels).sum(1)
    return sums.reshape(*g.window, channels)


# Blocks of taps


def _in_blocks(x, g: Geometry, most: int) -> tuple[jax.Array, Geometry, tuple[int, ...]]:
    """Cut the window into blocks of at most `most` taps.

    Returns:
      x with its padding and with zeros for the excess taps of the last blocks, the geometry of one
      block without padding, and the number of blocks along each axis.
    """
    window = []
    for taps in reversed(g.window):
        blocks = -(-taps // max(1, most))
        window.insert(0, -(-taps // blocks))
        most //= window[0]
    counts = tuple(-(-taps // size) for taps, size in zip(g.window, window, strict=True))
    excess = [
        (n * size - w) * d
        for n, size, w, d in zip(counts, window, g.window, g.dilation, strict=True)
    ]
    pads = [(lo, hi + more) for (lo, hi), more in zip(g.tight_padding, excess, strict=True)]
    return pad_spatial(x, pads), _over_padded(g, tuple(window)), counts


def _over_padded(g: Geometry, window: tuple[int, ...]) -> Geometry:
    """The geometry of a block of taps over an input that includes its padding and ends at the last
    tap.
    """
    steps = zip(g.outputs, g.strides, window, g.dilation, strict=True)
    sizes = tuple((o - 1) * s + (w - 1) * d + 1 for o, s, w, d in steps)
    return g._replace(sizes=sizes, window=window, padding=((0, 0),) * g.rank)


def _block_of(x, i, counts, block: Geometry):
    """The part of padded images x that the taps of block i meet."""
    steps = [size * d for size, d in zip(block.window, block.dilation, strict=True)]
    return _cut(
        x, [np.int32(0), *_starts(i, counts, steps)], (x.shape[0], *block.sizes, x.shape[-1])
    )


def _starts(i, counts, steps) -> list:
    """The start of block i along each axis."""
    table = np.stack(np.unravel_index(np.arange(math.prod(counts)), counts), -1).astype(np.int32)
    table *= np.asarray(steps, np.int32)
    table = jnp.asarray(table)
    return list(lax.dynamic_index_in_dim(table, i, keepdims=False, allow_negative_indices=False))


def _cut(x, starts, sizes):
    # Without negative indices, JAX need not compile code to wrap them. All starts need one dtype,
    # also under `jax_enable_x64`.
    return lax.dynamic_slice(x, [*starts, np.int32(0)], sizes, allow_negative_indices=False)
