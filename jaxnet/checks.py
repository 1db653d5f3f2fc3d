"""Checks of arguments that every room shares."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["size_of"]


def size_of(what: str, value: Any, minimum: int = 1) -> int:
    """A size as a Python int: whatever `operator.index` accepts, so NumPy integers too, but no bool.

    Args:
      what: how the error names the argument, such as "dense: units".
      value: the size as the caller gave it.
      minimum: the smallest size that is accepted.

    Raises:
      ValueError: the value is no whole number, or it is below `minimum`.

    Example:
      >>> size_of("dense: units", 3)
      3
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
            raise TypeError
        size = operator.index(value)
        if size < minimum:
            raise TypeError
    except TypeError:
        wanted = "a positive int" if minimum == 1 else f"an int of at least {minimum}"
        raise ValueError(f"{what} must be {wanted}, got {value!r}") from None
    return size
