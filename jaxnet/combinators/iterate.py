"""Combinators that call one child many times: copies in series, one cell over time, copies side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import (
    Layer,
    around,
    as_layer,
    check_key,
    describe,
    fold_copies,
    interned,
    is_array,
    is_threefry,
    output_specs,
    specs_of,
)

__all__ = ["check_same", "repeat", "scan", "vmap"]


@interned
def repeat(
    block: Any,
    n: int,
    *,
    each: str | Sequence[str] = (),
    collect: bool = False,
    reverse: bool = False,
    remat: bool | Callable[..., Any] = False,
    unroll: int = 1,
) -> Layer:
    """Apply n copies of a block, each with its own parameters: x_{i+1} = f(params_i, x_i), i = 0 .. n-1.

    One `jax.lax.scan` over stacked parameters (leaves [n, ...]), so that compile time does not grow with n. The first
    input is carried from copy to copy; all copies receive the same further inputs, but for those named in `each`. Copy i
    is initialised with `fold_in(key, i)`, and has its own key and state (leaves [n, ...]).

    Args:
      block: a layer or a plain function that keeps the shape and dtype of its first input.
      n: the number of copies; 0 is the identity.
      each: names of the named inputs of which each copy receives its own part, leaves [n, ...]: caches, rates, windows.
      collect: the block returns (x, out); the result is then (x, outs) with the outs of all copies, leaves [n, ...].
      reverse: run the copies from the last to the first, with the same parameters.
      remat: recompute each block in the backward pass, so that memory is that of one block; or a policy as in
        `jax.checkpoint`, which says what is stored all the same.
      unroll: copies per loop iteration, as in `jax.lax.scan`.

    Returns:
      The layer, (x, *rest, **named) -> x, or (x, outs) with `collect`.

    Raises:
      ValueError: the block changes the shape or dtype of its first input; params, state or an input in `each` are not
        stacked for n copies.

    Example:
      >>> blocks = repeat(lambda x, rate: x + rate, 3, each="rate")
      >>> blocks.apply({}, jnp.zeros(()), rate=jnp.asarray([1.0, 2.0, 3.0]))
      Array(6., dtype=float32)
    """
    block = as_layer(block, "repeat")
    n = size_of("repeat: n", n, 0)
    each = (each,) if isinstance(each, str) else tuple(each)
    label = f"repeat[{n}]"
    options: dict[str, Any] = dict(each=each, collect=collect, reverse=reverse, remat=remat, unroll=unroll)
    if "train" in each or "key" in each or "state" in each:
        raise ValueError(f"{label}: each copy has its own key and state already; each= names inputs, got {each}")

    def one_copy(inputs, named):
        """The specs of the inputs as one copy receives them."""
        own = {name: _one(label, n, named[name], f"'{name}'") for name in each if name in named}
        return specs_of((inputs, named | own))

    def init(key, *inputs, **named):
        check_key(label, key)
        inputs, named = one_copy(inputs, named)
        if n == 0:
            return {}
        outputs_of_block(False, inputs, named)  # raises here, not in the first call
        return _stacked(lambda key: block.init(key, *inputs, **named), key, n)

    def init_state(*inputs, key=None, **named):
        inputs, named = one_copy(inputs, named)
        return {} if n == 0 else _copies_of_state(block, key, n, inputs, named)

    def outputs_of_block(train, inputs, named):
        """The specs of what one copy returns: (x, out), out None without `collect`."""
        made = output_specs(block, train, *inputs, **named)
        y, out = _pair(label, "with collect the block returns (x, out)", made) if collect else (made, None)
        check_same(label, inputs[0], y, _KEEP)
        return y, out

    def outputs(train, *inputs, **named):
        y, out = outputs_of_block(train, *one_copy(inputs, named))
        more = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), out)
        return (y, more) if collect else y

    def call(run, params, state, key, x, *rest, **named):
        own = {name: named.pop(name) for name in each if name in named}
        for name in own:
            _one(label, n, own[name], f"'{name}'")
        check_stacked(label, n, (params, state), "copies")

        def step(x, copy):
            *copy, own = copy
            y, state, seen = run(*copy, x, *rest, **named, **own)
            y, out = _pair(label, "with collect the block returns (x, out)", y) if collect else (y, None)
            check_same(label, x, y, _KEEP)
            return y, (out, state, seen)

        if n == 0:
            return outputs_of_none(x, rest, named | own), state, {}
        keys = None if key is None or not block.random else fold_copies(key, n)
        copies = (params, state, keys, own)
        # A scan needs no barrier against common subexpressions.
        body = _recomputed(label, step, remat, prevent_cse=False)
        y, (out, state, seen) = jax.lax.scan(body, x, copies, length=n, reverse=reverse, unroll=unroll)
        return ((y, out) if collect else y), state, seen

    def outputs_of_none(x, rest, named):
        if not collect:
            return x
        outs = outputs(False, x, *rest, **named)[1]
        return x, jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), outs)

    _recomputed(label, lambda: None, remat)
    return around(
        block,
        call,
        label=label,
        rebuild=lambda inner: repeat(inner, n, **options),
        init=init,
        init_state=init_state,
        outputs=outputs,
        repeats=n,
    )


@interned
def scan(
    cell: Any,
    *,
    axis: int = 0,
    length: int | None = None,
    reverse: bool = False,
    remat: bool | Callable[..., Any] = False,
    unroll: int = 1,
) -> Layer:
    """Run a cell over time, as `jax.lax.scan` does: (carry, x_t) -> (carry, y_t) for each step t of xs.

    All steps share the parameters. Each step draws with its own key, `fold_in(key, t)`, and the state of the cell goes
    from step to step.

    Args:
      cell: a layer or a plain function (carry, x, *rest, **named) -> (carry, y).
      axis: the axis of time in every array of xs and ys: 0 for [T, B, D], 1 for [B, T, D].
      length: the number of steps if xs is None.
      reverse: run from the last step to the first; ys keeps the order of xs.
      remat: recompute each step in the backward pass instead of storing its intermediate values; or a policy as in
        `jax.checkpoint`.
      unroll: steps per loop iteration, as in `jax.lax.scan`.

    Returns:
      The layer, (carry, xs, *rest, **named) -> (carry, ys). All steps receive the same `rest` and `named`.

    Raises:
      ValueError: the arrays of xs differ in length or lack the axis; the cell returns no pair, or another carry than it
        receives.

    Example:
      >>> total = scan(lambda carry, x: (carry + x, carry))
      >>> total.apply({}, jnp.zeros(()), jnp.asarray([1.0, 2.0, 3.0]))
      (Array(6., dtype=float32), Array([0., 1., 3.], dtype=float32))
    """
    cell = as_layer(cell, "scan")
    axis = size_of("scan: axis", axis, 0)
    length = None if length is None else size_of("scan: length", length, 0)
    options: dict[str, Any] = dict(axis=axis, length=length, reverse=reverse, remat=remat, unroll=unroll)
    returns = "the cell returns (carry, y)"

    def one_step(carry, xs=None, *rest):
        _steps(xs, axis, length)
        return carry, jax.tree.map(lambda x: _without(x, axis), specs_of(xs)), *rest

    def init(key, *inputs, **named):
        return cell.init(key, *one_step(*inputs), **named)

    def init_state(*inputs, key=None, **named):
        return cell.init_state(*one_step(*inputs), key=key, **named)

    def outputs(train, *inputs, **named):
        carry, one, *rest = one_step(*inputs)
        new, y = _pair("scan", returns, output_specs(cell, train, carry, one, *rest, **named))
        check_same("scan", specs_of(carry), new, "the carry keeps its shapes and dtypes")
        steps = _steps(inputs[1] if len(inputs) > 1 else None, axis, length)
        return new, jax.tree.map(lambda leaf: _with(leaf, axis, steps), y)

    def call(run, params, state, key, carry, xs=None, *rest, **named):
        steps = _steps(xs, axis, length)
        key = key if cell.random else None

        def step(carried, turn):
            (carry, state), (x, t) = carried, turn
            own = None if key is None else jax.random.fold_in(key, t)
            pair, state, seen = run(params, state, own, carry, x, *rest, **named)
            new, y = _pair("scan", returns, pair)
            check_same("scan", carry, new, "the carry keeps its shapes and dtypes")
            return (new, state), (y, seen)

        if axis:
            xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)
        times = None if key is None else jnp.arange(steps)
        body = _recomputed("scan", step, remat, prevent_cse=False)
        carried, (ys, seen) = jax.lax.scan(
            body, (carry, state), (xs, times), length=steps, reverse=reverse, unroll=unroll
        )
        carry, state = carried
        if axis:
            ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, axis), ys)
        return (carry, ys), state, seen

    _recomputed("scan", lambda: None, remat)
    return around(
        cell,
        call,
        label="scan",
        rebuild=lambda inner: scan(inner, **options),
        init=init,
        init_state=init_state,
        outputs=outputs,
    )


@interned
def vmap(inner: Any, n: int, *, in_axes: int | None | Sequence[int | None] = 0) -> Layer:
    """n copies of a layer side by side, each with its own parameters, key and state: y_i = f(params_i, x_i).

    One `jax.vmap` over stacked parameters and state (leaves [n, ...]): experts, ensembles inside a network, heads. Copy i
    is initialised with `fold_in(key, i)`.

    Args:
      inner: a layer or a plain function.
      n: the number of copies.
      in_axes: the axis of each input along which the copies take their parts, as in `jax.vmap`: one for all, or one per
        input; None gives the whole input to every copy. Named inputs are divided along their first axis.

    Returns:
      The layer, x [n, ...] -> y [n, ...]. Leaves of the inputs that are no arrays are static and go to every copy.

    Raises:
      ValueError: params, state or a divided input are not stacked for n copies.

    Example:
      >>> vmap(lambda x: 2 * x, 3, in_axes=None).apply({}, jnp.ones(()))
      Array([2., 2., 2.], dtype=float32)
    """
    inner = as_layer(inner, "vmap")
    n = size_of("vmap: n", n)
    label = f"vmap[{n}]"
    in_axes = tuple(in_axes) if isinstance(in_axes, Sequence) else in_axes

    def divided(inputs, named):
        """All leaves, their structure, and the axis along which each is divided; None if it goes whole to every copy."""
        each = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(inputs)
        if len(each) != len(inputs):
            raise ValueError(f"{label}: in_axes is for {len(each)} inputs, got {len(inputs)}")
        axes = [a for a, x in zip(each, inputs, strict=True) for _ in jax.tree.leaves(x)]
        leaves, tree = jax.tree.flatten((inputs, named))
        axes += [0] * (len(leaves) - len(axes))
        return leaves, tree, [axis if is_array(leaf) else None for leaf, axis in zip(leaves, axes, strict=True)]

    def one_copy(inputs, named):
        leaves, tree, axes = divided(specs_of(inputs), specs_of(named))
        own = [x if a is None else _one(label, n, x, "an input", a) for x, a in zip(leaves, axes, strict=True)]
        return jax.tree.unflatten(tree, own)

    def init(key, *inputs, **named):
        check_key(label, key)
        inputs, named = one_copy(inputs, named)
        return _stacked(lambda key: inner.init(key, *inputs, **named), key, n)

    def init_state(*inputs, key=None, **named):
        return _copies_of_state(inner, key, n, *one_copy(inputs, named))

    def outputs(train, *inputs, **named):
        inputs, named = one_copy(inputs, named)
        return jax.tree.map(lambda y: _with(y, 0, n), output_specs(inner, train, *inputs, **named))

    def call(run, params, state, key, *inputs, **named):
        one_copy(inputs, named)
        check_stacked(label, n, (params, state), "copies")
        leaves, tree, axes = divided(inputs, named)
        mapped = [i for i, axis in enumerate(axes) if axis is not None]

        def one(params, state, key, arrays):
            filled = list(leaves)
            for i, array in zip(mapped, arrays, strict=True):
                filled[i] = array
            inputs, named = jax.tree.unflatten(tree, filled)
            return run(params, state, key, *inputs, **named)

        keys = None if key is None or not inner.random else fold_copies(key, n)
        arrays = [leaves[i] for i in mapped]
        return jax.vmap(one, (0, 0, 0, [axes[i] for i in mapped]), axis_size=n)(params, state, keys, arrays)

    return around(
        inner,
        call,
        label=label,
        rebuild=lambda new: vmap(new, n, in_axes=in_axes),
        init=init,
        init_state=init_state,
        outputs=outputs,
    )


# Checks


_KEEP = "only what keeps its shape can be repeated"


def check_same(label: str, x: Any, y: Any, remedy: str) -> None:
    """Raise ValueError unless two trees have the same structure, shapes and dtypes."""

    def facts(tree):
        return jax.tree.structure(tree), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]

    if facts(x) != facts(y):
        raise ValueError(f"{label}: the layer must return what it receives, {describe(x)}, got {describe(y)}; {remedy}")


def check_stacked(label: str, n: int, tree: Any, what: str) -> None:
    """Raise ValueError unless every leaf has a leading axis of n copies."""
    for leaf in jax.tree.leaves(tree):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
            raise ValueError(
                f"{label}: leaves of params and state must be stacked, [{n}, ...], got {describe(leaf)}; "
                f"they were made for another number of {what}"
            )


def _pair(label: str, returns: str, result: Any) -> Any:
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{label}: {returns}, a pair, got {describe(result)}")
    return result


def _steps(xs: Any, axis: int, length: int | None) -> int:
    """The number of steps of a scan: the length of every array of xs along the axis of time."""
    leaves = jax.tree.leaves(xs)
    if not leaves:
        if length is None:
            raise ValueError("scan: say how many steps, by an array in xs or by length=, got neither")
        return length
    for leaf in leaves:
        if not is_array(leaf) or len(leaf.shape) <= axis:
            raise ValueError(
                f"scan: every leaf of xs must be an array with the axis of time, {axis}, got {describe(leaf)}"
            )
    lengths = {leaf.shape[axis] for leaf in leaves} | ({length} - {None})
    if len(lengths) != 1:
        wanted = "" if length is None else f", and length={length}"
        raise ValueError(f"scan: the arrays of xs must have one length along axis {axis}, got {describe(xs)}{wanted}")
    return leaves[0].shape[axis]


def _recomputed(label: str, fn: Callable[..., Any], remat: Any, **options: Any) -> Callable[..., Any]:
    """`fn` under `jax.checkpoint` if `remat` is True or a policy."""
    if not isinstance(remat, bool) and not callable(remat):
        raise TypeError(f"{label}: remat must be True, False or a policy of jax.checkpoint_policies, got {remat!r}")
    policy: Any = None if isinstance(remat, bool) else remat
    return jax.checkpoint(fn, policy=policy, **options) if remat else fn


# Shapes of one copy and of all


def _one(label: str, n: int, tree: Any, what: str, axis: int = 0) -> Any:
    """The specs of the part that one of n copies receives."""

    def part(leaf):
        if not is_array(leaf) or not -len(leaf.shape) <= axis < len(leaf.shape) or leaf.shape[axis] != n:
            raise ValueError(
                f"{label}: {what} is divided among the copies and must have {n} parts along axis {axis}, got {describe(leaf)}"
            )
        return _without(leaf, axis)

    return jax.tree.map(part, specs_of(tree))


def _without(spec: Any, axis: int) -> jax.ShapeDtypeStruct:
    shape = list(spec.shape)
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), spec.dtype)


def _with(spec: Any, axis: int, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*spec.shape[:axis], size, *spec.shape[axis:]), spec.dtype)


def _copies_of_state(inner: Layer, key: Any, n: int, inputs: Any, named: Any) -> Any:
    """The state of n copies. With a key each copy has its own random numbers."""
    if key is not None:
        return _stacked(lambda key: inner.init_state(*inputs, key=key, **named), key, n)
    state = inner.init_state(*inputs, **named)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *jnp.shape(leaf))), state)


def _stacked(make: Callable[[Any], Any], key: Any, n: int) -> Any:
    """make(fold_in(key, i)) for each copy i, leaves stacked [n, ...].

    A loop over copies runs the few programs that serve all shapes and compiles nothing for n copies. It is not open to
    traced keys, to generators that draw differently under vmap, and to meshes, where arrays are placed by the program.
    """
    traced = isinstance(key, jax.core.Tracer) or not jax.sharding.get_abstract_mesh().empty
    if traced or n > _LOOPED or not is_threefry(key):
        return jax.vmap(make)(fold_copies(key, n))
    copies = [make(jax.random.fold_in(key, i)) for i in range(n)]

    def stack(*leaves):
        if any(isinstance(leaf, jax.core.Tracer) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves):
            return jnp.stack(leaves)
        where = leaves[0].sharding if getattr(leaves[0], "committed", False) else None
        return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]), where)

    return jax.tree.map(stack, *copies)


_LOOPED = 256  # copies up to which a loop is faster than a program for all
