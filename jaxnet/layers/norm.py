"""Normalization. Statistics are computed in at least float32 for every dtype of the input."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, widened

__all__ = ["batch_norm", "layer_norm"]


@interned
def batch_norm(
    *, momentum: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True
) -> Layer:
    """Normalize each feature over the batch, y = (x - m) / sqrt(v + eps) * scale + bias.

    Parameters: scale [C], bias [C]. State: mean [C], var [C].

    m and v are the mean and the variance over all axes but the last. In training they are those of
    the batch, and in evaluation the running averages in the state. Training updates the averages, s
    <- momentum s + (1 - momentum) s_batch, with the unbiased variance (divisor n - 1). PyTorch does
    the same, but its `momentum` is 1 minus this one.

    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.

    Args:
      momentum: the share of the old average, in [0, 1).
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.

    Returns:
      The layer, x [..., C] -> y [..., C].

    Raises:
      ValueError: `momentum` or `eps` is out of range; in `apply`, C differs from that at `init`, or
        training has only one value per feature.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    if not 0 <= momentum < 1:
        raise ValueError(
            f"batch_norm: momentum must be in [0, 1), got {momentum}; it is the share of the old "
            "average"
        )
    eps = _epsilon("batch_norm", eps)

    def init_state(x):
        check_input("batch_norm", x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        width = x.shape[-1:]
        return {
            "mean": initializers.zeros(None, width, dtype),
            "var": initializers.ones(None, width, dtype),
        }

    def fn(params, x, state, train):
        factor, shift = _affine("batch_norm", params, scale, bias)
        check_input("batch_norm", x, width=state["mean"].shape[0], like=_like(params))
        if not train:
            return _by_running_averages(x, state, factor, shift, eps), state
        n = math.prod(x.shape[:-1])
        if isinstance(n, int) and n < 2:
            raise ValueError(
                "batch_norm: training needs more than one value per feature, got "
                f"{x.dtype}{list(x.shape)}"
            )
        return _by_the_batch(x, state, factor, shift, eps, momentum)

    made = layer(_init("batch_norm", scale, bias), fn, init_state=init_state, label="batch_norm")
    return dataclasses.replace(made, wide=("scale", "bias"))


@interned
def layer_norm(*, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalize the last axis, y = (x - m) / sqrt(v + eps) * scale + bias.

    Parameters: scale [C], bias [C]. m and v are the mean and the biased variance over the last
    axis.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Args:
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.

    Returns:
      The layer, x [..., C] -> y [..., C].

    Raises:
      ValueError: `eps` is out of range; in `apply`, C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    eps = _epsilon("layer_norm", eps)

    def fn(params, x):
        factor, shift = _affine("layer_norm", params, scale, bias)
        like = _like(params)
        check_input("layer_norm", x, width=None if like is None else like.shape[0], like=like)
        return _over_features(x, factor, shift, eps)

    made = layer(_init("layer_norm", scale, bias), fn, label="layer_norm")
    return dataclasses.replace(made, wide=("scale", "bias"))


def _init(label: str, scale: bool, bias: bool):
    def init(key, x):
        check_input(label, x)
        params = {}
        if scale:
            params["scale"] = initializers.ones(key, x.shape[-1:], x.dtype)
        if bias:
            params["bias"] = initializers.zeros(key, x.shape[-1:], x.dtype)
        return params

    return init


# The equations are jitted, so that JAX traces and differentiates each once for all layers of one
# shape. `inline` leaves no call in the program of a network.


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _over_features(x, scale, bias, eps):
    d, _ = _shifted(widened(x), (x.ndim - 1,))
    d = d - d.mean(-1, keepdims=True)
    var = jnp.square(d).mean(-1, keepdims=True)
    return _scaled(d, var, eps, scale, bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _by_running_averages(x, state, scale, bias, eps):
    wide = widened(x)
    mean, var = (state[name].astype(wide.dtype) for name in ("mean", "var"))
    return _scaled(wide - jnp.broadcast_to(mean, wide.shape), var, eps, scale, bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _by_the_batch(x, state, scale, bias, eps, momentum):
    n, axes = math.prod(x.shape[:-1]), tuple(range(x.ndim - 1))
    d, shift = _shifted(widened(x), axes)
    # E[d^2] - E[d]^2 needs one pass over d. It loses digits if the mean of d is large compared with
    # the deviation, but the mean of the shifted values is small.
    mean = d.mean(axes, keepdims=True)
    var = jnp.maximum(jnp.square(d).mean(axes, keepdims=True) - jnp.square(mean), 0)
    unbiased = n / (n - 1) if isinstance(n, int) else _number(n, d) / (_number(n, d) - 1)
    batch = {"mean": (shift + mean).reshape(-1), "var": (var * unbiased).reshape(-1)}
    moved = {
        name: momentum * old + (1 - momentum) * batch[name].astype(old.dtype)
        for name, old in state.items()
    }
    return _scaled(d - mean, var, eps, scale, bias).astype(x.dtype), jax.lax.stop_gradient(moved)


def _shifted(x, axes: tuple[int, ...]):
    """(x minus its rounded mean over some axes, that mean with these axes of size 1).

    The mean of the difference is a rounding error. The rounded mean is subtracted without a
    gradient, because the layers give the same outputs for every shift.
    """
    shift = jax.lax.stop_gradient(x.mean(axes, keepdims=True))
    return x - shift, shift


def _scaled(d, var, eps, scale, bias):
    """d / sqrt(var + eps) * scale + bias."""
    factor = jax.lax.rsqrt(var + eps)
    if scale is not None:
        factor = factor * jnp.broadcast_to(scale.astype(d.dtype), (*factor.shape[:-1], d.shape[-1]))
    y = d * jnp.broadcast_to(factor, d.shape)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(d.dtype), d.shape)


def _number(n, x):
    """A size that is symbolic (`jax.export.symbolic_shape`) as a scalar in the dtype of x."""
    return jnp.asarray(n).astype(x.dtype)


def _epsilon(label: str, eps: Any) -> float:
    is_number = isinstance(eps, int | float | np.number) and not isinstance(eps, bool)
    if not is_number or not 0 <= eps < math.inf:
        raise ValueError(f"{label}: eps must be a number of at least 0 such as 1e-5, got {eps!r}")
    return float(eps)


def _affine(label: str, params, scale: bool, bias: bool):
    """The two parameters; None for one that this layer does not have."""
    check_real(label, params)
    return params["scale"] if scale else None, params["bias"] if bias else None


def _like(params):
    """The width and the dtype that the input must have; None if there is no parameter."""
    for param in params.values():
        return jax.ShapeDtypeStruct(param.shape, computed_dtype(params, param))
