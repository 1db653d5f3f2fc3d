"""One level of a tree: the children of a node, their names, and the node of other children."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import jax

__all__ = ["children_of", "is_dict", "is_leaf", "level", "like_node", "names_of", "path_of"]


def path_of(path) -> str:
    """The path of a leaf: its names, joined by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def level(node: Any) -> tuple[list[str], list[Any], Any]:
    """One level of a tree: (names of the children, children, structure to put them together)."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [path_of(path) for path, _ in pairs], [child for _, child in pairs], structure


def is_dict(node: Any) -> bool:
    """Whether it is a node whose children have names but no order. JAX sorts the keys of a dict,
    but not those of an OrderedDict.
    """
    return isinstance(node, dict) and not isinstance(node, collections.OrderedDict)


def like_node(node: dict, items: Iterable[tuple[Any, Any]]) -> dict:
    """A dict of these items, of the type of `node`."""
    if isinstance(node, collections.defaultdict):
        return collections.defaultdict(node.default_factory, items)
    return type(node)(items)


def is_leaf(node: Any) -> bool:
    """Whether a node is a leaf. None and empty nodes are not."""
    return jax.tree_util.all_leaves([node])


def children_of(node: Any) -> dict[str, Any]:
    """The children of a node by name; none for a leaf."""
    if is_leaf(node):
        return {}
    names, children, _ = level(node)
    return dict(zip(names, children, strict=True))


def names_of(path: str) -> list[str]:
    """The names in a path."""
    return path.split("/") if path else []
