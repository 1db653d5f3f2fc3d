"""Initial values of parameters: those of `jax.nn.initializers`, from few programs.

They are the same bit for bit with JAX 0.10, and to a few roundings with later versions.

XLA takes a quarter of a second to compile random numbers of one shape, more than a small network
needs for all the rest of its `init`. However, n numbers are the first n of any longer draw from the
same key. Therefore one program serves all shapes below its length, and NumPy, which compiles
nothing, does the rest of the work for a shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.core import fold, is_threefry

__all__ = ["bias", "fan_in_normal", "lecun_normal", "ones", "zeros"]

# The lengths of draws, and of the blocks in which a draw is computed, in numbers.
SHORTEST, LONGEST, BLOCK = 2**16, 2**20, 2**12


class Draw(NamedTuple):
    """A distribution whose numbers are sqrt(2) erf_inv(u) of uniform u in [low, high), clipped.

    Attributes:
      own: the draw of `jax.random`, (key, shape, dtype) -> array.
      low: the smallest u.
      high: the bound of u.
      least: the smallest number.
      most: the largest number.
      deviation: the standard deviation of the numbers. The initializers divide by it.
    """

    own: Callable[..., Any]
    low: float
    high: float
    least: float
    most: float
    deviation: float


# jax.lax.erf(2 / sqrt(2)) in float32.
_ERF_OF_SQRT_2 = float(np.float32(0.95449974))
_BELOW_2 = float(np.nextafter(np.float32(2), np.float32(0)))
NORMAL = Draw(
    jax.random.normal,
    float(np.nextafter(np.float32(-1), np.float32(0))),
    1.0,
    -math.inf,
    math.inf,
    deviation=1.0,
)
TRUNCATED = Draw(
    functools.partial(jax.random.truncated_normal, lower=-2.0, upper=2.0),
    -_ERF_OF_SQRT_2,
    _ERF_OF_SQRT_2,
    -_BELOW_2,
    _BELOW_2,
    deviation=0.87962566103423978,
)


def lecun_normal(key, shape: tuple[int, ...], dtype):
    """Draw a kernel [*window, in, out] as `jax.nn.initializers.lecun_normal()` does.

    The numbers are truncated normal with deviation 1 / sqrt(fan-in). The fan-in is the product of
    all axes but the last.
    """
    return _scaled_by_fan_in(
        jax.nn.initializers.lecun_normal(), TRUNCATED, key, shape, dtype, out_axis=-1
    )


def fan_in_normal(key, shape: tuple[int, int], dtype):
    """Draw an embedding [num_embeddings, features] from normal numbers of deviation 1 /
    sqrt(features).

    It is `jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)`.
    """
    own = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
    return _scaled_by_fan_in(own, NORMAL, key, shape, dtype, out_axis=0)


def bias(initializer: Callable[..., Any], key, shape: tuple[int, ...], dtype):
    """Initialize a bias. The kernel uses `key` itself, so a random bias is drawn with a key folded
    from it.
    """
    constant = initializer in (zeros, ones, jax.nn.initializers.zeros, jax.nn.initializers.ones)
    return initializer(key if constant else fold(key, "bias"), shape, dtype)


def zeros(key, shape: tuple[int, ...], dtype):
    """Fill with zeros, as `jax.nn.initializers.zeros` does. The key may be None."""
    return _full(key, shape, 0, dtype)


def ones(key, shape: tuple[int, ...], dtype):
    """Fill with ones, as `jax.nn.initializers.ones` does. The key may be None."""
    return _full(key, shape, 1, dtype)


def _full(key, shape, value, dtype):
    if _is_for_numpy(key):
        return jax.device_put(np.full(shape, value, dtype))
    return jnp.full(shape, value, dtype)


def _is_for_numpy(x) -> bool:
    """Whether results of x may be computed in NumPy: x is not traced, and no mesh places arrays."""
    return not isinstance(x, jax.core.Tracer) and jax.sharding.get_abstract_mesh().empty


def _scaled_by_fan_in(own: Callable[..., Any], draw: Draw, key, shape, dtype, *, out_axis: int):
    """`own(key, shape, dtype)`, which is `draw` over its deviation, times 1 / sqrt(fan-in).

    A traced draw has these bits too, although `own` itself may differ in the last one: XLA merges
    its constant factors.
    """
    n, traced = math.prod(shape), isinstance(key, jax.core.Tracer)
    prefixes = jax.config.jax_threefry_partitionable and is_threefry(key)  # pyright: ignore[reportAttributeAccessIssue]
    if not prefixes or n > LONGEST:
        return own(key, shape, dtype)
    length = 1 << (n - 1).bit_length()
    if not traced and dtype == jnp.float32 and _is_for_numpy(key) and _on_cpu(key):
        drawn = _first(key, n, draw)
    else:
        drawn = draw.own(key, shape=(length if traced else max(length, SHORTEST),), dtype=dtype)
    # JAX divides in this order and rounds each result to the dtype.
    fan_in = shape[-2] * (n / shape[-2] / shape[out_axis])
    factor = np.sqrt(np.array(1 / fan_in, drawn.dtype)) / np.array(draw.deviation, drawn.dtype)
    if _is_for_numpy(drawn):
        values = jax.device_get(drawn)[:n].reshape(shape) * factor
        return jax.device_put(values, drawn.sharding if drawn.committed else None)
    return jax.lax.optimization_barrier(drawn)[:n].reshape(shape) * factor


def _on_cpu(key) -> bool:
    return all(device.platform == "cpu" for device in key.devices())


def _first(key, n: int, draw: Draw) -> jax.Array:
    """At least the first n numbers of `draw.own(key, (length,), float32)`, for any length >= n."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    size = SHORTEST if n <= SHORTEST else LONGEST
    return _blocks(size, words, -(-n // BLOCK), *(np.float32(x) for x in draw[1:5]))


@functools.partial(jax.jit, static_argnums=0)
def _blocks(size: int, words, blocks, low, high, least, most):
    """The first blocks of a draw of `size` numbers, as `jax.random` computes them; the rest is 0.

    Number i depends only on the key and i. Therefore one program, with the number of blocks and the
    distribution as arguments, serves all shapes and computes only the blocks that are needed.
    """
    # This import takes as long as all imports of jaxnet, so it is not at the top of the module.
    from jax.extend.random import threefry2x32_p

    first, second = (jnp.broadcast_to(word, (BLOCK,)) for word in words)
    lane = jax.lax.iota(jnp.uint32, BLOCK)

    def add(i, numbers):
        start = i * BLOCK
        count = lane + jax.lax.convert_element_type(start, jnp.uint32)
        a, b = threefry2x32_p.bind(first, second, jnp.zeros_like(count), count)
        mantissa = jax.lax.shift_right_logical(a ^ b, np.uint32(9)) | np.uint32(0x3F800000)
        uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
        uniform = jax.lax.max(low, uniform * (high - low) + low)
        normal = jax.lax.clamp(least, np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform), most)
        return jax.lax.dynamic_update_slice(numbers, normal, (start,))

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros(size, jnp.float32))
