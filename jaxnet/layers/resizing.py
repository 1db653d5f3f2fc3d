"""Resampling of the spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnet.core import Layer, describe, interned, layer, no_params
from jaxnet.layers.resampling import COORDINATES, ROUNDINGS, Resampling, resample
from jaxnet.layers.spatial import check_spatial, spatial_window, telling_how_read
from jaxnet.mixed import widened

__all__ = ["resize", "upsample"]

METHODS = ("nearest", "linear", "cubic")


@interned
def resize(
    size: int | Sequence[int] | None = None,
    *,
    scale: float | Sequence[float] | None = None,
    method: str = "linear",
    coordinates: str = "half_pixel",
    rounding: str = "round_prefer_floor",
    cubic_coefficient: float = -0.75,
) -> Layer:
    """Interpolate the spatial axes to a new size, one axis after the other.

    Element o of an axis of m elements is read from x at position p(o), where n is the size of the
    axis of x, and r = n / m, or 1 / scale:

    | coordinates | p(o) |
    |---|---|
    | "half_pixel" | (o + 1/2) r - 1/2 |
    | "align_corners" | o (n - 1) / (m - 1), and 0 for m = 1 |
    | "asymmetric" | o r |

    "nearest" takes the element at the rounded position. "linear" weights the two next elements by
    their distance. "cubic" weights four by the kernel of Keys with a = `cubic_coefficient`.
    Positions outside of x mean the element at its edge. No method smooths before it makes an image
    smaller.

    `torch.nn.functional.interpolate` is: mode="nearest": method "nearest", coordinates
    "asymmetric", rounding "floor"; "nearest-exact": rounding "round_prefer_ceil"; all others: the
    same method, with align_corners=True as "align_corners". The names of the options are those of
    ONNX's Resize, whose defaults are "nearest" and the others that are here.

    Source: the operator Resize of ONNX; Keys, "Cubic convolution interpolation for digital image
    processing", 1981.

    Twins: keras.layers.Resizing, torch.nn.Upsample.

    Args:
      size: the new size: an int for images (two spatial axes), or one per spatial axis.
      scale: the factor, instead of `size`: a number for images, or one per spatial axis. The new
        size is floor(n scale).
      method: "nearest", "linear" or "cubic".
      coordinates: "half_pixel", "align_corners" or "asymmetric".
      rounding: for "nearest": "round_prefer_floor", "round_prefer_ceil", "floor" or "ceil".
      cubic_coefficient: a of the cubic kernel: -0.75 in PyTorch and ONNX, -0.5 in JAX and Keras.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *size, C]. For "nearest", x may hold any numbers.

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of floats.
    """
    known = (("method", method, METHODS), ("coordinates", coordinates, COORDINATES))
    for name, value, names in (*known, ("rounding", rounding, ROUNDINGS)):
        if value not in names:
            raise ValueError(f"resize: {name} must be one of {', '.join(names)}, got {value!r}")
    if (size is None) == (scale is None):
        raise ValueError(f"resize: give either size or scale, got {size=} and {scale=}")
    if scale is None:
        sizes, text = spatial_window("resize", "size", size)  # pyright: ignore[reportArgumentType]
        factors = (None,) * len(sizes)
    else:
        factors = _factors(scale)
        sizes, text = (None,) * len(factors), f"scale={_text(factors)}"
    rank, label = len(sizes), f"resize({text}, {method})"
    kind = jnp.number if method == "nearest" else jnp.floating
    options = Resampling(method, coordinates, rounding, float(cubic_coefficient))

    def fn(params, x):
        check_spatial(label, x, rank, kind=kind)
        old = x.shape[-rank - 1 : -1]
        new: list[Any] = [
            n if factor is None else math.floor(size * factor)
            for n, factor, size in zip(sizes, factors, old, strict=True)
        ]
        if 0 in (*old, *new):
            with telling_how_read(x, rank):
                raise ValueError(
                    f"{label}: no spatial axis may be empty, got {describe(x)} for the sizes {new}"
                )
        y = x if method == "nearest" else widened(x)
        for axis, m, factor in zip(range(-rank - 1, -1), new, factors, strict=True):
            y = resample(y, axis % y.ndim, m, factor, options)
        return y.astype(x.dtype)

    return layer(no_params, fn, label=label)


@interned
def upsample(factor: int | Sequence[int] = 2, *, method: str = "nearest") -> Layer:
    """Make the spatial axes larger by whole factors: `resize(scale=factor, method=method)`.

    Twins: keras.layers.UpSampling2D, torch.nn.Upsample.

    Args:
      factor: an int for images (two spatial axes), or one per spatial axis.
      method: "nearest" (each element is repeated), "linear" or "cubic".

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *spatial times factor, C].

    Raises:
      ValueError: an option has the wrong form; in `apply`, x lacks an axis, or one is empty.
      TypeError: in `apply`, x is not an array of floats.
    """
    factors, _ = spatial_window("upsample", "factor", factor)
    return resize(scale=tuple(map(float, factors)), method=method)


def _text(factors: tuple[float, ...]) -> str:
    """One number for images with equal factors, as an int is for images."""
    texts = [f"{factor:g}" for factor in factors]
    if factors == factors[:1] * 2:
        return texts[0]
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def _factors(scale: Any) -> tuple[float, ...]:
    values = (scale, scale) if np.ndim(scale) == 0 else tuple(scale)
    good = [
        isinstance(v, int | float | np.number) and not isinstance(v, bool) and 0 < v < math.inf
        for v in values
    ]
    if not good or not all(good):
        raise ValueError(
            "resize: scale must be a positive number, or one for each spatial axis as in (2.0,), "
            f"got {scale!r}"
        )
    return tuple(map(float, values))
