"""New arrays from the shards of a JAX array, on the devices where they lie."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checkpoint.arrays import to_bytes
from jaxnet.checkpoint.structure import Node

__all__ = ["as_stored", "copy_on_host"]


def as_stored(node: Node, x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The content of `to_bytes` as an array of this dtype, with the sharding of `x`.

    `x` may lie on devices of several processes.
    """
    if node.kind == "key":
        return jax.random.key_data(x)
    if node.value == "complex128":
        return jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == dtype:
        return x
    # XLA cannot convert all dtypes.
    return _by_shard(x, lambda shard: to_bytes(node, shard).view(dtype).reshape(shard.shape))


def copy_on_host(x: jax.Array) -> jax.Array:
    """A copy of an array whose memory the host could share and would see change; else `x`."""
    platform = next(iter(x.sharding.device_set)).platform
    if platform == "cpu" or "host" in str(x.sharding.memory_kind):
        return _by_shard(x, lambda shard: shard)
    return x


def _by_shard(x: jax.Array, change: Callable[[jax.Array], Any]) -> jax.Array:
    """A new array of the same shape and sharding, whose shards are changed one by one."""
    shards = [
        jax.device_put(change(s.data), s.data.sharding, may_alias=False)
        for s in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
