"""Convolution with a separate kernel for each position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.convolution import sliding
from jaxnet.layers.parameters import check_real
from jaxnet.layers.spatial import over_batch, spatial_window
from jaxnet.mixed import add_bias

__all__ = ["locally_connected"]


@interned
def locally_connected(
    features: int,
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "VALID",
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Convolve with a separate kernel and bias for each output position.

    y[o, f] = b[o, f] + sum over w, c of x[o s + w d - lo, c] k[o, w, c, f].

    Parameters: kernel k [*outputs, *kernel_size, C, F], bias b [*outputs, F]. The spatial sizes of
    the input are therefore those at `init`.

    Twins: flax.linen.ConvLocal, keras.layers.LocallyConnected2D (Keras 2).

    Args:
      features: F, the number of features of the output.
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: as in `conv`.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`. It receives the shape
        [*kernel_size, C, outputs * F], so that the fan-in is right; then the axes are rearranged.
      bias_init: the same for the bias, with its own shape.
      precision: the precision of the products, as in `jax.numpy.matmul`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, F].

    Raises:
      ValueError: an option has the wrong form; in `init` and `apply`, x lacks an axis, or no window
        fits, or the sizes differ from those at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    window, size = spatial_window("locally_connected", "kernel_size", kernel_size)
    features = size_of(f"locally_connected({features}, {size}): features", features)
    rank, label = len(window), f"locally_connected({features}, {size})"
    windows = sliding(label, window, strides, padding, dilation)

    def init(key, x):
        outputs = windows.check(x)
        drawn = (*window, x.shape[-1], math.prod(outputs) * features)
        kernel = kernel_init(key, drawn, x.dtype).reshape(*drawn[:-1], *outputs, features)
        params = {"kernel": jnp.moveaxis(kernel, range(rank + 1, 2 * rank + 1), range(rank))}
        if bias:
            shape = (*outputs, features)
            params["bias"] = initializers.bias(bias_init, key, shape, x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        outputs = windows.check(x, width=kernel.shape[-2], like=kernel)
        if outputs != kernel.shape[:rank]:
            raise ValueError(
                f"{label}: the outputs must have spatial sizes {kernel.shape[:rank]}, as at init, "
                f"got {outputs} from {x.dtype}{list(x.shape)}; there is a kernel for each position"
            )

        def convolve(x):
            x, pads = windows.padding.extend(x, rank)
            options: dict[str, Any] = dict(strides=windows.strides, dilation=windows.dilation)
            return ops.convolve_locally(x, kernel, padding=pads, precision=precision, **options)

        y = over_batch(convolve, x, rank)
        return add_bias(y, params["bias"]) if bias else y

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))
