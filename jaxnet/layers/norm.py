"""Normalisation. Statistics are computed in at least float32, whatever the dtype of the input."""

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
    """Normalise each feature over the batch, y = (x - m) / sqrt(v + eps) * scale + bias.

    x [..., C] -> y [..., C].

    m and v are the mean and variance over all axes but the last: of this batch in training, running
    averages in evaluation. Training moves those in `state` {mean [C], var [C]}, s <- momentum s +
    (1 - momentum) s_batch, where the variance is the unbiased one, with n - 1 (as in PyTorch, whose
    `momentum` is 1 minus this one).

    Raises: ValueError for another width than at `init`, or if there is one value a feature to train
    on.
    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.
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
                "batch_norm: training needs more than one value a feature, got "
                f"{x.dtype}{list(x.shape)}"
            )
        return _by_the_batch(x, state, factor, shift, eps, momentum)

    made = layer(_init("batch_norm", scale, bias), fn, init_state=init_state, label="batch_norm")
    return dataclasses.replace(made, wide=("scale", "bias"))


@interned
def layer_norm(*, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise the last axis, y = (x - m) / sqrt(v + eps) * scale + bias.

    x [..., C] -> y [..., C].

    m and v are the mean and the (biased) variance over the last axis.

    Raises: ValueError for another width than at `init`.
    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    eps = _epsilon("layer_norm", eps)

    def fn(params, x):
        factor, shift = _affine("layer_norm", params, scale, bias)
        like = _like(params)
        check_input("layer_norm", x, width=None if like is None else like.shape[0], like=like)
        return _over_features(x, factor, shift, eps)

    return dataclasses.replace(
        layer(_init("layer_norm", scale, bias), fn, label="layer_norm"), wide=("scale", "bias")
    )


def _init(label: str, scale: bool, bias: bool):
    def init(key, x):
        check_input(label, x)
        params = {"scale": initializers.ones(key, x.shape[-1:], x.dtype)} if scale else {}
        return params | ({"bias": initializers.zeros(key, x.shape[-1:], x.dtype)} if bias else {})

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
    # the deviation, which the mean of the shifted values is not.
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
    """x minus its rounded mean over some axes, whose mean is a rounding error; and that mean, kept
    with size 1.

    The mean is subtracted without a gradient, because the layers give the same outputs for every
    shift.
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
    if (
        isinstance(eps, bool)
        or not isinstance(eps, int | float | np.number)
        or not 0 <= eps < math.inf
    ):
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
