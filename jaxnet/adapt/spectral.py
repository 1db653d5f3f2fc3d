"""Kernels of spectral norm 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.adapt.kernels import KernelChange, fan_matrix, with_kernel
from jaxnet.checks import size_of
from jaxnet.core import Layer, interned
from jaxnet.mixed import widened

__all__ = ["spectral_norm"]


@interned
def spectral_norm(
    layer: Layer | Callable[..., Any],
    *,
    iterations: int = 1,
    name: str = "kernel",
    axis: int = -1,
    eps: float = 1e-12,
) -> Layer:
    """Divide the kernel by its largest singular value, estimated by power iteration.

    w = W / (u^T W v), for W as a matrix [outputs, inputs]. Each training call first updates u <- W
    v / |W v| and v <- W^T u / |W^T u|, `iterations` times; evaluation uses them as they are. No
    gradient passes through u and v.

    State: kernel_u [outputs] and kernel_v [inputs] beside the kernel; u begins random, and v as
    zeros, in place of which W^T u / |W^T u| is used.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.

    Twins: flax.linen.SpectralNorm, equinox.nn.SpectralNorm, keras.layers.SpectralNormalization,
    torch.nn.utils.parametrizations.spectral_norm.

    Args:
      layer: a layer with a kernel, such as `dense` or `conv`.
      iterations: the steps of the power iteration per training call.
      name: the name of the kernel in its parameters.
      axis: the axis of the output features.
      eps: the smallest length by which a vector is divided.

    Returns:
      The layer, x [...] -> y [...] as before, with state.

    Raises:
      ValueError: `iterations` is not a positive integer; in `init` and `apply`, the layer has no
        parameter of this name; in `init_state`, the key is missing.
    """
    iterations = size_of("spectral_norm: iterations", iterations)
    left, right = f"{name}_u", f"{name}_v"

    def unit(x):
        return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum()), eps)

    def state(key, kernel):
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        outputs = kernel.shape[axis]
        rest = 1
        for size in kernel.shape:
            rest *= size
        u = unit(jax.random.normal(key, (outputs,), dtype))
        return {left: u, right: jnp.zeros((rest // max(outputs, 1),), dtype)}

    def compute(own, kernel, train, dtype):
        matrix = fan_matrix(widened(kernel), axis)
        still = jax.lax.stop_gradient(matrix)
        u, v = (own[part].astype(still.dtype) for part in (left, right))
        v = jnp.where(jnp.any(v != 0), v, unit(still @ u))
        for _ in range(iterations if train else 0):
            u = unit(v @ still)
            v = unit(still @ u)
        largest = v @ matrix @ u
        new = (widened(kernel) / jnp.where(largest == 0, 1, largest)).astype(kernel.dtype)
        moved = {left: u, right: v} if train else {}
        return new, {
            part: moved[part].astype(own[part].dtype) if train else own[part]
            for part in (left, right)
        }

    label = "spectral_norm" if iterations == 1 else f"spectral_norm[{iterations}]"
    change = KernelChange(label, name, compute, state=state, names=(left, right), draws=True)
    options: dict[str, Any] = dict(iterations=iterations, name=name, axis=axis, eps=eps)
    return with_kernel(layer, change, lambda new: spectral_norm(new, **options))
