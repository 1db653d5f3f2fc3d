"""Compare a run with the run that wrote a checkpoint: its data, order, key and network."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.source import is_lazy

__all__ = ["changed", "data_digest", "key_text", "program_digest", "tree_differences"]

# The digest of an array of up to this number of bytes covers all of them.
WHOLE = 1 << 24
# The digest of a larger array covers this number of rows; that of a lazy array covers 8.
SAMPLE = 32

# A key also determines noise and initial values, so a run resumed with another key would equal neither run.
NAMES = {
    "key": "another key",
    "order": "another order",
    "order_digest": "an order of other labels or rows",
    "data": "other data",
    "examples": "data of another length",
    "batch_size": "another batch size",
    "drop_last": "another drop_last",
}


def key_text(key: Any) -> str | None:
    """A random key as text; None if it is not a single key."""
    if not isinstance(key, jax.Array | np.ndarray) or not getattr(key, "is_fully_addressable", True):
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words, name = np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))
    else:
        words, name = np.asarray(key), "raw"
    return f"{name}:{words.tobytes().hex()}" if words.size <= 16 else None


def data_digest(data: Any) -> str:
    """A cheap digest of arrays: shapes, dtypes, all bytes of small arrays, and a sample of the rows of large ones."""
    crc = 0
    for path, leaf in tree.flatten(data).items():
        dtype = _dtype_on_device(leaf.dtype) if hasattr(leaf, "dtype") else "object"
        crc = zlib.crc32(f"{path} {dtype} {list(np.shape(leaf))}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(_sample(leaf)).tobytes(), crc)
    return f"{crc:08x}"


def _sample(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.zeros(0, np.uint8)
    if is_lazy(leaf):
        return np.asarray(leaf[np.unique(np.linspace(0, leaf.shape[0] - 1, 8).astype(np.int64))])
    host = np.asarray(leaf)
    if host.dtype.hasobject:
        return np.zeros(0, np.uint8)
    if host.nbytes > WHOLE:
        host = host[np.linspace(0, len(host) - 1, SAMPLE).astype(np.int64)]
    # Use the dtype on the device, so that float64 and float32 copies of an array have the same digest.
    return host.astype(_dtype_on_device(host.dtype), copy=False)


def _dtype_on_device(dtype: Any) -> Any:
    native = dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype
    return jax.dtypes.canonicalize_dtype(native)


def program_digest(jaxpr: Any) -> str:
    """A digest of a traced program and its constants. It depends on the learning rate, the loss and the network."""
    crc = zlib.crc32(re.sub(r"0x[0-9a-f]+", "", str(jaxpr)).encode())
    for constant in _constants(jaxpr):
        crc = zlib.crc32(np.ascontiguousarray(_sample(constant)).tobytes(), crc)
    return f"{crc:08x}"


def _constants(x: Any) -> Iterator[Any]:
    """The arrays in a traced program, whose values its text lacks: constants and literals, also of programs inside it."""
    if isinstance(x, tuple | list):
        for part in x:
            yield from _constants(part)
    elif isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer):
        yield jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    elif hasattr(x, "consts"):
        yield from _constants([*x.consts, x.jaxpr])
    elif hasattr(x, "eqns"):
        for equation in x.eqns:
            literals = [getattr(variable, "val", None) for variable in equation.invars]
            yield from _constants([*literals, *equation.params.values()])


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The differences between the facts of a run and those in a checkpoint; None if they agree.

    Older files have fewer facts, and a missing fact is not a difference.
    """
    if ("batch_size" in before) != ("batch_size" in now):
        return "data of another kind (arrays in one, an iterable of batches in the other)"
    names = [name for name in before if name in now and before[name] != now[name]]
    if not names:
        return None
    shown = []
    for name in names:
        what = NAMES.get(name, f"another {name}")
        told = (
            ""
            if name in ("data", "key", "order_digest")
            else f" ('{name}': {before[name]!r} in the file, '{name}': {now[name]!r} here)"
        )
        shown.append(what + told)
    return ", ".join(shown)


def tree_differences(template: Any, leaves: Mapping[str, tuple[str, tuple]]) -> str | None:
    """How a tree differs from the leaves of a file, given as {path: (dtype, shape)}; None if it does not."""
    wanted = {path: (_dtype(leaf), tuple(np.shape(leaf))) for path, leaf in tree.flatten(template).items()}
    lines = []
    for path in [*wanted, *(p for p in leaves if p not in wanted)]:
        here, there = wanted.get(path), leaves.get(path)
        if here is None:
            lines.append(f"'{path}' is in the file only")
        elif there is None:
            lines.append(f"'{path}' is not in the file")
        elif here[1] != there[1] or (here[0] != there[0] and "key<" not in here[0] + there[0]):
            lines.append(f"'{path}' is {there[0]}{list(there[1])} in the file and {here[0]}{list(here[1])} here")
    # List parameters first. Differences in the optimizer's state only repeat them.
    lines.sort(key=lambda line: not line.startswith("'params"))
    if not lines:
        return None
    more = f", and {len(lines) - 3} more leaves" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__
