"""From a pytree to its structure and arrays, and back."""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxnet.checkpoint import scalars
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.structure import (
    ARRAYS,
    DICTS,
    LISTS,
    MAX_DEPTH,
    Node,
    Path,
    collisions,
    leaf_name,
    type_names,
)

__all__ = ["build", "encode", "refill"]

# The kinds of the containers that are restored as they were.
_CONTAINERS = {
    dict: "dict",
    collections.defaultdict: "dict",
    collections.OrderedDict: "ordered_dict",
    list: "list",
    tuple: "tuple",
}


def encode(
    file: str, tree: Any, describe: Callable[[str, Any], Node]
) -> tuple[Node, dict[str, Any]]:
    """Take a tree apart.

    Args:
      file: how errors name the file.
      tree: any pytree.
      describe: (name, leaf) -> the node of a leaf that is not a Python scalar.

    Returns:
      The structure, and the leaves that are not Python scalars by name.

    Raises:
      CheckpointError: the tree is too deep or has keys that cannot be stored; and errors of
        `describe`.
    """
    from jax.tree_util import all_leaves

    arrays = {}

    def visit(x: Any, path: Path) -> Node:
        if len(path) > MAX_DEPTH:
            text = f"the tree is nested deeper than {MAX_DEPTH} levels: does it contain itself?"
            raise CheckpointError(file, leaf_name(path[:8]) + "/...", text)
        if type(x) in scalars.KINDS:
            return Node(scalars.KINDS[type(x)], x)
        kind = _CONTAINERS.get(type(x))
        if kind in DICTS:
            return visit_all(kind, list(x.keys()), x.values(), path)
        if kind in LISTS:
            return visit_all(kind, range(len(x)), x, path)
        if not all_leaves([x]):
            fields = _fields(x)
            children = [child for _, child in fields]
            return visit_all("record", [name for name, _ in fields], children, path)
        name = leaf_name(path)
        arrays[name] = x
        return describe(name, x)

    def visit_all(kind: str, keys: Sequence[Any], children: Iterable[Any], path: Path) -> Node:
        if kind in DICTS:
            _check_keys(file, path, keys)
        steps = [str(key) for key in keys]
        if len(set(steps)) < len(steps):
            name = leaf_name((*path, next(step for step in steps if steps.count(step) > 1)))
            text = f"two keys of type {type_names(keys)} give this one name: rename one"
            raise CheckpointError(file, name, text)
        nodes = [visit(x, (*path, step)) for step, x in zip(steps, children, strict=True)]
        return Node(kind, None, keys, nodes)

    return visit(tree, ()), arrays


def build(node: Node, arrays: dict[str, Any], path: Path = ()) -> Any:
    """The tree with this structure and these arrays by name. A record becomes a dict."""
    if node.kind in ARRAYS:
        return arrays[leaf_name(path)]
    if node.kind in scalars.NAMES:
        return node.value
    below = zip(node.keys, node.children, strict=True)
    children = [build(child, arrays, (*path, str(key))) for key, child in below]
    if node.kind in LISTS:
        return LISTS[node.kind](children)
    return DICTS.get(node.kind, dict)(zip(node.keys, children, strict=True))


def refill(like: Any, leaves: dict[str, Any]) -> Any:
    """The tree `like` with other leaves, which are given by name."""
    from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

    paths, treedef = tree_flatten_with_path(like)
    names = [leaf_name(tuple(keystr((step,), simple=True) for step in path)) for path, _ in paths]
    return tree_unflatten(treedef, [leaves[name] for name in names])


def _fields(x: Any) -> list[tuple[str, Any]]:
    """The children of a registered node by name."""
    from jax.tree_util import keystr, tree_flatten_with_path

    pairs, _ = tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    return [(keystr(path, simple=True), child) for path, child in pairs]


def _check_keys(file: str, path: Path, keys: Sequence[Any]) -> None:
    """Raise CheckpointError unless a dict in a file can have these keys."""
    for key in keys:
        for part in key if type(key) is tuple else [key]:
            _check_key(file, path, part)
    if text := collisions(keys):
        raise CheckpointError(file, leaf_name(path), f"{text}: use strings")


def _check_key(file: str, path: Path, key: Any) -> None:
    too_long = isinstance(key, int) and key.bit_length() > 10_000
    if type(key) not in scalars.KINDS or too_long:
        text = (
            f"it has a key of type {type(key).__name__}: use str, int, float, bool, bytes, None "
            "or tuples of these"
        )
        raise CheckpointError(file, leaf_name(path), text)
    if isinstance(key, str) and re.search("[\ud800-\udfff]", key):
        text = f"its key {key!a} is not Unicode text (it has lone surrogates): rename it"
        raise CheckpointError(file, leaf_name(path), text)
