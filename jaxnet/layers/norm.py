"""Normalisation. Statistics are computed in at least float32, whatever the dtype of the input."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers

__all__ = ["batch_norm", "layer_norm"]


@interned
def batch_norm(*, momentum: float = 0.9, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise each feature over the batch, y = (x - m) / sqrt(v + eps) * scale + bias.   x [..., C] -> y [..., C].

    m and v are the mean and variance over all axes but the last: of this batch in training, running averages in
    evaluation. Training moves those in `state` {mean [C], var [C]}, s <- momentum s + (1 - momentum) s_batch, where the
    variance is the unbiased one, with n - 1 (as in PyTorch, whose `momentum` is 1 minus this one).

    Raises: ValueError for another width than at `init`, or if there is one value a feature to train on.
    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"batch_norm: momentum must be in [0, 1), got {momentum}; it is the share of the old average")

    def init_state(x):
        check_input("batch_norm", x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        width = x.shape[-1:]
        return {"mean": initializers.zeros(None, width, dtype), "var": initializers.ones(None, width, dtype)}

    def fn(params, x, state, train):
        factor, shift = _affine(params, scale, bias)
        check_input("batch_norm", x, width=state["mean"].shape[0], like=shift if factor is None else factor)
        mean, var = state["mean"], state["var"]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            n = math.prod(x.shape[:-1])
            if n < 2:
                raise ValueError(
                    f"batch_norm: training needs more than one value a feature, got {x.dtype}{list(x.shape)}"
                )
            mean, var = _moments(wide.reshape(n, -1))
            state = {
                "mean": momentum * state["mean"] + (1 - momentum) * mean,
                "var": momentum * state["var"] + (1 - momentum) * var * (n / (n - 1)),
            }
            state = jax.lax.stop_gradient(state)
        return _normalise(wide, mean, var, eps, factor, shift).astype(x.dtype), state

    return layer(_init("batch_norm", scale, bias), fn, init_state=init_state, label="batch_norm")


@interned
def layer_norm(*, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise the last axis, y = (x - m) / sqrt(v + eps) * scale + bias.   x [..., C] -> y [..., C].

    m and v are the mean and the (biased) variance over the last axis.

    Raises: ValueError for another width than at `init`.
    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def fn(params, x):
        factor, shift = _affine(params, scale, bias)
        like = shift if factor is None else factor
        check_input("layer_norm", x, width=None if like is None else like.shape[0], like=like)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = wide.mean(-1, keepdims=True)
        var = jnp.square(wide - mean).mean(-1, keepdims=True)
        return _normalise(wide, mean, var, eps, factor, shift).astype(x.dtype)

    return layer(_init("layer_norm", scale, bias), fn, label="layer_norm")


def _init(label: str, scale: bool, bias: bool):
    def init(key, x):
        check_input(label, x)
        params = {"scale": initializers.ones(key, x.shape[-1:], x.dtype)} if scale else {}
        return params | ({"bias": initializers.zeros(key, x.shape[-1:], x.dtype)} if bias else {})

    return init


def _affine(params, scale: bool, bias: bool):
    """The two parameters; None for one that this layer does not have."""
    return params["scale"] if scale else None, params["bias"] if bias else None


def _moments(x):
    """Mean and biased variance over the rows of x [n, C], in one pass over the data.

    E[d^2] - E[d]^2 loses digits where the mean is large against the deviation; with d = x - (the first row) it is not.
    """
    shift = jax.lax.stop_gradient(x[0])
    d = x - jnp.broadcast_to(shift, x.shape)
    mean = d.mean(0)
    var = jnp.square(d).mean(0) - jnp.square(mean)
    return shift + mean, jnp.maximum(var, 0)


def _normalise(x, mean, var, eps, scale, bias):
    factor = jax.lax.rsqrt(var + eps)
    if scale is not None:
        factor = factor * jnp.broadcast_to(scale.astype(x.dtype), (*factor.shape[:-1], x.shape[-1]))
    y = (x - jnp.broadcast_to(mean, x.shape)) * jnp.broadcast_to(factor, x.shape)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
