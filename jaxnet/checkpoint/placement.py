"""Place the arrays of a file on the devices that a template asks for."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checkpoint.arrays import dtype_of
from jaxnet.checkpoint.errors import RESTORE, CheckpointError, Misfit
from jaxnet.checkpoint.structure import Node, Spec
from jaxnet.checkpoint.words import shown

__all__ = ["Target", "is_abstract", "local_blocks", "place", "sharding_of"]


class Target(NamedTuple):
    """How an array shall come back.

    Attributes:
      kind: as in `Node`.
      dtype: as in `Node`.
      sharding: where it lies; None for the place where JAX puts arrays by default.
    """

    kind: str
    dtype: str
    sharding: Any = None


def sharding_of(x: Any) -> Any:
    """The sharding of a leaf of a template; None if it was left to JAX."""
    if isinstance(x, jax.Array) and x.committed or isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return None


def is_abstract(x: Any) -> bool:
    """Whether a leaf of a template has no values to keep."""
    return isinstance(x, jax.ShapeDtypeStruct) or isinstance(x, jax.Array) and x.is_deleted()


def place(
    file: str, nodes: dict[str, Node], data: dict[str, np.ndarray], targets: dict[str, Target]
) -> dict[str, Any]:
    """Make leaves from NumPy arrays.

    All transfers to devices are one call. Arrays that JAX would narrow (64 bits while
    `jax_enable_x64` is off) stay NumPy arrays.

    Args:
      file: how errors name the file.
      nodes: the nodes in the file by name.
      data: the results of `from_bytes` by name.
      targets: how the leaves shall come back, by name.

    Returns:
      The leaves by name.

    Raises:
      CheckpointError: data are not those of random keys.
      Misfit: a sharding does not suit its array.
    """
    result: dict[str, Any] = dict(data)
    moving = []
    for name, target in targets.items():
        if target.kind == "numpy_scalar":
            result[name] = data[name][()]
        elif _is_spread(target):
            result[name] = _spread(file, nodes[name], data[name], target.sharding)
        elif _goes_to_jax(target):
            if target.kind == "key":
                result[name] = _wrap_key(file, name, nodes[name].value, data[name])
            moving.append(name)
    shardings = [targets[name].sharding for name in moving]
    # A list of None alone would take a fifth longer than None.
    where = shardings if any(shardings) else None
    with _suitable(file):
        placed = jax.device_put([result[name] for name in moving], where)
    return result | dict(zip(moving, placed, strict=True))


def local_blocks(
    file: str, target: Target, shape: tuple[int, ...]
) -> list[tuple[slice, ...]] | None:
    """The blocks of an array in the file that this process needs; None if it needs all of it."""
    if not _is_spread(target):
        return None
    with _suitable(file):
        return list(target.sharding.addressable_devices_indices_map(shape).values())


def _is_spread(target: Target) -> bool:
    """Whether an array goes to devices of several processes, each of which fills its own."""
    spread = target.sharding is not None and not target.sharding.is_fully_addressable
    return spread and _goes_to_jax(target)


def _goes_to_jax(target: Target) -> bool:
    if target.kind == "key":
        return True
    dtype = dtype_of(target.dtype)
    return target.kind == "jax" and jax.dtypes.canonicalize_dtype(dtype) == dtype


def _spread(file: str, node: Node, data: np.ndarray, sharding: Any) -> jax.Array:
    with _suitable(file):
        x = jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
    return jax.random.wrap_key_data(x, impl=node.value) if node.kind == "key" else x


@contextlib.contextmanager
def _suitable(file: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as e:
        text = f"the shardings of `like` do not suit its shapes: {shown(e, 3000)}"
        raise Misfit(file, None, text) from e


def _wrap_key(file: str, name: str, kind: str, data: np.ndarray) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=kind)
    except (TypeError, ValueError) as e:
        text = (
            f"its data {Spec('uint32', data.shape)} are not random keys of kind {kind!r}: "
            f"{shown(e, 3000)}; {RESTORE}"
        )
        raise CheckpointError(file, name, text) from e
