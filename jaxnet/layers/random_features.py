"""Random features that approximate a kernel."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer, no_params
from jaxnet.mixed import widened

__all__ = ["fourier_features"]


@interned
def fourier_features(features: int, *, length: float = 1.0) -> Layer:
    """Random Fourier features, y = [cos(x B), sin(x B)] / sqrt(features), B normal and constant.

    The inner product of two outputs approximates the Gaussian kernel, exp(-|x - x'|^2 / (2
    length^2)), with an error of about 1 / sqrt(features).

    State: frequencies B [D, features], normal with deviation 1 / length.

    Source: Rahimi & Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.

    Twins: keras.layers.RandomFourierFeatures.

    Args:
      features: the number of frequencies.
      length: the length scale of the kernel.

    Returns:
      The layer, x [..., D] -> y [..., 2 * features].

    Raises:
      ValueError: an option is out of range; in `init_state`, the key is missing; in `apply`, D
        differs from that of the state.
      TypeError: in `init_state` and `apply`, x is not an array of floats.
    """
    features = size_of("fourier_features: features", features)
    if isinstance(length, bool) or not 0 < length < math.inf:
        raise ValueError(f"fourier_features: length must be a positive number, got {length}")
    label = f"fourier_features({features})"

    def init_state(x, key):
        check_input(label, x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return {"frequencies": jax.random.normal(key, (x.shape[-1], features), dtype) / length}

    def fn(params, x, state):
        check_input(label, x, width=state["frequencies"].shape[0])
        return _waves(x, state["frequencies"]), state

    return layer(no_params, fn, init_state=init_state, label=label)


@functools.partial(jax.jit, inline=True)
def _waves(x, frequencies):
    wide = widened(x)
    flat = wide if x.ndim <= 2 else wide.reshape(-1, x.shape[-1])
    # An angle of many turns needs all digits of the product.
    angles = jnp.matmul(flat, frequencies.astype(wide.dtype), precision="highest")
    factor = frequencies.shape[1] ** -0.5
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1) * factor
    return waves.reshape(*x.shape[:-1], -1).astype(x.dtype)
