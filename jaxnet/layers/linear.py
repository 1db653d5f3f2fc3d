"""Affine maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxnet.core import Layer, check_input, fold, interned, layer
from jaxnet.layers import initializers

__all__ = ["dense"]


@interned
def dense(
    units: int,
    *,
    bias: bool = True,
    kernel_init: Callable = initializers.lecun_normal,
    bias_init: Callable = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Affine map of the last axis, y = x W + b.   x [..., D] -> y [..., units]; kernel [D, units], bias [units].

    Args:
      bias: False leaves out b.
      kernel_init, bias_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      precision: of the matrix product, as in `jax.numpy.matmul`.

    Raises: ValueError for another width than at `init`, TypeError for inputs that are not floats of the parameters'
    dtype.
    """
    if not isinstance(units, int) or units < 1:
        raise ValueError(f"dense: units must be a positive int, got {units!r}")
    label = f"dense({units})"

    def init(key, x):
        check_input(label, x)
        params = {"kernel": kernel_init(key, (x.shape[-1], units), x.dtype)}
        return params | {"bias": bias_init(fold(key, "bias"), (units,), x.dtype)} if bias else params

    def fn(params, x):
        kernel = params["kernel"]
        check_input(label, x, width=kernel.shape[0], like=kernel)
        # Two axes at most: then the kernel's gradient is one plain matrix product, no contraction over all batch axes.
        flat = x if x.ndim <= 2 else x.reshape(-1, x.shape[-1])
        y = jnp.matmul(flat, kernel, precision=precision)
        if bias:
            y = y + jnp.broadcast_to(params["bias"], y.shape)
        return y.reshape(*x.shape[:-1], units)

    return layer(init, fn, label=label)
