"""Recurrent cells, (carry, x) -> (carry, y): simple, gated, and minimal gated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer
from jaxnet.layers import initializers
from jaxnet.layers.gates import carried, gate_kernel, joined, orthogonal, product
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import add_bias

__all__ = ["gru_cell", "mgu_cell", "rnn_cell"]


@interned
def rnn_cell(
    features: int,
    *,
    activation: Callable[..., Any] = jnp.tanh,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    recurrent_init: Callable[..., Any] = orthogonal,
    bias_init: Callable[..., Any] = initializers.zeros,
) -> Layer:
    """Simple recurrent cell, h_t = tanh([x_t, h_{t-1}] K + b), y_t = h_t.

    Parameters: kernel K [D + H, H], whose first D rows multiply x; bias b [H].

    Source: Elman, "Finding structure in time", Cognitive Science 14, 1990.
    Twins: flax.linen.SimpleCell, haiku.VanillaRNN, keras.layers.SimpleRNNCell, torch.nn.RNNCell.

    Args:
      features: H, the number of features of the carry and of the output.
      activation: an elementwise function, tanh by default.
      bias: False leaves out b.
      kernel_init: (key, shape, dtype) -> array, for the rows of the input.
      recurrent_init: the same for the rows of the carry.
      bias_init: the same for the bias.

    Returns:
      The layer, (h [..., H], x [..., D]) -> (h, y [..., H]). A carry None is zeros.

    Raises:
      ValueError: `features` is not a positive integer; in `apply`, D differs from that at `init`,
        or the carry has another shape.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    features = size_of("rnn_cell: features", features)
    label = f"rnn_cell({features})"

    def fn(params, carry, x):
        h = _checked(label, params, carry, x, features)
        b = params["bias"] if bias else None
        h = activation(_joined(x, h, params["kernel"], b))
        return h, h

    init = _init(label, features, 1, bias, kernel_init, recurrent_init, bias_init)
    return dataclasses.replace(layer(init, fn, label=label), wide=("bias",))


@interned
def gru_cell(
    features: int,
    *,
    reset_after: bool = True,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    recurrent_init: Callable[..., Any] = orthogonal,
    bias_init: Callable[..., Any] = initializers.zeros,
) -> Layer:
    """Gated recurrent unit, h_t = (1 - z) n + z h_{t-1}, y_t = h_t.

    r, z = sigmoid([x_t, h_{t-1}] K + b), and n = tanh(x_t K_x + b + r (h_{t-1} K_h + c)) with the
    reset after the product, as in cuDNN, or n = tanh([x_t, r h_{t-1}] K + b) with the reset before
    it, as in the paper.

    Parameters: kernel K [D + H, 3 H], whose first D rows multiply x; bias b [3 H]; with
    `reset_after`, hidden_bias c [H]. The columns are r, z, n. A second bias of r and z, as PyTorch
    has it, would only add to b.

    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    Twins: flax.linen.GRUCell, equinox.nn.GRUCell, haiku.GRU, keras.layers.GRUCell,
    torch.nn.GRUCell.

    Args:
      features: H, the number of features of the carry and of the output.
      reset_after: whether r multiplies h K_h + c (PyTorch, Flax, the default of Keras) or h itself
        (Haiku, Keras with reset_after=False).
      bias: False leaves out b and c.
      kernel_init: (key, shape, dtype) -> array, for the rows of the input.
      recurrent_init: the same for the rows of the carry, for each gate.
      bias_init: the same for the biases.

    Returns:
      The layer, (h [..., H], x [..., D]) -> (h, y [..., H]). A carry None is zeros.

    Raises:
      ValueError: `features` is not a positive integer; in `apply`, D differs from that at `init`,
        or the carry has another shape.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    features = size_of("gru_cell: features", features)
    label, step = f"gru_cell({features})", _reset_after if reset_after else _reset_before

    def fn(params, carry, x):
        h = _checked(label, params, carry, x, features)
        h = step(x, h, params["kernel"], params.get("bias"), params.get("hidden_bias"))
        return h, h

    inits = kernel_init, recurrent_init, bias_init
    init = _init(label, features, 3, bias, *inits, hidden=bias and reset_after)
    return dataclasses.replace(layer(init, fn, label=label), wide=("bias", "hidden_bias"))


@interned
def mgu_cell(
    features: int,
    *,
    bias: bool = True,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
    recurrent_init: Callable[..., Any] = orthogonal,
    bias_init: Callable[..., Any] = initializers.zeros,
) -> Layer:
    """Minimal gated unit, h_t = (1 - f) n + f h_{t-1}, y_t = h_t.

    f = sigmoid([x_t, h_{t-1}] K + b) is the only gate, and n = tanh(x_t K_x + b + f (h_{t-1} K_h +
    c)).

    Parameters: kernel K [D + H, 2 H], whose first D rows multiply x; bias b [2 H]; hidden_bias c
    [H]. The columns are f, n.

    Source: Zhou et al., "Minimal gated unit for recurrent neural networks", 2016, arXiv:1603.09420;
    there f and 1 - f change places in h, and f multiplies h before the product.
    Twins: flax.linen.MGUCell.

    Args:
      features: H, the number of features of the carry and of the output.
      bias: False leaves out b and c.
      kernel_init: (key, shape, dtype) -> array, for the rows of the input.
      recurrent_init: the same for the rows of the carry, for each gate.
      bias_init: the same for the biases.

    Returns:
      The layer, (h [..., H], x [..., D]) -> (h, y [..., H]). A carry None is zeros.

    Raises:
      ValueError: `features` is not a positive integer; in `apply`, D differs from that at `init`,
        or the carry has another shape.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    features = size_of("mgu_cell: features", features)
    label = f"mgu_cell({features})"

    def fn(params, carry, x):
        h = _checked(label, params, carry, x, features)
        h = _minimal(x, h, params["kernel"], params.get("bias"), params.get("hidden_bias"))
        return h, h

    inits = kernel_init, recurrent_init, bias_init
    init = _init(label, features, 2, bias, *inits, hidden=bias)
    return dataclasses.replace(layer(init, fn, label=label), wide=("bias", "hidden_bias"))


def _init(label, features, gates, bias, kernel_init, recurrent_init, bias_init, *, hidden=False):
    def init(key, carry, x):
        check_input(label, x)
        sizes = x.shape[-1], features, features
        kernel = gate_kernel(kernel_init, recurrent_init, key, sizes, gates, x.dtype)
        params = {"kernel": kernel}
        if bias:
            params["bias"] = initializers.bias(bias_init, key, (gates * features,), x.dtype)
        if hidden:
            params["hidden_bias"] = initializers.bias(bias_init, key, (features,), x.dtype)
        return params

    return init


def _checked(label, params, carry, x, features):
    check_real(label, params)
    kernel = params["kernel"]
    check_input(label, x, width=kernel.shape[0] - features, like=kernel)
    return carried(label, carry, x, features)


_joined = jax.jit(joined, inline=True)


@functools.partial(jax.jit, inline=True)
def _reset_after(x, h, kernel, bias, hidden_bias):
    from_x, from_h = _halves(x, h, kernel, bias)
    r, z, n = jnp.split(from_x, 3, -1)
    r_h, z_h, n_h = jnp.split(from_h, 3, -1)
    r, z = jax.nn.sigmoid(r + r_h), jax.nn.sigmoid(z + z_h)
    n = jnp.tanh(n + r * _plus(n_h, hidden_bias))
    return n + z * (h - n)


@functools.partial(jax.jit, inline=True)
def _reset_before(x, h, kernel, bias, _):
    split = 2 * h.shape[-1]
    gate_bias, new_bias = (None, None) if bias is None else (bias[:split], bias[split:])
    r, z = jnp.split(jax.nn.sigmoid(joined(x, h, kernel[:, :split], gate_bias)), 2, -1)
    n = jnp.tanh(joined(x, r * h, kernel[:, split:], new_bias))
    return n + z * (h - n)


@functools.partial(jax.jit, inline=True)
def _minimal(x, h, kernel, bias, hidden_bias):
    from_x, from_h = _halves(x, h, kernel, bias)
    f, n = jnp.split(from_x, 2, -1)
    f_h, n_h = jnp.split(from_h, 2, -1)
    f = jax.nn.sigmoid(f + f_h)
    n = jnp.tanh(n + f * _plus(n_h, hidden_bias))
    return n + f * (h - n)


def _halves(x, h, kernel, bias):
    """(x K_x + b, h K_h)."""
    width = x.shape[-1]
    return product(x, kernel[:width], bias), product(h, kernel[width:])


def _plus(y, bias):
    return y if bias is None else add_bias(y, bias)
