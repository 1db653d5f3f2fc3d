"""A cell over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.combinators.copies import check_same, pair, recomputed, with_axis, without_axis
from jaxnet.core import (
    Layer,
    around,
    as_layer,
    describe,
    interned,
    is_array,
    output_specs,
    specs_of,
    start_state,
)

__all__ = ["scan"]


@interned
def scan(
    cell: Layer | Callable[..., Any],
    *,
    axis: int = 0,
    length: int | None = None,
    reverse: bool = False,
    remat: bool | Callable[..., Any] = False,
    unroll: int = 1,
) -> Layer:
    """Run a cell over time, as `jax.lax.scan` does.

    carry_{t+1}, y_t = f(carry_t, x_t) for each step t of xs.

    All steps share the parameters. Each step draws with its own key, `fold_in(key, t)`, and passes
    the state of the cell to the next step.

    Args:
      cell: a layer or a plain function (carry, x, *rest, **named) -> (carry, y).
      axis: the axis of time in every array of xs and ys: 0 for [T, B, D], 1 for [B, T, D].
      length: the number of steps if xs is None.
      reverse: run from the last step to the first; ys keeps the order of xs.
      remat: True to recompute each step in the backward pass instead of storing its intermediate
        values, or a policy as in `jax.checkpoint`, which selects values to store.
      unroll: steps per loop iteration, as in `jax.lax.scan`.

    Returns:
      The layer, (carry, xs, *rest, **named) -> (carry, ys). All steps receive the same `rest` and
      `named`.

    Raises:
      TypeError: the inputs are not passed by position, or `remat` is neither a bool nor a policy.
      ValueError: the arrays of xs differ in length or lack the axis; the cell does not return a
        pair; or the carry that it returns differs from the received one in structure, shape or
        dtype.

    Example:
      >>> total = scan(lambda carry, x: (carry + x, carry))
      >>> total.apply({}, jnp.zeros(()), jnp.asarray([1.0, 2.0, 3.0]))
      (Array(6., dtype=float32), Array([0., 1., 3.], dtype=float32))
    """
    cell = as_layer(cell, "scan")
    axis = size_of("scan: axis", axis, 0)
    length = None if length is None else size_of("scan: length", length, 0)
    unroll = size_of("scan: unroll", unroll)
    options: dict[str, Any] = dict(
        axis=axis, length=length, reverse=reverse, remat=remat, unroll=unroll
    )
    returns = "the cell returns (carry, y)"

    def one_step(*inputs):
        if not inputs:
            raise TypeError("scan: pass the carry and xs by position, (carry, xs, *rest)")
        carry, xs, *rest = *inputs, *(None,) * (2 - len(inputs))
        _steps(xs, axis, length)
        return carry, jax.tree.map(lambda x: without_axis(x, axis), specs_of(xs)), *rest

    def init(key, /, *inputs, **named):
        return cell.init(key, *one_step(*inputs), **named)

    def init_state(*inputs, key=None, **named):
        return start_state(cell, key, one_step(*inputs), named)

    def outputs(train, /, *inputs, **named):
        carry, one, *rest = one_step(*inputs)
        new, y = pair("scan", returns, output_specs(cell, train, carry, one, *rest, **named))
        check_same("scan", specs_of(carry), new, "the carry keeps its shapes and dtypes")
        steps = _steps(inputs[1] if len(inputs) > 1 else None, axis, length)
        return new, jax.tree.map(lambda leaf: with_axis(leaf, axis, steps), y)

    def call(run, params, state, key, /, *inputs, **named):
        one_step(*inputs)
        carry, xs, *rest = *inputs, *(None,) * (2 - len(inputs))
        key = key if cell.random else None

        def step(carried, turn):
            (carry, state), (x, t) = carried, turn
            own = None if key is None else jax.random.fold_in(key, t)
            result, state, seen = run(params, state, own, carry, x, *rest, **named)
            new, y = pair("scan", returns, result)
            check_same("scan", carry, new, "the carry keeps its shapes and dtypes")
            return (new, state), (y, seen)

        if axis:
            xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)
        # In an exported program the length may be symbolic; `jax.lax.scan` takes it from xs.
        steps = None if jax.tree.leaves(xs) else length
        times = None if key is None else jnp.arange(_steps(xs, 0, length))
        body = recomputed("scan", step, remat, prevent_cse=False)
        carried, (ys, seen) = jax.lax.scan(
            body, (carry, state), (xs, times), length=steps, reverse=reverse, unroll=unroll
        )
        carry, state = carried
        if axis:
            ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, min(axis, y.ndim - 1)), ys)
        return (carry, ys), state, seen

    recomputed("scan", lambda: None, remat)
    return around(
        cell,
        call,
        label="scan",
        rebuild=lambda inner: scan(inner, **options),
        init=init,
        init_state=init_state,
        outputs=outputs,
        checked=False,
    )


def _steps(xs: Any, axis: int, length: int | None) -> int:
    """The number of steps of a scan: the length of every array of xs along the axis of time."""
    leaves = jax.tree.leaves(xs)
    if not leaves:
        if length is None:
            raise ValueError(
                "scan: say how many steps, by an array in xs or by length=, got neither"
            )
        return length
    for leaf in leaves:
        if not is_array(leaf) or len(leaf.shape) <= axis:
            raise ValueError(
                f"scan: every leaf of xs must be an array with the axis of time, {axis}, got "
                f"{describe(leaf)}"
            )
    lengths = {leaf.shape[axis] for leaf in leaves} | ({length} - {None})
    if len(lengths) != 1:
        wanted = "" if length is None else f", and length={length}"
        raise ValueError(
            f"scan: the arrays of xs must have one length along axis {axis}, got "
            f"{describe(xs)}{wanted}"
        )
    return leaves[0].shape[axis]
