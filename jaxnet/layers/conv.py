"""Convolution over the axes of lines, images and volumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxnet import ops
from jaxnet.core import Layer, check_input, describe, fold, interned, layer
from jaxnet.layers import initializers
from jaxnet.ops.geometry import window_geometry

__all__ = ["conv"]


@interned
def conv(
    features: int,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    kernel_init: Callable = initializers.lecun_normal,
    bias_init: Callable = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Convolve, y[o, f] = b[f] + sum over w, c of x[o s + w d - lo, c] k[w, c, f].   [..., *spatial, C] -> [..., *outputs, F]

    kernel [*window, C / groups, F], bias [F]. As everywhere in deep learning the kernel is not flipped. All axes before the
    spatial ones are batch axes. Every derivative keeps its speed inside compiled loops (`jaxnet.ops.convolve`).

    Args:
      features: F, features of the output.
      window: an int for images (two spatial axes), or its size along each spatial axis: (3,) for sequences, (3, 3, 3) for
        volumes.
      strides: s, the step between windows; one int for all spatial axes or one for each, as is `dilation`.
      padding: "SAME" (ceil(size / stride) outputs, the odd zero at the end), "VALID" (no zeros), an int, or
        (before, after) for each spatial axis.
      dilation: d, the step between the elements of a window.
      groups: output features [i F / groups, (i+1) F / groups) see only input features [i C / groups, (i+1) C / groups);
        with groups = C, a depthwise convolution.
      bias: False leaves out b.
      kernel_init, bias_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      precision: as in `jax.lax.conv_general_dilated`.

    Raises: ValueError for options of the wrong form, another number of features than at `init`, a missing axis, or where no
    window fits; TypeError for inputs that are not floats of the parameters' dtype.
    """
    window, size = spatial_window("conv", window)
    rank, label = len(window), f"conv({features}, {size})"
    for name, number in (("features", features), ("groups", groups)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{label}: {name} must be a positive int, got {number!r}")
    if features % groups:
        raise ValueError(f"{label}: groups must divide the features, got {groups=}")

    def check_windows(sizes):
        window_geometry(label, (1, *sizes, 1), window, strides, padding, dilation)

    check_windows((ENDLESS,) * rank)  # options of the wrong form fail here; whether a window fits depends on x

    def init(key, x):
        check_spatial(label, x, rank)
        check_windows(x.shape[-rank - 1 : -1])
        if x.shape[-1] % groups:
            raise ValueError(f"{label}: groups must divide the last axis, got groups={groups} and {describe(x)}")
        params = {"kernel": kernel_init(key, (*window, x.shape[-1] // groups, features), x.dtype)}
        return params | {"bias": bias_init(fold(key, "bias"), (features,), x.dtype)} if bias else params

    def fn(params, x):
        kernel = params["kernel"]
        check_spatial(label, x, rank, width=kernel.shape[-2] * groups, like=kernel)
        check_windows(x.shape[-rank - 1 : -1])
        options: dict[str, Any] = dict(strides=strides, padding=padding, dilation=dilation, groups=groups)
        y = over_batch(lambda x: ops.convolve(x, kernel, precision=precision, **options), x, rank)
        return y + jnp.broadcast_to(params["bias"], y.shape) if bias else y

    return layer(init, fn, label=label)


# Shared with pooling

ENDLESS = 2**30  # the size of an axis into which every window fits


def spatial_window(name: str, window: int | Sequence[int]) -> tuple[tuple[int, ...], str]:
    """The window along each spatial axis, an int being for images, and how a label prints it."""
    sizes = (window, window) if isinstance(window, int) else tuple(window)
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(
            f"{name}: window must be a positive int, or one for each spatial axis as in (3,), got {window!r}"
        )
    return sizes, str(sizes[0] if sizes == sizes[:1] * 2 else sizes)


def check_spatial(label: str, x, rank: int, **checks) -> None:
    """`check_input` for x [..., *spatial, C]."""
    check_input(label, x, **checks)
    if len(x.shape) <= rank:
        axes = {1: "length", 2: "height, width", 3: "depth, height, width"}.get(rank, f"{rank} spatial axes")
        raise ValueError(f"{label}: the input must be [..., {axes}, features], got {describe(x)}")


def over_batch(fn: Callable, x, rank: int):
    """Apply fn, made for one batch axis [N, *spatial, C], over any number of them."""
    batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
    y = fn(x.reshape(math.prod(batch), *image))
    return y.reshape(*batch, *y.shape[1:])
