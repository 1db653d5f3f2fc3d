"""Arrays of any library, which are converted as a whole or read by rows."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.weighted import check_weights

__all__ = ["fitting", "is_lazy", "on_device", "rows_of"]


def is_lazy(leaf: Any) -> bool:
    """Whether an array is read row by row instead of being copied to the device.

    These are memory maps, and objects with `shape`, `dtype` and `array[rows]` but without a
    conversion of the whole: h5py and zarr datasets, `jaxnet.data.Windows`. Series, frames and
    tensors of other libraries are in memory and are copied by position, because their `[]` may look
    up rows by label.
    """
    if isinstance(leaf, np.memmap):
        return True
    if isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | bool | list):
        return False
    in_memory = any(hasattr(leaf, name) for name in ("to_numpy", "numpy", "__dlpack__", "toarray"))
    return not in_memory and all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))


def on_device(data: Any) -> Any:
    """Copy a tree of arrays of any library to the device.

    Args:
      data: a pytree of arrays. Rows are taken by position, not by label.

    Returns:
      The tree with JAX arrays.

    Raises:
      ValueError: an integer does not fit in JAX's 32 bits, or weights are negative or not finite.
      TypeError: a leaf is not an array of numbers.
    """
    data = tree.map_with_path(fitting, data)
    check_weights(data)
    # This transfer is intended, even if the user forbids implicit ones.
    with jax.transfer_guard("allow"):
        return jax.tree.map(jnp.asarray, data)


def rows_of(path: str, leaf: Any, rows: np.ndarray) -> np.ndarray:
    """Read rows of an array that is read lazily.

    Args:
      path: the path of the array in the data, for errors.
      leaf: the array, [N, ...].
      rows: integers [B], in any order and with repetitions. They are read in increasing order.

    Returns:
      The rows, [B, ...].
    """
    wanted, inverse = np.unique(rows, return_inverse=True)
    values = leaf.oindex[wanted] if hasattr(leaf, "oindex") else leaf[wanted]
    if isinstance(values, list | tuple) or not hasattr(values, "shape"):
        values = np.asarray(values)
    if tuple(values.shape) != (len(wanted), *leaf.shape[1:]):
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, gives {list(values.shape)} for "
            f"{len(wanted)} rows, not {[len(wanted), *leaf.shape[1:]]}; pass an array whose "
            "`array[rows]` gives these rows, or np.asarray of it"
        )
    return np.asarray(values)[inverse]


def fitting(path: str, leaf: Any) -> Any:
    """Convert a leaf to the dtype that JAX gives it. 64-bit integers are checked before they are
    cut to 32 bits.
    """
    if isinstance(leaf, jax.Array):
        return leaf
    array = _as_numpy(path, leaf)
    # JAX has no other byte order than the machine's.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.names:
        raise TypeError(
            f"data: '{path}' is a structured array with the fields {list(array.dtype.names)}; "
            "pass a dict of its fields, {name: array[name] for name in array.dtype.names}"
        )
    # The narrow floats of JAX are of kind V, as raw bytes are.
    if array.dtype.kind not in "biufcV" or array.dtype.type is np.void:
        raise TypeError(f"data: '{path}' must hold numbers, got {array.dtype}; encode it first")
    wanted = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and wanted != array.dtype and array.size:
        low, high, info = array.min(), array.max(), np.iinfo(wanted)
        if low < info.min or high > info.max:
            worst = low if low < info.min else high
            raise ValueError(
                f"data: '{path}' holds {worst}, which {array.dtype} can and {wanted} cannot; JAX "
                "would wrap it around: use smaller numbers, or set jax_enable_x64"
            )
    return array.astype(wanted, copy=False)


def _as_numpy(path: str, leaf: Any) -> np.ndarray:
    """The numbers of an array of any library, by position."""
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise TypeError(
            f"data: '{path}' has masked entries, which JAX would read; fill them, or give them "
            "weight 0"
        )
    if hasattr(leaf, "toarray"):
        raise TypeError(
            f"data: '{path}' is a sparse {type(leaf).__name__}; make it dense, with .toarray()"
        )
    try:
        return np.asarray(leaf)
    except Exception as error:
        # NumPy may lack the dtype, such as bfloat16.
        if hasattr(leaf, "__dlpack__"):
            with contextlib.suppress(Exception):
                return np.asarray(jax.dlpack.from_dlpack(leaf))
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, cannot be read as a NumPy array "
            f"({error}); convert it first, a tensor of PyTorch with .detach().cpu().numpy()"
        ) from error
