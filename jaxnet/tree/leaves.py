"""The leaves of a tree by path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxnet.nodes import children_of, level, like_node, names_of, path_of

__all__ = ["flatten", "get", "map_with_path", "paths", "put", "unflatten"]


def flatten(tree: Any) -> dict[str, Any]:
    """Collect the leaves of a tree by path.

    Args:
      tree: any pytree.

    Returns:
      {path: leaf}, in JAX's order.

    Raises:
      ValueError: two leaves have the same path, because a key contains a '/'.

    Example:
      >>> flatten({"out": {"bias": 1}, "steps": (2, 3)})
      {'out/bias': 1, 'steps/0': 2, 'steps/1': 3}
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_of(path)
        if name in leaves:
            raise ValueError(f"two leaves have the path '{name}'; a key must not contain a '/'")
        leaves[name] = leaf
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Any:
    """Build nested dicts from leaves by path.

    It is the inverse of `flatten` for trees of dicts with string keys.

    Args:
      leaves: {path: leaf}.

    Returns:
      The tree.

    Raises:
      ValueError: a path is both a leaf and a node.

    Example:
      >>> unflatten({"out/bias": 1, "out/kernel": 2})
      {'out': {'bias': 1, 'kernel': 2}}
    """
    if set(leaves) == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"'{path}' goes through a leaf; a path cannot be both a leaf and a node"
                )
        if name in node:
            raise ValueError(f"'{path}' is both a leaf and a node")
        node[name] = leaf
    return tree


def paths(tree: Any) -> list[str]:
    """List the paths of all leaves.

    Args:
      tree: any pytree.

    Returns:
      The paths, in JAX's order.

    Example:
      >>> paths({"out": {"bias": 1, "kernel": 2}})
      ['out/bias', 'out/kernel']
    """
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map a function over the leaves of a tree and their paths, as `jax.tree.map` does.

    Args:
      fn: (path, leaf, *leaves of `rest`) -> new leaf.
      tree: any pytree.
      *rest: trees of the same structure.

    Returns:
      The tree of the new leaves.

    Example:
      >>> map_with_path(lambda path, leaf: f"{path}: {leaf}", {"out": {"bias": 1}})
      {'out': {'bias': 'out/bias: 1'}}
    """

    def named(path, *leaves):
        return fn(path_of(path), *leaves)

    return jax.tree_util.tree_map_with_path(named, tree, *rest)


def get(tree: Any, path: str) -> Any:
    """Get the leaf or node at a path.

    Args:
      tree: any pytree.
      path: the path; '' is the tree itself.

    Returns:
      The leaf or node.

    Raises:
      KeyError: there is none. The message has the most similar names.

    Example:
      >>> get({"out": {"bias": 1, "kernel": 2}}, "out/kernel")
      2
    """
    node = tree
    for depth, name in enumerate(names_of(path)):
        children = children_of(node)
        if name not in children:
            raise KeyError(_no_child(path, depth, name, children))
        node = children[name]
    return node


def put(tree: Any, path: str, value: Any) -> Any:
    """Copy a tree with another leaf or node at a path.

    Args:
      tree: any pytree. It is not changed.
      path: the path. Its last name may be a new key of a dict.
      value: the new leaf or node.

    Returns:
      The new tree.

    Raises:
      KeyError: another name of the path does not exist.

    Example:
      >>> put({"out": {"bias": 1}}, "out/bias", 5)
      {'out': {'bias': 5}}
    """
    return _put(tree, names_of(path), value, path)


def _put(node: Any, names: list[str], value: Any, path: str) -> Any:
    if not names:
        return value
    name, *rest = names
    children = children_of(node)
    depth = len(names_of(path)) - len(names)
    if name not in children:
        if isinstance(node, dict) and not rest:
            return like_node(node, [*node.items(), (name, value)])
        raise KeyError(_no_child(path, depth, name, children))
    known, nodes, structure = level(node)
    nodes[known.index(name)] = _put(children[name], rest, value, path)
    return jax.tree.unflatten(structure, nodes)


def _no_child(path: str, depth: int, name: str, children: Mapping[str, Any]) -> str:
    where = "/".join(names_of(path)[:depth]) or "the top of the tree"
    close = difflib.get_close_matches(name, children, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return (
        f"no '{path}': {where} has no '{name}'{hint} (it has "
        f"{', '.join(children) or 'no children'})"
    )
