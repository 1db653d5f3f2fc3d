"""Convolution of each feature by itself, and with a map of the features behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxnet.checks import size_of
from jaxnet.core import Layer, interned, wire
from jaxnet.layers import initializers
from jaxnet.layers.convolution import conv, convolution, sliding
from jaxnet.layers.spatial import spatial_window

__all__ = ["depthwise_conv", "separable_conv"]


@interned
def depthwise_conv(
    kernel_size: int | Sequence[int],
    *,
    multiplier: int = 1,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Convolve each feature by itself over the spatial axes.

    y[o, c M + m] = b[c M + m] + sum over w of x[o s + w d - lo, c] k[w, 0, c M + m].

    Parameters: kernel k [*kernel_size, 1, C M], bias b [C M]. It is `conv(C M, kernel_size,
    groups=C)`, with C from the input. Keras stores the kernel as [*kernel_size, C, M], which is the
    same numbers in the same order.

    Twins: keras.layers.DepthwiseConv2D.

    Args:
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis.
      multiplier: M, the number of output features per input feature.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: as in `conv`.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      bias_init: the same for the bias.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, C M].

    Raises:
      ValueError: an option has the wrong form; in `init` and `apply`, x lacks an axis, or no window
        fits, or C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    window, size = spatial_window("depthwise_conv", "kernel_size", kernel_size)
    label = f"depthwise_conv({size})"
    multiplier = size_of(f"{label}: multiplier", multiplier)
    windows = sliding(label, window, strides, padding, dilation)
    return convolution(
        windows,
        lambda x: (1, x.shape[-1] * multiplier),
        lambda kernel: kernel.shape[-1] // multiplier,
        bias,
        kernel_init,
        bias_init,
        precision,
    )


@interned
def separable_conv(
    features: int,
    kernel_size: int | Sequence[int],
    *,
    multiplier: int = 1,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Convolve each feature by itself, then map the features of each position.

    y = conv(features, 1)(depthwise_conv(kernel_size)(x)), with a bias in the second one only.

    Children: 'depthwise', a `depthwise_conv`, with kernel [*kernel_size, 1, C M]; 'pointwise', a
    `conv`, with kernel [1, .., C M, features] and bias [features].

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017.

    Twins: keras.layers.SeparableConv2D.

    Args:
      features: the number of features of the output.
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis.
      multiplier: M, the number of features that 'depthwise' makes of each feature.
      strides: the step between windows; one int for all spatial axes, or one per axis.
      padding: as in `conv`.
      dilation: the step between the elements of a window; one int for all spatial axes, or one per
        axis.
      bias: False leaves out the bias.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`, for both kernels.
      bias_init: the same for the bias.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, features].

    Raises:
      ValueError: as `depthwise_conv`, or `features` is not a positive integer.
      TypeError: as `depthwise_conv`.
    """
    window, _ = spatial_window("separable_conv", "kernel_size", kernel_size)
    features = size_of("separable_conv: features", features)
    first = depthwise_conv(
        kernel_size,
        multiplier=multiplier,
        strides=strides,
        padding=padding,
        dilation=dilation,
        bias=False,
        kernel_init=kernel_init,
        precision=precision,
    )
    second = conv(
        features,
        (1,) * len(window),
        bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        precision=precision,
    )

    def separable_conv(f, x):
        return f.pointwise(f.depthwise(x))

    return wire(depthwise=first, pointwise=second)(separable_conv)
