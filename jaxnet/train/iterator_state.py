"""Convert the states of iterators to JSON and back, to keep them in checkpoints."""

from __future__ import annotations

import base64
import importlib
from typing import Any

import numpy as np

__all__ = ["from_json", "to_json"]


def to_json(x: Any) -> Any:
    """Convert the state of an iterator to JSON. Values that JSON lacks become an object with one
    entry, named after their kind.
    """
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, list):
        return [to_json(y) for y in x]
    if isinstance(x, tuple):
        return {"tuple": [to_json(y) for y in x]}
    if isinstance(x, dict):
        return {"dict": [[to_json(key), to_json(y)] for key, y in x.items()]}
    if isinstance(x, bytes):
        return {"bytes": base64.b64encode(x).decode()}
    if isinstance(x, np.ndarray | np.generic) or type(x).__module__ == "torch":
        array = np.asarray(x)
        if array.dtype.kind in "biufc":
            kind = "array" if isinstance(x, np.ndarray | np.generic) else "tensor"
            content = base64.b64encode(array.tobytes()).decode()
            return {kind: [array.dtype.str, list(array.shape), content]}
    raise TypeError(
        f"data: the iterator's state holds a {type(x).__name__}, which a checkpoint cannot keep; "
        "use numbers, strings, bytes, arrays, and lists, tuples and dicts of them"
    )


def from_json(x: Any) -> Any:
    """Convert JSON to the state of an iterator, the inverse of `to_json`."""
    if isinstance(x, list):
        return [from_json(y) for y in x]
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "tuple":
        return tuple(from_json(y) for y in content)
    if kind == "dict":
        return {from_json(key): from_json(y) for key, y in content}
    dtype, shape, data = content
    array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    if kind == "array":
        return array
    return importlib.import_module("torch").from_numpy(array)
