"""Normalisation. Statistics are computed in at least float32, whatever the dtype of the input."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, widened

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
        factor, shift = _affine("batch_norm", params, scale, bias)
        check_input("batch_norm", x, width=state["mean"].shape[0], like=_like(params))
        wide = widened(x)
        if not train:
            mean, var = (state[name].astype(wide.dtype) for name in ("mean", "var"))
            return _normalise(wide, mean, var, eps, factor, shift).astype(x.dtype), state
        n = math.prod(x.shape[:-1])
        if isinstance(n, int) and n < 2:
            raise ValueError(f"batch_norm: training needs more than one value a feature, got {x.dtype}{list(x.shape)}")
        d, offset, center, var = _moments(wide, tuple(range(x.ndim - 1)))
        unbiased = n / (n - 1) if isinstance(n, int) else _number(n, wide) / (_number(n, wide) - 1)
        batch = {"mean": (center + offset).reshape(-1), "var": (var * unbiased).reshape(-1)}
        moved = {name: momentum * old + (1 - momentum) * batch[name].astype(old.dtype) for name, old in state.items()}
        return _normalise(d, offset, var, eps, factor, shift).astype(x.dtype), jax.lax.stop_gradient(moved)

    made = layer(_init("batch_norm", scale, bias), fn, init_state=init_state, label="batch_norm")
    return dataclasses.replace(made, wide=("scale", "bias"))


@interned
def layer_norm(*, eps: float = 1e-5, scale: bool = True, bias: bool = True) -> Layer:
    """Normalise the last axis, y = (x - m) / sqrt(v + eps) * scale + bias.   x [..., C] -> y [..., C].

    m and v are the mean and the (biased) variance over the last axis.

    Raises: ValueError for another width than at `init`.
    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """

    def fn(params, x):
        factor, shift = _affine("layer_norm", params, scale, bias)
        like = _like(params)
        check_input("layer_norm", x, width=None if like is None else like.shape[0], like=like)
        wide = widened(x)
        d, mean, _, var = _moments(wide, (x.ndim - 1,))
        return _normalise(d, mean, var, eps, factor, shift).astype(x.dtype)

    return dataclasses.replace(layer(_init("layer_norm", scale, bias), fn, label="layer_norm"), wide=("scale", "bias"))


def _init(label: str, scale: bool, bias: bool):
    def init(key, x):
        check_input(label, x)
        params = {"scale": initializers.ones(key, x.shape[-1:], x.dtype)} if scale else {}
        return params | ({"bias": initializers.zeros(key, x.shape[-1:], x.dtype)} if bias else {})

    return init


def _affine(label: str, params, scale: bool, bias: bool):
    """The two parameters; None for one that this layer does not have."""
    check_real(label, params)
    return params["scale"] if scale else None, params["bias"] if bias else None


def _like(params):
    """The width and the dtype that the input must have; None if there is no parameter."""
    for param in params.values():
        return jax.ShapeDtypeStruct(param.shape, computed_dtype(params, param))


def _moments(x, axes: tuple[int, ...]):
    """Mean and biased variance over some axes, kept with size 1: (d, mean of d, shift, variance), where x = d + shift.

    E[d^2] - E[d]^2 loses digits if the mean of d is large compared with the deviation. Therefore x is shifted by its
    rounded mean, and the mean of d is the rounding error. The shift has no gradient, because the results do not depend on
    it.
    """
    shift = jax.lax.stop_gradient(x.mean(axes, keepdims=True))
    d = x - jnp.broadcast_to(shift, x.shape)
    mean = d.mean(axes, keepdims=True)
    var = jnp.square(d).mean(axes, keepdims=True) - jnp.square(mean)
    return d, mean, shift, jnp.maximum(var, 0)


def _number(n, x):
    """A size that is symbolic (`jax.export.symbolic_shape`) as a scalar in the dtype of x."""
    return jnp.asarray(n).astype(x.dtype)


def _normalise(x, mean, var, eps, scale, bias):
    factor = jax.lax.rsqrt(var + eps)
    if scale is not None:
        factor = factor * jnp.broadcast_to(scale.astype(x.dtype), (*factor.shape[:-1], x.shape[-1]))
    y = (x - jnp.broadcast_to(mean, x.shape)) * jnp.broadcast_to(factor, x.shape)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
