"""Trees by path: find, select, split, merge, change, count and print the leaves of any pytree.

A path names a leaf as its keys joined by '/': `blocks/attn/query/kernel`, `0/mu/hidden/bias` in an
optimizer's state. A pattern is a path with wildcards: `*` is any name, `**` any number of names
(also none); within a name, `*` is any text, `?` any character, `[ab]` one of these, `[!ab]`
another. A pattern that matches an inner node selects everything below it: `head` is all of the
head, `**/bias` every bias.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.nodes import children_of, is_dict, is_leaf, level, like_node, names_of, path_of
from jaxnet.numerics import euclidean

__all__ = [
    "bytes_of",
    "count",
    "flatten",
    "get",
    "map_with_path",
    "mask",
    "matches",
    "merge",
    "norm",
    "norms",
    "paths",
    "put",
    "select",
    "split",
    "table",
    "unflatten",
]


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in JAX's order.

    Raises: ValueError if two leaves have one path (a key that holds a '/').

    >>> flatten({"out": {"bias": 1}, "steps": (2, 3)})
    {'out/bias': 1, 'steps/0': 2, 'steps/1': 3}
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_of(path)
        if name in leaves:
            raise ValueError(f"two leaves have the path '{name}'; a key must not hold a '/'")
        leaves[name] = leaf
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Any:
    """Nested dicts from leaves by path: the inverse of `flatten` for trees of dicts with string
    keys.

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
    """The paths of all leaves, in JAX's order."""
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def matches(path: str, *patterns: str, below: bool = True) -> bool:
    """Whether one of the patterns matches the path or, unless `below` is False, a node above it.

    >>> matches("blocks/attn/bias", "**/bias"), matches("blocks/attn/bias", "blocks")
    (True, True)
    >>> matches("head/bias", "*/kernel")
    False
    """
    return any(_matches(names_of(path), names_of(pattern), below) for pattern in patterns)


def select(tree: Any, *patterns: str) -> dict[str, Any]:
    """The leaves whose path matches one of the patterns, by path. Raises KeyError if a pattern
    matches nothing.
    """
    leaves = flatten(tree)
    _check_patterns(leaves, patterns)
    return {path: leaf for path, leaf in leaves.items() if matches(path, *patterns)}


def mask(tree: Any, *patterns: str) -> Any:
    """A tree of bools, True where the path matches, as `optax.masked` and weight decay want it.

    Raises: KeyError if a pattern matches nothing.
    """
    _check_patterns(paths(tree), patterns)
    return map_with_path(lambda path, _: matches(path, *patterns), tree)


def split(tree: Any, *patterns: str) -> tuple[Any, Any]:
    """Split a tree in two: (what matches one of the patterns, the rest); `merge` puts them together
    again.

    What is not in a part is missing from its dicts, so that `jax.grad`, `optax` and checkpoints of
    that part know nothing of it. In tuples, lists, OrderedDicts and other nodes, where positions
    count, None stands in its place.

    Raises: KeyError if a pattern matches nothing.

    >>> split({"body": {"kernel": 1}, "head": {"bias": 2, "kernel": 3}}, "head/kernel")
    ({'head': {'kernel': 3}}, {'body': {'kernel': 1}, 'head': {'bias': 2}})
    """
    _check_patterns(paths(tree), patterns)
    parts = _split(tree, "", lambda path: matches(path, *patterns))
    empty = like_node(tree, []) if is_dict(tree) else None
    return tuple(empty if part is _MISSING else part for part in parts)  # pyright: ignore[reportReturnType]


def merge(*trees: Any) -> Any:
    """Put the parts of a split tree together.

    Raises: ValueError if two of them hold the same leaf, or differ in structure.

    >>> merge({"head": {"bias": 2}}, {"head": {"kernel": 3}, "body": 1})
    {'body': 1, 'head': {'bias': 2, 'kernel': 3}}
    """
    return functools.reduce(lambda a, b: _merge(a, b, ""), trees)


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` with the path: fn(path, leaf, *leaves of rest)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_of(path), *leaves), tree, *rest
    )


def get(tree: Any, path: str) -> Any:
    """The leaf or node at a path ('' is the tree itself). Raises KeyError with the nearest
    names.
    """
    node = tree
    for depth, name in enumerate(names_of(path)):
        children = children_of(node)
        if name not in children:
            raise KeyError(_no_child(path, depth, name, children))
        node = children[name]
    return node


def put(tree: Any, path: str, value: Any) -> Any:
    """A copy of the tree with another leaf or node at a path; a new key in a dict is added.

    Raises: KeyError if the path leads through what is not there.
    """
    return _put(tree, names_of(path), value, path)


def count(tree: Any) -> int:
    """How many numbers the tree holds: the sum of the sizes of its leaves."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """How many bytes its leaves take, bit-packed dtypes counted by the byte that each element takes
    in memory.
    """
    return sum(math.prod(np.shape(leaf)) * _dtype(leaf).itemsize for leaf in jax.tree.leaves(tree))


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers together, sqrt(sum |x|^2), accumulated in at least float32.

    Squares of very large and very small numbers neither overflow nor vanish. The gradient at zero
    is zero.
    """
    return euclidean(jax.tree.leaves(tree))


def norms(tree: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of each leaf, by path."""
    return {path: euclidean([leaf]) for path, leaf in flatten(tree).items()}


def table(tree: Any) -> str:
    """The tree as text: path, shape, dtype, count, bytes and Euclidean norm of each leaf, and the
    totals.

    Leaves without values (`jax.ShapeDtypeStruct`) and those that are no numbers have no norm.
    """
    rows = [("path", "shape", "dtype", "count", "bytes", "norm")]
    for path, leaf in flatten(tree).items():
        shape = "x".join(map(str, np.shape(leaf))) or "-"
        rows.append(
            (
                path or ".",
                shape,
                str(_dtype(leaf)),
                f"{count(leaf):,}",
                f"{bytes_of(leaf):,}",
                _norm_text(leaf),
            )
        )
    rows.append(("total", "", "", f"{count(tree):,}", f"{bytes_of(tree):,}", ""))
    return align(rows, left=3)


def align(rows: list[tuple[str, ...]], left: int) -> str:
    """Rows of words as columns, the first `left` of them flush left, the others right; a rule under
    the header.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        sized = enumerate(zip(row, widths, strict=True))
        cells = [word.ljust(w) if i < left else word.rjust(w) for i, (word, w) in sized]
        return "  ".join(cells).rstrip()

    return "\n".join(
        [line(rows[0]), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows[1:])]
    )


class _Missing:
    """What a part of a split tree does not hold."""


_MISSING = _Missing()


def _matches(names: list[str], pattern: list[str], below: bool) -> bool:
    if not pattern:
        return below or not names
    first, *rest = pattern
    if first == "**":
        return any(_matches(names[i:], rest, below) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], first) and _matches(names[1:], rest, below)


def _check_patterns(known: Iterable[str], patterns: tuple[str, ...]) -> None:
    known = list(known)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in known):
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
            raise KeyError(f"no path matches '{pattern}'; the nearest of {len(known)} are {close}")


def _split(node: Any, path: str, chosen: Callable[[str], bool]) -> tuple[Any, Any]:
    if is_leaf(node):
        return (node, _MISSING) if chosen(path) else (_MISSING, node)
    names, children, structure = level(node)
    if not children:
        return _MISSING, node
    parts = [
        _split(c, f"{path}/{n}" if path else n, chosen)
        for n, c in zip(names, children, strict=True)
    ]
    sides = []
    for side in zip(*parts, strict=True):
        if all(part is _MISSING for part in side):
            sides.append(_MISSING)
        elif is_dict(node):
            kept = [
                (key, part)
                for key, part in zip(sorted(node), side, strict=True)
                if part is not _MISSING
            ]
            sides.append(like_node(node, kept))
        else:
            filled = [None if part is _MISSING else part for part in side]
            sides.append(jax.tree.unflatten(structure, filled))
    return sides[0], sides[1]


def _merge(a: Any, b: Any, path: str) -> Any:
    if is_dict(a) and is_dict(b):
        both = {k: _merge(a[k], b[k], f"{path}/{k}") for k in a.keys() & b.keys()}
        return like_node(a, sorted({**a, **b, **both}.items(), key=lambda item: item[0]))
    if a is None or b is None:
        return b if a is None else a
    if is_leaf(a) or is_leaf(b):
        raise ValueError(
            f"both trees hold '{path.strip('/')}'; the parts of a split have no leaf in common"
        )
    (names, left, structure), (others, right, _) = level(a), level(b)
    if type(a) is not type(b) or names != others:
        kinds = f"{type(a).__name__} and {type(b).__name__}"
        raise ValueError(f"cannot merge {kinds} at '{path.strip('/')}': other children")
    merged = [_merge(x, y, f"{path}/{n}") for n, x, y in zip(names, left, right, strict=True)]
    return jax.tree.unflatten(structure, merged)


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


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _norm_text(leaf: Any) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct) or not (
        jnp.issubdtype(_dtype(leaf), np.number) or jnp.issubdtype(_dtype(leaf), np.bool_)
    ):
        return "-"
    return f"{float(euclidean([leaf])):.4g}"
