"""Kernels with zeros that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxnet.adapt.folding import at_layers, converted
from jaxnet.adapt.kernels import KernelChange, with_kernel
from jaxnet.core import Layer, as_layer, interned

__all__ = ["prune"]


def prune(
    net: Layer,
    params: Any,
    patterns: str | Sequence[str],
    sparsity: float,
    *,
    state: Any = None,
    name: str = "kernel",
) -> tuple[Layer, Any, Any]:
    """Set the smallest weights of some layers to zero, w = m k, and keep them zero in training.

    The mask m is state, `kernel_mask`, beside the other state of the layer. It is False for the
    floor(sparsity * size) elements of the kernel with the smallest |k|. Their gradients are zero.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
    NeurIPS 2015.

    Args:
      net: a network.
      params: its parameters.
      patterns: a path with wildcards as in `jaxnet.tree`, or several, of layers with a kernel.
      sparsity: the share of zeros in each kernel, in [0, 1].
      state: the state of a stateful network.
      name: the name of the kernel in the parameters of these layers.

    Returns:
      (network, params, state). The masked parameters are zero.

    Raises:
      KeyError: no layer with parameters matches.
      ValueError: `sparsity` is out of range, or a layer has no kernel.
    """
    if isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
        raise ValueError(f"prune: sparsity is the share of zeros, in [0, 1], got {sparsity}")
    wrap = lambda layer: _pruned(layer, name)  # noqa: E731
    changed, made = at_layers("prune", as_layer(net), patterns, wrap)

    def numbers(params, state):
        if name not in params:
            raise ValueError(
                f"prune: the layer must have a parameter '{name}', got {sorted(params)}"
            )
        kernel = jnp.asarray(params[name])
        order = jnp.argsort(jnp.abs(kernel).reshape(-1))
        kept = jnp.arange(kernel.size) >= math.floor(sparsity * kernel.size)
        mask = jnp.zeros(kernel.size, bool).at[order].set(kept).reshape(kernel.shape)
        masked = {**params, name: jnp.where(mask, kernel, 0)}
        return masked, {**(state or {}), f"{name}_mask": mask}

    new_params, new_state = converted(changed, params, state, made, numbers)
    return changed, new_params, new_state


@interned
def _pruned(layer: Layer, name: str) -> Layer:
    mask = f"{name}_mask"

    def compute(own, kernel, train, dtype):
        return jnp.where(own[mask], kernel, 0), {mask: own[mask]}

    def state(key, kernel):
        return {mask: jnp.ones(kernel.shape, bool)}

    change = KernelChange("pruned", name, compute, state=state, names=(mask,))
    return with_kernel(layer, change, lambda new: _pruned(new, name))
