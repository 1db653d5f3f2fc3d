"""The arrays of a tree: the node of each, its bytes, and arrays from bytes."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxnet.checkpoint.dtypes import CODES, WIDENED
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.structure import Node, Spec
from jaxnet.checkpoint.words import shown

__all__ = [
    "describe",
    "describe_template",
    "dtype_of",
    "empty",
    "fetch",
    "from_bytes",
    "shape_in_file",
    "to_bytes",
]


def describe(file: str, name: str, x: Any) -> Node:
    """The node of a leaf to save. Raises CheckpointError if its values cannot be stored."""
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
    """The node of a leaf of a template, which need not have values."""
    if (kind := _kind_of(x)) is None:
        raise CheckpointError(file, name, _no_array(x))
    if node := _node(kind, x.dtype):
        return node
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return Node("key", _key_kind(file, name, x.dtype))
    text = f"dtype {x.dtype} cannot be stored: convert it to one of {', '.join([*CODES, *WIDENED])}"
    raise CheckpointError(file, name, text)


def _kind_of(x: Any) -> str | None:
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        return "jax"
    # No other subclass is accepted: a masked array would lose its mask.
    if type(x) in (np.ndarray, np.memmap):
        return "numpy"
    return "numpy_scalar" if isinstance(x, np.generic) else None


def _no_array(x: Any) -> str:
    """The error for a leaf that is not an array, with the remedy."""
    what = f"{type(x).__module__}.{type(x).__qualname__}"
    text = f"a {what} is neither an array nor a Python scalar, str or bytes"
    if callable(getattr(x, "init", None)) and callable(getattr(x, "apply", None)):
        return (
            f"{text}: a network is code and holds no arrays: save its parameters, params = "
            "net.init(key, x)"
        )
    return f"{text}: convert it, or register its class as a pytree of arrays"


@functools.lru_cache(1000)
def _node(kind: str, dtype: Any) -> Node | None:
    """The node of an array; None for random keys and for dtypes that cannot be stored."""
    return Node(kind, dtype.name) if dtype.name in CODES or dtype.name in WIDENED else None


def _key_kind(file: str, name: str, dtype: Any) -> str:
    kind = jax.random.key_impl(jnp.empty(0, dtype))
    if not isinstance(kind, str):
        text = f"random keys of an unregistered kind ({kind}) cannot be stored"
        raise CheckpointError(file, name, text)
    return kind


def shape_in_file(node: Node, x: Any) -> tuple[int, ...]:
    """The shape of a leaf; for random keys, the shape of their data."""
    return jax.eval_shape(jax.random.key_data, x).shape if node.kind == "key" else tuple(x.shape)


def to_bytes(node: Node, x: Any) -> np.ndarray:
    """The bytes of a leaf as in the file: uint8 [bytes], little-endian in row-major order.

    The result is a view of the leaf if that is possible.
    """
    a = fetch(jax.random.key_data(x) if node.kind == "key" else x)
    if whole := _whole_dtype(node):
        a = a.astype(whole)
    a = np.ascontiguousarray(a, a.dtype.newbyteorder("=") if a.dtype.byteorder == ">" else None)
    return a.reshape(-1).view(np.uint8)


def from_bytes(
    file: str, name: str, node: Node, shape: tuple[int, ...], raw: np.ndarray
) -> np.ndarray:
    """The array of a node from its bytes.

    Args:
      file: how errors name the file.
      name: the name of the leaf.
      node: the node of the leaf.
      shape: the shape in the file.
      raw: uint8 [bytes].

    Returns:
      The array, a view of `raw` if that is possible; for random keys, their data.

    Raises:
      CheckpointError: NumPy has no such array.
    """
    is_key = node.kind == "key"
    if not is_key and node.value not in CODES and node.value not in WIDENED:
        text = (
            f"safetensors' type {node.value} packs several elements into a byte, which jaxnet "
            "cannot read: widen it"
        )
        raise CheckpointError(file, name, text)
    try:
        dtype, whole = dtype_of("uint32" if is_key else node.value), _whole_dtype(node)
        values = raw.view(whole).astype(dtype) if whole else raw.view(dtype)
        return values.reshape(shape[:-1] if dtype == np.complex128 else shape)
    except (TypeError, ValueError) as e:
        made = Spec(node.value, shape)
        text = f"numpy and ml_dtypes here cannot make {made}: {shown(e, 3000)}"
        raise CheckpointError(file, name, text) from e


def _whole_dtype(node: Node) -> type | None:
    """The dtype of whole bytes in which integers of fewer bits are stored; None for others."""
    if node.kind == "key" or "int" not in node.value or node.value not in WIDENED:
        return None
    return np.uint8 if node.value.startswith("uint") else np.int8


def fetch(x: Any) -> np.ndarray:
    """The values of an array on the host.

    No second copy stays inside a JAX array, as np.asarray would leave it.
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


def empty(nbytes: int) -> np.ndarray:
    """Memory whose address is a multiple of 64, which JAX on a CPU can use without a copy."""
    raw = np.empty(nbytes + 63, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + nbytes]


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of this name, also of those that only ml_dtypes has."""
    return np.dtype(getattr(ml_dtypes, name, name))
