"""Collect the arrays in containers of any kind by path, and convert each to a NumPy array.

An object that holds arrays, but is neither an array nor a container, is kept as `Refused` with the
remedy. It is an error only if it is requested, so `pattern=` can read the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxnet.checkpoint.dtypes import CODES
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.structure import MAX_DEPTH
from jaxnet.checkpoint.words import shown

__all__ = ["Refused", "by_path", "collect", "flat", "to_numpy"]

# The most characters in all names of a tree. A dict of 60 levels, each of which holds the next
# level twice, fits in a kilobyte and has more leaves than any memory can hold.
MAX_NAMES = 100_000_000


class Refused(NamedTuple):
    """An object whose arrays cannot be taken.

    Attributes:
      reason: why, and the remedy.
    """

    reason: str


def collect(file: str, content: Any) -> dict[str, Any]:
    """Collect all arrays in dicts, lists, tuples, namedtuples and dataclasses.

    Args:
      file: how errors name the source.
      content: the containers.

    Returns:
      The arrays, or `Refused`, by name: the steps to each, joined by '.'.

    Raises:
      CheckpointError: the containers hold no named arrays, contain themselves, or two arrays have
        the same name.
    """
    found: dict[str, Any] = {}
    room = MAX_NAMES

    def visit(x: Any, name: str, depth: int) -> None:
        nonlocal room
        room -= len(name) + 1
        if depth > MAX_DEPTH or room < 0:
            text = (
                f"it is nested deeper than {MAX_DEPTH} levels or has too many paths: does it "
                "contain itself?"
            )
            raise CheckpointError(file, f"{name[:40]}...", text)
        problem = _problem(x)
        if problem is None and (below := _children(x)) is not None:
            for step, child in below:
                visit(child, f"{name}.{step}" if depth else step, depth + 1)
        elif problem is not None or _is_array(x):
            if name in found:
                text = f"two arrays have this path, '{shown(name)}' and another: rename one there"
                raise CheckpointError(file, name.replace(".", "/"), text)
            found[name] = x if problem is None else Refused(problem)

    if problem := _problem(content):
        raise CheckpointError(file, None, problem)
    if not _has_names(content):
        text = (
            f"it holds a {type(content).__name__}, expected a dict of tensors: give "
            "model.state_dict()"
        )
        raise CheckpointError(file, None, text)
    visit(content, "", 0)
    return found


def by_path(
    file: str, leaves: Iterable[tuple[str, Any]], path: Callable[[str], str]
) -> dict[str, Any]:
    """Bring leaves under their paths.

    Args:
      file: how errors name the source.
      leaves: the leaves with their names.
      path: the path of a name.

    Returns:
      The leaves by path.

    Raises:
      CheckpointError: two leaves have the same path.
    """
    result = {}
    for name, x in leaves:
        if path(name) in result:
            text = f"two arrays have this path, '{shown(name)}' and another: rename one there"
            raise CheckpointError(file, path(name), text)
        result[path(name)] = x
    return result


def flat(tree: Any) -> list[tuple[str, Any]]:
    """List the arrays of a pytree.

    Args:
      tree: any pytree.

    Returns:
      The arrays with their paths, without random keys.
    """
    import jax

    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in pairs]
    return [(name, x) for name, x in named if _is_array(x)]


def to_numpy(file: str, name: str, x: Any) -> Any:
    """Copy an array to the host, in native byte order.

    Args:
      file: how errors name the source.
      name: the path of the array.
      x: an array [...] of any library, or `Refused`.

    Returns:
      The NumPy array [...].

    Raises:
      CheckpointError: the array has no values, or its dtype cannot be stored.
    """
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays

    if isinstance(x, Refused):
        raise CheckpointError(file, name, x.reason)
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        arrays.describe(file, name, x)
        return arrays.fetch(x)
    if isinstance(x, np.ma.MaskedArray):
        raise CheckpointError(
            file, name, "a masked array would lose its mask: fill it, x.filled(value)"
        )
    try:
        a = _tensor_to_numpy(x) if _is_tensor(x) else np.asarray(x)
    except Exception as e:
        # The libraries raise errors of many kinds, and none of them names the array.
        reason = shown((str(e).splitlines() or [""])[0], 3000)
        text = f"a {_type_name(x)} that has no values to copy: {type(e).__name__}: {reason}"
        raise CheckpointError(file, name, text) from e
    a = a.astype(a.dtype.newbyteorder("=")) if a.dtype.byteorder == ">" else a
    arrays.describe_template(file, name, a)
    return a


def _has_names(content: Any) -> bool:
    """Whether the arrays in a container have names. The arrays of a list only have numbers."""
    children = _children(content)
    if children is None:
        return False
    is_list = isinstance(content, (list, tuple, collections.deque))
    if not is_list or hasattr(content, "_fields"):
        return True
    below = [x for _, x in children]
    if any(map(_is_array, below)):
        return False
    return any(_children(x) is not None for x in below)


def _children(x: Any) -> list[tuple[str, Any]] | None:
    """The children of a container with their names, None for anything else."""
    if isinstance(x, Mapping):
        return [(str(key), child) for key, child in x.items()]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [
            (field.name, getattr(x, field.name))
            for field in dataclasses.fields(x)
            if hasattr(x, field.name)
        ]
    if isinstance(x, tuple) and (fields := getattr(x, "_fields", None)):
        return list(zip(fields, x, strict=True))
    if isinstance(x, (list, tuple, collections.deque)):
        return [(str(i), child) for i, child in enumerate(x)]
    return None


def _is_array(x: Any) -> bool:
    """Whether an object is an array of numbers, and not of text, dates or random keys."""
    import jax
    import jax.numpy as jnp

    if isinstance(x, type) or not (hasattr(x, "dtype") and hasattr(x, "shape")):
        return False
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return not is_key and getattr(x.dtype, "kind", "f") not in "SUMm"


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _problem(x: Any) -> str | None:
    """Why the arrays in an object cannot be taken, with the remedy; None if nothing is wrong."""
    import jax

    if isinstance(x, (type, str, bytes, int, float, complex, type(None), jax.Array)):
        return None
    if _is_tensor(x):
        return _problem_of_tensor(x)
    if callable(getattr(x, "state_dict", None)):
        return f"it is a {_type_name(x)}, expected arrays by name: give its state_dict()"
    if _is_array(x) or _children(x) is not None:
        return None
    if isinstance(x, (set, frozenset)):
        text = "arrays in a set have no names: use a dict or a list"
        return text if any(map(_holds_arrays, x)) else None
    if not callable(x) and any(map(_holds_arrays, getattr(x, "__dict__", {}).values())):
        return (
            f"it is a {_type_name(x)} that holds arrays, expected arrays by name: give vars() of it"
        )
    return None


def _holds_arrays(x: Any, depth: int = 2) -> bool:
    below = _children(x) if depth else None
    if _is_tensor(x) or _is_array(x) or callable(getattr(x, "state_dict", None)):
        return True
    return any(_holds_arrays(child, depth - 1) for _, child in below or ())


def _problem_of_tensor(x: Any) -> str | None:
    import torch  # pyright: ignore[reportMissingImports]

    if torch.nn.parameter.is_lazy(x):
        return (
            "an uninitialized parameter has no values: run the model once before you take its "
            "state_dict()"
        )
    if hasattr(x, "full_tensor"):
        return "a distributed tensor (DTensor) holds a part of its values: give x.full_tensor()"
    if x.is_meta:
        return "a tensor on the device 'meta' has no values: load the weights first"
    if x.is_nested:
        return "a nested tensor has no one shape: give its parts, x.unbind()"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype}) holds codes, not values: give x.dequantize()"
    if x.layout != torch.strided:
        return f"a sparse tensor ({x.layout}) does not hold its values in order: give x.to_dense()"
    name = str(x.dtype).removeprefix("torch.")
    if name not in CODES and name != "complex128":
        wide = "complex64" if name == "complex32" else "float32"
        others = ", ".join(CODES)
        return f"dtype {name} cannot be read: give x.to(torch.{wide}), or another of {others}"
    return None


def _tensor_to_numpy(x: Any) -> Any:
    """Convert a tensor through its bytes, because NumPy lacks some dtypes of torch.

    `copy_` resolves strides, expanded axes, and the lazy conjugate and negative bits.
    """
    import torch  # pyright: ignore[reportMissingImports]

    from jaxnet.checkpoint import arrays

    copy = torch.empty(
        tuple(x.shape), dtype=x.dtype, device="cpu", memory_format=torch.contiguous_format
    )
    copy.copy_(x.detach())
    dtype = arrays.dtype_of(str(x.dtype).removeprefix("torch."))
    return copy.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tuple(x.shape))


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
