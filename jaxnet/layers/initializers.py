"""The layers' own initialisers: the bits of `jax.nn.initializers`, from few programs.

XLA takes a quarter of a second to compile random numbers of one shape, more than a small network needs for all the rest
of its `init`. But n numbers are the first n of any longer draw from the same key, so that one program serves all shapes
below its length; and what is left to do for one shape alone is done in NumPy, which compiles nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.core import is_threefry

__all__ = ["fan_in_normal", "lecun_normal", "ones", "zeros"]

SHORTEST, LONGEST = 2**16, 2**20  # of the draws, in numbers: 1 ms and 20 ms on a core


def lecun_normal(key, shape: tuple[int, ...], dtype):
    """`jax.nn.initializers.lecun_normal()`: truncated normal of deviation 1 / sqrt(fan-in), all axes but the last.

    key; shape [*window, in, out]; dtype -> array.
    """
    draw = functools.partial(jax.random.truncated_normal, lower=-2.0, upper=2.0)
    own = jax.nn.initializers.lecun_normal()
    deviation = 0.87962566103423978  # of a standard normal cut off at -2 and 2
    return _scaled_by_fan_in(own, draw, deviation, key, shape, dtype, out_axis=-1)


def fan_in_normal(key, shape: tuple[int, int], dtype):
    """`jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)`: normal of deviation 1 / sqrt(features).

    key; shape [vocabulary, features]; dtype -> array.
    """
    own = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    return _scaled_by_fan_in(own, jax.random.normal, 1.0, key, shape, dtype, out_axis=0)


def zeros(key, shape: tuple[int, ...], dtype):
    """`jax.nn.initializers.zeros`; the key may be None."""
    return _full(key, shape, 0, dtype)


def ones(key, shape: tuple[int, ...], dtype):
    """`jax.nn.initializers.ones`; the key may be None."""
    return _full(key, shape, 1, dtype)


def _full(key, shape, value, dtype):
    if _is_for_numpy(key):
        return jax.device_put(np.full(shape, value, dtype))
    return jnp.full(shape, value, dtype)


def _is_for_numpy(x) -> bool:
    """Whether what follows from x may be computed in NumPy: x is not traced, and no mesh says where arrays are to be."""
    return not isinstance(x, jax.core.Tracer) and jax.sharding.get_abstract_mesh().empty


def _scaled_by_fan_in(own: Callable, draw: Callable, deviation: float, key, shape, dtype, *, out_axis: int):
    """`own(key, shape, dtype)`, which is `draw` over its deviation, times 1 / sqrt(fan-in).

    What is traced has these bits, too, where `own` itself may differ in the last: XLA merges its constant factors.
    """
    n, traced = math.prod(shape), isinstance(key, jax.core.Tracer)
    prefixes = jax.config.jax_threefry_partitionable and is_threefry(key)  # pyright: ignore[reportAttributeAccessIssue]
    if not prefixes or n > LONGEST:
        return own(key, shape, dtype)
    length = 1 << (n - 1).bit_length()
    drawn = draw(key, shape=(length if traced else max(length, SHORTEST),), dtype=dtype)
    # From here on as in JAX: this order of divisions, each result rounded to the dtype.
    fan_in = shape[-2] * (n / shape[-2] / shape[out_axis])
    factor = np.sqrt(np.array(1 / fan_in, drawn.dtype)) / np.array(deviation, drawn.dtype)
    if _is_for_numpy(drawn):
        values = jax.device_get(drawn)[:n].reshape(shape) * factor
        return jax.device_put(values, drawn.sharding if drawn.committed else None)
    return jax.lax.optimization_barrier(drawn)[:n].reshape(shape) * factor
