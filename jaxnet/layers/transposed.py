"""Transposed convolution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxnet import ops
from jaxnet.checks import size_of
from jaxnet.core import Layer, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.layers.spatial import (
    check_spatial,
    over_batch,
    pads_along,
    sizes_along,
    spatial_window,
    telling_how_read,
)
from jaxnet.mixed import add_bias
from jaxnet.ops.transposed import transposed_geometry

__all__ = ["conv_transpose"]


@interned
def conv_transpose(
    features: int,
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    output_padding: int | Sequence[int] = 0,
    output_size: int | Sequence[int] | None = None,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
) -> Layer:
    """Transpose a convolution: the gradient of `conv` with respect to its input, plus a bias.

    y[o s + w d - lo, f] = b[f] + sum over all such o and w, and c, of x[o, c] k[w, f, c].

    Parameters: kernel k [*kernel_size, F / groups, C], bias b [F]. The kernel has the layout of the
    convolution that is transposed, from F to C features, as in Keras; `from_torch` and `from_keras`
    give this layout. Nothing is flipped.

    Sizes: with span = (window - 1) d + 1, the whole result has (size - 1) s + span elements along
    an axis, and y is a part of it:

    | padding | sizes of y | elements cut off before, after |
    |---|---|---|
    | p, or (p, q) per axis | (size - 1) s + span - p - q + output_padding | p, q |
    | "SAME" | size s | floor(cut / 2), the rest, cut = max(0, span - s) |
    | "SAME_LOWER" | size s | ceil(cut / 2), the rest |
    | "VALID" | (size - 1) s + max(span, s) | none |
    | one of these names, with output_size | output_size | the same with cut = whole - output_size |

    The first row is the convention of PyTorch, and that of ONNX with `pads`; the names are those of
    Keras and `jax.lax.conv_transpose`, and with `output_size` those of ONNX's `auto_pad`. With
    numbers as padding, `output_size` chooses the output_padding, as in PyTorch.

    Source: Dumoulin & Visin, "A guide to convolution arithmetic for deep learning", 2016,
    arXiv:1603.07285.

    Twins: flax.linen.ConvTranspose, equinox.nn.ConvTranspose, keras.layers.Conv2DTranspose,
    torch.nn.ConvTranspose2d.

    Args:
      features: F, the number of features of the output.
      kernel_size: an int for images (two spatial axes), or the size along each spatial axis.
      strides: s, the step between the copies of the kernel; one int for all spatial axes, or one
        per axis.
      padding: a name of the table, an int, or (before, after) per spatial axis.
      output_padding: how many elements are added at the end of each axis, fewer than stride or
        dilation; only with numbers as padding.
      output_size: the size of y along each spatial axis; one int for all, or one per axis.
      dilation: d, the step between the elements of a window; one int for all spatial axes, or one
        per axis.
      groups: the number of groups. Output features [i F / groups, (i+1) F / groups) use only input
        features [i C / groups, (i+1) C / groups).
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`. It receives the shape
        [*kernel_size, C / groups, F], so that the fan-in is right; then the axes are rearranged.
      bias_init: the same for the bias.
      precision: as in `jax.lax.conv_general_dilated`.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *outputs, F].

    Raises:
      ValueError: an option has the wrong form; in `init` and `apply`, x lacks an axis, or the sizes
        do not fit, or C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.

    Example:
      >>> x = jax.ShapeDtypeStruct((8, 5, 2), "float32")
      >>> net = conv_transpose(3, (4,), strides=2)
      >>> net.init(jax.random.key(0), x)["kernel"].shape
      (4, 3, 2)
    """
    window, size = spatial_window("conv_transpose", "kernel_size", kernel_size)
    features = size_of(f"conv_transpose({features}, {size}): features", features)
    rank, label = len(window), f"conv_transpose({features}, {size})"
    groups = size_of(f"{label}: groups", groups)
    if features % groups:
        raise ValueError(f"{label}: groups must divide the features, got {groups=}")
    options: dict[str, Any] = dict(
        strides=sizes_along(f"{label}: strides", strides, rank),
        padding=pads_along(f"{label}: padding", padding, rank),
        output_padding=sizes_along(f"{label}: output_padding", output_padding, rank, 0),
        dilation=sizes_along(f"{label}: dilation", dilation, rank),
    )
    if output_size is not None:
        options["output_size"] = sizes_along(f"{label}: output_size", output_size, rank)
    _check_options(label, window, options)

    def check(x, **checks):
        check_spatial(label, x, rank, **checks)
        with telling_how_read(x, rank):
            transposed_geometry(label, x.shape[-rank - 1 : -1], window, **options)
            if x.shape[-1] % groups:
                raise ValueError(
                    f"{label}: groups must divide the last axis, got groups={groups} and "
                    f"{describe(x)}"
                )

    def init(key, x):
        check(x)
        kernel = kernel_init(key, (*window, x.shape[-1] // groups, features), x.dtype)
        params = {"kernel": _transposed(kernel, groups)}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        check(x, width=kernel.shape[-1], like=kernel)
        convolve = functools.partial(
            ops.convolve_transpose, kernel=kernel, groups=groups, precision=precision, **options
        )
        y = over_batch(convolve, x, rank)
        return add_bias(y, params["bias"]) if bias else y

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))


def _check_options(label: str, window: tuple[int, ...], options: dict[str, Any]) -> None:
    """Refuse options that fit no input."""
    added, padding = options["output_padding"], options["padding"]
    facts = zip(added, options["strides"], options["dilation"], strict=True)
    if any(more >= max(s, d) for more, s, d in facts):
        raise ValueError(
            f"{label}: output_padding must be smaller than stride or dilation, got {added}"
        )
    if max(added) and (isinstance(padding, str) or "output_size" in options):
        raise ValueError(
            f"{label}: output_padding goes with numbers as padding and without output_size, got "
            f"{padding=}; give one of them"
        )
    if "output_size" not in options:
        transposed_geometry(label, (2**20,) * len(window), window, **options)
    elif isinstance(padding, str) and padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
        raise ValueError(
            f"{label}: padding must be 'SAME', 'VALID', an int or (before, after) for each axis, "
            f"or 'SAME_LOWER', got {padding!r}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _transposed(kernel, groups: int):
    """[*window, C / groups, F] -> [*window, F / groups, C], group by group."""
    *window, channels, features = kernel.shape
    kernel = kernel.reshape(*window, channels, groups, features // groups).swapaxes(-1, -3)
    return kernel.reshape(*window, features // groups, groups * channels)
