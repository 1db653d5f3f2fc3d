"""Parts of a tree: the leaves whose paths match patterns."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxnet.nodes import is_dict, is_leaf, level, like_node, names_of
from jaxnet.tree.leaves import flatten, map_with_path, paths

__all__ = ["mask", "matches", "merge", "select", "split"]


def matches(path: str, *patterns: str, below: bool = True) -> bool:
    """Tell whether one of the patterns matches a path or a node above it.

    Args:
      path: the path.
      *patterns: patterns, as the module describes them.
      below: False to accept only matches of the path itself.

    Returns:
      True if a pattern matches.

    Example:
      >>> matches("blocks/attn/bias", "**/bias"), matches("blocks/attn/bias", "blocks")
      (True, True)
      >>> matches("head/bias", "*/kernel")
      False
    """
    return any(_matches(names_of(path), names_of(pattern), below) for pattern in patterns)


def select(tree: Any, *patterns: str) -> dict[str, Any]:
    """Select the leaves whose path matches one of the patterns.

    Args:
      tree: any pytree.
      *patterns: patterns of paths.

    Returns:
      {path: leaf}.

    Raises:
      KeyError: a pattern matches nothing.

    Example:
      >>> select({"head": {"bias": 2, "kernel": 3}}, "**/bias")
      {'head/bias': 2}
    """
    leaves = flatten(tree)
    _check_patterns(leaves, patterns)
    return {path: leaf for path, leaf in leaves.items() if matches(path, *patterns)}


def mask(tree: Any, *patterns: str) -> Any:
    """Make a tree of bools, as `optax.masked` and weight decay take it.

    Args:
      tree: any pytree.
      *patterns: patterns of paths.

    Returns:
      The tree, with True for each leaf whose path matches one of the patterns, else False.

    Raises:
      KeyError: a pattern matches nothing.

    Example:
      >>> mask({"head": {"bias": 2, "kernel": 3}}, "**/kernel")
      {'head': {'bias': False, 'kernel': True}}
    """
    _check_patterns(paths(tree), patterns)
    return map_with_path(lambda path, _: matches(path, *patterns), tree)


def split(tree: Any, *patterns: str) -> tuple[Any, Any]:
    """Split a tree in two. `merge` puts the parts together again.

    The dicts of a part lack the other leaves, so `jax.grad`, `optax` and checkpoints of that part
    ignore them. Tuples, lists, OrderedDicts and other nodes whose children have positions hold None
    instead.

    Args:
      tree: any pytree.
      *patterns: patterns of paths.

    Returns:
      (the leaves that match one of the patterns, the other leaves), as trees.

    Raises:
      KeyError: a pattern matches nothing.

    Example:
      >>> split({"body": {"kernel": 1}, "head": {"bias": 2, "kernel": 3}}, "head/kernel")
      ({'head': {'kernel': 3}}, {'body': {'kernel': 1}, 'head': {'bias': 2}})
    """
    _check_patterns(paths(tree), patterns)
    parts = _split(tree, "", lambda path: matches(path, *patterns))
    empty = like_node(tree, []) if is_dict(tree) else None
    return tuple(empty if part is _MISSING else part for part in parts)  # pyright: ignore[reportReturnType]


def merge(*trees: Any) -> Any:
    """Put the parts of a split tree together.

    Args:
      *trees: the parts.

    Returns:
      The whole tree.

    Raises:
      ValueError: two parts have the same leaf, or differ in structure.

    Example:
      >>> merge({"head": {"bias": 2}}, {"head": {"kernel": 3}, "body": 1})
      {'body': 1, 'head': {'bias': 2, 'kernel': 3}}
    """
    return functools.reduce(lambda a, b: _merge(a, b, ""), trees)


class _Missing:
    """The place of a leaf that is in the other part of a split tree."""


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
    prefix = f"{path}/" if path else ""
    pairs = zip(names, children, strict=True)
    parts = [_split(child, prefix + name, chosen) for name, child in pairs]
    sides = []
    for side in zip(*parts, strict=True):
        if all(part is _MISSING for part in side):
            sides.append(_MISSING)
        elif is_dict(node):
            pairs = zip(sorted(node), side, strict=True)
            sides.append(like_node(node, [pair for pair in pairs if pair[1] is not _MISSING]))
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
        raise ValueError(
            f"cannot merge {kinds} at '{path.strip('/')}': their children differ; merge parts of "
            "one tree"
        )
    merged = [_merge(x, y, f"{path}/{n}") for n, x, y in zip(names, left, right, strict=True)]
    return jax.tree.unflatten(structure, merged)
