"""Checks of arguments that all packages share."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["size_of"]


def size_of(what: str, value: Any, minimum: int = 1) -> int:
    """Convert a size to a Python int.

    Everything that `operator.index` accepts is a size, except a bool.

    Args:
      what: how the error names the argument, such as "dense: features".
      value: the size as the caller gave it.
      minimum: the smallest size that is accepted.

    Returns:
      The size.

    Raises:
      ValueError: the value is not an integer, or it is below `minimum`.

    Example:
      >>> size_of("dense: features", 3)
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
