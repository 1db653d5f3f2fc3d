"""Affine maps over several named axes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import add_bias, affine

__all__ = ["einsum_dense"]


@interned
def einsum_dense(
    equation: str,
    *,
    bias_axes: str | None = None,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    bias_init: Callable[..., Any] = initializers.zeros,
    precision: Any = None,
    **sizes: int,
) -> Layer:
    """Affine map over several named axes, y = einsum(equation, x, kernel) + bias.

    The equation names the axes of x, of the kernel and of y by letters, as in `jax.numpy.einsum`;
    `sizes` has the sizes of the letters that x does not have. Further leading axes of x are batch
    axes of y, with or without an ellipsis:

    | equation | map |
    |---|---|
    | "d,df->f" | `dense` |
    | "d,dhk->hk", h=8, k=64 | to heads: queries, keys, values; Flax's DenseGeneral((8, 64)) |
    | "hk,hkd->d", d=512 | from heads; Flax's DenseGeneral(512, axis=(-2, -1)) |
    | "ed,edf->ef", f=64 | another matrix for each e |
    | "td,ts->sd", s=32 | along another axis than the last |

    Parameters: kernel, with its letters as axes; bias, with `bias_axes` as axes.

    Twins: flax.linen.Einsum, keras.layers.EinsumDense.

    Args:
      equation: "axes of x,axes of the kernel->axes of y". Each letter at most once per operand.
      bias_axes: the letters of the bias, among those of y; "" for none. By default those of y that
        the kernel has.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`. It receives the shape
        [fan_in, others], where fan_in is the product of the axes that are summed; then the axes are
        brought into their order.
      bias_init: the same for the bias, with its own shape.
      precision: the precision of the products, as in `jax.numpy.einsum`.
      **sizes: the size of each letter, as in h=8.

    Returns:
      The layer, x [..., axes of x] -> y [..., axes of y].

    Raises:
      ValueError: the equation has the wrong form, or a size is missing or not a positive integer;
        in `init` and `apply`, x has another size for a letter.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.

    Example:
      >>> net = einsum_dense("td,dhk->thk", h=2, k=3)
      >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0), jnp.ones((8, 5, 4))))
      {'bias': (2, 3), 'kernel': (4, 2, 3)}
    """
    axes = _parsed(equation, bias_axes, sizes)
    label = f"einsum_dense({equation})"

    def sizes_for(x) -> dict[str, int]:
        """The sizes of all letters."""
        check_input(label, x, rank=len(axes.x))
        found = dict(zip(axes.x, _named(x.shape, axes), strict=True))
        for letter, size in axes.sizes.items():
            if found.setdefault(letter, size) != size:
                raise ValueError(f"{label}: axis '{letter}' must be {size}, got {describe(x)}")
        return found

    def init(key, x):
        size = sizes_for(x)
        fan_in = [letter for letter in axes.kernel if letter not in axes.y]
        drawn = fan_in + [letter for letter in axes.kernel if letter in axes.y]
        width = math.prod(size[letter] for letter in fan_in)
        rest = math.prod(size[letter] for letter in drawn[len(fan_in) :])
        kernel = kernel_init(key, (width, rest), x.dtype)
        kernel = kernel.reshape([size[letter] for letter in drawn])
        if drawn != list(axes.kernel):
            kernel = kernel.transpose([drawn.index(letter) for letter in axes.kernel])
        params = {"kernel": kernel}
        if axes.bias:
            shape = tuple(size[letter] for letter in axes.bias)
            params["bias"] = initializers.bias(bias_init, key, shape, x.dtype)
        return params

    def fn(params, x):
        check_real(label, params)
        kernel = params["kernel"]
        check_input(label, x, rank=len(axes.x), like=kernel)
        sizes_for(x)
        for letter, size in zip(axes.kernel, kernel.shape, strict=True):
            if letter in axes.x and _named(x.shape, axes)[axes.x.index(letter)] != size:
                raise ValueError(
                    f"{label}: axis '{letter}' must be {size}, got {describe(x)}; the parameters "
                    f"were made for {size}"
                )
        return _map(x, kernel, params["bias"] if axes.bias else None, axes, precision)

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))


class Axes(NamedTuple):
    """A parsed equation: the letters of each array, the given sizes, and the number of letters
    before the batch axes of x and of y.
    """

    x: str
    kernel: str
    y: str
    bias: str
    sizes: Any
    x_gap: int
    y_gap: int


def _named(shape: tuple, axes: Axes) -> tuple:
    """The sizes of the axes that have a letter."""
    after = len(axes.x) - axes.x_gap
    return (*shape[: axes.x_gap], *shape[len(shape) - after :])


def _parsed(equation: str, bias_axes: str | None, sizes: dict[str, int]) -> Axes:
    where = f"einsum_dense({equation})"
    parts = re.fullmatch(r"([^,>]*),([^,>]*)->([^,>]*)", str(equation).replace(" ", ""))
    operands = parts.groups() if parts else ()
    good = [re.fullmatch(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*", operand) for operand in operands]
    letters = [operand.replace("...", "") for operand in operands]
    once = all(len(set(operand)) == len(operand) for operand in letters)
    if not operands or not all(good) or not once or "..." in operands[1] or not letters[1]:
        raise ValueError(
            f"{where}: the equation must be 'axes of x,axes of the kernel->axes of y', each axis a "
            "letter that occurs once per operand, as in '...d,dhk->...hk'"
        )
    x, kernel, y = letters
    if ("..." in operands[0]) != ("..." in operands[2]):
        raise ValueError(f"{where}: x and y must both have an ellipsis, or none of them")
    unknown = [a for a in y if a not in x + kernel] + [a for a in kernel if a not in x + y]
    if unknown:
        raise ValueError(
            f"{where}: axis '{unknown[0]}' must be in two of the three operands, x, kernel and y"
        )
    given = {letter: size_of(f"{where}: {letter}", size) for letter, size in sizes.items()}
    missing = [a for a in kernel if a not in x and a not in given]
    foreign = [a for a in given if a not in x + kernel]
    if missing or foreign:
        problem = (
            f"the size of axis '{missing[0]}' is missing, as in {missing[0]}=8"
            if missing
            else f"'{foreign[0]}' is no axis of the equation"
        )
        raise ValueError(f"{where}: {problem}")
    bias = "".join(a for a in y if a in kernel) if bias_axes is None else bias_axes
    if not isinstance(bias, str) or len(set(bias)) != len(bias) or not set(bias) <= set(y):
        raise ValueError(
            f"{where}: bias_axes must be letters of y, {y!r}, each once, got {bias_axes!r}"
        )
    gaps = [operand.find("...") for operand in (operands[0], operands[2])]
    return Axes(x, kernel, y, bias, given, *(max(0, gap) for gap in gaps))


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def _einsum(x, kernel, bias, axes: tuple, precision):
    x_letters, kernel_letters, y_letters, bias_letters, x_gap, y_gap = axes
    equation = (
        f"{x_letters[:x_gap]}...{x_letters[x_gap:]},{kernel_letters}->"
        f"{y_letters[:y_gap]}...{y_letters[y_gap:]}"
    )
    summed = "".join(letter for letter in kernel_letters if letter not in y_letters)
    made = kernel_letters[len(summed) :]
    kept = x_letters[: len(x_letters) - len(summed)]
    if x_gap == y_gap == 0 and x_letters == kept + summed and y_letters == kept + made:
        if kernel_letters == summed + made and not set(made) & set(x_letters):
            return _as_rows(x, kernel, bias, len(summed), bias_letters == made, precision, axes)
    y = jnp.einsum(equation, x, kernel, precision=precision)
    return y if bias is None else add_bias(y, _spread(bias, y, axes))


def _map(x, kernel, bias, axes: Axes, precision):
    return _einsum(x, kernel, bias, (*axes[:4], axes.x_gap, axes.y_gap), precision)


def _as_rows(x, kernel, bias, summed: int, whole: bool, precision, axes):
    """The sum over the last axes of x as one product of two matrices, whose gradients are, too."""
    lead, made = x.shape[: x.ndim - summed], kernel.shape[summed:]
    # One axis at a time, because JAX can then infer the sharding of the result.
    flat = x.reshape(*lead, math.prod(x.shape[x.ndim - summed :]))
    rows = flat.reshape(math.prod(lead), flat.shape[-1])
    matrix = kernel.reshape(rows.shape[1], math.prod(made))
    if bias is not None and whole:
        y = affine(rows, matrix, bias.reshape(-1), precision)
    else:
        y = jnp.matmul(rows, matrix, precision=precision)
    y = y.reshape(y.shape[0], *made).reshape(*lead, *made)
    return y if bias is None or whole else add_bias(y, _spread(bias, y, axes))


def _spread(bias, y, axes):
    """The bias with an axis of size 1 for each letter of y that it lacks."""
    _, _, letters, bias_letters, _, gap = axes
    order = [bias_letters.index(letter) for letter in letters if letter in bias_letters]
    bias = bias.transpose(order)
    after = letters[gap:]
    shape, rest = [], list(bias.shape)
    for letter in letters:
        shape.append(rest.pop(0) if letter in bias_letters else 1)
    batch = y.ndim - len(letters)
    return bias.reshape(*shape[:gap], *(1,) * batch, *shape[len(letters) - len(after) :])
