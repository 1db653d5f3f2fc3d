"""Layers that only move numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer, no_params
from jaxnet.layers.spatial import spatial_window, telling_how_read

__all__ = ["flatten", "pixel_shuffle", "pixel_unshuffle"]


@interned
def flatten(rank: int = 3) -> Layer:
    """Merge the last `rank` axes into one.

    With the default of 3, an image [..., H, W, C] becomes [..., H * W * C].

    Twins: keras.layers.Flatten, torch.nn.Flatten.

    Args:
      rank: the number of axes to merge.

    Returns:
      The layer, x [..., *sizes] -> y [..., product of sizes].

    Raises:
      ValueError: `rank` is not a positive integer; in `apply`, x has fewer axes.
    """
    rank = size_of("flatten: rank", rank)

    def fn(params, x):
        check_input(f"flatten({rank})", x, rank=rank, kind=object)
        return x.reshape(*x.shape[: x.ndim - rank], math.prod(x.shape[x.ndim - rank :]))

    return layer(no_params, fn, label=f"flatten({rank})")


@interned
def pixel_shuffle(factor: int | Sequence[int]) -> Layer:
    """Move features into space, y[h r + i, w r + j, c] = x[h, w, c r r + i r + j].

    The order of the features is that of PyTorch, and of ONNX's DepthToSpace in mode "CRD".

    Source: Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
    Sub-Pixel Convolutional Neural Network", CVPR 2016.

    Twins: torch.nn.PixelShuffle.

    Args:
      factor: r, an int for images (two spatial axes), or the factor along each spatial axis.

    Returns:
      The layer, x [..., H, W, C r r] -> y [..., H r, W r, C].

    Raises:
      ValueError: `factor` has the wrong form; in `apply`, x lacks an axis, or the factors do not
        divide the number of features.
    """
    factors, size = spatial_window("pixel_shuffle", "factor", factor)
    rank, label = len(factors), f"pixel_shuffle({size})"

    def fn(params, x):
        check_input(label, x, rank=rank + 1, kind=object)
        channels, rest = divmod(x.shape[-1], math.prod(factors))
        if rest:
            with telling_how_read(x, rank):
                raise ValueError(
                    f"{label}: the last axis must be a multiple of {math.prod(factors)}, got "
                    f"{describe(x)}"
                )
        first, sizes = x.ndim - rank - 1, x.shape[-rank - 1 : -1]
        x = x.reshape(*x.shape[:-1], channels, *factors)
        # [.., H, W, C, r, r'] -> [.., H, r, W, r', C]
        pairs = [(first + i, first + rank + 1 + i) for i in range(rank)]
        order = [*range(first), *(axis for pair in pairs for axis in pair), first + rank]
        x = x.transpose(order)
        # One axis at a time, because JAX can then infer the sharding of the result.
        for axis, (n, r) in enumerate(zip(sizes, factors, strict=True), first):
            x = x.reshape(*x.shape[:axis], n * r, *x.shape[axis + 2 :])
        return x

    return layer(no_params, fn, label=label)


@interned
def pixel_unshuffle(factor: int | Sequence[int]) -> Layer:
    """Move space into features, the inverse of `pixel_shuffle`.

    y[h, w, c r r + i r + j] = x[h r + i, w r + j, c].

    Twins: torch.nn.PixelUnshuffle.

    Args:
      factor: r, an int for images (two spatial axes), or the factor along each spatial axis.

    Returns:
      The layer, x [..., H r, W r, C] -> y [..., H, W, C r r].

    Raises:
      ValueError: `factor` has the wrong form; in `apply`, x lacks an axis, or the factors do not
        divide the spatial axes.
    """
    factors, size = spatial_window("pixel_unshuffle", "factor", factor)
    rank, label = len(factors), f"pixel_unshuffle({size})"

    def fn(params, x):
        check_input(label, x, rank=rank + 1, kind=object)
        sizes = x.shape[-rank - 1 : -1]
        if any(n % r for n, r in zip(sizes, factors, strict=True)):
            with telling_how_read(x, rank):
                raise ValueError(
                    f"{label}: the spatial axes must be multiples of {factors}, got {describe(x)}"
                )
        first, channels = x.ndim - rank - 1, x.shape[-1]
        for axis, (n, r) in enumerate(zip(sizes, factors, strict=True)):
            at = first + 2 * axis
            x = x.reshape(*x.shape[:at], n // r, r, *x.shape[at + 1 :])
        # [.., H, r, W, r', C] -> [.., H, W, C, r, r']
        last = x.ndim - 1
        outer = range(first, last, 2)
        order = [*range(first), *outer, last, *(axis + 1 for axis in outer)]
        x = x.transpose(order)
        return x.reshape(*x.shape[: first + rank], channels * math.prod(factors))

    return layer(no_params, fn, label=label)
