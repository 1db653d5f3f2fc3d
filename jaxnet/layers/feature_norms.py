"""Normalization over the last axes of each example."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.normalizing import affine_of, epsilon, init_affine, like_of, scaled, shifted
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import widened

__all__ = ["layer_norm", "rms_norm"]


@interned
def layer_norm(*, eps: float = 1e-5, scale: bool = True, bias: bool = True, rank: int = 1) -> Layer:
    """Normalize the last axis, y = (x - m) / sqrt(v + eps) * scale + bias.

    Parameters: scale [C], bias [C]. m and v are the mean and the biased variance over the last
    axis. With `rank` they are those of the last `rank` axes, whose sizes the parameters have.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, arXiv:1607.06450.

    Twins: flax.linen.LayerNorm, equinox.nn.LayerNorm, keras.layers.LayerNormalization,
    torch.nn.LayerNorm.

    Args:
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.
      rank: the number of last axes that are normalized together.

    Returns:
      The layer, x [..., C] -> y [..., C].

    Raises:
      ValueError: `eps` or `rank` is out of range; in `apply`, C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    eps = epsilon("layer_norm", eps)
    rank = size_of("layer_norm: rank", rank)

    def fn(params, x):
        factor, shift = affine_of("layer_norm", params, scale, bias)
        like = like_of(params)
        width = None if like is None else like.shape[-1]
        check_input("layer_norm", x, width=width, rank=rank, like=like)
        if rank == 1:
            return _over_features(x, factor, shift, eps)
        sizes = x.shape[x.ndim - rank :]
        if like is not None and like.shape != sizes:
            raise ValueError(
                f"layer_norm: the last {rank} axes must be {list(like.shape)}, got {describe(x)}; "
                f"the parameters were made for {list(like.shape)}"
            )
        flat = x.reshape(*x.shape[: x.ndim - rank], math.prod(sizes))
        factor, shift = (None if p is None else p.reshape(-1) for p in (factor, shift))
        return _over_features(flat, factor, shift, eps).reshape(x.shape)

    made = layer(init_affine("layer_norm", scale, bias, rank), fn, label="layer_norm")
    return dataclasses.replace(made, wide=("scale", "bias"))


@interned
def rms_norm(*, eps: float = 1e-6, scale: bool = True, offset: float = 0.0) -> Layer:
    """Divide by the root mean square of the last axis, y = x / sqrt(mean(x^2) + eps) * scale.

    Parameters: scale [C], which begins at 1. With `offset`, the factor is offset + scale, and scale
    begins at 1 - offset. Gemma has an offset of 1, so weight decay pulls the factor to 1.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Twins: flax.linen.RMSNorm, equinox.nn.RMSNorm, keras.layers.RMSNormalization, torch.nn.RMSNorm.

    Args:
      eps: a number that is added to the mean square.
      scale: False leaves out the scale.
      offset: a number that is added to the scale.

    Returns:
      The layer, x [..., C] -> y [..., C].

    Raises:
      ValueError: `eps` or `offset` is not a finite number; in `apply`, C differs from that at
        `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    eps = epsilon("rms_norm", eps)
    offset = epsilon("rms_norm", offset, "offset", "1.0")

    def init(key, x):
        check_input("rms_norm", x)
        if not scale:
            return {}
        start = initializers.ones(key, x.shape[-1:], x.dtype)
        return {"scale": start if offset == 0 else start - jnp.asarray(offset, x.dtype)}

    def fn(params, x):
        check_real("rms_norm", params)
        like = like_of(params)
        check_input("rms_norm", x, width=None if like is None else like.shape[0], like=like)
        return _by_root_mean_square(x, params["scale"] if scale else None, eps, offset)

    return dataclasses.replace(layer(init, fn, label="rms_norm"), wide=("scale",))


# The equations are jitted, so that JAX traces and differentiates each once for all layers of one
# shape. `inline` leaves no call in the program of a network.


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _over_features(x, scale, bias, eps):
    d, _ = shifted(widened(x), (x.ndim - 1,))
    d = d - d.mean(-1, keepdims=True)
    var = jnp.square(d).mean(-1, keepdims=True)
    return scaled(d, var, eps, scale, bias).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _by_root_mean_square(x, scale, eps, offset):
    wide = widened(x)
    factor = None if scale is None else offset + scale.astype(wide.dtype)
    return scaled(wide, jnp.square(wide).mean(-1, keepdims=True), eps, factor, None).astype(x.dtype)
