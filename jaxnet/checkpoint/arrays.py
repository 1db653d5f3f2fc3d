"""The leaves: what each kind of array is, its bytes, and arrays from bytes."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.checkpoint.casting import Target, dtype_of
from jaxnet.checkpoint.dtypes import CODES, WIDENED
from jaxnet.checkpoint.format import RESTORE, CheckpointError, Misfit
from jaxnet.checkpoint.structure import Node, Spec
from jaxnet.checkpoint.words import shown


def describe(file: str, name: str, x: Any) -> Node:
    """The node of a leaf that is to be saved; CheckpointError for what has no values, or none that
    can be had.
    """
    node = describe_template(file, name, x)
    text = None
    if isinstance(x, jax.ShapeDtypeStruct):
        text = "a ShapeDtypeStruct has no values: save the arrays themselves"
    elif isinstance(x, jax.core.Tracer):
        text = "a traced array has no values yet: save outside jit, grad, vmap and scan"
    elif isinstance(x, jax.Array) and x.is_deleted():
        text = (
            "the array has been deleted (donated to a jitted function?): save the arrays that "
            "the function returned"
        )
    if text:
        raise CheckpointError(file, name, text)
    return node


def describe_template(file: str, name: str, x: Any) -> Node:
    """The node of a leaf of a template, of which only kind, dtype, shape and sharding count."""
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        kind = "jax"
    elif type(x) in (np.ndarray, np.memmap):
        # No other subclass is taken: a masked array would lose its mask.
        kind = "numpy"
    elif isinstance(x, np.generic):
        kind = "numpy_scalar"
    else:
        text = (
            f"a {type(x).__module__}.{type(x).__qualname__} is neither an array nor a Python "
            "scalar, str or bytes"
        )
        if callable(getattr(x, "init", None)) and callable(getattr(x, "apply", None)):
            remedy = (
                "a network is code and holds no arrays: save its parameters, params = "
                "net.init(key, x)"
            )
            raise CheckpointError(file, name, f"{text}: {remedy}")
        raise CheckpointError(
            file, name, f"{text}: convert it, or register its class as a pytree of arrays"
        )
    if node := _node(kind, x.dtype):
        return node
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return Node("key", _key_kind(file, name, x.dtype))
    text = f"dtype {x.dtype} cannot be stored: convert it to one of {', '.join([*CODES, *WIDENED])}"
    raise CheckpointError(file, name, text)


@functools.lru_cache(1000)
def _node(kind: str, dtype: Any) -> Node | None:
    """The node of an array; None for random keys, and for what has no code."""
    return Node(kind, dtype.name) if dtype.name in CODES or dtype.name in WIDENED else None


def shape_in_file(node: Node, x: Any) -> tuple[int, ...]:
    """The shape of a leaf, for random keys that of their data."""
    return jax.eval_shape(jax.random.key_data, x).shape if node.kind == "key" else tuple(x.shape)


def to_bytes(node: Node, x: Any) -> np.ndarray:
    """The bytes of a leaf as in the file, little-endian in row-major order: uint8 [bytes], a view
    where that can be.
    """
    a = fetch(jax.random.key_data(x) if node.kind == "key" else x)
    if "int" in node.value and node.value in WIDENED:
        a = a.astype(np.uint8 if node.value.startswith("uint") else np.int8)
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("=") if a.dtype.byteorder == ">" else None)
    return a.reshape(-1).view(np.uint8)


def as_stored(node: Node, x: jax.Array, dtype: np.dtype) -> jax.Array:
    """What `to_bytes` gives, as an array of this dtype where `x` lies, on however many devices and
    processes.
    """
    if node.kind == "key":
        return jax.random.key_data(x)
    if node.value == "complex128":
        return jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == dtype:
        return x
    return _by_shard(
        x, lambda shard: to_bytes(node, shard).view(dtype).reshape(shard.shape)
    )  # not all that XLA can convert


def copy(x: jax.Array) -> jax.Array:
    """The same in other memory, where the host could share that of `x` and would see it change;
    else `x`.
    """
    on_host = next(iter(x.sharding.device_set)).platform == "cpu" or "host" in str(
        x.sharding.memory_kind
    )
    return _by_shard(x, lambda shard: shard) if on_host else x


def _by_shard(x: jax.Array, change: Callable[[jax.Array], Any]) -> jax.Array:
    """A new array of the same shape and sharding, whose shards are changed one by one."""
    shards = [
        jax.device_put(change(s.data), s.data.sharding, may_alias=False)
        for s in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def from_bytes(
    file: str, name: str, node: Node, shape: tuple[int, ...], raw: np.ndarray
) -> np.ndarray:
    """The array whose bytes were `raw`, as a view where that can be; for random keys their data."""
    if node.kind != "key" and node.value not in CODES and node.value not in WIDENED:
        text = (
            f"safetensors' type {node.value} packs several elements into a byte, which jaxnet "
            "cannot read: widen it"
        )
        raise CheckpointError(file, name, text)
    try:
        if node.kind == "key":
            return raw.view(np.uint32).reshape(shape)
        dtype = dtype_of(node.value)
        if "int" in node.value and node.value in WIDENED:
            return (
                raw.view(np.uint8 if node.value.startswith("uint") else np.int8)
                .astype(dtype)
                .reshape(shape)
            )
        return raw.view(dtype).reshape(shape[:-1] if dtype == np.complex128 else shape)
    except (TypeError, ValueError) as e:
        raise CheckpointError(
            file,
            name,
            f"numpy and ml_dtypes here cannot make {Spec(node.value, shape)}: {shown(e, 3000)}",
        ) from e


def place(
    file: str, nodes: dict[str, Node], data: dict[str, np.ndarray], targets: dict[str, Target]
) -> dict[str, Any]:
    """Turn what `from_bytes` gave into what `targets` asks for, all transfers in one call.

    What JAX would narrow (64 bits while `jax_enable_x64` is off) stays a NumPy array.
    """
    result: dict[str, Any] = dict(data)
    moving = []
    for name, target in targets.items():
        if target.kind == "numpy_scalar":
            result[name] = data[name][()]
        elif is_spread(target):
            result[name] = _spread(file, nodes[name], data[name], target.sharding)
        elif _goes_to_jax(target):
            result[name] = (
                _wrap_key(file, name, nodes[name].value, data[name])
                if target.kind == "key"
                else data[name]
            )
            moving.append(name)
    shardings = [targets[name].sharding for name in moving]
    with _suitable(file):  # a list of nothing but None would take a fifth longer
        placed = jax.device_put(
            [result[name] for name in moving], shardings if any(shardings) else None
        )
    return result | dict(zip(moving, placed, strict=True))


def is_spread(target: Target) -> bool:
    """Whether an array goes to devices of several processes, of which each fills its own."""
    return (
        target.sharding is not None
        and not target.sharding.is_fully_addressable
        and _goes_to_jax(target)
    )


def _goes_to_jax(target: Target) -> bool:
    if target.kind == "key":
        return True
    return target.kind == "jax" and jax.dtypes.canonicalize_dtype(
        dtype_of(target.dtype)
    ) == dtype_of(target.dtype)


def blocks(file: str, target: Target, shape: tuple[int, ...]) -> list[tuple[slice, ...]] | None:
    """Which blocks of an array in the file are for devices of this process; None if all of it
    is.
    """
    if not is_spread(target):
        return None
    with _suitable(file):
        return list(target.sharding.addressable_devices_indices_map(shape).values())


def _spread(file: str, node: Node, data: np.ndarray, sharding: Any) -> jax.Array:
    with _suitable(file):
        x = jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
    return jax.random.wrap_key_data(x, impl=node.value) if node.kind == "key" else x


@contextlib.contextmanager
def _suitable(file: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as e:
        raise Misfit(
            file, None, f"the shardings of `like` do not suit its shapes: {shown(e, 3000)}"
        ) from e


def is_abstract(x: Any) -> bool:
    """Whether a leaf of a template has no values to keep."""
    return isinstance(x, jax.ShapeDtypeStruct) or isinstance(x, jax.Array) and x.is_deleted()


def sharding(x: Any) -> Any:
    """Where a leaf of a template lies, or None where that was left to JAX."""
    if isinstance(x, jax.Array) and x.committed or isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return None


def empty(nbytes: int) -> np.ndarray:
    """Memory that JAX on a CPU can take over without a copy, since it starts at a multiple of
    64.
    """
    raw = np.empty(nbytes + 63, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + nbytes]


def fetch(x: Any) -> np.ndarray:
    """The values on the host, without leaving a second copy inside the JAX array (as np.asarray
    does).
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    if not x.is_fully_addressable:
        raise ValueError(
            "an array is spread over several processes: gather it first "
            "(multihost_utils.process_allgather)"
        )
    result = np.empty(x.shape, x.dtype)
    for shard in x.addressable_shards:
        result[shard.index] = np.asarray(shard.data.addressable_data(0))
    return result


def _key_kind(file: str, name: str, dtype: Any) -> str:
    kind = jax.random.key_impl(jnp.empty(0, dtype))
    if not isinstance(kind, str):
        raise CheckpointError(
            file, name, f"random keys of an unregistered kind ({kind}) cannot be stored"
        )
    return kind


def _wrap_key(file: str, name: str, kind: str, data: np.ndarray) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=kind)
    except (TypeError, ValueError) as e:
        text = (
            f"its data {Spec('uint32', data.shape)} are not random keys of kind {kind!r}: "
            f"{shown(e, 3000)}; {RESTORE}"
        )
        raise CheckpointError(file, name, text) from e
