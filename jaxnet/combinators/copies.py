"""Copies of a layer, stacked along an axis, as `repeat`, `scan` and `vmap` need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.core import Layer, describe, fold_copies, is_array, is_threefry, specs_of, start_state

__all__ = [
    "check_same",
    "check_stacked",
    "copies_of_state",
    "pair",
    "part_of",
    "recomputed",
    "stacked",
    "with_axis",
    "without_axis",
]


def check_same(label: str, x: Any, y: Any, remedy: str) -> None:
    """Raise ValueError unless two trees have the same structure, shapes and dtypes."""

    def facts(tree):
        return jax.tree.structure(tree), [
            (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)
        ]

    if facts(x) != facts(y):
        raise ValueError(
            f"{label}: the layer must return what it receives, {describe(x)}, got {describe(y)}; "
            f"{remedy}"
        )


def check_stacked(label: str, n: int, tree: Any, what: str) -> None:
    """Raise ValueError unless every leaf has a leading axis of n copies."""
    for leaf in jax.tree.leaves(tree):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != n:
            raise ValueError(
                f"{label}: leaves of params and state must be stacked, [{n}, ...], got "
                f"{describe(leaf)}; they were made for another number of {what}"
            )


def pair(label: str, returns: str, result: Any) -> Any:
    """Return the result of a layer if it is a pair. Raises ValueError otherwise."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{label}: {returns}, a pair, got {describe(result)}")
    return result


def recomputed(
    label: str, fn: Callable[..., Any], remat: Any, **options: Any
) -> Callable[..., Any]:
    """`fn` under `jax.checkpoint` if `remat` is True or a policy. Raises TypeError if `remat` is
    anything else.
    """
    if not isinstance(remat, bool) and not callable(remat):
        raise TypeError(
            f"{label}: remat must be True, False or a policy of jax.checkpoint_policies, got "
            f"{remat!r}"
        )
    policy: Any = None if isinstance(remat, bool) else remat
    return jax.checkpoint(fn, policy=policy, **options) if remat else fn


def part_of(label: str, n: int, tree: Any, what: str, axis: int = 0) -> Any:
    """The specs of the part that one of n copies receives."""

    def part(leaf):
        rank = len(leaf.shape) if is_array(leaf) else 0
        if not -rank <= axis < rank or leaf.shape[axis] != n:
            raise ValueError(
                f"{label}: {what} is divided among the copies and must have {n} parts along axis "
                f"{axis}, got {describe(leaf)}"
            )
        return without_axis(leaf, axis)

    return jax.tree.map(part, specs_of(tree))


def without_axis(spec: Any, axis: int) -> jax.ShapeDtypeStruct:
    """The spec of one part along an axis."""
    shape = list(spec.shape)
    del shape[axis]
    return _of_shape(spec, tuple(shape))


def with_axis(spec: Any, axis: int, size: int) -> jax.ShapeDtypeStruct:
    """The spec of `size` parts along a new axis."""
    return _of_shape(spec, (*spec.shape[:axis], size, *spec.shape[axis:]))


def _of_shape(spec: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, spec.dtype, weak_type=getattr(spec, "weak_type", False))


def copies_of_state(inner: Layer, key: Any, n: int, inputs: Any, named: Any) -> Any:
    """The state of n copies. With a key, each copy has its own random numbers."""
    if key is not None:
        return stacked(lambda key: start_state(inner, key, inputs, named), key, n)
    state = inner.init_state(*inputs, **named)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *jnp.shape(leaf))), state)


def stacked(make: Callable[[Any], Any], key: Any, n: int) -> Any:
    """make(fold_in(key, i)) for each copy i, leaves stacked [n, ...].

    A loop over the copies reuses the few programs that serve all shapes, and compiles nothing for n
    copies. `jax.vmap` is needed for traced keys, for generators that draw differently under vmap,
    and for meshes, on which the program places the arrays.
    """
    # This key is a tracer inside any transform, even if `key` itself is not.
    first = jax.random.fold_in(key, 0)
    traced = isinstance(first, jax.core.Tracer) or not jax.sharding.get_abstract_mesh().empty
    if traced or n > _LOOPED or not is_threefry(key):
        return jax.vmap(make)(fold_copies(key, n))
    copies = [make(jax.random.fold_in(key, i) if i else first) for i in range(n)]

    def stack(*leaves):
        leaves = [leaf if is_array(leaf) else jnp.asarray(leaf) for leaf in leaves]
        if not all(map(_is_for_numpy, leaves)):
            return jnp.stack(leaves)
        device = leaves[0].sharding if getattr(leaves[0], "committed", False) else None
        return jax.device_put(np.stack([np.asarray(leaf) for leaf in leaves]), device)

    return jax.tree.map(stack, *copies)


def _is_for_numpy(x: Any) -> bool:
    traced = isinstance(x, jax.core.Tracer)
    return not traced and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


# Up to this number of copies, a loop is faster than one program for all copies.
_LOOPED = 256
