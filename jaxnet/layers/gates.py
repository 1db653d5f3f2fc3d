"""What the recurrent cells share: the start of a carry, its checks, and kernels of gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxnet.core import describe, fold, is_array
from jaxnet.mixed import affine

__all__ = [
    "carried",
    "check_carry",
    "gate_kernel",
    "joined",
    "orthogonal",
    "product",
    "zeros_beside",
]


def orthogonal(key, shape: tuple[int, int], dtype):
    """Draw a matrix [in, out] with orthonormal rows or columns (Saxe, McClelland & Ganguli 2014).

    The decomposition runs in at least float32.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


def gate_kernel(
    kernel_init: Callable[..., Any],
    recurrent_init: Callable[..., Any],
    key: Any,
    sizes: tuple[int, int, int],
    gates: int,
    dtype: Any,
) -> jax.Array:
    """The kernel [D + P, gates * H] of all gates, for `sizes` (D, P, H).

    The first D rows multiply the input, and the last P rows the output of the last step. Each gate
    draws a recurrent matrix of its own.
    """
    width, back, features = sizes
    above = kernel_init(key, (width, gates * features), dtype)
    below = [
        recurrent_init(fold(key, f"recurrent{gate}"), (back, features), dtype)
        for gate in range(gates)
    ]
    return jnp.concatenate([above, jnp.concatenate(below, 1)], 0)


def zeros_beside(x: Any, lead: int, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """Zeros [*x.shape[:lead], *shape], sharded over these leading axes as x is."""
    shape, dtype = (*x.shape[:lead], *shape), dtype or x.dtype
    sharding = jax.typeof(x).sharding
    axes = tuple(sharding.spec)[:lead]
    if all(axis is None for axis in axes):
        return jnp.zeros(shape, dtype)
    spec = PartitionSpec(*axes, *(None,) * (len(shape) - lead))
    placed = NamedSharding(sharding.mesh, spec)
    return jax.lax.broadcast(jnp.zeros((), dtype), shape, out_sharding=placed)


def carried(label: str, carry: Any, x: Any, features: int, what: str = "the carry") -> jax.Array:
    """One array of the carry, [..., features] for x [..., D]; zeros for None."""
    if carry is None:
        return zeros_beside(x, x.ndim - 1, (features,))
    check_carry(label, carry, (*x.shape[:-1], features), x, what)
    return carry


def check_carry(label: str, carry: Any, shape: tuple[Any, ...], x: Any, what: str) -> None:
    """Raise unless an array of the carry has this shape and the dtype of x."""
    if not is_array(carry):
        raise TypeError(
            f"{label}: {what} must be an array, or None for zeros, got {describe(carry)}"
        )
    if carry.shape != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(
            f"{label}: {what} must have shape [{sizes}], got {describe(carry)}; its leading axes "
            "are those of the input"
        )
    if carry.dtype != x.dtype:
        raise TypeError(
            f"{label}: {what} must have the dtype of the input, {x.dtype}, got {describe(carry)}; "
            "convert one of them"
        )


def joined(x: jax.Array, h: jax.Array, kernel: jax.Array, bias: Any) -> jax.Array:
    """[x, h] K + b over the last axis, in one matrix product."""
    return product(jnp.concatenate([x, h], -1), kernel, bias)


def product(x: jax.Array, kernel: jax.Array, bias: Any = None) -> jax.Array:
    """x K + b over the last axis, x [..., D]. The product is one of matrices."""
    flat = x if x.ndim <= 2 else x.reshape(-1, x.shape[-1])
    y = jnp.matmul(flat, kernel) if bias is None else affine(flat, kernel, bias)
    return y.reshape(*x.shape[:-1], kernel.shape[1])
