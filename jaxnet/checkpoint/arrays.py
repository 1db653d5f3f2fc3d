"""The leaves: what each kind of array is, its bytes, and arrays from bytes."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxnet.checkpoint.format import RESTORE, CheckpointError
from jaxnet.checkpoint.structure import CODES, WIDENED, Node, Spec


class Target(NamedTuple):
    """How a leaf shall come back: its kind as in Node, and its sharding (None: where JAX puts arrays by default)."""

    kind: str
    sharding: Any = None


def describe(file: str, name: str, x: Any) -> Node:
    """The node of a leaf that is to be saved; CheckpointError for what has no values, or none that can be had."""
    node = describe_template(file, name, x)
    text = None
    if isinstance(x, jax.ShapeDtypeStruct):
        text = "a ShapeDtypeStruct has no values: save the arrays themselves"
    elif isinstance(x, jax.core.Tracer):
        text = "a traced array has no values yet: save outside jit, grad, vmap and scan"
    elif isinstance(x, jax.Array) and x.is_deleted():
        text = "the array has been deleted (donated to a jitted function?): save the arrays that the function returned"
    elif isinstance(x, jax.Array) and not x.is_fully_addressable:
        text = "the array is spread over several processes: gather it first (multihost_utils.process_allgather)"
    if text:
        raise CheckpointError(file, name, text)
    return node


def describe_template(file: str, name: str, x: Any) -> Node:
    """The node of a leaf of a template, of which only kind, dtype, shape and sharding count."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return Node("key", _key_kind(file, name, x.dtype))
        kind = "jax"
    elif type(x) in (np.ndarray, np.memmap):  # no other subclass: a masked array would lose its mask
        kind = "numpy"
    elif isinstance(x, np.generic):
        kind = "numpy_scalar"
    else:
        text = f"a {type(x).__module__}.{type(x).__qualname__} is neither an array nor a Python scalar, str or bytes"
        raise CheckpointError(file, name, f"{text}: convert it, or register its class as a pytree of arrays")
    dtype = x.dtype.name
    if dtype not in CODES and dtype not in WIDENED:
        text = f"dtype {x.dtype} cannot be stored: convert it to one of {', '.join([*CODES, *WIDENED])}"
        raise CheckpointError(file, name, text)
    return Node(kind, dtype)


def shape_in_file(node: Node, x: Any) -> tuple[int, ...]:
    """The shape of a leaf, for random keys that of their data."""
    return jax.eval_shape(jax.random.key_data, x).shape if node.kind == "key" else tuple(x.shape)


def to_bytes(node: Node, x: Any) -> np.ndarray:
    """The bytes of a leaf as in the file, little-endian in row-major order: uint8 [bytes], a view where that can be."""
    a = _fetch(jax.random.key_data(x) if node.kind == "key" else x)
    if "int" in node.value and node.value in WIDENED:
        a = a.astype(np.uint8 if node.value.startswith("uint") else np.int8)
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("=") if a.dtype.byteorder == ">" else None)
    return a.reshape(-1).view(np.uint8)


def from_bytes(file: str, name: str, node: Node, shape: tuple[int, ...], raw: np.ndarray) -> np.ndarray:
    """The array whose bytes were `raw`, as a view where that can be; for random keys their data."""
    if node.kind != "key" and node.value not in CODES and node.value not in WIDENED:
        text = f"safetensors' type {node.value} packs several elements into a byte, which jaxnet cannot read: widen it"
        raise CheckpointError(file, name, text)
    try:
        if node.kind == "key":
            return raw.view(np.uint32).reshape(shape)
        dtype = np.dtype(getattr(ml_dtypes, node.value, node.value))
        if "int" in node.value and node.value in WIDENED:
            return raw.view(np.uint8 if node.value.startswith("uint") else np.int8).astype(dtype).reshape(shape)
        return raw.view(dtype).reshape(shape[:-1] if dtype == np.complex128 else shape)
    except (TypeError, ValueError) as e:
        raise CheckpointError(file, name, f"numpy and ml_dtypes here cannot make {Spec(node.value, shape)}: {e}") from e


def place(file: str, nodes: dict[str, Node], data: dict[str, np.ndarray], targets: dict[str, Target]) -> dict[str, Any]:
    """Turn what `from_bytes` gave into what `targets` asks for, all transfers in one call.

    What JAX would narrow (64 bits while `jax_enable_x64` is off) stays a NumPy array.
    """
    result: dict[str, Any] = dict(data)
    moving = []
    for name, (kind, _) in targets.items():
        if kind == "key":
            result[name] = _wrap_key(file, name, nodes[name].value, data[name])
        elif kind == "numpy_scalar":
            result[name] = data[name][()]
        if kind == "key" or kind == "jax" and jax.dtypes.canonicalize_dtype(data[name].dtype) == data[name].dtype:
            moving.append(name)
    try:
        placed = jax.device_put([result[name] for name in moving], [targets[name].sharding for name in moving])
    except (TypeError, ValueError) as e:
        raise CheckpointError(file, None, f"the shardings of `like` do not suit its shapes: {e}") from e
    return result | dict(zip(moving, placed, strict=True))


def sharding(x: Any) -> Any:
    """Where a leaf of a template lies, or None where that was left to JAX."""
    if isinstance(x, jax.Array) and x.committed or isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding
    return None


def empty(nbytes: int) -> np.ndarray:
    """Memory that JAX on a CPU can take over without a copy, since it starts at a multiple of 64."""
    raw = np.empty(nbytes + 63, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + nbytes]


def _fetch(x: Any) -> np.ndarray:
    """The values on the host, without leaving a second copy inside the JAX array (as np.asarray does)."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    result = np.empty(x.shape, x.dtype)
    for shard in x.addressable_shards:
        result[shard.index] = np.asarray(shard.data.addressable_data(0))
    return result


def _key_kind(file: str, name: str, dtype: Any) -> str:
    kind = jax.random.key_impl(jnp.empty(0, dtype))
    if not isinstance(kind, str):
        raise CheckpointError(file, name, f"random keys of an unregistered kind ({kind}) cannot be stored")
    return kind


def _wrap_key(file: str, name: str, kind: str, data: np.ndarray) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=kind)
    except (TypeError, ValueError) as e:
        text = f"its data {Spec('uint32', data.shape)} are not random keys of kind {kind!r}: {e}; {RESTORE}"
        raise CheckpointError(file, name, text) from e
