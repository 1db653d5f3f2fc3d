"""Normalization over the spatial axes and groups of features of each example."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer
from jaxnet.layers.normalizing import affine_of, epsilon, init_affine, like_of, scaled
from jaxnet.mixed import widened

__all__ = ["group_norm", "instance_norm"]


@interned
def group_norm(
    groups: int, *, rank: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True
) -> Layer:
    """Normalize groups of features of each example, y = (x - m) / sqrt(v + eps) * scale + bias.

    Parameters: scale [C], bias [C]. m and v are the mean and the biased variance over the spatial
    axes and over the C / groups features of one group. Training and evaluation are the same.

    Source: Wu & He, "Group Normalization", ECCV 2018.

    Twins: flax.linen.GroupNorm, equinox.nn.GroupNorm, keras.layers.GroupNormalization,
    torch.nn.GroupNorm.

    Args:
      groups: the number of groups, which divides C.
      rank: the number of spatial axes: 0 for vectors, 1 for sequences, 2 for images, 3 for volumes.
        All axes before those are batch axes.
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *spatial, C].

    Raises:
      ValueError: `groups`, `rank` or `eps` is out of range; in `init` and `apply`, the groups do
        not divide C, x lacks an axis, or C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    groups = size_of("group_norm: groups", groups)
    return _grouped(f"group_norm({groups})", "group_norm", groups, rank, eps, scale, bias)


@interned
def instance_norm(
    *, rank: int = 2, eps: float = 1e-5, scale: bool = True, bias: bool = True
) -> Layer:
    """Normalize each feature over the spatial axes of each example.

    y = (x - m) / sqrt(v + eps) * scale + bias. Parameters: scale [C], bias [C]. m and v are the
    mean and the biased variance over the spatial axes. It is `group_norm` with one feature per
    group. PyTorch's default is without scale and bias.

    Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", 2016, arXiv:1607.08022.

    Twins: flax.linen.InstanceNorm, torch.nn.InstanceNorm2d.

    Args:
      rank: the number of spatial axes: 1 for sequences, 2 for images, 3 for volumes. All axes
        before those are batch axes.
      eps: a number that is added to the variance.
      scale: False leaves out the scale.
      bias: False leaves out the bias.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *spatial, C].

    Raises:
      ValueError: `rank` or `eps` is out of range; in `init` and `apply`, x lacks an axis, or C
        differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    rank = size_of("instance_norm: rank", rank)
    return _grouped("instance_norm", "instance_norm", None, rank, eps, scale, bias)


def _grouped(label: str, name: str, groups: int | None, rank, eps, scale, bias) -> Layer:
    rank, eps = size_of(f"{name}: rank", rank, 0), epsilon(name, eps)
    make = init_affine(label, scale, bias)

    def check(x, width=None, like=None):
        check_input(label, x, width=width, rank=rank + 1, like=like)
        if groups is not None and x.shape[-1] % groups:
            raise ValueError(f"{label}: the groups must divide the last axis, got {describe(x)}")

    def init(key, x):
        check(x)
        return make(key, x)

    def fn(params, x):
        factor, shift = affine_of(label, params, scale, bias)
        like = like_of(params)
        check(x, None if like is None else like.shape[0], like)
        parts = x.shape[-1] if groups is None else groups
        return _over_groups(x, factor, shift, parts, rank, eps)

    return dataclasses.replace(layer(init, fn, label=label), wide=("scale", "bias"))


@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _over_groups(x, scale, bias, groups, rank, eps):
    wide, axes = widened(x), tuple(range(x.ndim - 1 - rank, x.ndim - 1))

    # Sums over the spatial axes first, all features at once, and then over the few features of a
    # group: on a CPU, sums over a short last axis of a large array are slow.
    def mean_of(values):
        by_feature = values.mean(axes, keepdims=True)
        parts = by_feature.reshape(*by_feature.shape[:-1], groups, x.shape[-1] // groups)
        by_group = jnp.broadcast_to(parts.mean(-1, keepdims=True), parts.shape)
        return by_group.reshape(by_feature.shape)

    # As in `batch_norm`, one pass over d is enough because its mean is small.
    d = wide - jnp.broadcast_to(jax.lax.stop_gradient(mean_of(wide)), wide.shape)
    mean = mean_of(d)
    var = jnp.maximum(mean_of(jnp.square(d)) - jnp.square(mean), 0)
    y = d - jnp.broadcast_to(mean, wide.shape)
    return scaled(y, var, eps, scale, bias).astype(x.dtype)
