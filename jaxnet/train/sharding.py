"""Batches of data that an explicit mesh axis shards over the examples. For other data, these
functions do what JAX does.

JAX infers no sharding for a gather, a slice or a reshape along a sharded axis. A batch is sharded
as its data are if its length divides evenly, and replicated over the examples otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["first_rows", "gathered", "in_parts", "on_mesh_of", "sliced", "zeros_like_spec"]


def gathered(leaf: jax.Array, rows: jax.Array) -> jax.Array:
    """Gather rows of an array.

    Args:
      leaf: the array, [N, ...].
      rows: integers within bounds, int32 [B].

    Returns:
      The rows, [B, ...].
    """
    options = {}
    if sharding := _sharding(leaf, rows.shape[0]):
        options["out_sharding"] = sharding
    return leaf.at[rows].get(mode="promise_in_bounds", **options)


def sliced(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    """The rows start .. start + size - 1 of an array [N, ...]."""
    if not _sharding(leaf, size):
        return jax.lax.dynamic_slice_in_dim(leaf, start, size)
    return gathered(leaf, start + jnp.arange(size, dtype=jnp.int32))


def first_rows(leaf: jax.Array, size: int) -> jax.Array:
    """The first rows of an array."""
    if not _sharding(leaf, size):
        return leaf[:size]
    return gathered(leaf, jnp.arange(size, dtype=jnp.int32))


def in_parts(leaf: jax.Array, parts: int) -> jax.Array:
    """An array [B, ...] in equal parts [parts, B / parts, ...], each sharded as the array is."""
    size = leaf.shape[0] // parts
    shape = (parts, size, *leaf.shape[1:])
    sharding = _sharding(leaf, size)
    if sharding is None:
        return leaf.reshape(shape)
    rows = jnp.arange(parts * size, dtype=jnp.int32).reshape(parts, size)
    parted = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return leaf.at[rows].get(mode="promise_in_bounds", out_sharding=parted)


def on_mesh_of(data: Any, state: Any) -> Any:
    """Put a train state on the explicit mesh that shards the data, if there is one. Leaves that are
    not on a mesh are replicated.

    JAX infers the sharding of a gradient, a sum over sharded examples, only if the parameters are
    on the mesh.
    """
    leaves = [leaf for leaf in jax.tree.leaves(data) if isinstance(leaf, jax.Array)]
    concrete: list[Any] = [
        leaf for leaf in leaves if not isinstance(leaf, jax.core.Tracer) and _is_sharded(leaf)
    ]
    meshes = [leaf.sharding.mesh for leaf in concrete]
    meshes += [jax.typeof(leaf).sharding.mesh for leaf in leaves if _is_sharded(leaf)]
    if not meshes:
        return state
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def put(leaf):
        own = not isinstance(leaf, jax.core.Tracer) and getattr(leaf, "committed", False)
        if own or not jax.typeof(leaf).sharding.mesh.empty:
            return leaf
        return jax.sharding.reshard(leaf, everywhere)

    return jax.tree.map(put, state)


def zeros_like_spec(spec: Any, *leading: int) -> jax.Array:
    """Zeros with the shape, dtype and explicit sharding of a spec, after more axes at the front."""
    shape, sharding = (*leading, *spec.shape), getattr(spec, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.explicit_axes:
        return jnp.zeros(shape, spec.dtype)
    placed = NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(leading), *sharding.spec))
    # With JAX 0.12, `zeros(out_sharding=...)` forgets the mesh if no axis is sharded.
    return jax.sharding.reshard(jnp.zeros(shape, spec.dtype), placed)


def _is_sharded(leaf: jax.Array) -> bool:
    sharding = jax.typeof(leaf).sharding
    return not sharding.mesh.empty and any(axis is not None for axis in sharding.spec)


def _sharding(leaf: Any, size: int) -> NamedSharding | None:
    """The sharding of `size` rows of an array if an explicit mesh axis shards the array."""
    sharding = jax.typeof(leaf).sharding
    spec = tuple(sharding.spec)
    if not _is_sharded(leaf):
        return None
    if spec[0] is not None:
        names = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
        shards = math.prod(sharding.mesh.shape[name] for name in names)
        spec = (None if size % shards else spec[0], *spec[1:])
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
