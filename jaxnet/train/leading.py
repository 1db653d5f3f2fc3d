"""The leading axis that all leaves of a pytree share: examples of data, members of an ensemble."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxnet import tree
from jaxnet.train.weighted import check_shape, weighted_nodes
from jaxnet.train.words import describe, shape_of

__all__ = ["count_examples", "leading_length"]


def leading_length(what: str, things: str, data: Any, remedy: str) -> int:
    """Return the length of the leading axis that all leaves share.

    Args:
      what: how errors name the data, such as "data".
      things: what the axis counts, such as "examples".
      data: a pytree of arrays, or of specs of arrays, with leaves [N, ...].
      remedy: what to do if a leaf lacks the axis, or if the lengths differ.

    Returns:
      The length N, at least 1.

    Raises:
      ValueError: the lengths differ or are zero, or a leaf has no leading axis.
    """
    lengths = {}
    for path, leaf in tree.flatten(data).items():
        shape = shape_of(leaf)
        if not shape:
            raise ValueError(
                f"{what}: every leaf needs a leading axis of {things}, '{path}' is a scalar "
                f"({describe(leaf)}); {remedy}"
            )
        lengths[path] = int(shape[0])
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{what}: all leaves must have the same number of {things}, got {lengths}; {remedy}"
        )
    n = next(iter(lengths.values()), 0)
    if not n:
        raise ValueError(f"{what}: there are no {things}; pass arrays with at least one row")
    return n


def count_examples(data: Any) -> int:
    """Return the number of examples in data or in a batch.

    Args:
      data: a pytree of arrays, or of specs of arrays, with leaves [N, ...].

    Returns:
      The number N.

    Raises:
      ValueError: the lengths differ or are zero, a leaf has no leading axis, or weights do not have
        the shape [N].
      TypeError: a leaf is a Python list instead of an array.
    """
    _check_lists(data)
    remedy = "give every leaf one row per example; np.stack and np.asarray make arrays of lists"
    n = leading_length("data", "examples", data, remedy)
    if n >= 2**31:
        raise ValueError(
            f"data: rows are counted in int32, at most 2**31 - 1 of them, got {n}; split the data"
        )
    for path, weights in weighted_nodes(data):
        check_shape(f"data: '{path}'", weights, n)
    return n


# A list of more arrays than this, all of one shape, is a list of examples.
_MANY = 16


def _check_lists(data: Any) -> None:
    """Raise TypeError for a Python list of examples, which JAX treats as a container of as many
    leaves.
    """
    nodes = [("", data)]
    while nodes:
        path, node = nodes.pop()
        if isinstance(node, list) and node:
            _check_list(f"'{path}'" if path else "it", node)
        if isinstance(node, dict):
            children = list(node.items())
        elif isinstance(node, list | tuple):
            names = getattr(node, "_fields", range(len(node)))
            children = list(zip(names, node, strict=True))
        else:
            continue
        nodes += [(f"{path}/{name}".lstrip("/"), child) for name, child in children]


def _check_list(name: str, node: list) -> None:
    """Raise TypeError if a list is not a container of a few arrays."""
    first, n = node[0], len(node)
    if isinstance(first, bool | int | float | str | np.generic):
        raise TypeError(
            f"data: {name} is a list of {n} numbers; make an array of it, with np.asarray"
        )
    shapes = {np.shape(x) for x in node if hasattr(x, "shape")}
    if n > _MANY and len(shapes) == 1 and hasattr(first, "shape"):
        raise TypeError(
            f"data: {name} is a list of {n} arrays {list(np.shape(first))}; make one array of it, "
            "with np.stack"
        )
    examples = n > _MANY or any(not np.ndim(leaf) for leaf in jax.tree.leaves(first))
    if n > 1 and examples and isinstance(first, tuple | list | dict):
        kind = type(first).__name__
        raise TypeError(
            f"data: {name} is a list of {n} examples, each a {kind}; make a {kind} of arrays, one "
            "per field, with np.stack"
        )
