"""Combinators that call each child once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.combinators.copies import check_same
from jaxnet.core import (
    Layer,
    abstractly,
    around,
    as_layer,
    check_key,
    compose,
    describe,
    interned,
    no_params,
    output_specs,
    show_inputs,
    specs_of,
)
from jaxnet.mixed import cast_floats, is_float, narrowed

__all__ = ["cast", "chain", "parallel", "remat", "residual"]


@interned
def chain(*layers: Layer | Callable[..., Any], **named: Layer | Callable[..., Any]) -> Layer:
    """Apply layers one after the other: y = f_n(... f_2(f_1(x))).

    The first layer may take several inputs.

    Args:
      *layers: layers or plain functions, named '0', '1', ... in params.
      **named: further layers by name, which follow the unnamed ones.

    Returns:
      The layer, (*inputs, **named) -> y.

    Raises:
      TypeError: an argument is neither a layer nor a function.
      ValueError: two layers have the same name.

    Example:
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
    net = compose("chain", children, body, lambda new: chain(**new), random=False, computes=False)
    return _showing_inputs_of_first(net)


@interned
def parallel(
    *layers: Layer | Callable[..., Any],
    merge: Callable[..., Any] | None = None,
    **named: Layer | Callable[..., Any],
) -> Layer:
    """Apply layers to the same inputs: y = (f_1(x), ..., f_n(x)), or merge(f_1(x), ..., f_n(x)).

    `parallel(main, shortcut, merge=jnp.add)` is a residual block with a projection.

    Args:
      *layers: layers or plain functions, named '0', '1', ... in params.
      merge: a function of the outputs; without it, the result is the tuple of the outputs.
      **named: further layers by name, which follow the unnamed ones.

    Returns:
      The layer, (*inputs, **named) -> the outputs.

    Raises:
      TypeError: an argument is neither a layer nor a function.
      ValueError: two layers have the same name.

    Example:
      >>> parallel(jnp.sin, jnp.cos, merge=jnp.add).apply({}, jnp.zeros(()))
      Array(1., dtype=float32)
    """

    def body(f, *inputs, **kwargs):
        outputs = tuple(f[name](*inputs, **kwargs) for name in children)
        return merge(*outputs) if merge else outputs

    children = _named("parallel", layers, named)
    rebuild = lambda new: parallel(merge=merge, **new)  # noqa: E731
    net = compose("parallel", children, body, rebuild, random=False, computes=merge is not None)
    return _showing_inputs_of_first(net)


@interned
def residual(inner: Layer | Callable[..., Any]) -> Layer:
    """Add a layer to its first input: y = x + f(x). Parameters, state and path are those of
    `inner`.

    Args:
      inner: a layer or a plain function of float arrays that keeps shapes and dtypes.

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: f changes the shape or dtype of x.
      TypeError: x holds arrays that are neither float nor complex, such as the edges of a graph,
        which a sum would change.
    """
    inner = as_layer(inner, "residual")

    def call(run, params, state, key, x, /, *rest, **named):
        y, state, seen = run(params, state, key, x, *rest, **named)
        check_same("residual", x, y, _PROJECT)
        _check_inexact("residual", x)
        return jax.tree.map(jnp.add, x, y), state, seen

    def outputs(train, x, /, *rest, **named):
        x = specs_of(x)
        check_same("residual", x, output_specs(inner, train, x, *rest, **named), _PROJECT)
        _check_inexact("residual", x)
        return x

    def init(key, x, /, *rest, **named):
        check_key("residual", key)
        # A layer that cannot be added to its input raises in `init` instead of in the first call.
        outputs(False, x, *rest, **named)
        return inner.init(key, x, *rest, **named)

    own_init = None if inner.init is no_params else init
    return around(
        inner,
        call,
        label="residual",
        rebuild=residual,
        init=own_init,
        outputs=outputs,
        checked=False,
    )


_PROJECT = "parallel(inner, shortcut, merge=jnp.add) projects x to the new shape"


def _check_inexact(label: str, x: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            got = describe(leaf) + (f" at {name!r}" if name else "")
            raise TypeError(
                f"{label}: it adds floats, got {got}; add the float part in the body of wire, and "
                "pass the rest as a further input"
            )


@interned
def remat(inner: Layer | Callable[..., Any], *, policy: Callable[..., Any] | None = None) -> Layer:
    """Recompute a layer in the backward pass instead of storing its intermediate values
    (`jax.checkpoint`).

    Args:
      inner: a layer or a plain function.
      policy: selects intermediate values to store, as in `jax.checkpoint`.

    Returns:
      The layer, with the parameters, state and path of `inner`.

    Raises:
      TypeError: `inner` is neither a layer nor a function, or `policy` is not a function.
    """
    inner = as_layer(inner, "remat")
    if policy is not None and not callable(policy):
        raise TypeError(f"remat: the policy must be one of jax.checkpoint_policies, got {policy!r}")

    def call(run, params, state, key, /, *inputs, **named):
        checkpointed = abstractly(run, lambda fn, arrays: jax.checkpoint(fn, policy=policy)(arrays))
        return checkpointed(params, state, key, *inputs, **named)

    def outputs(train, /, *inputs, **named):
        return output_specs(inner, train, *inputs, **named)

    return around(
        inner, call, label="remat", rebuild=lambda new: remat(new, policy=policy), outputs=outputs
    )


@interned
def cast(inner: Layer | Callable[..., Any], dtype: Any) -> Layer:
    """Compute in another dtype, such as bfloat16, and return outputs in the dtype of the inputs.

    Float parameters and inputs are cast before the call. Float outputs are cast back after it, to
    the dtype of the first float input, or of the parameters if there is no float input. `init` is
    that of `inner`: parameters keep the dtype of the inputs, and so do gradients and the optimizer.
    The biases, scales and embeddings of the layers are not cast, and sums over many examples are
    taken in float32; in a body, `jaxnet.mixed.add_bias` and `rows` do the same for a `param`. State
    is not cast and may be wider than the inputs; a layer casts when it reads or writes its state.

    Args:
      inner: a layer or a plain function.
      dtype: a float dtype.

    Returns:
      The layer, with the parameters, state and path of `inner`.

    Raises:
      TypeError: the dtype is not a float.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"cast: {dtype!r} is not a dtype; use one such as jnp.bfloat16") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"cast: the dtype to compute in must be a float, got {dtype.name}")
    inner = as_layer(inner, f"cast[{dtype.name}]")

    def call(run, params, state, key, /, *inputs, **named):
        floats = [x.dtype for x in jax.tree.leaves((inputs, named, params)) if is_float(x)]
        inputs, named = cast_floats((inputs, named), dtype)
        outputs, state, seen = run(narrowed(inner, params, dtype), state, key, *inputs, **named)
        return cast_floats(outputs, floats[0]) if floats else outputs, state, seen

    return around(inner, call, label=f"cast[{dtype.name}]", rebuild=lambda new: cast(new, dtype))


def _showing_inputs_of_first(net: Layer) -> Layer:
    """The network, whose `apply` shows the inputs of its first child in its signature."""
    for first in net.children.values():
        show_inputs(net.apply, first.apply)
        break
    return net


def _named(label: str, layers, named) -> dict[str, Any]:
    numbered = {str(i): layer for i, layer in enumerate(layers)}
    if twice := numbered.keys() & named.keys():
        raise ValueError(f"{label}: two children have the name '{min(twice)}'")
    return numbered | named
