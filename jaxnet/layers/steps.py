"""The steps of sequences: which are valid, one of them, chunks of them, and their first carry."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, around, check_input, describe, is_array, output_specs, start_state
from jaxnet.layers.gates import zeros_beside

__all__ = [
    "alive_steps",
    "apart",
    "beside",
    "chunked",
    "first_carry",
    "masked",
    "one_step",
    "time_axis",
    "unwrapped",
]


def time_axis(label: str, axis: Any) -> int:
    """Check an axis that is counted from the end."""
    try:
        if isinstance(axis, bool):
            raise TypeError
        axis = operator.index(axis)
    except TypeError:
        axis = 0
    if axis >= -1:
        raise ValueError(
            f"{label}: axis counts from the end and precedes the features, -2 for [..., T, D], got "
            f"{axis!r}"
        )
    return axis


def one_step(label: str, x: Any, axis: int) -> jax.ShapeDtypeStruct:
    """The specs of one step of x."""
    check_input(label, x, rank=-axis)
    shape = list(x.shape)
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def alive_steps(label: str, x: jax.Array, axis: int, lengths: Any, mask: Any) -> Any:
    """Bools [..., T]: whether each step is valid; None if all are."""
    shape = x.shape[: x.ndim + axis + 1]
    if mask is None and lengths is None:
        return None
    if mask is None:
        _check(label, "lengths", lengths, shape[:-1], jnp.integer)
        steps = jax.lax.broadcasted_iota(lengths.dtype, shape, len(shape) - 1)
        return steps < jnp.broadcast_to(lengths[..., None], shape)
    if lengths is not None:
        raise ValueError(f"{label}: expected lengths or a mask, got both; leave out one")
    _check(label, "mask", mask, shape, jnp.bool_)
    return mask


def _check(label: str, what: str, given: Any, shape: tuple[Any, ...], kind: Any) -> None:
    if not is_array(given) or not jnp.issubdtype(given.dtype, kind):
        wanted = "bools" if kind is jnp.bool_ else "integers"
        raise TypeError(f"{label}: {what} must be an array of {wanted}, got {describe(given)}")
    if given.shape != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{label}: {what} must have shape [{sizes}], got {describe(given)}")


def beside(alive: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
    """Bools [...] for every number of an array with more axes behind."""
    more = len(shape) - alive.ndim
    return jnp.broadcast_to(alive.reshape(*alive.shape, *(1,) * more), shape)


def first_carry(cell: Layer, x: jax.Array, axis: int) -> Any:
    """Zeros of the shapes of the carry that the cell returns for the carry None."""
    carry, _ = output_specs(cell, False, None, one_step("recurrent", x, axis))
    lead = x.ndim + axis
    return jax.tree.map(lambda c: zeros_beside(x, lead, c.shape[lead:], c.dtype), carry)


def chunked(xs: jax.Array, alive: Any, n: int, lead: int) -> tuple[jax.Array, Any]:
    """Steps [T, ...] as chunks [T / n, n, ...]. Steps that fill the last one are not valid."""
    missing = -xs.shape[0] % n
    if missing:
        alive = jnp.ones(xs.shape[: lead + 1], bool) if alive is None else alive
        xs, alive = (jnp.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)]) for a in (xs, alive))
    return jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]), (xs, alive))


def masked(cell: Layer) -> Layer:
    """The cell with steps (x, alive): a step that is not valid keeps the carry and returns 0."""

    def call(run, params, state, key, carry, step):
        x, alive = step
        (new, y), state, seen = run(params, state, key, carry, x)
        if alive is not None:
            keep = lambda new, old: jnp.where(beside(alive, new.shape), new, old)  # noqa: E731
            new = jax.tree.map(keep, new, carry)
            y = jax.tree.map(lambda y: keep(y, jnp.zeros((), y.dtype)), y)
        return (new, y), state, seen

    return around(
        cell,
        call,
        label="masked",
        rebuild=masked,
        init=lambda key, carry, step: cell.init(key, carry, step[0]),
        init_state=lambda carry, step, key=None: start_state(cell, key, (carry, step[0]), {}),
        checked=False,
    )


def unwrapped(layer: Layer, depth: int) -> Layer:
    """The layer inside several combinators of one child."""
    for _ in range(depth):
        layer = layer.children[""]
    return layer


def apart(label: str, results: Any) -> tuple[Any, list[Any]]:
    """(the carries, or None if no layer returns its carry; the outputs) of several layers."""
    pairs = [isinstance(result, tuple) for result in results]
    if any(pairs) != all(pairs):
        raise ValueError(
            f"{label}: all layers return their carry, or none, got return_carry={pairs}"
        )
    if not any(pairs):
        return None, list(results)
    return tuple(carry for carry, _ in results), [y for _, y in results]
