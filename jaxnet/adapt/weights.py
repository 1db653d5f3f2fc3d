"""Normalized kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.adapt.kernels import KernelChange, along, fan_matrix, with_kernel
from jaxnet.core import Layer, interned
from jaxnet.mixed import widened

__all__ = ["weight_norm", "weight_standardization"]


@interned
def weight_norm(
    layer: Layer | Callable[..., Any], *, name: str = "kernel", axis: int = -1
) -> Layer:
    """Compute the kernel from length and direction, w = gain * v / |v| per output feature.

    The parameter `kernel` is v. The parameter `kernel_gain` [features] begins at |v|, so the layer
    begins as it was.

    Source: Salimans & Kingma, "Weight Normalization", NeurIPS 2016.

    Twins: flax.linen.WeightNorm, equinox.nn.WeightNorm,
    torch.nn.utils.parametrizations.weight_norm.

    Args:
      layer: a layer with a kernel, such as `dense` or `conv`.
      name: the name of the kernel in its parameters.
      axis: the axis of the output features.

    Returns:
      The layer, x [...] -> y [...] as before, with the parameter of the gain beside the kernel.

    Raises:
      ValueError: in `init` and `apply`, the layer has no parameter of this name.

    Example:
      >>> from jaxnet import dense
      >>> net = weight_norm(dense(3))
      >>> sorted(net.init(jax.random.key(0), jnp.ones((1, 2))))
      ['bias', 'kernel', 'kernel_gain']
    """
    gain = f"{name}_gain"

    def compute(own, kernel, train, dtype):
        v = widened(kernel)
        squares = _squares(v, axis)
        factor = widened(own[gain]) / jnp.sqrt(jnp.where(squares > 0, squares, 1))
        return (v * along(factor, v, axis)).astype(kernel.dtype), {}

    def params(key, kernel):
        return {gain: jnp.sqrt(_squares(widened(kernel), axis)).astype(kernel.dtype)}

    change = KernelChange("weight_norm", name, compute, params, names=(gain,))
    return with_kernel(layer, change, lambda new: weight_norm(new, name=name, axis=axis))


@interned
def weight_standardization(
    layer: Layer | Callable[..., Any], *, name: str = "kernel", axis: int = -1, eps: float = 1e-5
) -> Layer:
    """Standardize the kernel, w = (k - m) / sqrt(v + eps), per output feature.

    m and v are the mean and the biased variance of k over all other axes.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019, arXiv:1903.10520.

    Args:
      layer: a layer with a kernel, such as `conv`.
      name: the name of the kernel in its parameters.
      axis: the axis of the output features.
      eps: a number that is added to the variance.

    Returns:
      The layer, x [...] -> y [...] as before, with the same parameters.

    Raises:
      ValueError: `eps` is negative; in `init` and `apply`, the layer has no parameter of this name.
    """
    if isinstance(eps, bool) or not eps >= 0:
        raise ValueError(f"weight_standardization: eps must be a number of at least 0, got {eps!r}")

    def compute(own, kernel, train, dtype):
        wide = widened(kernel)
        matrix = fan_matrix(wide, axis)
        d = wide - along(matrix.mean(0), wide, axis)
        factor = jax.lax.rsqrt(matrix.var(0) + eps)
        return (d * along(factor, wide, axis)).astype(kernel.dtype), {}

    change = KernelChange("weight_standardization", name, compute)
    again = lambda new: weight_standardization(new, name=name, axis=axis, eps=eps)  # noqa: E731
    return with_kernel(layer, change, again)


def _squares(kernel, axis: int):
    return jnp.square(fan_matrix(kernel, axis)).sum(0)
