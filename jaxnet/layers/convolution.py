"""Convolution over the spatial axes of sequences, images and volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.layers.spatial import (
    ENDLESS,
    check_spatial,
    over_batch,
    pads_along,
    sizes_along,
    spatial_window,
    telling_how_read,
)
from jaxnet.mixed import add_bias
from jaxnet.ops.geometry import window_geometry

__all__ = ["conv"]


@interned
def conv(
    features: int,
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Convolve over the spatial axes.

    y[o, f] = b[f] + sum over w, c of x[o s + w d - lo, c] k[w, c, f].

    Parameters: kernel k [*kernel_size, C / groups, F], bias b [F]. As everywhere in deep learning,
    the kernel is not flipped. All axes before the spatial ones are batch axes. Every derivative
    keeps its speed inside compiled loops (`jaxnet.ops.convolve`).

    Args:
      features: F, the number of features of the output.
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis: (3,)
        for sequences, (3, 3, 3) for volumes.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: "SAME" (ceil(size / stride) outputs, the odd zero at the end), "VALID" (no zeros), an
        int, or (before, after) per spatial axis.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      groups: the number of groups. Output features [i F / groups, (i+1) F / groups) use only input
        features [i C / groups, (i+1) C / groups). With groups = C, a depthwise convolution.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      bias_init: the same for the bias.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, F].

    Raises:
      ValueError: an option has the wrong form; in `init` and `apply`, x lacks an axis, or no window
        fits, or C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    window, size = spatial_window("conv", "kernel_size", kernel_size)
    features = size_of(f"conv({features}, {size}): features", features)
    rank, label = len(window), f"conv({features}, {size})"
    groups = size_of(f"{label}: groups", groups)
    strides = sizes_along(f"{label}: strides", strides, rank)
    dilation = sizes_along(f"{label}: dilation", dilation, rank)
    padding = pads_along(f"{label}: padding", padding, rank)
    if features % groups:
        raise ValueError(f"{label}: groups must divide the features, got {groups=}")

    def check_windows(sizes):
        window_geometry(label, (1, *sizes, 1), window, strides, padding, dilation)

    # Options of the wrong form fail here. Whether a window fits depends on x.
    check_windows((ENDLESS,) * rank)

    def init(key, x):
        check_spatial(label, x, rank)
        with telling_how_read(x, rank):
            check_windows(x.shape[-rank - 1 : -1])
            if x.shape[-1] % groups:
                raise ValueError(
                    f"{label}: groups must divide the last axis, got groups={groups} and "
                    f"{describe(x)}"
                )
        params = {"kernel": kernel_init(key, (*window, x.shape[-1] // groups, features), x.dtype)}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        check_spatial(label, x, rank, width=kernel.shape[-2] * groups, like=kernel)
        with telling_how_read(x, rank):
            check_windows(x.shape[-rank - 1 : -1])
        options: dict[str, Any] = dict(
            strides=strides, padding=padding, dilation=dilation, groups=groups
        )
        y = over_batch(lambda x: ops.convolve(x, kernel, precision=precision, **options), x, rank)
        return add_bias(y, params["bias"]) if bias else y

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))
