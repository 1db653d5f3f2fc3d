"""Cells with a memory beside the output: LSTM, and LSTM over images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, fold, interned, layer, wire
from jaxnet.layers import initializers
from jaxnet.layers.convolution import conv
from jaxnet.layers.gates import (
    carried,
    check_carry,
    gate_kernel,
    joined,
    orthogonal,
    product,
    zeros_beside,
)
from jaxnet.layers.parameters import check_real
from jaxnet.layers.spatial import spatial_window
from jaxnet.mixed import widened

__all__ = ["conv_lstm_cell", "lstm_cell"]


@interned
def lstm_cell(
    features: int,
    *,
    projection: int | None = None,
    peephole: bool = False,
    forget_bias: float = 1.0,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    recurrent_init: Callable[..., Any] = orthogonal,
    bias_init: Callable[..., Any] = initializers.zeros,
) -> Layer:
    """Long short-term memory, c_t = f c_{t-1} + i g, y_t = h_t = o tanh(c_t).

    i, f, g, o = [x_t, h_{t-1}] K + b, with sigmoid for i, f, o and tanh for g. With a projection,
    h_t = (o tanh(c_t)) W. With peepholes, i and f see p_i c_{t-1} and p_f c_{t-1}, and o sees
    p_o c_t.

    Parameters: kernel K [D + P, 4 H], whose first D rows multiply x, with the columns i, f, g, o;
    bias b [4 H]; projection W [H, P]; peephole [3, H], the rows p_i, p_f, p_o. P is H without a
    projection.

    Source: Hochreiter & Schmidhuber, "Long short-term memory", 1997; the forget gate and peepholes:
    Gers, Schmidhuber & Cummins, 2000; the projection: Sak, Senior & Beaufays, 2014.
    Twins: flax.linen.LSTMCell, equinox.nn.LSTMCell, haiku.LSTM, keras.layers.LSTMCell,
    torch.nn.LSTMCell.

    Args:
      features: H, the number of features of the memory c.
      projection: P, the number of features of the output h, if it differs from H.
      peephole: whether the gates see the memory.
      forget_bias: the number that the initial bias of f has beyond `bias_init`, so that the memory
        begins by keeping (Jozefowicz, Zaremba & Sutskever 2015).
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, for the rows of the input and for W.
      recurrent_init: the same for the rows of the carry, for each gate.
      bias_init: the same for the bias.

    Returns:
      The layer, ((h [..., P], c [..., H]), x [..., D]) -> ((h, c), y [..., P]). A carry None is
      zeros.

    Raises:
      ValueError: a size is not a positive integer; in `apply`, D differs from that at `init`, or
        the carry has another form.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.

    Example:
      >>> cell, x = lstm_cell(3), jnp.ones((8, 2))
      >>> jax.tree.map(jnp.shape, cell.init(jax.random.key(0), None, x))
      {'bias': (12,), 'kernel': (5, 12)}
    """
    features = size_of("lstm_cell: features", features)
    back = features if projection is None else size_of("lstm_cell: projection", projection)
    label = f"lstm_cell({features})"

    def init(key, carry, x):
        check_input(label, x)
        sizes = x.shape[-1], back, features
        params = {"kernel": gate_kernel(kernel_init, recurrent_init, key, sizes, 4, x.dtype)}
        if bias:
            drawn = initializers.bias(bias_init, key, (4 * features,), x.dtype)
            forget = slice(features, 2 * features)
            params["bias"] = drawn.at[forget].add(forget_bias) if forget_bias else drawn
        if projection is not None:
            params["projection"] = kernel_init(fold(key, "projection"), (features, back), x.dtype)
        if peephole:
            drawn = jax.random.normal(fold(key, "peephole"), (3, features), x.dtype)
            params["peephole"] = drawn / features**0.5
        return params

    def fn(params, carry, x):
        check_real(label, params)
        kernel = params["kernel"]
        check_input(label, x, width=kernel.shape[0] - back, like=kernel)
        h, c = _pair(label, carry)
        h = carried(label, h, x, back, "h of the carry")
        c = carried(label, c, x, features, "c of the carry")
        rest = (params.get(name) for name in ("bias", "projection", "peephole"))
        h, c = _step(x, h, c, kernel, *rest)
        return (h, c), h

    return dataclasses.replace(layer(init, fn, label=label), wide=("bias", "peephole"))


@interned
def conv_lstm_cell(
    features: int,
    kernel_size: int | Sequence[int],
    *,
    forget_bias: float = 1.0,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
) -> Layer:
    """LSTM over images, whose products are convolutions: c_t = f c_{t-1} + i g, h_t = o tanh(c_t).

    i, f, g, o = [x_t, h_{t-1}] * K + b, with sigmoid for i, f, o and tanh for g. The convolution is
    padded to keep the size of the image. There are no peepholes.

    Parameters: gates/kernel K [*kernel_size, C + F, 4 F], whose first C input channels are those of
    x, with the columns i, f, g, o; gates/bias b [4 F].

    Source: Shi et al., "Convolutional LSTM network", NeurIPS 2015.
    Twins: flax.linen.ConvLSTMCell, haiku.Conv2DLSTM, keras.layers.ConvLSTM2D.

    Args:
      features: F, the number of features of the memory and of the output.
      kernel_size: as in `conv`: an int for images, or the size along each spatial axis.
      forget_bias: the initial bias of f.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, for the kernel.

    Returns:
      The layer, ((h, c), x [..., *spatial, C]) -> ((h, c), y), with h, c and y
      [..., *spatial, F]. A carry None is zeros.

    Raises:
      ValueError: an argument has the wrong form; in `apply`, C differs from that at `init`, or the
        carry has another form.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    features = size_of("conv_lstm_cell: features", features)
    window, _ = spatial_window("conv_lstm_cell", "kernel_size", kernel_size)
    rank, label = len(window), f"conv_lstm_cell({features})"
    begin = functools.partial(_forgetful, float(forget_bias))
    gates = conv(4 * features, window, bias=bias, kernel_init=kernel_init, bias_init=begin)

    def start(part, x, what):
        if part is None:
            return zeros_beside(x, x.ndim - rank - 1, (*x.shape[-rank - 1 : -1], features))
        check_carry(label, part, (*x.shape[:-1], features), x, f"{what} of the carry")
        return part

    @wire(gates=gates)
    def conv_lstm_cell(f, carry, x):
        check_input(label, x, rank=rank + 1)
        h, c = _pair(label, carry)
        h, c = start(h, x, "h"), start(c, x, "c")
        h, c = _remember(f.gates(jnp.concatenate([x, h], -1)), c)
        return (h, c), h

    return conv_lstm_cell


def _forgetful(value: float, key, shape, dtype):
    """A bias [4 F] that is `value` for the second gate, and else 0."""
    bias = initializers.zeros(key, shape, dtype)
    quarter = shape[0] // 4
    return bias.at[quarter : 2 * quarter].set(value) if value else bias


def _pair(label: str, carry: Any) -> Any:
    if carry is None:
        return None, None
    if not isinstance(carry, tuple | list) or len(carry) != 2:
        raise ValueError(
            f"{label}: the carry must be a pair (h, c), or None, got {describe(carry)}"
        )
    return carry


@functools.partial(jax.jit, inline=True)
def _step(x, h, c, kernel, bias, projection, peephole):
    z = joined(x, h, kernel, bias)
    h, c = _remember(z, c) if peephole is None else _peeping(z, c, peephole)
    return (h if projection is None else product(h, projection)), c


def _remember(z, c):
    """The new (h, c) from the sums of the gates, [..., 4 H]."""
    i, f, g, o = jnp.split(z, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _peeping(z, c, peephole):
    """`_remember` with gates that see the memory. Sums with peepholes are at least float32."""
    i, f, g, o = jnp.split(widened(z), 4, -1)
    p_i, p_f, p_o = (jnp.broadcast_to(p.astype(i.dtype), i.shape) for p in peephole)
    old = widened(c)
    c = jax.nn.sigmoid(f + p_f * old) * old + jax.nn.sigmoid(i + p_i * old) * jnp.tanh(g)
    return (jax.nn.sigmoid(o + p_o * c) * jnp.tanh(c)).astype(z.dtype), c.astype(z.dtype)
