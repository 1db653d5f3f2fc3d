"""Layers made of layers: each takes layers (or plain functions) and gives a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, abstractly, as_layer, check_key, compose, describe, specs_of, transparent
from jaxnet.mixed import cast_floats, is_float, narrowed

__all__ = ["cast", "chain", "parallel", "remat", "repeat", "residual"]


def chain(*layers: Any, **named: Any) -> Layer:
    """Apply layers one after the other: y = f_n(... f_2(f_1(x))).

    Unnamed layers are called '0', '1', ... in params; named ones follow them. The first layer may take several inputs.

    >>> chain(jnp.tanh, jnp.negative)
    chain(
      0: tanh
      1: negative
    )
    """

    def body(f, *inputs, **kwargs):
        for name in children:
            inputs, kwargs = (f[name](*inputs, **kwargs),), {}
        if len(inputs) != 1 or kwargs:
            got = ", ".join([str(len(inputs)), *kwargs])
            raise TypeError(f"chain: without layers it is the identity of one input, got {got}")
        return inputs[0]

    children = _named("chain", layers, named)
    return compose("chain", children, body, lambda new: chain(**new), random=False)


def parallel(*layers: Any, merge: Callable | None = None, **named: Any) -> Layer:
    """Apply layers to the same inputs: (f_1(x), ..., f_n(x)), or merge(f_1(x), ..., f_n(x)).

    `parallel(main, shortcut, merge=jnp.add)` is a residual block with a projection.
    """

    def body(f, *inputs, **kwargs):
        outputs = tuple(f[name](*inputs, **kwargs) for name in children)
        return merge(*outputs) if merge else outputs

    children = _named("parallel", layers, named)
    return compose("parallel", children, body, lambda new: parallel(merge=merge, **new), random=False)


def residual(inner: Any) -> Layer:
    """Add a layer to its first input: y = x + f(x). Parameters, state and path are those of `inner`.

    Raises: ValueError if f changes the shape or dtype of x.
    """

    def around(run):
        def added(params, state, key, x, *rest, **named):
            y, state = run(params, state, key, x, *rest, **named)
            _check_same("residual", x, y, "parallel(inner, shortcut, merge=jnp.add) projects x to the new shape")
            return jax.tree.map(jnp.add, x, y), state

        return added

    return transparent("residual", inner, around, residual)


def repeat(block: Any, n: int, *, remat: bool = False, unroll: int = 1) -> Layer:
    """Apply n copies of a block, each with parameters of its own: x_{i+1} = f(params_i, x_i), i = 0 .. n-1.

    One `jax.lax.scan` over stacked parameters (leaves [n, ...]), so that compile time does not grow with n. The first
    input is carried from copy to copy; further inputs are the same for all. Copy i is initialised with `fold_in(key,
    i)`, has a key of its own, and a state of its own (leaves [n, ...]).

    Args:
      remat: recompute each block in the backward pass instead of storing what is inside (memory of one block, not n).
      unroll: copies per loop iteration, as in `jax.lax.scan`.

    Raises: ValueError if the block changes the shape or dtype of its first input, or if params were made for another n.
    """
    block = as_layer(block, "repeat")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"repeat: n must be a positive int, got {n!r}")

    def fold(key):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))

    def init(key, *inputs, **named):
        check_key("repeat", key)
        inputs, named = specs_of((inputs, named))
        return jax.vmap(lambda key: block.init(key, *inputs, **named))(fold(key))

    def init_state(*inputs, **named):
        state = block.init_state(*inputs, **named)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *jnp.shape(leaf))), state)

    def around(run):
        def scanned(params, state, key, x, *rest, **named):
            def step(x, copy):
                y, state = run(*copy, x, *rest, **named)
                _check_same(f"repeat[{n}]", x, y, "only what keeps its shape can be repeated")
                return y, state

            for leaf in jax.tree.leaves((params, state)):
                if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
                    raise ValueError(
                        f"repeat[{n}]: leaves of params and state must be stacked, [{n}, ...], got {describe(leaf)}; "
                        f"they were made for another number of copies"
                    )
            keys = None if key is None or not block.random else fold(key)
            body = jax.checkpoint(step, prevent_cse=False) if remat else step  # a scan needs no barrier against CSE
            return jax.lax.scan(body, x, (params, state, keys), length=n, unroll=unroll)

        return scanned

    return transparent(
        f"repeat[{n}]",
        block,
        around,
        lambda inner: repeat(inner, n, remat=remat, unroll=unroll),
        init=init,
        init_state=init_state,
        repeats=n,
    )


def remat(inner: Any, *, policy: Callable | None = None) -> Layer:
    """Recompute a layer in the backward pass instead of storing what is inside (`jax.checkpoint`, its `policy` too)."""

    def around(run):
        def recomputed(params, state, key, *inputs, **named):
            checkpointed = abstractly(run, lambda fn, arrays: jax.checkpoint(fn, policy=policy)(arrays))
            return checkpointed(params, state, key, *inputs, **named)

        return recomputed

    return transparent("remat", inner, around, lambda new: remat(new, policy=policy))


def cast(inner: Any, dtype: Any) -> Layer:
    """Compute in another dtype, such as bfloat16, and return the dtype that came in.

    Float parameters and inputs are cast on the way in, float outputs on the way out (to the dtype of the first float
    input, or of the parameters where there is none). `init` is that of `inner`: parameters keep the dtype of the
    inputs, so that gradients and the optimizer work in it. The layers' biases and scales are not cast, and sums over
    many examples are taken in float32 (`jaxnet.mixed`). State is not cast: a layer reads and writes it in the dtype that
    `init_state` gave it.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"cast: the dtype to compute in must be a float, got {dtype.name}")
    inner = as_layer(inner, f"cast[{dtype.name}]")

    def around(run):
        def lowered(params, state, key, *inputs, **named):
            floats = [x.dtype for x in jax.tree.leaves((inputs, named, params)) if is_float(x)]
            inputs, named = cast_floats((inputs, named), dtype)
            outputs, state = run(narrowed(inner, params, dtype), state, key, *inputs, **named)
            return cast_floats(outputs, floats[0]) if floats else outputs, state

        return lowered

    return transparent(f"cast[{dtype.name}]", inner, around, lambda new: cast(new, dtype))


def _named(label: str, layers, named) -> dict[str, Any]:
    numbered = {str(i): layer for i, layer in enumerate(layers)}
    if twice := numbered.keys() & named.keys():
        raise ValueError(f"{label}: two children have the name '{min(twice)}'")
    return numbered | named


def _check_same(label: str, x, y, remedy: str) -> None:
    def facts(tree):
        return jax.tree.structure(tree), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]

    if facts(x) != facts(y):
        raise ValueError(f"{label}: the layer must return what it receives, {describe(x)}, got {describe(y)}; {remedy}")
