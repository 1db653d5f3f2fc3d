"""Transposed convolution: the map to the input of `convolution`, with the sizes of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.ops.convolution import bind, equally_varying
from jaxnet.ops.geometry import Geometry, per_axis

__all__ = ["convolve_transpose", "transposed_geometry"]


def convolve_transpose(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    output_padding: int | Sequence[int] = 0,
    output_size: Sequence[int] | None = None,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Transpose a convolution: the gradient of `convolve` with respect to its input.

    y[n, o s + w d - lo, f] sums x[n, o, c] kernel[w, f, c] over o, w and c. All derivatives, in
    both modes and of every order, keep their speed inside compiled loops on a CPU.

    Args:
      x: the input, [N, *spatial, C], with at least one spatial axis.
      kernel: the kernel of the convolution, [*window, F / groups, C], in the dtype of x.
      strides: s; one int for all spatial axes, or one per axis.
      padding: how much of the whole result is cut off; as in `jaxnet.conv_transpose`.
      output_padding: the number of elements that are added at the end of each axis.
      output_size: the size along each spatial axis of y.
      dilation: d; one int for all spatial axes, or one per axis.
      groups: the number of groups.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      y [N, *outputs, F] in the dtype of x.

    Raises:
      TypeError: the dtypes differ or have no gradient.
      ValueError: shapes or options do not fit.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            "convolve_transpose: x and kernel must have one floating dtype, got "
            f"{x.dtype} and {kernel.dtype}"
        )
    divides = groups >= 1 and x.shape[-1] % groups == 0
    if x.ndim < 3 or kernel.ndim != x.ndim or kernel.shape[-1] != x.shape[-1] or not divides:
        raise ValueError(
            "convolve_transpose: x must be [N, *spatial, C] and kernel [*window, F / groups, C], "
            f"and groups divide C, got {groups=} and shapes {x.shape} and {kernel.shape}"
        )
    geometry = transposed_geometry(
        "convolve_transpose",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides,
        padding,
        output_padding,
        output_size,
        dilation,
    )
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    x, kernel = equally_varying(x, kernel)
    geometry = geometry._replace(groups=groups, precision=precision)
    return bind("input", kernel, x, geometry=geometry)


def transposed_geometry(
    what: str,
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Any,
    padding: Any,
    output_padding: Any = 0,
    output_size: Any = None,
    dilation: Any = 1,
) -> Geometry:
    """The geometry of the convolution whose transpose has inputs of these sizes. `what` is the
    start of errors. Raises ValueError if an option has the wrong form, or nothing would be left.
    """
    rank = len(sizes)
    strides = per_axis(f"{what}: strides", strides, rank)
    dilation = per_axis(f"{what}: dilation", dilation, rank)
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    ends = zip(sizes, strides, spans, strict=True)
    whole = [(n - 1) * s + span for n, s, span in ends]
    if isinstance(padding, str):
        cut, outputs = _by_name(what, padding.upper(), sizes, strides, whole, output_size)
    else:
        cut, outputs = _by_numbers(padding, whole, output_padding, output_size)
    least = [full - lo - hi for full, (lo, hi) in zip(whole, cut, strict=True)]
    if min(*sizes, *outputs) < 1:
        raise ValueError(
            f"{what}: nothing is left of spatial axes {tuple(sizes)} with {padding=}, the outputs "
            f"would have sizes {tuple(outputs)}; take less padding"
        )
    most = [n + max(s, d) - 1 for n, s, d in zip(least, strides, dilation, strict=True)]
    if any(not n <= size <= m for n, size, m in zip(least, outputs, most, strict=True)):
        raise ValueError(
            f"{what}: the outputs of spatial axes {tuple(sizes)} may have sizes from "
            f"{tuple(least)} to {tuple(most)}, because fewer elements are added than stride or "
            f"dilation; got {tuple(outputs)}"
        )
    facts = zip(whole, outputs, cut, strict=True)
    pads = tuple((lo, full - size - lo) for full, size, (lo, _) in facts)
    return Geometry(tuple(outputs), tuple(window), strides, pads, dilation)


def _by_name(what: str, name: str, sizes, strides, whole, output_size) -> tuple[list, list]:
    """The numbers of elements to cut off (before, after) each axis, and the sizes of the outputs,
    for a named padding.
    """
    if name not in ("SAME", "SAME_LOWER", "VALID"):
        raise ValueError(
            f"{what}: padding must be 'SAME', 'VALID', an int or (before, after) for each axis, "
            f"or 'SAME_LOWER', got {name!r}"
        )
    tiled = [n * s for n, s in zip(sizes, strides, strict=True)]
    if name == "VALID":
        outputs = [max(pair) for pair in zip(tiled, whole, strict=True)]
        return [(0, 0)] * len(whole), list(output_size or outputs)
    outputs = list(output_size or tiled)
    cut = [max(0, full - size) for full, size in zip(whole, outputs, strict=True)]
    halves = [(n // 2, n - n // 2) for n in cut]
    return (halves if name == "SAME" else [pair[::-1] for pair in halves]), outputs


def _by_numbers(padding, whole, output_padding, output_size) -> tuple[list, list]:
    """The same for an int, or (before, after) per axis."""
    rank = len(whole)
    pads = [(padding, padding)] * rank if isinstance(padding, int) else list(padding)
    more = [output_padding] * rank if isinstance(output_padding, int) else output_padding
    facts = zip(whole, pads, more, strict=True)
    outputs = [full - lo - hi + extra for full, (lo, hi), extra in facts]
    return pads, list(output_size or outputs)
