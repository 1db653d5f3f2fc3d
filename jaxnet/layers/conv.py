"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, describe, fold, layer
from jaxnet.ops import convolve

__all__ = ["conv"]


def conv(
    features: int,
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    kernel_init: Callable = jax.nn.initializers.lecun_normal(),
    bias_init: Callable = jax.nn.initializers.zeros,
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
      padding: "SAME" (ceil(size / stride) outputs, the odd zero at the end), "VALID" (no zeros), an int, or (before, after)
        for each spatial axis.
      dilation: d, the step between the elements of a window.
      groups: output features [i F / groups, (i+1) F / groups) see only input features [i C / groups, (i+1) C / groups);
        with groups = C, a depthwise convolution.
      bias: False leaves out b.
      kernel_init, bias_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      precision: as in `jax.lax.conv_general_dilated`.

    Raises: ValueError for another number of features than at `init`, too few axes, or options that do not fit; TypeError for
    inputs that are not floats of the parameters' dtype.
    """
    window = (window, window) if isinstance(window, int) else tuple(window)
    label = f"conv({features}, {window[0] if len(window) == 2 and len(set(window)) == 1 else window})"
    for name, size in [("features", features), ("groups", groups), *(("window", w) for w in window)]:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{label}: {name} must be a positive int, got {size!r}")
    if features % groups:
        raise ValueError(f"{label}: groups must divide the features, got groups={groups}")
    rank = len(window)

    def init(key, x):
        check_input(label, x, rank=rank + 1)
        if x.shape[-1] % groups:
            raise ValueError(f"{label}: groups must divide the last axis, got groups={groups} and {describe(x)}")
        params = {"kernel": kernel_init(key, (*window, x.shape[-1] // groups, features), x.dtype)}
        return params | {"bias": bias_init(fold(key, "bias"), (features,), x.dtype)} if bias else params

    def fn(params, x):
        kernel = params["kernel"]
        check_input(label, x, rank=rank + 1, width=kernel.shape[-2] * groups, like=kernel)
        batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
        y = convolve(
            x.reshape(-1, *image),
            kernel,
            strides=strides,
            padding=padding,
            dilation=dilation,
            groups=groups,
            precision=precision,
        )
        if bias:
            y = y + jnp.broadcast_to(params["bias"], y.shape)
        return y.reshape(*batch, *y.shape[1:])

    return layer(init, fn, label=label)
