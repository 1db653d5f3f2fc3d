"""Interpolation along one axis: positions, taps and weights, all known at trace time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["COORDINATES", "ROUNDINGS", "Resampling", "resample"]

COORDINATES = ("half_pixel", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")

# The most slices of a resampling that repeats itself; more make the program long.
SLICES = 16
# Positions are rounded to this many parts of a pixel, so that rounding errors do not decide.
PARTS = 2.0**36


class Resampling(NamedTuple):
    """The options of a resampling.

    Attributes:
      method: "nearest", "linear" or "cubic".
      coordinates: one of COORDINATES.
      rounding: one of ROUNDINGS.
      coefficient: that of the cubic kernel.
    """

    method: str
    coordinates: str
    rounding: str
    coefficient: float


def resample(
    x: jax.Array, axis: int, size: int, scale: float | None, options: Resampling
) -> jax.Array:
    """Resample one axis.

    Args:
      x: any array, [...].
      axis: the axis.
      size: its new size.
      scale: the factor; None for that of the sizes.
      options: how.

    Returns:
      The array with the new size.
    """
    at = _positions(x.shape[axis], size, scale, options.coordinates)
    taps, weights = _taps(at, options)
    period = _period(taps, weights)
    if period is not None and period[0] * taps.shape[1] <= SLICES:
        return _by_slices(x, axis, taps, weights, period)
    taps = np.clip(taps, 0, x.shape[axis] - 1)
    total: Any = 0
    for tap, weight in zip(taps.T, weights.T, strict=True):
        total = total + _weighted(jnp.take(x, tap, axis=axis, mode="clip"), weight, axis)
    return total


def _positions(old: int, new: int, scale: float | None, coordinates: str) -> np.ndarray:
    """The position in the old axis of each element of the new one."""
    o = np.arange(new)
    if coordinates == "align_corners":
        return o * (old - 1) / max(1, new - 1)
    step = old / new if scale is None else 1 / scale
    shift = 0.5 if coordinates == "half_pixel" else 0.0
    return np.round(((o + shift) * step - shift) * PARTS) / PARTS


def _taps(at: np.ndarray, options: Resampling) -> tuple[np.ndarray, np.ndarray]:
    """The elements that each new element is a sum of, and their weights, [size, taps]. Elements may
    be outside of the axis.
    """
    below = np.floor(at).astype(np.int64)
    t = at - below
    if options.method == "nearest":
        up = {
            "round_prefer_floor": t > 0.5,
            "round_prefer_ceil": t >= 0.5,
            "floor": t < 0,
            "ceil": t > 0,
        }[options.rounding]
        return (below + up)[:, None], np.ones((len(at), 1))
    if options.method == "linear":
        return below[:, None] + np.arange(2), np.stack([1 - t, t], -1)
    taps = np.arange(-1, 3)
    return below[:, None] + taps, _keys(np.abs(t[:, None] - taps), options.coefficient)


def _keys(d: np.ndarray, a: float) -> np.ndarray:
    """The cubic kernel of Keys at distance d."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _period(taps: np.ndarray, weights: np.ndarray) -> tuple[int, int] | None:
    """(p, q) if the elements repeat: p elements later, all taps are q elements later. None if there
    are no such small numbers.
    """
    size = len(taps)
    for p in range(1, min(size - 1, SLICES) + 1):
        if size % p == 0:
            moved = taps[p:] - taps[:-p]
            q = int(moved.flat[0])
            if q > 0 and (moved == q).all() and np.allclose(weights[p:], weights[:-p], 0, 1e-9):
                return p, q
    return None


def _by_slices(x, axis: int, taps: np.ndarray, weights: np.ndarray, period: tuple[int, int]):
    """The sum of strided slices, for elements that repeat. Unlike a gather, its gradient is no
    scatter.
    """
    (p, q), size = period, x.shape[axis]
    count = len(taps) // p
    before = max(0, -int(taps.min()))
    after = max(0, int(taps.max()) - size + 1)
    padded = _with_edges(x, axis, before, after)

    def part(start: int):
        first = start + before
        return lax.slice_in_dim(padded, first, first + (count - 1) * q + 1, q, axis=axis)

    phases = []
    for elements, shares in zip(taps[:p], weights[:p], strict=True):
        parts = {
            int(start): share for start, share in zip(elements, shares, strict=True) if share != 0
        }
        phases.append(_sum(part, parts, x.dtype))
    if p == 1:
        return phases[0]
    together = jnp.stack(phases, axis + 1)
    return together.reshape(*x.shape[:axis], len(taps), *x.shape[axis + 1 :])


def _with_edges(x, axis: int, before: int, after: int):
    """The first and the last element of an axis, repeated. `jnp.pad` would also slice the batch,
    which may be sharded.
    """
    parts = [x]
    if before:
        first = lax.slice_in_dim(x, 0, 1, axis=axis)
        parts = [first] * before + parts
    if after:
        last = lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
        parts = parts + [last] * after
    return jnp.concatenate(parts, axis) if len(parts) > 1 else x


def _sum(part, parts: dict[int, float], dtype):
    """The weighted sum of slices by their start."""
    terms = [part(at) if w == 1 else part(at) * np.asarray(w, dtype) for at, w in parts.items()]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _weighted(x, weights: np.ndarray, axis: int):
    if (weights == 1).all():
        return x
    weights = weights.reshape((1,) * axis + weights.shape + (1,) * (x.ndim - axis - 1))
    return x * jnp.asarray(weights, x.dtype)
