"""The roles of axes, and values with roles."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

__all__ = [
    "ASKED",
    "EXAMPLES",
    "FILLED",
    "Found",
    "GIVEN",
    "MARK",
    "ORDER",
    "OTHER",
    "Roles",
    "Value",
]

MARK = "all_pairs"

# The roles of an axis. The values vary along the first two and are constant along the others.
EXAMPLES, OTHER = "examples", "other"
# Size one in the data or by a computation, added by the user's code, and added by JAX.
GIVEN, ASKED, FILLED = "given", "asked", "filled"
ORDER = (EXAMPLES, OTHER, GIVEN, ASKED, FILLED)
Roles = tuple[str, ...]


class Found(NamedTuple):
    """An operation that pairs examples.

    Attributes:
      operation: its name.
      where: file and line of the call, "" if unknown.
      shapes: of the two operands that are paired.
    """

    operation: str
    where: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class Value(NamedTuple):
    """A value of the program.

    Attributes:
      shape: its shape.
      roles: one per axis.
      number: equal for equal expressions, whatever axes of size one they have.
      norm: equal for sums over the same axes of different values, None for other values.
      reduced: whether a reduction made it.
      batched: whether a broadcast of `vmap` made it.
      squeezed: its shape before JAX took out axes of size one, None if JAX took none out.
    """

    shape: tuple[int, ...]
    roles: Roles
    number: Hashable
    norm: Hashable = None
    reduced: bool = False
    batched: bool = False
    squeezed: tuple[int, ...] | None = None
