"""Check the data and the functions that `fit` receives."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxnet.train.words import describe

__all__ = ["check_arrays", "check_call", "check_iterable"]


def check_arrays(data: Any) -> None:
    """Raise TypeError for data passed with `batch_size` that is not a pytree of arrays."""
    if isinstance(data, Iterator):
        raise TypeError(
            f"fit: with batch_size the data is arrays, got a {type(data).__name__}, which is "
            "used up as it is read; without batch_size its items are the batches, or collect its "
            "examples first: np.stack(list(data))"
        )
    if callable(data) and not hasattr(data, "shape") or _is_loader(data):
        raise TypeError(
            f"fit: with batch_size the data is arrays, got {describe(data)}; without batch_size "
            "it is taken as an iterable of batches"
        )
    _check_lists("", data)


def _check_lists(path: str, data: Any) -> None:
    """Raise TypeError for a list of examples anywhere in the data."""
    if isinstance(data, list) and data:
        _check_list(f" in '{path}'" if path else "", data)
    if isinstance(data, Mapping):
        parts = data.items()
    elif isinstance(data, list | tuple):
        parts = zip(getattr(data, "_fields", range(len(data))), data, strict=True)
    else:
        return
    for name, part in parts:
        _check_lists(f"{path}/{name}" if path else str(name), part)


def _check_list(where: str, data: list) -> None:
    """Raise TypeError if a list is not a container of a few arrays."""
    first, n = data[0], len(data)
    if n > 1 and all(isinstance(x, tuple | dict) and len(x) == len(first) for x in data):
        raise TypeError(
            f"fit: the data{where} is a list of {n} examples, each {describe(first)}; fit takes "
            "one array per part: tuple(np.stack(part) for part in zip(*data))"
        )
    containers = list | tuple | dict
    numbers = all(np.ndim(x) == 0 for x in data if not isinstance(x, containers))
    if numbers and not isinstance(first, containers):
        raise TypeError(
            f"fit: the data{where} is a list of {n} numbers; make it an array: np.asarray(data)"
        )
    shapes = {np.shape(x) for x in data} if all(hasattr(x, "shape") for x in data) else set()
    if n > 2 and len(shapes) == 1:
        raise TypeError(
            f"fit: the data{where} is a list of {n} arrays of shape {shapes.pop()}; make it one "
            f"array of {n} examples: np.stack(data)"
        )
    if isinstance(first, list):
        raise TypeError(
            f"fit: the data{where} is a list of lists; make it an array: np.asarray(data)"
        )


def check_iterable(data: Any) -> None:
    """Raise TypeError for data passed without `batch_size` that is not an iterable of batches."""
    other = isinstance(data, dict | tuple | str | bytes) or hasattr(data, "shape")
    if other or not (isinstance(data, Iterable) or callable(data)):
        raise TypeError(
            "fit: without batch_size the data is an iterable of batches, got "
            f"{type(data).__name__}; for arrays say batch_size"
        )
    if callable(data) and not isinstance(data, Iterable):
        hint = "; fit calls it with the number of the pass: write lambda number: ..."
        check_call(
            "data",
            data,
            "an iterable of batches or a function (number of the pass) -> iterable",
            hint,
        )
    if isinstance(data, list) and data and isinstance(data[0], tuple) and len(data[0]) > 1:
        last = data[0][-1]
        if np.ndim(last) == 0 and not isinstance(last, str | Mapping | tuple | list):
            raise TypeError(
                f"fit: without batch_size each item is a batch, and this list of {len(data)} "
                f"holds single examples: {describe(data[0])}; make it arrays, "
                "tuple(np.stack(part) for part in zip(*data)), and say batch_size"
            )


def _is_loader(data: Any) -> bool:
    """Whether an object yields batches and is neither a container nor an array for JAX."""
    if isinstance(data, list | tuple | dict | str) or hasattr(data, "shape"):
        return False
    return hasattr(data, "__iter__") and jax.tree.leaves(data)[:1] == [data]


def check_call(name: str, function: Any, what: str, hint: str = "") -> None:
    """Raise TypeError unless a function can be called with one argument.

    Args:
      name: the argument of `fit`.
      function: its value.
      what: the function that is expected.
      hint: what the error says in addition if the function takes other arguments.
    """
    if not callable(function):
        raise TypeError(f"fit: {name} must be {what}, got {describe(function)}")
    # Some built-in functions have no signature.
    with contextlib.suppress(ValueError):
        signature = inspect.signature(function)
        try:
            signature.bind(None)
        except TypeError:
            text = f"fit: {name} must be {what}, got {describe(function)}{signature}"
            raise TypeError(f"{text}, which cannot be called with one argument{hint}") from None
