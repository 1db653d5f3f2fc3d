"""Kernels of 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxnet.adapt.folding import at_layers, converted
from jaxnet.adapt.kernels import KernelChange, along, fan_matrix, with_kernel
from jaxnet.core import Layer, as_layer, interned
from jaxnet.mixed import widened

__all__ = ["quantize_int8"]


def quantize_int8(
    net: Layer,
    params: Any,
    patterns: str | Sequence[str],
    *,
    state: Any = None,
    name: str = "kernel",
    axis: int = -1,
) -> tuple[Layer, Any, Any]:
    """Store the kernels of some layers as 8-bit integers, w = s q per output feature.

    q = round(k / s) and s = max |k| / 127 over the inputs of each output feature (symmetric), so
    |w - k| <= s / 2. `kernel_int8` and `kernel_scale` [features] are state beside the other state
    of the layer; the kernel is not a parameter any more. The product is computed with s q in the
    dtype of the input.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-
    Arithmetic-Only Inference", CVPR 2018.

    Args:
      net: a network.
      params: its parameters.
      patterns: a path with wildcards as in `jaxnet.tree`, or several, of layers with a kernel.
      state: the state of a stateful network.
      name: the name of the kernel in the parameters of these layers.
      axis: the axis of the output features.

    Returns:
      (network, params, state).

    Raises:
      KeyError: no layer with parameters matches.
      ValueError: a layer has no kernel.
    """
    wrap = lambda layer: _quantized(layer, name, axis)  # noqa: E731
    changed, made = at_layers("quantize_int8", as_layer(net), patterns, wrap)

    def numbers(params, state):
        if name not in params:
            raise ValueError(
                f"quantize_int8: the layer must have a parameter '{name}', got {sorted(params)}"
            )
        kernel = widened(jnp.asarray(params[name]))
        largest = jnp.abs(fan_matrix(kernel, axis)).max(0, initial=0)
        scale = jnp.where(largest > 0, largest, 1) / 127
        whole = jnp.clip(jnp.round(kernel / along(scale, kernel, axis)), -127, 127)
        rest = {part: leaf for part, leaf in params.items() if part != name}
        added = {f"{name}_int8": whole.astype(jnp.int8), f"{name}_scale": scale}
        return rest, {**(state or {}), **added}

    new_params, new_state = converted(changed, params, state, made, numbers)
    return changed, new_params, new_state


@interned
def _quantized(layer: Layer, name: str, axis: int) -> Layer:
    whole, scale = f"{name}_int8", f"{name}_scale"

    def compute(own, kernel, train, dtype):
        factor = along(own[scale], own[whole], axis)
        new = (own[whole].astype(factor.dtype) * factor).astype(dtype)
        return new, {whole: own[whole], scale: own[scale]}

    def state(key, kernel):
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        features = kernel.shape[axis]
        return {whole: jnp.zeros(kernel.shape, jnp.int8), scale: jnp.ones((features,), dtype)}

    options: dict[str, Any] = dict(names=(whole, scale), stays=False)
    change = KernelChange("int8", name, compute, state=state, **options)
    return with_kernel(layer, change, lambda new: _quantized(new, name, axis))
