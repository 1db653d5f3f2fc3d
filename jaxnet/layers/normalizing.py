"""Equations and checks that the normalizations share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.core import check_input
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype

__all__ = ["affine_of", "epsilon", "init_affine", "like_of", "scaled", "shifted"]


def init_affine(label: str, scale: bool, bias: bool, rank: int = 1) -> Callable[..., Any]:
    """The `init` of scale and bias, each with the sizes of the last `rank` axes of the input."""

    def init(key, x):
        check_input(label, x, rank=rank)
        sizes, params = x.shape[len(x.shape) - rank :], {}
        if scale:
            params["scale"] = initializers.ones(key, sizes, x.dtype)
        if bias:
            params["bias"] = initializers.zeros(key, sizes, x.dtype)
        return params

    return init


def shifted(x, axes: tuple[int, ...]):
    """(x minus its rounded mean over some axes, that mean with these axes of size 1).

    The mean of the difference is a rounding error. The rounded mean is subtracted without a
    gradient, because the layers give the same outputs for every shift.
    """
    shift = jax.lax.stop_gradient(x.mean(axes, keepdims=True))
    return x - shift, shift


def scaled(d, var, eps, scale, bias):
    """d / sqrt(var + eps) * scale + bias."""
    factor = jax.lax.rsqrt(var + eps)
    if scale is not None:
        factor = factor * jnp.broadcast_to(scale.astype(d.dtype), (*factor.shape[:-1], d.shape[-1]))
    y = d * jnp.broadcast_to(factor, d.shape)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(d.dtype), d.shape)


def epsilon(label: str, value: Any, what: str = "eps", such: str = "1e-5") -> float:
    """A number of at least 0 as a float. Errors name the argument `what`."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(
            f"{label}: {what} must be a number of at least 0 such as {such}, got {value!r}"
        )
    return float(value)


def affine_of(label: str, params, scale: bool, bias: bool):
    """The two parameters; None for one that this layer does not have."""
    check_real(label, params)
    return params["scale"] if scale else None, params["bias"] if bias else None


def like_of(params):
    """The width and the dtype that the input must have; None if there is no parameter."""
    for param in params.values():
        return jax.ShapeDtypeStruct(param.shape, computed_dtype(params, param))
