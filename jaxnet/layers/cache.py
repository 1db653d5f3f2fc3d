"""Caches of keys and values, for generation token by token.

A cache is a dict of arrays, an ordinary input and output of attention: {"key": [..., L, G, D],
"value": [..., L, G, D], "at": [L] or [..., L]}, where `at` has the position of each place, and -1
for an empty one. The token at position p is written to the place p mod L. A cache with a place for
every position is a full buffer. A shorter one is a ring, which serves a window of L tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, describe, interned, layer, no_params

__all__ = ["empty_cache", "kv_cache"]


def empty_cache(specs: Any) -> Any:
    """Make an empty cache.

    A call without a cache returns the cache of its own tokens, so its specs are those of a cache
    with a place for each token: `_, specs = output_specs(net, False, ids)` with ids [..., L].

    Args:
      specs: a tree of arrays or `jax.ShapeDtypeStruct`, with the shapes of the cache.

    Returns:
      The tree with zeros for floats and -1 for integers.
    """

    def empty(x):
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return jnp.full(x.shape, -1 if whole else 0, x.dtype)

    return jax.tree.map(empty, specs)


@interned
def kv_cache() -> Layer:
    """Add the keys and values of a call to those of earlier calls.

    One token is written before the attention, and replaces the token that is L positions earlier.
    Several tokens attend to the old cache beside themselves, because the first of them may need
    keys that the last ones replace. Old entries at or behind the first new position are dropped, so
    generation may go back to an earlier position.

    Returns:
      The layer, (k [..., T, G, D], v [..., T, G, D], at [T] or [..., T], cache=None) -> (k, v, at,
      cache), with the keys and values to attend to, and their positions.

    Raises:
      ValueError: in `apply`, the cache does not fit the keys and values.
    """

    def fn(params, k, v, at, cache=None):
        if cache is None:
            return k, v, at, {"key": k, "value": v, "at": at}
        _check_cache(cache, k, v, at)
        new = {
            "key": k,
            "value": v,
            "at": jnp.broadcast_to(at, cache["at"].shape[:-1] + at.shape[-1:]),
        }
        new = {name: x.astype(cache[name].dtype) for name, x in new.items()}
        kept = {**cache, "at": jnp.where(cache["at"] < new["at"][..., :1], cache["at"], -1)}
        written = _written(kept, new)
        seen = written if k.shape[-3] == 1 else _joined(kept, new)
        return seen["key"].astype(k.dtype), seen["value"].astype(v.dtype), seen["at"], written

    return layer(no_params, fn, label="kv_cache")


AXIS = {"key": -3, "value": -3, "at": -1}


def _joined(old, new):
    return {name: jnp.concatenate([old[name], new[name]], AXIS[name]) for name in AXIS}


def _written(cache, new):
    """The cache with new tokens, each at its position mod L."""
    length, count = cache["at"].shape[-1], new["at"].shape[-1]
    # Only the last tokens find a place in a ring.
    new = {name: _last(x, AXIS[name], length) for name, x in new.items()}
    places = new["at"] % length
    if count == 1 and places.ndim == 1:
        return {
            name: jax.lax.dynamic_update_slice_in_dim(x, new[name], places[0], x.ndim + AXIS[name])
            for name, x in cache.items()
        }
    return {name: _scattered(x, new[name], places, AXIS[name]) for name, x in cache.items()}


def _last(x, axis: int, length: int):
    size = x.shape[axis]
    return x if size <= length else jax.lax.slice_in_dim(x, size - length, size, axis=axis)


def _scattered(x, new, places, axis: int):
    if places.ndim == 1:
        return jnp.moveaxis(
            jnp.moveaxis(x, axis, 0).at[places].set(jnp.moveaxis(new, axis, 0)), 0, axis
        )
    return jax.vmap(lambda x, new, places: _scattered(x, new, places, axis))(x, new, places)


def _check_cache(cache, k, v, at):
    try:
        shapes = [cache[name].shape for name in AXIS]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            "kv_cache: a cache has the arrays 'key', 'value' and 'at', as empty_cache makes it, "
            f"got {describe(cache)}"
        ) from None
    (keys, values, positions), length = shapes, cache["at"].shape[-1]
    fits = all(
        old == (*new.shape[:-3], length, *new.shape[-2:]) for old, new in [(keys, k), (values, v)]
    )
    if not fits or len(at.shape) > len(positions) or len(positions) > k.ndim - 2:
        raise ValueError(
            f"kv_cache: the cache must fit keys {describe(k)}, values {describe(v)} and positions "
            f"{describe(at)}, got {describe(cache)}"
        )
