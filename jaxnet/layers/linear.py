"""Affine and bilinear maps of the last axis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import affine

__all__ = ["bilinear", "dense"]


@interned
def dense(
    features: int,
    *,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Affine map of the last axis, y = x W + b.

    Parameters: kernel W [D, features], bias b [features].

    Twins: flax.linen.Dense, equinox.nn.Linear, keras.layers.Dense, torch.nn.Linear.

    Args:
      features: the number of features of the output.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      bias_init: the same for the bias.
      precision: the precision of the matrix product, as in `jax.numpy.matmul`.

    Returns:
      The layer, x [..., D] -> y [..., features].

    Raises:
      ValueError: `features` is not a positive integer; in `apply`, D differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.

    Example:
      >>> net = dense(3)
      >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0), jnp.ones((8, 2))))
      {'bias': (3,), 'kernel': (2, 3)}
    """
    features = size_of("dense: features", features)
    label = f"dense({features})"

    def init(key, x):
        check_input(label, x)
        params = {"kernel": kernel_init(key, (x.shape[-1], features), x.dtype)}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        check_input(label, x, width=kernel.shape[0], like=kernel)
        return _affine_rows(x, kernel, params["bias"] if bias else None, precision)

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))


@interned
def bilinear(
    features: int,
    *,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Bilinear map of the last axes of two inputs.

    y[f] = b[f] + sum over d, e of x[d] z[e] W[e, d, f].

    Parameters: kernel W [E, D, features], bias b [features]. `from_torch` gives this order of axes.

    Twins: torch.nn.Bilinear.

    Args:
      features: the number of features of the output.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      bias_init: the same for the bias.
      precision: the precision of the matrix product, as in `jax.numpy.matmul`.

    Returns:
      The layer, (x [..., D], z [..., E]) -> y [..., features].

    Raises:
      ValueError: `features` is not a positive integer; in `init` and `apply`, the batch axes of x
        and z differ, or D or E differs from that at `init`.
      TypeError: in `init` and `apply`, an input is not an array of floats, or not in the dtype of
        the parameters.
    """
    features = size_of("bilinear: features", features)
    label = f"bilinear({features})"

    def check(x, z):
        if x.shape[:-1] != z.shape[:-1]:
            raise ValueError(
                f"{label}: both inputs must have the same batch axes, got {describe(x)} and "
                f"{describe(z)}"
            )

    def init(key, x, z):
        check_input(label, x)
        check_input(label, z, like=x)
        check(x, z)
        params = {"kernel": kernel_init(key, (z.shape[-1], x.shape[-1], features), x.dtype)}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    def fn(params, x, z):
        check_real(label, params)
        kernel = params["kernel"]
        check_input(label, x, width=kernel.shape[1], like=kernel)
        check_input(label, z, width=kernel.shape[0], like=kernel)
        check(x, z)
        pairs = z[..., :, None] * x[..., None, :]
        pairs = pairs.reshape(*x.shape[:-1], kernel.shape[0] * kernel.shape[1])
        matrix = kernel.reshape(pairs.shape[-1], features)
        return _affine_rows(pairs, matrix, params["bias"] if bias else None, precision)

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))


# JAX traces and differentiates a jitted function once for all layers of one shape. `inline` leaves
# no call in the program.
@functools.partial(jax.jit, static_argnums=3, inline=True)
def _affine_rows(x, kernel, bias, precision):
    # With two axes, the gradient of the kernel is one plain matrix product, not a contraction over
    # several axes.
    flat = x if x.ndim <= 2 else x.reshape(-1, x.shape[-1])
    if bias is None:
        y = jnp.matmul(flat, kernel, precision=precision)
    else:
        y = affine(flat, kernel, bias, precision)
    return y.reshape(*x.shape[:-1], kernel.shape[1])
