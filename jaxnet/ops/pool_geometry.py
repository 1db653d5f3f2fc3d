"""The geometry of the windows of pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxnet.ops.geometry import Geometry, per_axis, resolve_padding, window_geometry


def pool_geometry(
    what: str,
    shape,
    window,
    strides,
    padding,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Geometry:
    """The windows of a pooling over arrays [N, *spatial, C] of this shape. `what` is the start of
    errors.

    With `ceil_mode`, the number of windows along an axis is rounded up, and the padding at its end
    grows to fit the last window. As in PyTorch and ONNX, a window that would start in the padding
    at the end is left out.
    """
    if len(shape) < 3:
        raise ValueError(
            f"{what}: x must be [N, *spatial, C] with 1 spatial axis or more, got shape {shape}"
        )
    strides = window if strides is None else strides
    sizes, rank = tuple(shape[1:-1]), len(shape) - 2
    facts = [
        per_axis(f"{what}: {name}", value, rank)
        for name, value in (("window", window), ("strides", strides), ("dilation", dilation))
    ]
    pads = resolve_padding(what, padding, sizes, *facts)
    windows, steps, gaps = facts
    spans = tuple((w - 1) * d + 1 for w, d in zip(windows, gaps, strict=True))
    if any(max(pair) >= span for pair, span in zip(pads, spans, strict=True)):
        raise ValueError(
            f"{what}: padding must be smaller than the window, {spans}, else a window has no "
            f"element; got {padding!r}"
        )
    if ceil_mode:
        ends = zip(sizes, pads, spans, steps, strict=True)
        padding = [(lo, hi + _excess(n, lo, hi, span, s)) for n, (lo, hi), span, s in ends]
    return window_geometry(what, shape, windows, steps, padding, gaps)


def _excess(size: int, lo: int, hi: int, span: int, stride: int) -> int:
    """By how much the windows of `ceil_mode` exceed one axis and its padding."""
    room = size + lo + hi - span
    last = -(-room // stride) * stride
    if last >= size + lo:
        last -= stride
    return max(0, last - room)


def counts_along(g: Geometry, starts: list[int], ends: list[int]) -> list[np.ndarray]:
    """For each axis, the number of elements of each window that lie between start and end."""
    facts = zip(g.outputs, g.strides, g.padding, g.window, g.dilation, strict=True)
    positions = [
        np.add.outer(np.arange(o) * s - lo, np.arange(w) * d) for o, s, (lo, _), w, d in facts
    ]
    along = zip(positions, starts, ends, strict=True)
    return [((at >= start) & (at < end)).sum(-1) for at, start, end in along]
