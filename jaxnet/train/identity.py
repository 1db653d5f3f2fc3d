"""Compare a run with the run that wrote a checkpoint: its data, order, key and network."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.arrays import is_lazy

__all__ = [
    "begins_alike",
    "changed",
    "data_digest",
    "key_text",
    "program_digest",
    "start_of",
    "tree_differences",
]

# Up to this number of bytes, all of an array count in its digest.
WHOLE = 1 << 24
# Rows that count in the digest of a larger array, and of an array that is read lazily.
SAMPLE, LAZY_SAMPLE = 32, 8
# Leaves of a train state that count in how a run begins, and elements of each.
LEAVES, ELEMENTS = 256, 1 << 16
# Two starts are the same up to this difference, relative to the norm.
ROUNDING = 1e-4

# A key also determines noise and initial values, so a run resumed with another key would equal
# neither run.
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
    """A PRNG key as text; None if it is not a single key."""
    if not isinstance(key, jax.Array | np.ndarray):
        return None
    if not getattr(key, "is_fully_addressable", True):
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words, name = np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))
    else:
        words, name = np.asarray(key), "raw"
    return f"{name}:{words.tobytes().hex()}" if words.size <= 16 else None


def data_digest(data: Any) -> str:
    """Return a cheap digest of arrays: of their shapes and dtypes, all bytes of small arrays, and a
    sample of the rows of large ones.
    """
    crc = 0
    for path, leaf in tree.flatten(data).items():
        dtype = _dtype_on_device(leaf.dtype) if hasattr(leaf, "dtype") else "object"
        crc = zlib.crc32(f"{path} {dtype} {list(np.shape(leaf))}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(_sample(leaf)).tobytes(), crc)
    return f"{crc:08x}"


def start_of(train_state: Any) -> dict[str, Any]:
    """Return how a run begins: {'step': n, 'leaves': [[a weighted sum of the values, their norm],
    ...]}.

    These are numbers and not bits, since initial values may be rounded differently on another kind
    of device.
    """
    leaves = jax.tree.leaves((train_state.params, train_state.state))
    chosen = range(len(leaves))
    if len(leaves) > LEAVES:
        chosen = np.unique(np.linspace(0, len(leaves) - 1, LEAVES).astype(np.int64)).tolist()
    return {"step": int(train_state.step), "leaves": [_sketch(leaves[i]) for i in chosen]}


def begins_alike(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether two starts agree. Starts that cannot be compared count as equal: older files have no
    start, and a later state is not a start.
    """
    if before is None or before["step"] != now["step"]:
        return True
    leaves = before["leaves"], now["leaves"]
    if len(leaves[0]) != len(leaves[1]):
        return True
    pairs = zip(*leaves, strict=True)
    return all(abs(a[i] - b[i]) <= ROUNDING * max(a[1], b[1]) for a, b in pairs for i in (0, 1))


def _sketch(leaf: Any) -> list[float]:
    """Two numbers of a leaf, or of a sample of its elements if there are many: a weighted sum, and
    the norm.
    """
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return [0.0, 0.0]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
    flat = np.asarray(leaf).reshape(-1)
    if flat.size > ELEMENTS:
        flat = flat[np.linspace(0, flat.size - 1, ELEMENTS).astype(np.int64)]
    values = np.nan_to_num(np.real(flat).astype(np.float64), posinf=0.0, neginf=0.0)
    weights = np.cos(np.arange(values.size))
    return [float(f"{x:.7g}") for x in (values @ weights, np.linalg.norm(values))]


def _sample(leaf: Any) -> np.ndarray:
    """The values of an array that count in a digest."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.zeros(0, np.uint8)
    if is_lazy(leaf):
        rows = np.linspace(0, leaf.shape[0] - 1, LAZY_SAMPLE).astype(np.int64)
        return np.asarray(leaf[np.unique(rows)])
    host = np.asarray(leaf)
    if host.dtype.hasobject:
        return np.zeros(0, np.uint8)
    if host.nbytes > WHOLE:
        host = host[np.linspace(0, len(host) - 1, SAMPLE).astype(np.int64)]
    # Use the dtype on the device, so that float64 and float32 copies of an array have the same
    # digest.
    return host.astype(_dtype_on_device(host.dtype), copy=False)


def _dtype_on_device(dtype: Any) -> Any:
    native = dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype
    return jax.dtypes.canonicalize_dtype(native)


def program_digest(jaxpr: Any) -> str:
    """Return a digest of a traced program and its constants. It depends on the learning rate, the
    loss and the network.
    """
    # Addresses differ between processes.
    crc = zlib.crc32(re.sub(r"0x[0-9a-f]+", "", str(jaxpr)).encode())
    for constant in _constants(jaxpr):
        crc = zlib.crc32(np.ascontiguousarray(_sample(constant)).tobytes(), crc)
    return f"{crc:08x}"


def _constants(x: Any) -> Iterator[Any]:
    """Yield the arrays in a traced program, whose values its text lacks: constants and literals,
    also of programs inside it.
    """
    traced: Any = x
    if isinstance(x, tuple | list):
        for part in x:
            yield from _constants(part)
    elif isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer):
        yield jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    elif hasattr(x, "eqns"):
        yield from _constants([*getattr(traced, "consts", ())])
        for equation in traced.eqns:
            literals = [getattr(variable, "val", None) for variable in equation.invars]
            yield from _constants([*literals, *equation.params.values()])


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe the differences between the facts of a run and those in a checkpoint.

    Older files have fewer facts, and a missing fact is not a difference.

    Args:
      before: the facts in the checkpoint.
      now: the facts of the run.

    Returns:
      The differences as text; None if the facts agree.
    """
    if ("batch_size" in before) != ("batch_size" in now):
        return "data of another kind (arrays in one, an iterable of batches in the other)"
    names = [name for name in before if name in now and before[name] != now[name]]
    if not names:
        return None
    shown = []
    for name in names:
        what = NAMES.get(name, f"another {name}")
        if name not in ("data", "key", "order_digest"):
            what += f" ('{name}': {before[name]!r} in the file, '{name}': {now[name]!r} here)"
        shown.append(what)
    return ", ".join(shown)


def tree_differences(template: Any, leaves: Mapping[str, tuple[str, tuple]]) -> str | None:
    """Describe how a tree differs from the leaves of a file.

    Args:
      template: the tree.
      leaves: (dtype, shape) by path.

    Returns:
      The differences as text; None if there are none.
    """
    flat = tree.flatten(template).items()
    wanted = {path: (_dtype(leaf), tuple(np.shape(leaf))) for path, leaf in flat}
    lines = []
    for path in [*wanted, *(p for p in leaves if p not in wanted)]:
        here, there = wanted.get(path), leaves.get(path)
        if here is None:
            lines.append(f"'{path}' is in the file only")
        elif there is None:
            lines.append(f"'{path}' is not in the file")
        elif here[1] != there[1] or (here[0] != there[0] and "key<" not in here[0] + there[0]):
            lines.append(
                f"'{path}' is {there[0]}{list(there[1])} in the file and "
                f"{here[0]}{list(here[1])} here"
            )
    # List parameters first. Differences in the optimizer's state only repeat them.
    lines.sort(key=lambda line: not line.startswith("'params"))
    if not lines:
        return None
    more = f", and {len(lines) - 3} more leaves" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__
