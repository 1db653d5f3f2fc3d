"""Arrays of any library: which are read where they are needed, and the numbers of the others."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.batch import check_weights

__all__ = ["fitting", "is_lazy", "on_device", "rows_of"]


def is_lazy(leaf: Any) -> bool:
    """Tell whether an array is read row by row instead of being put on the device.

    These are memory maps, and whatever has `shape`, `dtype` and `array[rows]` but no way to hand over its numbers as a
    whole: datasets of h5py and zarr, `jaxnet.data.Windows`. Series, frames and tensors of other libraries are in memory:
    they are copied by position, since their `[]` may look rows up by a label.
    """
    if isinstance(leaf, np.memmap):
        return True
    if isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | bool | list):
        return False
    in_memory = any(hasattr(leaf, name) for name in ("to_numpy", "numpy", "__dlpack__", "toarray"))
    return not in_memory and all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))


def on_device(data: Any) -> Any:
    """Put a tree on the device, whatever library its arrays are from, by position.

    Raises:
      ValueError: an integer that JAX's 32 bits cannot hold, or weights that have no meaning.
      TypeError: something that is not an array of numbers.
    """
    data = tree.map_with_path(fitting, data)
    check_weights(data)
    with jax.transfer_guard("allow"):  # this transfer is meant
        return jax.tree.map(jnp.asarray, data)


def rows_of(path: str, leaf: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array that is read lazily, in any order and with repetitions, read in increasing order."""
    wanted, inverse = np.unique(rows, return_inverse=True)
    values = leaf.oindex[wanted] if hasattr(leaf, "oindex") else leaf[wanted]
    if isinstance(values, list | tuple) or not hasattr(values, "shape"):
        values = np.asarray(values)
    if tuple(values.shape) != (len(wanted), *leaf.shape[1:]):
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, gives {list(values.shape)} for {len(wanted)} rows, not "
            f"{[len(wanted), *leaf.shape[1:]]}; pass an array whose `array[rows]` gives these rows, or np.asarray of it"
        )
    return np.asarray(values)[inverse]


def fitting(path: str, leaf: Any) -> Any:
    """The leaf as JAX will hold it, with 64-bit integers checked before they are cut to 32."""
    if isinstance(leaf, jax.Array):
        return leaf
    array = _as_numpy(path, leaf)
    if array.dtype.kind not in "biufcV":
        raise TypeError(f"data: '{path}' must hold numbers, got {array.dtype}; encode it first")
    wanted = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind in "iu" and wanted != array.dtype and array.size:
        low, high, info = array.min(), array.max(), np.iinfo(wanted)
        if low < info.min or high > info.max:
            worst = low if low < info.min else high
            raise ValueError(
                f"data: '{path}' holds {worst}, which {array.dtype} can and {wanted} cannot; JAX would wrap it around: "
                "use smaller numbers, or set jax_enable_x64"
            )
    return array.astype(wanted, copy=False)


def _as_numpy(path: str, leaf: Any) -> np.ndarray:
    """The numbers of an array of any library, by position."""
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise TypeError(f"data: '{path}' has masked entries, which JAX would read; fill them, or give them weight 0")
    if hasattr(leaf, "toarray"):
        raise TypeError(f"data: '{path}' is a sparse {type(leaf).__name__}; make it dense, with .toarray()")
    try:
        return np.asarray(leaf)
    except Exception as error:
        if hasattr(leaf, "__dlpack__"):  # a dtype that NumPy lacks, such as bfloat16
            with contextlib.suppress(Exception):
                return np.asarray(jax.dlpack.from_dlpack(leaf))
        raise TypeError(
            f"data: '{path}', a {type(leaf).__name__}, cannot be read as a NumPy array ({error}); convert it first, a "
            "tensor of PyTorch with .detach().cpu().numpy()"
        ) from error
