"""Values of a traced program, with the roles of their axes."""

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

# The name of the scope in which pairs are declared.
MARK = "all_pairs"

# The roles of an axis along which values vary.
EXAMPLES, OTHER = "examples", "other"
# The roles of an axis along which values are constant: it has size one in the data or by a
# computation, the user's code has added it, or JAX has added it.
GIVEN, ASKED, FILLED = "given", "asked", "filled"
# From the role that decides most to the one that decides least.
ORDER = (EXAMPLES, OTHER, GIVEN, ASKED, FILLED)
Roles = tuple[str, ...]


class Found(NamedTuple):
    """An operation that pairs examples.

    Attributes:
      operation: its name.
      where: file and line of the call, "" if unknown.
      shapes: the shapes of the two operands that are paired.
    """

    operation: str
    where: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


class Value(NamedTuple):
    """A value of the program.

    Attributes:
      shape: its shape.
      roles: the role of each axis.
      number: a mark that is equal for equal expressions, whatever axes of size one they have.
      norm: a mark that is equal for sums over the same axes of different values; None for other
        values.
      reduced: whether a reduction made it.
      batched: whether a broadcast of `vmap` made it.
      squeezed: its shape before JAX took out axes of size one; None if JAX took none out.
    """

    shape: tuple[int, ...]
    roles: Roles
    number: Hashable
    norm: Hashable = None
    reduced: bool = False
    batched: bool = False
    squeezed: tuple[int, ...] | None = None
