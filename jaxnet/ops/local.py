"""Convolution with a separate kernel for each output position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.ops.geometry import Geometry, window_geometry
from jaxnet.ops.unfolding_cpu import side_by_side

__all__ = ["convolve_locally"]


def convolve_locally(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    precision: Any = None,
) -> jax.Array:
    """Convolve with a separate kernel for each output position.

    y[n, o, f] = sum over w, c of x[n, o s + w d - lo, c] kernel[o, w, c, f].

    Args:
      x: the input, [N, *spatial, C], with at least one spatial axis.
      kernel: the kernels, [*outputs, *window, C, F], in the dtype of x.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: as in `convolve`.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      precision: the precision of the products, as in `jax.numpy.matmul`.

    Returns:
      y [N, *outputs, F] in the dtype of x.

    Raises:
      ValueError: shapes or options do not fit.
    """
    rank = x.ndim - 2
    window = kernel.shape[rank : 2 * rank]
    g = window_geometry("convolve_locally", x.shape, window, strides, padding, dilation)
    if kernel.shape != (*g.outputs, *g.window, x.shape[-1], kernel.shape[-1]):
        raise ValueError(
            f"convolve_locally: the kernel must be {[*g.outputs, *g.window, x.shape[-1]]} and F "
            f"for x {x.shape}, got {kernel.shape}"
        )
    positions, features = math.prod(g.outputs), kernel.shape[-1]
    patches = _patches(x, g).reshape(x.shape[0], positions, math.prod(window) * x.shape[-1])
    # The last axis of the window comes first in the patches.
    order = [*range(rank), *reversed(range(rank, 2 * rank)), 2 * rank, 2 * rank + 1]
    kernels = kernel.transpose(order).reshape(positions, patches.shape[-1], features)
    y = jnp.einsum("npk,pkf->npf", patches, kernels, precision=precision)
    return y.reshape(x.shape[0], *g.outputs, features)


def _patches(x, g: Geometry):
    """The elements of each window as features, [N, *spatial, C] -> [N, *outputs, .. w' w C]; one
    axis after the other, which needs only h + w slices.
    """
    for axis in range(g.rank):
        # `side_by_side` unfolds the axis behind the batch.
        shape = x.shape
        x = x.reshape(math.prod(shape[: axis + 1]), *shape[axis + 1 :])
        x = side_by_side(x, g.axes(slice(axis, axis + 1)))
        x = x.reshape(*shape[: axis + 1], *x.shape[1:])
    return x
