"""What convolution and pooling share: windows that slide over the spatial axes, and the trilinear
form of a convolution.
"""

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
    """What is static in a convolution."""

    sizes: tuple[int, ...]  # of the input along its spatial axes
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pads  # zeros before and after, along each axis
    dilation: tuple[int, ...]
    groups: int = 1
    precision: Any = None

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def spans(self) -> tuple[int, ...]:
        """How far a window reaches."""
        return tuple((w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def outputs(self) -> tuple[int, ...]:
        ends = zip(self.sizes, self.padding, self.spans, self.strides, strict=True)
        return tuple(max(0, (size + lo + hi - span) // s + 1) for size, (lo, hi), span, s in ends)

    @property
    def tight_padding(self) -> Pads:
        """The padding with which the last window ends where the input does; negative where elements
        are never used.
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
        """Do the windows not overlap?"""
        return all(span <= s for span, s in zip(self.spans, self.strides, strict=True))

    @property
    def tap_axes(self) -> tuple[int, ...]:
        """Where `split_windows` puts the axes of the window."""
        return tuple(range(2, 2 * self.rank + 1, 2))

    @property
    def met(self) -> tuple[tuple[int, ...], Geometry]:
        """The first tap that meets the input along each axis, and the geometry without taps that
        only meet padding.
        """
        first, window, padding = [], [], []
        ends = zip(
            self.sizes,
            self.padding,
            self.window,
            self.outputs,
            self.strides,
            self.dilation,
            strict=True,
        )
        for size, (lo, hi), w, o, s, d in ends:
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
    """The geometry of windows over arrays [N, *spatial, C] of this shape; `what` is the name that
    errors start with.

    Raises: ValueError for options of the wrong form, or where no window fits.
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
    if len(values) != rank or not all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 1 for v in values
    ):
        axes = "the spatial axis" if rank == 1 else f"each of the {rank} spatial axes"
        raise ValueError(f"{what} must be a positive int, or one for {axes}, got {value!r}")
    return tuple(map(int, values))


def resolve_padding(what: str, padding, sizes, window, strides, dilation) -> Pads:
    """(before, after) for each axis, from any form of the option."""
    rank = len(sizes)
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            return ((0, 0),) * rank
        if padding.upper() == "SAME":
            spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
            totals = [
                max(0, (-(-n // s) - 1) * s + span - n)
                for n, s, span in zip(sizes, strides, spans, strict=True)
            ]
            return tuple((total // 2, total - total // 2) for total in totals)
        raise ValueError(
            f"{what}: padding must be 'SAME', 'VALID', an int or (before, after) for each axis, "
            f"got {padding!r}"
        )
    try:
        pads = tuple(
            (int(lo), int(hi))
            for lo, hi in ([(padding, padding)] * rank if np.ndim(padding) == 0 else padding)
        )
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
    return lax.pad(
        x,
        jnp.asarray(value, x.dtype),
        [(0, 0, 0), *((lo, hi, 0) for lo, hi in pads), *[(0, 0, 0)] * rest],
    )


def slice_windows(x, g: Geometry, value: float = 0) -> list[jax.Array]:
    """For each tap w, the elements x[n, o s + w d - lo, ...] for all outputs o: arrays [N,
    *outputs, ...].
    """
    x = pad_spatial(x, g.tight_padding, value)
    features = x.shape[g.rank + 1 :]

    def shifted(tap):
        starts = [w * d for w, d in zip(tap, g.dilation, strict=True)]
        stops = [
            start + (o - 1) * s + 1
            for start, o, s in zip(starts, g.outputs, g.strides, strict=True)
        ]
        none, ones = [0] * len(features), [1] * len(features)
        return lax.slice(
            x, [0, *starts, *none], [x.shape[0], *stops, *features], [1, *g.strides, *ones]
        )

    return [shifted(tap) for tap in g.taps]


def split_windows(x, g: Geometry, value: float = 0) -> jax.Array:
    """For windows that do not overlap: x cut into them, [N, *spatial, C] -> [N, o, w, o', w', ...,
    C], without copies of it.
    """
    ends = zip(g.sizes, g.padding, g.outputs, g.strides, strict=True)
    x = pad_spatial(x, [(lo, o * s - size - lo) for size, (lo, _), o, s in ends], value)
    for axis, o, s, span, d in zip(
        g.tap_axes, g.outputs, g.strides, g.spans, g.dilation, strict=True
    ):
        # Split one axis at a time, because JAX can then infer the sharding of the result.
        x = x.reshape(*x.shape[: axis - 1], o, s, *x.shape[axis:])
        x = lax.slice_in_dim(x, 0, span, d, axis=axis)
    return x


# The trilinear form T(x, k, y) of a convolution: its operands, and a map for each, named by the
# operand that it returns

ROLES = ("input", "kernel", "output")


def others(role: str) -> list[str]:
    """The operands that the map takes, in their order."""
    return [r for r in ROLES if r != role]


def shape_of(role: str, a, b, g: Geometry) -> tuple[int, ...]:
    """The shape of the operand that the map returns, given the two others."""
    if role == "output":
        return (a.shape[0], *g.outputs, b.shape[-1])
    if role == "input":
        return (b.shape[0], *g.sizes, a.shape[-2] * g.groups)
    return (*g.window, a.shape[-1] // g.groups, b.shape[-1])


def plain(role: str, a, b, *, geometry: Geometry):
    """The map as JAX itself writes it: a convolution, or the transpose that autodiff makes of
    it.
    """
    if role == "output":
        return lax_convolution(a, b, geometry)
    spec = jax.ShapeDtypeStruct(shape_of(role, a, b, geometry), a.dtype)
    if role == "input":
        return jax.linear_transpose(lambda x: lax_convolution(x, a, geometry), spec)(b)[0]
    return jax.linear_transpose(lambda k: lax_convolution(a, k, geometry), spec)(b)[0]


def lax_convolution(x, kernel, g: Geometry, **options):
    """x [N, *spatial, C], kernel [*window, C / groups, F] -> [N, *outputs, F] by JAX's own
    convolution.
    """
    n = g.rank
    # The positions of N, C, *spatial and of F, C, *window.
    image, weight = (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n))
    return lax.conv_general_dilated(
        x,
        kernel,
        g.strides,
        g.padding,
        rhs_dilation=g.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(image, weight, image),
        feature_group_count=g.groups,
        precision=g.precision,
        **options,
    )
