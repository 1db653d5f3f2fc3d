"""Layers that only move numbers."""

from __future__ import annotations

import math

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer, no_params

__all__ = ["flatten"]


@interned
def flatten(rank: int = 3) -> Layer:
    """Merge the last `rank` axes into one.

    With the default of 3, an image [..., H, W, C] becomes [..., H * W * C].

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
