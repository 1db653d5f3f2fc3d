"""Positions: rotations of queries and keys, and vectors added to inputs.

The position of a token is an integer. `at` is a scalar, the position of the first token, or an
array [T] or [..., T] with the position of each token. It begins at 0 by default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer, no_params
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, rows, widened

__all__ = ["learned_positions", "positions_of", "rotary", "sinusoidal"]


@interned
def rotary(
    base: float = 10_000.0,
    *,
    interleaved: bool = False,
    size: int | None = None,
    scaling: Callable[[np.ndarray], Any] | None = None,
) -> Layer:
    """Rotate pairs of features by angles that grow with the position.

    (a_i, b_i) -> (a_i cos t - b_i sin t, a_i sin t + b_i cos t), t = position / base^(2i / size).

    A product of a rotated query and a rotated key depends on the distance of their positions only.
    The angles are computed in float32.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.

    Twins: torchtune.modules.RotaryPositionalEmbeddings, equinox.nn.RotaryPositionalEmbedding,
    keras_hub.layers.RotaryEmbedding.

    Args:
      base: the base of the frequencies (`rope_theta`).
      interleaved: how features are paired. False pairs feature i with i + size / 2, as Hugging Face
        does; True pairs 2i with 2i + 1, as the paper and llama2.c do.
      size: the number of features that are rotated, the first ones; all by default.
      scaling: a function of the frequencies [size / 2] in NumPy, that returns other frequencies, or
        a pair (frequencies, factor of cos and sin): `jaxnet.layers.scaling` has those of Llama 3,
        YaRN and linear scaling.

    Returns:
      The layer, (x [..., T, heads, D], at) -> y [..., T, heads, D].

    Raises:
      ValueError: `base` is not positive, `size` is odd; in `apply`, D is odd or less than `size`.
      TypeError: in `apply`, x is not an array of floats, or `at` has no integers.
    """
    if not base > 0:
        raise ValueError(f"rotary: base must be positive, got {base}")
    size = None if size is None else size_of("rotary: size", size)
    if size is not None and size % 2:
        raise ValueError(f"rotary: size must be even, because features are paired, got {size}")

    def fn(params, x, at=None):
        check_input("rotary", x, rank=3)
        turned = size or x.shape[-1]
        if turned % 2 or turned > x.shape[-1]:
            raise ValueError(
                f"rotary: the last axis must be even and at least size={size}, got {describe(x)}"
            )
        frequencies, factor = _frequencies(float(base), turned, scaling)
        positions = positions_of("rotary", at, x.shape[-3], x.ndim - 2)
        return _rotated(x, positions, frequencies.tobytes(), factor, interleaved)

    return layer(no_params, fn, label=f"rotary({base:g})")


def _frequencies(base: float, size: int, scaling):
    frequencies, factor = base ** (-np.arange(0, size, 2) / size), 1.0
    if scaling is not None:
        frequencies = scaling(frequencies)
        if isinstance(frequencies, tuple):
            frequencies, factor = frequencies
    return np.asarray(frequencies, np.float64), float(factor)


# The frequencies are static, as bytes, so that one trace serves all layers of a network.
@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _rotated(x, positions, frequencies, factor, interleaved):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    f = jnp.asarray(np.frombuffer(frequencies), wide)
    angles = jnp.expand_dims(positions, (-1, -2)).astype(wide) * f.reshape(
        (1,) * (positions.ndim + 1) + f.shape
    )
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    size = 2 * f.size
    turned, rest = widened(x[..., :size]), x[..., size:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., : f.size], turned[..., f.size :]
    shape = (1,) * (x.ndim - cos.ndim) + cos.shape
    cos, sin = (jnp.broadcast_to(z.reshape(shape), a.shape) for z in (cos, sin))
    a, b = a * cos - b * sin, a * sin + b * cos
    y = jnp.stack([a, b], -1).reshape(turned.shape) if interleaved else jnp.concatenate([a, b], -1)
    y = y.astype(x.dtype)
    return y if rest.shape[-1] == 0 else jnp.concatenate([y, rest], -1)


@interned
def sinusoidal(base: float = 10_000.0) -> Layer:
    """Add sines and cosines of the position.

    y = x + P, P[p, 2i] = sin(p / base^(2i / C)), P[p, 2i + 1] = cos(p / base^(2i / C)).

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.

    Twins: keras_hub.layers.SinePositionEncoding.

    Args:
      base: the base of the frequencies.

    Returns:
      The layer, (x [..., T, C], at=None) -> y [..., T, C].

    Raises:
      ValueError: `base` is not positive.
      TypeError: in `apply`, x is not an array of floats, or `at` has no integers.
    """
    if not base > 0:
        raise ValueError(f"sinusoidal: base must be positive, got {base}")

    def fn(params, x, at=None):
        check_input("sinusoidal", x, rank=2)
        positions = positions_of("sinusoidal", at, x.shape[-2], x.ndim - 1)
        return _with_waves(x, positions, float(base))

    return layer(no_params, fn, label=f"sinusoidal({base:g})")


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _with_waves(x, positions, base):
    wide, width = jnp.promote_types(x.dtype, jnp.float32), x.shape[-1]
    f = jnp.asarray(base ** (-np.arange(0, width, 2) / width), wide)
    angles = jnp.expand_dims(positions, -1).astype(wide) * f.reshape(
        (1,) * positions.ndim + f.shape
    )
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
    waves = waves.reshape(*positions.shape, 2 * f.size)[..., :width]
    waves = waves.reshape((1,) * (x.ndim - waves.ndim) + waves.shape)
    return (x.astype(wide) + jnp.broadcast_to(waves, x.shape)).astype(x.dtype)


@interned
def learned_positions(
    length: int, *, embedding_init: Callable[..., Any] = initializers.fan_in_normal
) -> Layer:
    """Add a learned vector for each position, y = x + E[at].

    Parameters: embedding E [length, C].

    The vector of a position that is not in 0 .. length - 1 is NaN, so that the mistake shows.

    Source: Gehring et al., "Convolutional Sequence to Sequence Learning", ICML 2017.

    Twins: keras_hub.layers.PositionEmbedding.

    Args:
      length: the number of positions.
      embedding_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, (x [..., T, C], at=None) -> y [..., T, C].

    Raises:
      ValueError: `length` is not a positive integer; in `apply`, T is greater, or C differs from
        that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    length = size_of("learned_positions: length", length)
    label = f"learned_positions({length})"

    def check_length(x):
        if x.shape[-2] > length:
            raise ValueError(
                f"{label}: the sequence must have at most {length} tokens, got {describe(x)}"
            )

    def init(key, x):
        check_input(label, x, rank=2)
        check_length(x)
        return {"embedding": embedding_init(key, (length, x.shape[-1]), x.dtype)}

    def fn(params, x, at=None):
        check_real(label, params)
        table = params["embedding"]
        dtype = computed_dtype(params, table)
        check_input(
            label, x, rank=2, width=table.shape[-1], like=jax.ShapeDtypeStruct(table.shape, dtype)
        )
        check_length(x)
        positions = positions_of(label, at, x.shape[-2], x.ndim - 1)
        outside = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        added = rows(table, positions, table.dtype, **outside)
        added = jnp.broadcast_to(added.reshape((1,) * (x.ndim - added.ndim) + added.shape), x.shape)
        return (x.astype(added.dtype) + added).astype(x.dtype)

    return dataclasses.replace(layer(init, fn, label=label), wide=("embedding",))


def positions_of(label: str, at: Any, length: Any, rank: int) -> jax.Array:
    """The position of each token.

    Args:
      label: the name of the layer in errors.
      at: the position of the first token, a scalar; the positions of all, [T] or [..., T]; None for
        0, 1, ...
      length: T, the number of tokens.
      rank: the largest number of axes of `at`.

    Returns:
      Integers, [T] or [..., T].

    Raises:
      TypeError: `at` has no integers.
      ValueError: `at` has another shape.
    """
    count = jax.lax.iota(jnp.int32, length)
    if at is None:
        return count
    at = jnp.asarray(at)
    if not jnp.issubdtype(at.dtype, jnp.integer):
        raise TypeError(f"{label}: positions must be integers, got {describe(at)}")
    if at.ndim == 0:
        return count + at.astype(count.dtype)
    if at.ndim > rank or at.shape[-1] != length:
        raise ValueError(
            f"{label}: `at` must be a scalar, the position of the first token, or the positions of "
            f"all {length} tokens, got {describe(at)}"
        )
    return at
