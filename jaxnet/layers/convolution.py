"""Convolution over the spatial axes of sequences, images and volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.pads import Padding, convolution_padding
from jaxnet.layers.parameters import check_real
from jaxnet.layers.spatial import (
    ENDLESS,
    check_spatial,
    over_batch,
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
    input_dilation: int | Sequence[int] = 1,
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

    | padding | zeros, or elements of x, before and after an axis; span = (window - 1) d + 1 |
    |---|---|
    | "SAME" | zeros for ceil(size / s) outputs, the odd zero after |
    | "SAME_LOWER" | the same, the odd zero before |
    | "VALID" | none |
    | "CAUSAL" | span - 1 zeros before, so y[o] sees no x behind o s; one spatial axis only |
    | "CIRCULAR" | (span - 1) // 2 before and span // 2 after, from the other end of x |
    | "REFLECT" | the same numbers, mirrored at the first and the last element |
    | an int, or (before, after) per axis | that many zeros |

    Twins: flax.linen.Conv, equinox.nn.Conv, keras.layers.Conv2D, torch.nn.Conv2d.

    Args:
      features: F, the number of features of the output.
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis: (3,)
        for sequences, (3, 3, 3) for volumes.
      strides: s, the step between windows; one int for all spatial axes, or one per axis.
      padding: a name of the table, an int, or (before, after) per spatial axis.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      input_dilation: the step between the elements of x; zeros are put between them first. One int
        for all spatial axes, or one per axis.
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
    label = f"conv({features}, {size})"
    groups = size_of(f"{label}: groups", groups)
    if features % groups:
        raise ValueError(f"{label}: groups must divide the features, got {groups=}")
    windows = sliding(label, window, strides, padding, dilation, input_dilation)

    def shape(x):
        if x.shape[-1] % groups:
            raise ValueError(
                f"{label}: groups must divide the last axis, got groups={groups} and {describe(x)}"
            )
        return x.shape[-1] // groups, features

    return convolution(
        windows, shape, lambda kernel: groups, bias, kernel_init, bias_init, precision
    )


class Sliding(NamedTuple):
    """The windows of a convolution.

    Attributes:
      label: the name of the layer in errors.
      window: the sizes of the window.
      strides: the steps between windows.
      padding: what surrounds the input.
      dilation: the steps between the elements of a window.
      input_dilation: the steps between the elements of the input.
    """

    label: str
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.window)

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the output along the spatial axes. Raises ValueError if no window fits."""
        spread = [(n - 1) * d + 1 for n, d in zip(sizes, self.input_dilation, strict=True)]
        facts = self.window, self.strides, self.padding.pads, self.dilation
        return window_geometry(self.label, (1, *spread, 1), *facts).outputs

    def check(self, x: Any, **checks: Any) -> tuple[int, ...]:
        """Check an input [..., *spatial, C] and return the sizes of the output."""
        check_spatial(self.label, x, self.rank, **checks)
        with telling_how_read(x, self.rank):
            return self.outputs(x.shape[-self.rank - 1 : -1])

    def extend(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """Spread x [N, *spatial, C] and add the elements that are not zeros; returns the padding
        that is left, too.
        """
        if max(self.input_dilation) > 1:
            spread = [(0, 0, d - 1) for d in self.input_dilation]
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        return self.padding.extend(x, self.rank)


def sliding(
    label: str,
    window: tuple[int, ...],
    strides: Any,
    padding: Any,
    dilation: Any = 1,
    input_dilation: Any = 1,
) -> Sliding:
    """Check the options of a convolution. Raises ValueError if one has the wrong form."""
    rank = len(window)
    strides = sizes_along(f"{label}: strides", strides, rank)
    dilation = sizes_along(f"{label}: dilation", dilation, rank)
    spread = sizes_along(f"{label}: input_dilation", input_dilation, rank)
    padding = convolution_padding(f"{label}: padding", padding, window, dilation)
    made = Sliding(label, window, strides, padding, dilation, spread)
    # Options of the wrong form fail here. Whether a window fits depends on the input.
    made.outputs((ENDLESS,) * rank)
    return made


def convolution(
    windows: Sliding,
    shape: Callable[[Any], tuple[int, int]],
    groups_of: Callable[[Any], int],
    bias: bool,
    kernel_init: Callable[..., Any],
    bias_init: Callable[..., Any],
    precision: Any,
) -> Layer:
    """The layer of a convolution. `shape` gives the last two axes of the kernel for an input, and
    `groups_of` the number of groups for a kernel.
    """
    label, rank = windows.label, windows.rank

    def init(key, x):
        windows.check(x)
        with telling_how_read(x, rank):
            channels, features = shape(x)
        params = {"kernel": kernel_init(key, (*windows.window, channels, features), x.dtype)}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        groups = groups_of(kernel)
        windows.check(x, width=kernel.shape[-2] * groups, like=kernel)
        options: dict[str, Any] = dict(
            strides=windows.strides, dilation=windows.dilation, groups=groups, precision=precision
        )

        def convolve(x):
            x, padding = windows.extend(x)
            return ops.convolve(x, kernel, padding=padding, **options)

        y = over_batch(convolve, x, rank)
        return add_bias(y, params["bias"]) if bias else y

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))
