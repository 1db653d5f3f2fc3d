"""The geometry of windows that slide over spatial axes, for convolution and pooling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], ...]


class Geometry(NamedTuple):
    """The static facts of a convolution or pooling.

    Attributes:
      sizes: the sizes of the input along its spatial axes.
      window: the sizes of the window.
      strides: the steps between windows.
      padding: the zeros (before, after) along each axis.
      dilation: the steps between the elements of a window.
      groups: the number of groups of features.
      precision: the precision of products.
    """

    sizes: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pads
    dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def spans(self) -> tuple[int, ...]:
        """The sizes of a window, including its gaps."""
        return tuple((w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def outputs(self) -> tuple[int, ...]:
        ends = zip(self.sizes, self.padding, self.spans, self.strides, strict=True)
        return tuple(max(0, (size + lo + hi - span) // s + 1) for size, (lo, hi), span, s in ends)

    @property
    def tight_padding(self) -> Pads:
        """The padding with which the last window ends at the end of the input. It is negative if
        elements at the end are never used.
        """
        ends = zip(self.sizes, self.padding, self.outputs, self.strides, self.spans, strict=True)
        return tuple((lo, (o - 1) * s + span - size - lo) for size, (lo, _), o, s, span in ends)

    @property
    def pullback_padding(self) -> Pads:
        """The padding of the convolution that brings outputs, spread out by the strides, back to
        the input (`_canonical`).
        """
        ends = zip(self.sizes, self.padding, self.outputs, self.strides, self.spans, strict=True)
        return tuple(
            (span - 1 - lo, size - 1 + lo - (o - 1) * s) for size, (lo, _), o, s, span in ends
        )

    @property
    def taps(self) -> list[tuple[int, ...]]:
        """The positions in a window, in row-major order."""
        return list(itertools.product(*(range(w) for w in self.window)))

    @property
    def apart(self) -> bool:
        """Whether the windows do not overlap."""
        return all(span <= s for span, s in zip(self.spans, self.strides, strict=True))

    @property
    def tap_axes(self) -> tuple[int, ...]:
        """The axes of the window in the result of `split_windows`."""
        return tuple(range(2, 2 * self.rank + 1, 2))

    @property
    def met(self) -> tuple[tuple[int, ...], Geometry]:
        """The first tap that meets the input along each axis, and the geometry without taps that
        only meet padding.
        """
        first, window, padding = [], [], []
        facts = self.sizes, self.padding, self.window, self.outputs, self.strides, self.dilation
        for size, (lo, hi), w, o, s, d in zip(*facts, strict=True):
            start = max(0, (lo - (o - 1) * s) // d)
            stop = min(w, -(-(size - 1 + lo) // d) + 1)
            first.append(start)
            window.append(stop - start)
            padding.append((lo - start * d, hi - (w - stop) * d))
        return tuple(first), self._replace(window=tuple(window), padding=tuple(padding))

    def axes(self, part: slice) -> Geometry:
        """The geometry of some of the spatial axes."""
        return self._replace(
            sizes=self.sizes[part],
            window=self.window[part],
            strides=self.strides[part],
            padding=self.padding[part],
            dilation=self.dilation[part],
        )


def window_geometry(
    what: str,
    shape,
    window,
    strides,
    padding,
    dilation: Any = 1,
    groups: int = 1,
    precision: Any = None,
) -> Geometry:
    """The geometry of windows over arrays [N, *spatial, C] of this shape. `what` is the start of
    errors. Raises ValueError if an option has the wrong form, or no window fits.
    """
    sizes = tuple(shape[1:-1])
    rank = len(sizes)
    window = per_axis(f"{what}: window", window, rank)
    strides = per_axis(f"{what}: strides", strides, rank)
    dilation = per_axis(f"{what}: dilation", dilation, rank)
    pads = resolve_padding(what, padding, sizes, window, strides, dilation)
    g = Geometry(sizes, window, strides, pads, dilation, groups, precision)
    if 0 in g.outputs:
        spans = f"the window {window}" + (f" with {dilation=}" if max(dilation) > 1 else "")
        raise ValueError(
            f"{what}: {spans} does not fit into spatial axes {sizes} with {padding=}; "
            "take a smaller window, larger inputs or padding='SAME'"
        )
    return g


def per_axis(what: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive int for each of `rank` axes, from one for all or a sequence."""
    values: tuple = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    positive = [
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 1 for v in values
    ]
    if len(values) != rank or not all(positive):
        axes = "the spatial axis" if rank == 1 else f"each of the {rank} spatial axes"
        raise ValueError(f"{what} must be a positive int, or one for {axes}, got {value!r}")
    return tuple(map(int, values))


def resolve_padding(what: str, padding, sizes, window, strides, dilation) -> Pads:
    """(before, after) for each axis, from any form of the option."""
    rank = len(sizes)
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            return ((0, 0),) * rank
        if padding.upper() in ("SAME", "SAME_LOWER"):
            spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
            totals = [
                max(0, (-(-n // s) - 1) * s + span - n)
                for n, s, span in zip(sizes, strides, spans, strict=True)
            ]
            halves = tuple((total // 2, total - total // 2) for total in totals)
            return halves if padding.upper() == "SAME" else tuple((b, a) for a, b in halves)
        raise ValueError(
            f"{what}: padding must be 'SAME', 'VALID', an int or (before, after) for each axis, "
            f"or 'SAME_LOWER', got {padding!r}"
        )
    try:
        pairs = [(padding, padding)] * rank if np.ndim(padding) == 0 else padding
        pads = tuple((int(lo), int(hi)) for lo, hi in pairs)
    except (TypeError, ValueError):
        pads = ()
    if len(pads) != rank or min(min(pair) for pair in pads) < 0:
        raise ValueError(
            f"{what}: padding must be 'SAME', 'VALID', an int or (before, after), neither "
            f"negative, for each of the {rank} spatial axes, got {padding!r}"
        )
    return pads


def is_static(size) -> bool:
    """Whether the size of an axis is known. In a program exported for any size, it is an expression
    without an order.
    """
    return isinstance(size, int | np.integer)


def pad_spatial(x, pads, value: float = 0):
    """x [N, *spatial, ...] with `value` before and after each spatial axis; negative pads cut."""
    if not any(map(any, pads)):
        return x
    rest = x.ndim - 1 - len(pads)
    config = [(0, 0, 0), *((lo, hi, 0) for lo, hi in pads), *[(0, 0, 0)] * rest]
    return lax.pad(x, jnp.asarray(value, x.dtype), config)


def slice_windows(x, g: Geometry, value: float = 0) -> list[jax.Array]:
    """For each tap w, the elements x[n, o s + w d - lo, ...] for all outputs o: arrays [N,
    *outputs, ...].
    """
    x = pad_spatial(x, g.tight_padding, value)
    features = x.shape[g.rank + 1 :]

    def shifted(tap):
        starts = [w * d for w, d in zip(tap, g.dilation, strict=True)]
        ends = zip(starts, g.outputs, g.strides, strict=True)
        stops = [x.shape[0], *(start + (o - 1) * s + 1 for start, o, s in ends), *features]
        none, ones = [0] * len(features), [1] * len(features)
        return lax.slice(x, [0, *starts, *none], stops, [1, *g.strides, *ones])

    return [shifted(tap) for tap in g.taps]


def split_windows(x, g: Geometry, value: float = 0) -> jax.Array:
    """Cut x into windows that do not overlap, without copies: [N, *spatial, C] -> [N, o, w, o', w',
    ..., C].
    """
    ends = zip(g.sizes, g.padding, g.outputs, g.strides, strict=True)
    x = pad_spatial(x, [(lo, o * s - size - lo) for size, (lo, _), o, s in ends], value)
    facts = g.tap_axes, g.outputs, g.strides, g.spans, g.dilation
    for axis, o, s, span, d in zip(*facts, strict=True):
        # Split one axis at a time, because JAX can then infer the sharding of the result.
        x = x.reshape(*x.shape[: axis - 1], o, s, *x.shape[axis:])
        x = lax.slice_in_dim(x, 0, span, d, axis=axis)
    return x
