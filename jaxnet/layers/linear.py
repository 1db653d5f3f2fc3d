"""Affine maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import affine

__all__ = ["dense"]


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
