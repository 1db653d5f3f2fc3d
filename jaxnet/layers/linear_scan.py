"""Linear recurrences h_t = a_t h_{t-1} + b_t, over time in parallel or step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, layer
from jaxnet.layers.gates import check_carry, zeros_beside
from jaxnet.layers.parameters import check_real
from jaxnet.layers.steps import alive_steps, beside
from jaxnet.mixed import widened

__all__ = ["Recurrence", "linear_scan", "over_time", "step_by_step"]


class Recurrence(NamedTuple):
    """A linear recurrence as equations over any leading axes.

    Attributes:
      label: the name of the layer in errors.
      init: (key, x) -> params; x [..., D] is one step or a sequence.
      width: params -> D and a parameter that has the dtype of the inputs.
      shape: params -> the shape of the carry behind the batch axes.
      coefficients: (params, x) -> (a, b), each [..., *shape], in at least float32. Axes of a that
        b has too may be 1.
      readout: (params, h, x) -> y [..., F].
      wide: as in `Layer.wide`.
      pack: h -> the carry as floats, in at least float32.
      unpack: the inverse.
    """

    label: str
    init: Callable[..., Any]
    width: Callable[..., Any]
    shape: Callable[..., Any]
    coefficients: Callable[..., Any]
    readout: Callable[..., Any]
    wide: tuple[str, ...] = ()
    pack: Callable[..., Any] = lambda h: h
    unpack: Callable[..., Any] = lambda h: h


def linear_scan(a: jax.Array, b: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t h_{t-1} + b_t along an axis, from h = 0, in O(log T) parallel steps.

    Source: Martin & Cundy, "Parallelizing linear recurrent neural nets over sequence length", ICLR
    2018.

    Args:
      a: the factors, [..., T, ...]; other axes of size 1 are broadcast.
      b: the summands, [..., T, ...].
      axis: the axis of time.

    Returns:
      (the products a_t ... a_1 of the factors, h), each [..., T, ...]. From another start, h_t is
      the product of a_t ... a_1 and the start more.
    """

    def after(first, second):
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(after, (a, b), axis=axis)


def step_by_step(made: Recurrence) -> Layer:
    """The recurrence as a cell, (carry, x) -> (carry, y)."""

    def fn(params, carry, x):
        _check(made, params, x)
        carry = _start(made, params, carry, x, x.ndim - 1)
        a, b = made.coefficients(params, x)
        h = a * made.unpack(widened(carry)) + b
        return made.pack(h).astype(x.dtype), made.readout(params, h, x)

    init = lambda key, carry, x: made.init(key, x)  # noqa: E731
    return dataclasses.replace(layer(init, fn, label=made.label), wide=made.wide)


def over_time(made: Recurrence, return_carry: bool) -> Layer:
    """The recurrence over sequences, (x, lengths, mask, carry) -> y, or (carry, y)."""

    def fn(params, x, lengths=None, mask=None, carry=None):
        check_input(made.label, x, rank=2)
        _check(made, params, x)
        continued = carry is not None
        carry = _start(made, params, carry, x, x.ndim - 2)
        alive = alive_steps(made.label, x, -2, lengths, mask)
        if alive is not None:
            x = jnp.where(beside(alive, x.shape), x, jnp.zeros((), x.dtype))
        # The axis of time stays where it is: the batch may be sharded.
        time, (a, b) = x.ndim - 2, made.coefficients(params, x)
        a = jnp.broadcast_to(a, (*a.shape[:time], x.shape[-2], *a.shape[time + 1 :]))
        if alive is not None:
            whole = beside(alive, b.shape)
            a = jnp.where(whole, jnp.broadcast_to(a, b.shape), 1)
            b = jnp.where(whole, b, 0)
        decays, h = linear_scan(a, b, time)
        if continued:
            h = h + decays * jnp.expand_dims(made.unpack(widened(carry)), time)
        ys = made.readout(params, h, x)
        if alive is not None:
            ys = jnp.where(beside(alive, ys.shape), ys, jnp.zeros((), ys.dtype))
        if not return_carry:
            return ys
        if x.shape[-2]:
            last = jax.lax.index_in_dim(h, x.shape[-2] - 1, time, keepdims=False)
            carry = made.pack(last).astype(x.dtype)
        return carry, ys

    init = lambda key, x: made.init(key, x)  # noqa: E731
    return dataclasses.replace(layer(init, fn, label=made.label), wide=made.wide)


def _check(made: Recurrence, params: Any, x: Any) -> None:
    check_real(made.label, params)
    width, like = made.width(params)
    check_input(made.label, x, width=width, like=like)


def _start(made: Recurrence, params: Any, carry: Any, x: jax.Array, lead: int) -> jax.Array:
    shape = made.shape(params)
    if carry is None:
        return zeros_beside(x, lead, shape)
    check_carry(made.label, carry, (*x.shape[:lead], *shape), x, "the carry")
    return carry
