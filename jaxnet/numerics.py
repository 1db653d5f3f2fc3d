"""Functions that stay correct for very large and very small numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["euclidean"]


def euclidean(arrays: Sequence[Any]) -> jax.Array:
    """Compute the Euclidean norm of several arrays, sqrt(sum |x|^2), in at least float32.

    The numbers are divided by a power of two near the largest one, so their squares neither
    overflow nor vanish. If the plain formula is accurate, all bits agree with it. The gradient at
    zero is zero.

    Args:
      arrays: arrays of any shape [...].

    Returns:
      The norm, a scalar.
    """
    arrays = [_floating(x) for x in arrays]
    largest = jax.lax.stop_gradient(
        functools.reduce(jnp.maximum, map(_largest, arrays), jnp.float32(0))
    )
    # Without mantissa bits, rounding gives a power of two. The bounds keep its reciprocal from
    # being subnormal.
    kind = jnp.finfo(largest.dtype)
    scale = jax.lax.reduce_precision(jnp.minimum(largest / 2, float(kind.max) / 8), kind.nexp, 0)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1)
    squares = sum((_sum_of_squares(x, scale) for x in arrays), jnp.zeros_like(scale))
    # The derivative of the root is infinite at zero. The inner `where` keeps it from being
    # multiplied by 0 in the gradient.
    zero = squares == 0
    return scale * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def _floating(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _largest(x: jax.Array) -> jax.Array:
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(part), initial=0) for part in parts])


def _sum_of_squares(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x / scale.astype(jnp.finfo(x.dtype).dtype)
    return jnp.sum(jnp.real(x * jnp.conj(x)))
