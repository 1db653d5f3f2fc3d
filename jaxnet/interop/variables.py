"""The variables of a network, {"params": params, "state": state}, as leaves with one path each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxnet.checkpoint import pytrees, structure
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.words import shown

__all__ = ["STATE", "Variables", "full_path", "variables_of"]

# Without a template, arrays with these names belong to `state`.
STATE = ("mean", "var")


class Variables(NamedTuple):
    """The leaves of params and state together, by their paths below params or state.

    Attributes:
      nodes: the nodes of all leaves.
      leaves: the arrays.
      whole: the full paths.
    """

    nodes: dict[str, Node]
    leaves: dict[str, Any]
    whole: dict[str, str]


def variables_of(
    file: str, what: str, variables: Any, describe: Callable[[str, str, Any], Node]
) -> Variables:
    """Take variables apart.

    Args:
      file: how errors name the source.
      what: how errors name the variables.
      variables: {"params": params, "state": state}; "state" may be missing.
      describe: (file, name, leaf) -> the node of a leaf.

    Returns:
      The leaves.

    Raises:
      ValueError: they do not have the form of variables, or the same path in both parts.
    """
    parts = {"params", "state"}
    if not isinstance(variables, Mapping) or not {"params"} <= set(variables) <= parts:
        got = list(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise ValueError(
            f"{what} must be {{'params': params, 'state': state}} or {{'params': params}}, got "
            f"{got}"
        )
    template, leaves = pytrees.encode(file, dict(variables), functools.partial(describe, file))
    nodes = structure.leaves(template)
    short = {name: name.partition("/")[2] for name in nodes}
    for name, below in short.items():
        if name.startswith("state/") and f"params/{below}" in nodes:
            raise ValueError(f"{what}: '{shown(below)}' is in params and in state: rename one")
    return Variables(
        {short[name]: node for name, node in nodes.items()},
        {short[name]: x for name, x in leaves.items()},
        {below: name for name, below in short.items()},
    )


def full_path(name: str) -> str:
    """The full path of an array without a template, from its path below params or state."""
    return f"{'state' if name.rpartition('/')[2] in STATE else 'params'}/{name}"
