"""Copies of a layer in series."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.combinators.copies import (
    check_same,
    check_stacked,
    copies_of_state,
    pair,
    part_of,
    recomputed,
    stacked,
    with_axis,
)
from jaxnet.core import (
    Layer,
    around,
    as_layer,
    check_key,
    fold_copies,
    interned,
    output_specs,
    specs_of,
)

__all__ = ["repeat"]

KEEP = "only what keeps its shape can be repeated"


@interned
def repeat(
    block: Layer | Callable[..., Any],
    n: int,
    *,
    each: str | Sequence[str] = (),
    collect: bool = False,
    reverse: bool = False,
    remat: bool | Callable[..., Any] = False,
    unroll: int = 1,
) -> Layer:
    """Apply n copies of a block in series, each with its own parameters.

    x_{i+1} = f(params_i, x_i) for i = 0 .. n-1.

    One `jax.lax.scan` runs over stacked parameters (leaves [n, ...]), so compile time does not grow
    with n. The first input is carried from copy to copy. All copies receive the same further
    inputs, except those named in `each`. Copy i is initialized with `fold_in(key, i)`, and has its
    own key and state (leaves [n, ...]).

    Args:
      block: a layer or a plain function that keeps the shape and dtype of its first input.
      n: the number of copies; 0 is the identity.
      each: names of keyword inputs that are split among the copies, leaves [n, ...], such as caches
        or rates.
      collect: whether the block returns (x, out). The result is then (x, outs) with the outs of all
        copies, leaves [n, ...].
      reverse: run the copies from the last to the first, with the same parameters.
      remat: True to recompute each block in the backward pass, which needs the memory of one block
        only, or a policy as in `jax.checkpoint`, which selects values to store.
      unroll: copies per loop iteration, as in `jax.lax.scan`.

    Returns:
      The layer, (x, *rest, **named) -> x, or (x, outs) with `collect`. x is [...] and keeps its
      shape.

    Raises:
      TypeError: an input in `each` is not passed by name; `remat` is neither a bool nor a policy.
      ValueError: the block changes the shape or dtype of its first input; params, state or an input
        in `each` are not stacked for n copies.

    Example:
      >>> blocks = repeat(lambda x, rate: x + rate, 3, each="rate")
      >>> blocks.apply({}, jnp.zeros(()), rate=jnp.asarray([1.0, 2.0, 3.0]))
      Array(6., dtype=float32)
    """
    block = as_layer(block, "repeat")
    n = size_of("repeat: n", n, 0)
    each = (each,) if isinstance(each, str) else tuple(each)
    label = f"repeat[{n}]"
    unroll = size_of("repeat: unroll", unroll)
    options: dict[str, Any] = dict(
        each=each, collect=collect, reverse=reverse, remat=remat, unroll=unroll
    )
    if "train" in each or "key" in each or "state" in each:
        raise ValueError(
            f"{label}: each copy has its own key and state already; each= names inputs, got {each}"
        )

    def one_copy(inputs, named):
        """The specs of the inputs as one copy receives them."""
        if not inputs:
            raise TypeError(
                f"{label}: the first input is carried from copy to copy: pass it by position"
            )
        for name in each:
            if name not in named:
                got = ", ".join(named) or "none"
                raise TypeError(
                    f"{label}: each copy takes its part of '{name}': pass it by name, "
                    f"{name}=..., got {got}"
                )
        own = {name: part_of(label, n, named[name], f"'{name}'") for name in each}
        return specs_of((inputs, named | own))

    def split(result):
        """The result of one copy as (x, out); out is None without `collect`."""
        if not collect:
            return result, None
        return pair(label, "with collect the block returns (x, out)", result)

    def init(key, /, *inputs, **named):
        check_key(label, key)
        inputs, named = one_copy(inputs, named)
        if n == 0:
            return {}
        # A block that cannot be repeated raises in `init` instead of in the first call.
        outputs_of_block(False, inputs, named)
        return stacked(lambda key: block.init(key, *inputs, **named), key, n)

    def init_state(*inputs, key=None, **named):
        inputs, named = one_copy(inputs, named)
        return {} if n == 0 else copies_of_state(block, key, n, inputs, named)

    def outputs_of_block(train, inputs, named):
        """The specs of the outputs of one copy, (x, out)."""
        y, out = split(output_specs(block, train, *inputs, **named))
        check_same(label, inputs[0], y, KEEP)
        return y, out

    def outputs(train, /, *inputs, **named):
        y, out = outputs_of_block(train, *one_copy(inputs, named))
        more = jax.tree.map(lambda leaf: with_axis(leaf, 0, n), out)
        return (y, more) if collect else y

    def call(run, params, state, key, /, *inputs, **named):
        one_copy(inputs, named)
        x, *rest = inputs
        own = {name: named.pop(name) for name in each}
        check_stacked(label, n, (params, state), "copies")

        def step(x, copy):
            *copy, own = copy
            y, state, seen = run(*copy, x, *rest, **named, **own)
            y, out = split(y)
            check_same(label, x, y, KEEP)
            return y, (out, state, seen)

        if n == 0:
            return outputs_of_none(x, rest, named | own), state, {}
        keys = None if key is None or not block.random else fold_copies(key, n)
        copies = (params, state, keys, own)
        # A scan needs no barrier against common subexpressions.
        body = recomputed(label, step, remat, prevent_cse=False)
        y, (out, state, seen) = jax.lax.scan(
            body, x, copies, length=n, reverse=reverse, unroll=unroll
        )
        return ((y, out) if collect else y), state, seen

    def outputs_of_none(x, rest, named):
        if not collect:
            return x
        outs = outputs(False, x, *rest, **named)[1]
        return x, jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), outs)

    recomputed(label, lambda: None, remat)
    return around(
        block,
        call,
        label=label,
        rebuild=lambda inner: repeat(inner, n, **options),
        init=init,
        init_state=init_state,
        outputs=outputs,
        checked=False,
        stacked=True,
        repeats=n,
    )
