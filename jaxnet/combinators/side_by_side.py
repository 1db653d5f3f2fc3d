"""Copies of a layer side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxnet.checks import size_of
from jaxnet.combinators.copies import check_stacked, copies_of_state, part_of, stacked, with_axis
from jaxnet.core import (
    Layer,
    around,
    as_layer,
    check_key,
    fold_copies,
    interned,
    is_array,
    output_specs,
    specs_of,
)

__all__ = ["vmap"]


@interned
def vmap(
    inner: Layer | Callable[..., Any], n: int, *, in_axes: int | None | Sequence[int | None] = 0
) -> Layer:
    """Apply n copies of a layer side by side, each with its own parameters, key and state.

    y_i = f(params_i, x_i) for i = 0 .. n-1.

    One `jax.vmap` runs over stacked parameters and state (leaves [n, ...]). Uses are experts, heads
    and ensembles inside a network. Copy i is initialized with `fold_in(key, i)`.

    Args:
      inner: a layer or a plain function.
      n: the number of copies.
      in_axes: the axis along which the inputs are split among the copies, as in `jax.vmap`. One
        axis is for all inputs, including named ones. A sequence has one axis per positional input;
        named inputs are then split along their first axis. None passes the whole input to every
        copy.

    Returns:
      The layer, x [n, ...] -> y [n, ...]. Leaves of the inputs that are not arrays are static and
      go to every copy.

    Raises:
      TypeError: `in_axes` holds anything but ints and None.
      ValueError: `n` is not a positive integer; params, state or a split input are not stacked for
        n copies.

    Example:
      >>> import jax.numpy as jnp
      >>> vmap(lambda x: 2 * x, 3, in_axes=None).apply({}, jnp.ones(()))
      Array([2., 2., 2.], dtype=float32)
    """
    inner = as_layer(inner, "vmap")
    n = size_of("vmap: n", n)
    label = f"vmap[{n}]"
    given: Any = tuple(in_axes) if isinstance(in_axes, list | tuple) else in_axes
    for axis in given if isinstance(given, tuple) else (given,):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(
                f"{label}: in_axes is an int or None, or a tuple of these with one per input, "
                f"got {in_axes!r}"
            )

    def divided(inputs, named):
        """All leaves, their structure, and the axis along which each is split; None if every copy
        receives all of it.
        """
        each = given if isinstance(given, tuple) else (given,) * len(inputs)
        if len(each) != len(inputs):
            raise ValueError(f"{label}: in_axes is for {len(each)} inputs, got {len(inputs)}")
        axes = [a for a, x in zip(each, inputs, strict=True) for _ in jax.tree.leaves(x)]
        leaves, tree = jax.tree.flatten((inputs, named))
        axes += [0 if isinstance(given, tuple) else given] * (len(leaves) - len(axes))
        pairs = zip(leaves, axes, strict=True)
        return leaves, tree, [axis if is_array(leaf) else None for leaf, axis in pairs]

    def one_copy(inputs, named):
        leaves, tree, axes = divided(specs_of(inputs), specs_of(named))
        own = [
            x if a is None else part_of(label, n, x, "an input", a)
            for x, a in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(tree, own)

    def init(key, /, *inputs, **named):
        check_key(label, key)
        inputs, named = one_copy(inputs, named)
        return stacked(lambda key: inner.init(key, *inputs, **named), key, n)

    def init_state(*inputs, key=None, **named):
        return copies_of_state(inner, key, n, *one_copy(inputs, named))

    def outputs(train, /, *inputs, **named):
        inputs, named = one_copy(inputs, named)
        outputs_of_one = output_specs(inner, train, *inputs, **named)
        return jax.tree.map(lambda y: with_axis(y, 0, n), outputs_of_one)

    def call(run, params, state, key, /, *inputs, **named):
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

        arrays = [leaves[i] for i in mapped]
        keys = None if key is None or not inner.random else fold_copies(key, n)
        whole = [(leaf, 0) for leaf in jax.tree.leaves((params, state))]
        keys = _spread_as(keys, [*whole, *((leaves[i], axes[i]) for i in mapped)])
        copies = jax.vmap(one, (0, 0, 0, [axes[i] for i in mapped]), axis_size=n)
        return copies(params, state, keys, arrays)

    return around(
        inner,
        call,
        label=label,
        rebuild=lambda new: vmap(new, n, in_axes=given),
        init=init,
        init_state=init_state,
        outputs=outputs,
        checked=False,
        stacked=True,
    )


def _spread_as(keys: Any, mapped: list[tuple[Any, Any]]) -> Any:
    """The keys of the copies. On a mesh with explicit axes they are sharded over the copies as the
    arrays are.
    """
    if keys is None:
        return None
    for leaf, axis in mapped:
        spec = jax.typeof(leaf).sharding.spec
        if len(spec) and spec[axis] is not None:
            return jax.sharding.reshard(keys, jax.sharding.PartitionSpec(spec[axis]))
    return keys
