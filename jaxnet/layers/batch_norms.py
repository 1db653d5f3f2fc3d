"""Normalization over the batch, with running averages."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, describe, interned, is_array, layer
from jaxnet.layers import initializers
from jaxnet.layers.normalizing import affine_of, epsilon, init_affine, like_of, scaled, shifted
from jaxnet.mixed import widened

__all__ = ["batch_norm"]


@interned
def batch_norm(
    *,
    momentum: float = 0.9,
    eps: float = 1e-5,
    scale: bool = True,
    bias: bool = True,
    unbiased: bool = True,
    axis_name: str | Sequence[str] | None = None,
    frozen: bool = False,
) -> Layer:
    """Normalize each feature over the batch, y = (x - m) / sqrt(v + eps) * scale + bias.

    Parameters: scale [C], bias [C]. State: mean [C], var [C].

    m and v are the mean and the variance over all axes but the last. In training they are those of
    the batch, and in evaluation the running averages in the state. Training updates the averages, s
    <- momentum s + (1 - momentum) s_batch, with the unbiased variance (divisor n - 1). PyTorch does
    the same, but its `momentum` is 1 minus this one. Flax and Keras store the biased variance.

    The second input gives each value of a feature a weight, 0 for padding. The statistics are then
    weighted sums, and n is the sum of the weights. If all weights are zero, the averages stay.

    Source: Ioffe & Szegedy, "Batch Normalization", ICML 2015.

    Twins: flax.linen.BatchNorm, equinox.nn.BatchNorm, keras.layers.BatchNormalization,
    torch.nn.BatchNorm2d.

    Args:
      momentum: the share of the old average, in [0, 1).
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.
      unbiased: False stores the biased variance (divisor n).
      axis_name: the mapped axes of `jax.shard_map`, `jax.pmap` or `jax.vmap` over which the batch
        is divided; the statistics are then those of the whole batch. Under `jax.jit`, arrays are
        global and need none.
      frozen: True uses the running averages in training, too, and leaves them as they are.

    Returns:
      The layer, x [..., C] -> y [..., C], or (x, weights) -> y with weights [...] as the leading
      axes of x.

    Raises:
      ValueError: `momentum` or `eps` is out of range; in `apply`, C differs from that at `init`, or
        training has only one value per feature, or the weights do not have leading axes of x.
      TypeError: `axis_name` is not a name; in `init` and `apply`, x is not an array of floats, or
        not in the dtype of the parameters.
    """
    if not 0 <= momentum < 1:
        raise ValueError(
            f"batch_norm: momentum must be in [0, 1), got {momentum}; it is the share of the old "
            "average"
        )
    eps = epsilon("batch_norm", eps)
    names = _names(axis_name)
    make = init_affine("batch_norm", scale, bias)

    def init(key, x, weights=None):
        return make(key, x)

    def init_state(x, weights=None):
        check_input("batch_norm", x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        width = x.shape[-1:]
        return {
            "mean": initializers.zeros(None, width, dtype),
            "var": initializers.ones(None, width, dtype),
        }

    def fn(params, x, weights=None, *, state, train):
        factor, shift = affine_of("batch_norm", params, scale, bias)
        check_input("batch_norm", x, width=state["mean"].shape[0], like=like_of(params))
        weights = None if weights is None else _check_weights(weights, x)
        if frozen or not train:
            return _by_running_averages(x, state, factor, shift, eps), state
        n = math.prod(x.shape[:-1]) * (jax.lax.axis_size(names) if names else 1)
        if isinstance(n, int) and n < 2:
            raise ValueError(
                "batch_norm: training needs more than one value per feature, got "
                f"{x.dtype}{list(x.shape)}"
            )
        if weights is None and not names:
            return _by_the_batch(x, state, factor, shift, eps, momentum, unbiased)
        options = (names, eps, momentum, unbiased)
        return _by_weights(x, weights, state, factor, shift, *options)

    made = layer(
        init,
        fn,
        init_state=init_state,
        # A collective cannot run outside of its mapped axis, where `init` traces the layer.
        outputs=(lambda x, weights=None: x) if names else None,
        label="batch_norm",
    )
    return dataclasses.replace(made, wide=("scale", "bias"))


def _names(axis_name: Any) -> tuple[str, ...]:
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"batch_norm: axis_name must be the name of a mapped axis or a tuple of them, got "
            f"{axis_name!r}"
        )
    return tuple(names)


def _check_weights(weights: Any, x: Any) -> Any:
    if not is_array(weights):
        raise TypeError(f"batch_norm: the weights must be an array, got {weights!r}")
    lead = x.shape[:-1]
    if len(weights.shape) > len(lead) or weights.shape != lead[: len(weights.shape)]:
        raise ValueError(
            "batch_norm: the weights must have the leading axes of x, "
            f"{list(lead)}, or the first of them, got {describe(weights)}"
        )
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"batch_norm: the weights must be real, got {describe(weights)}")
    return weights


# The equations are jitted, so that JAX traces and differentiates each once for all layers of one
# shape. `inline` leaves no call in the program of a network.


@functools.partial(jax.jit, static_argnums=4, inline=True)
def _by_running_averages(x, state, scale, bias, eps):
    wide = widened(x)
    mean, var = (state[name].astype(wide.dtype) for name in ("mean", "var"))
    return scaled(wide - jnp.broadcast_to(mean, wide.shape), var, eps, scale, bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def _by_the_batch(x, state, scale, bias, eps, momentum, unbiased):
    n, axes = math.prod(x.shape[:-1]), tuple(range(x.ndim - 1))
    d, shift = shifted(widened(x), axes)
    # E[d^2] - E[d]^2 needs one pass over d. It loses digits if the mean of d is large compared with
    # the deviation, but the mean of the shifted values is small.
    mean = d.mean(axes, keepdims=True)
    var = jnp.maximum(jnp.square(d).mean(axes, keepdims=True) - jnp.square(mean), 0)
    stored = 1
    if unbiased:
        stored = n / (n - 1) if isinstance(n, int) else _number(n, d) / (_number(n, d) - 1)
    moved = _moved(state, (shift + mean).reshape(-1), (var * stored).reshape(-1), momentum)
    return scaled(d - mean, var, eps, scale, bias).astype(x.dtype), moved


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8), inline=True)
def _by_weights(x, weights, state, scale, bias, names, eps, momentum, unbiased):
    wide, axes = widened(x), tuple(range(x.ndim - 1))
    w = jnp.ones(x.shape[:-1], wide.dtype) if weights is None else weights.astype(wide.dtype)
    w = jnp.broadcast_to(w.reshape(*w.shape, *(1,) * (x.ndim - w.ndim)), wide.shape)

    def total(values):
        # Padding may hold anything, also NaN.
        sums = jnp.where(w > 0, values * w, 0).sum(axes, keepdims=True)
        return jax.lax.psum(sums, names) if names else sums

    n = jax.lax.stop_gradient(total(jnp.ones_like(wide)))
    share = jnp.where(n > 0, 1 / jnp.where(n > 0, n, 1), 0)
    used = jnp.where(w > 0, wide, 0)
    shift = jax.lax.stop_gradient(total(used) * share)
    d = used - jnp.broadcast_to(shift, wide.shape)
    mean = total(d) * share
    var = jnp.maximum(total(jnp.square(d)) * share - jnp.square(mean), 0)
    stored = jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), 1) if unbiased else 1
    moved = _moved(state, (shift + mean).reshape(-1), (var * stored).reshape(-1), momentum)
    any_left = (n > 0).reshape(-1)
    moved = {name: jnp.where(any_left, new, state[name]) for name, new in moved.items()}
    y = wide - jnp.broadcast_to(shift + mean, wide.shape)
    return scaled(y, var, eps, scale, bias).astype(x.dtype), moved


def _moved(state, mean, var, momentum):
    """The running averages after a step."""
    batch = {"mean": mean, "var": var}
    return jax.lax.stop_gradient(
        {
            name: momentum * old + (1 - momentum) * batch[name].astype(old.dtype)
            for name, old in state.items()
        }
    )


def _number(n, x):
    """A size that is symbolic (`jax.export.symbolic_shape`) as a scalar in the dtype of x."""
    return jnp.asarray(n).astype(x.dtype)
