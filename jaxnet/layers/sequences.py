"""Cells over sequences of different lengths: one direction, two directions, stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.combinators import scan
from jaxnet.core import (
    Layer,
    around,
    as_layer,
    interned,
    start_state,
    wire,
)
from jaxnet.layers.cells import gru_cell, rnn_cell
from jaxnet.layers.long_memory import lstm_cell
from jaxnet.layers.noise import dropout
from jaxnet.layers.steps import (
    alive_steps,
    apart,
    beside,
    chunked,
    first_carry,
    masked,
    one_step,
    time_axis,
    unwrapped,
)

__all__ = ["bidirectional", "gru", "lstm", "recurrent", "simple_rnn", "stacked"]


@interned
def recurrent(
    cell: Layer | Callable[..., Any],
    *,
    reverse: bool = False,
    axis: int = -2,
    remat_every: int | None = None,
    return_carry: bool = False,
) -> Layer:
    """Run a cell over sequences: carry, y_t = f(carry, x_t) for each step t.

    Parameters, state and path are those of the cell. Steps beyond the length of a sequence keep its
    carry and return zeros, as the packed sequences of PyTorch do; so does every step at which a
    mask is False. Therefore the carry is the one after the last valid step, and with `reverse` the
    first step is the last valid one. Padding may hold any numbers, even NaN.

    Each step draws with its own key, so a `dropout` in the cell has a new mask at each step. For
    one mask per sequence, draw it outside: `x * f.drop(ones)` with ones [..., 1, D] (Gal &
    Ghahramani 2016).

    Twins: flax.linen.RNN, haiku.dynamic_unroll, keras.layers.RNN.

    Args:
      cell: a layer or a function (carry, x_t) -> (carry, y_t), such as `lstm_cell(64)`.
      reverse: run from the last valid step to the first; y keeps the order of x.
      axis: the axis of time, counted from the end: -2 for [..., T, D], -4 for images [..., T, H,
        W, C]. y has as many axes as x.
      remat_every: n to store the carry of every n-th step only, and compute the n steps between
        again in the backward pass. The memory is that of T / n carries and n steps. Random numbers
        differ from those without it.
      return_carry: True to return (carry, y), as the cell does.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, F].
      `lengths` has integers [...], `mask` has bools [..., T], and at most one of them is given.
      `carry` is the first carry. Without it the cell starts from the carry None, which
      is zeros for all cells of the library.

    Raises:
      TypeError: `cell` is neither a layer nor a function; lengths or mask have another dtype.
      ValueError: an option has the wrong form; x lacks the axis; lengths or mask have another
        shape, or both are given.

    Example:
      >>> net, x = recurrent(lstm_cell(3)), jnp.ones((8, 5, 2))
      >>> params = net.init(jax.random.key(0), x)
      >>> net.apply(params, x, lengths=jnp.full(8, 4)).shape
      (8, 5, 3)
    """
    cell, axis = as_layer(cell, "recurrent"), time_axis("recurrent", axis)
    options: dict[str, Any] = dict(
        reverse=reverse, axis=axis, remat_every=remat_every, return_carry=return_carry
    )
    inner = scan(masked(cell), reverse=reverse)
    if remat_every is not None:
        remat_every = size_of("recurrent: remat_every", remat_every)
        inner = scan(inner, reverse=reverse, remat=True)

    def arranged(x, lengths, mask, carry):
        """The inputs of `inner`: the carry, and the steps with whether each is valid."""
        alive = alive_steps("recurrent", x, axis, lengths, mask)
        if alive is not None:
            x = jnp.where(beside(alive, x.shape), x, jnp.zeros((), x.dtype))
            alive = jnp.moveaxis(alive, -1, 0)
        lead, xs = x.ndim + axis, jnp.moveaxis(x, axis, 0)
        if carry is None:
            carry = first_carry(cell, x, axis)
        if remat_every is not None:
            xs, alive = chunked(xs, alive, remat_every, lead)
        return carry, (xs, alive)

    def init(key, x, lengths=None, mask=None, carry=None):
        return cell.init(key, carry, one_step("recurrent", x, axis))

    def init_state(x, lengths=None, mask=None, carry=None, key=None):
        return start_state(cell, key, (carry, one_step("recurrent", x, axis)), {})

    def call(run, params, state, key, x, lengths=None, mask=None, carry=None):
        one_step("recurrent", x, axis)
        inputs = arranged(x, lengths, mask, carry)
        (carry, ys), state, seen = run(params, state, key, *inputs)
        if remat_every is not None:
            ys = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[: x.shape[axis]], ys)
        ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, y.ndim + axis), ys)
        return (carry, ys) if return_carry else ys, state, seen

    return around(
        inner,
        call,
        label="recurrent",
        rebuild=lambda new: recurrent(unwrapped(new, 2 + (remat_every is not None)), **options),
        init=init,
        init_state=init_state,
        checked=False,
    )


@interned
def bidirectional(forward: Layer, backward: Layer) -> Layer:
    """Run one layer over a sequence and another against it: y = [forward(x), backward(x)].

    Parameters: forward, backward, those of the two layers.

    Source: Schuster & Paliwal, "Bidirectional recurrent neural networks", 1997.
    Twins: flax.linen.Bidirectional, keras.layers.Bidirectional.

    Args:
      forward: a layer such as `lstm(64)`.
      backward: a layer such as `lstm(64, reverse=True)`.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, F1 + F2].
      `carry` is a pair of first carries. If both layers return their carry, it returns
      (carries, y).

    Raises:
      TypeError: an argument is not a layer.
      ValueError: only one of the two layers returns its carry.

    Example:
      >>> net = bidirectional(lstm(3), lstm(4, reverse=True))
      >>> net.apply(net.init(jax.random.key(0), jnp.ones((8, 5, 2))), jnp.ones((8, 5, 2))).shape
      (8, 5, 7)
    """

    @wire(forward=forward, backward=backward)
    def bidirectional(f, x, lengths=None, mask=None, carry=None):
        options = dict(lengths=lengths, mask=mask)
        first, last = (None, None) if carry is None else carry
        both = [f.forward(x, carry=first, **options), f.backward(x, carry=last, **options)]
        carries, ys = apart("bidirectional", both)
        y = jnp.concatenate(ys, -1)
        return y if carries is None else (carries, y)

    return bidirectional


@interned
def stacked(*layers: Layer, dropout_rate: float = 0.0) -> Layer:
    """Run recurrent layers one after the other, each over the outputs of the last.

    `chain` does the same without lengths and carries. Parameters: '0', '1', ..., those of the
    layers.

    Twins: haiku.DeepRNN, keras.layers.StackedRNNCells, torch.nn.LSTM(num_layers=...).

    Args:
      *layers: layers such as `lstm(64)` or `bidirectional(lstm(32), lstm(32, reverse=True))`.
      dropout_rate: the rate of the dropout between two layers, a new mask for each step, as in
        PyTorch.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, F]. `carry` has
      a first carry for each layer. If all layers return their carry, it returns (carries, y).

    Raises:
      ValueError: there is no layer, the rate is not in [0, 1), or only some of the layers return
        their carry; in `apply`, training with dropout has no key.
      TypeError: an argument is not a layer.
    """
    if not layers:
        raise ValueError("stacked: expected at least one layer, such as lstm(64), got none")
    children: dict[str, Any] = {str(i): one for i, one in enumerate(layers)}
    noisy = dropout_rate != 0 and len(layers) > 1
    drop = dropout(dropout_rate)

    @wire(**children, **({"drop": drop} if noisy else {}))
    def stacked(f, x, lengths=None, mask=None, carry=None):
        carry, results = (None,) * len(layers) if carry is None else carry, []
        if len(carry) != len(layers):
            raise ValueError(
                f"stacked: the carry must have {len(layers)} parts, one for each layer, got "
                f"{len(carry)}"
            )
        for i, start in enumerate(carry):
            x = f.drop(x) if noisy and i else x
            results.append(f[str(i)](x, lengths=lengths, mask=mask, carry=start))
            x = apart("stacked", results[-1:])[1][0]
        carries, _ = apart("stacked", results)
        return x if carries is None else (carries, x)

    return stacked


def lstm(
    features: int, *, reverse: bool = False, return_carry: bool = False, **options: Any
) -> Layer:
    """Run a long short-term memory over sequences: `recurrent(lstm_cell(features))`.

    Parameters: those of `lstm_cell`.

    Twins: keras.layers.LSTM, torch.nn.LSTM.

    Args:
      features: the number of features.
      reverse: as in `recurrent`.
      return_carry: as in `recurrent`.
      **options: as in `lstm_cell`.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, features].

    Raises:
      ValueError: as in `lstm_cell`.
    """
    return recurrent(lstm_cell(features, **options), reverse=reverse, return_carry=return_carry)


def gru(
    features: int, *, reverse: bool = False, return_carry: bool = False, **options: Any
) -> Layer:
    """Run a gated recurrent unit over sequences: `recurrent(gru_cell(features))`.

    Parameters: those of `gru_cell`.

    Twins: keras.layers.GRU, torch.nn.GRU.

    Args:
      features: the number of features.
      reverse: as in `recurrent`.
      return_carry: as in `recurrent`.
      **options: as in `gru_cell`.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, features].

    Raises:
      ValueError: as in `gru_cell`.
    """
    return recurrent(gru_cell(features, **options), reverse=reverse, return_carry=return_carry)


def simple_rnn(
    features: int, *, reverse: bool = False, return_carry: bool = False, **options: Any
) -> Layer:
    """Run a simple recurrent cell over sequences: `recurrent(rnn_cell(features))`.

    Parameters: those of `rnn_cell`.

    Twins: keras.layers.SimpleRNN, torch.nn.RNN.

    Args:
      features: the number of features.
      reverse: as in `recurrent`.
      return_carry: as in `recurrent`.
      **options: as in `rnn_cell`.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, features].

    Raises:
      ValueError: as in `rnn_cell`.
    """
    return recurrent(rnn_cell(features, **options), reverse=reverse, return_carry=return_carry)
