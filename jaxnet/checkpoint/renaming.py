"""Rename the leaves of a file, or of another source of arrays."""

import glob
from collections.abc import Callable, Iterable

from jaxnet.checkpoint import structure
from jaxnet.checkpoint.container import Content
from jaxnet.checkpoint.errors import Misfit
from jaxnet.checkpoint.selection import select
from jaxnet.checkpoint.structure import Path, leaf_name
from jaxnet.checkpoint.words import shown

__all__ = ["Rename", "rename_all", "renamed", "with_prefix"]

Rename = dict[str, str] | Callable[[str], str]


def renamed(file: str, names: Iterable[str], rename: Rename) -> dict[str, Path]:
    """The new path of each leaf.

    Args:
      file: how errors name the source.
      names: the names of all leaves.
      rename: a function of the name; or a dict from old prefixes to new prefixes, of which the
        longest that fits applies.

    Returns:
      The new paths by the old names.

    Raises:
      TypeError: the function returns something other than a str.
      Misfit: a prefix is not in the source, or two leaves would be in one place.
    """
    names = list(names)
    if callable(rename):
        new = {name: rename(name) for name in names}
    else:
        select(file, names, [glob.escape(old) for old in rename])
        new = {name: with_prefix(name, rename) for name in names}
    if odd := [(name, x) for name, x in new.items() if not isinstance(x, str)]:
        name, x = odd[0]
        raise TypeError(f"rename must give a str for each path, got {x!r} for '{shown(name)}'")
    paths = {name: structure.leaf_path(x) for name, x in new.items()}
    _check_distinct(file, paths)
    return paths


def rename_all(file: str, content: Content, rename: Rename) -> tuple[Content, dict[str, str]]:
    """Give the leaves of a file other names. The result has no containers but nested dicts.

    Returns the new content, and the names in the file by the new names.
    """
    paths = renamed(file, content.leaves, rename)
    old = {leaf_name(path): name for name, path in paths.items()}
    leaves = {new: content.leaves[name] for new, name in old.items()}
    tensors = {new: content.tensors[name] for new, name in old.items() if name in content.tensors}
    node = structure.nest({path: content.leaves[name] for name, path in paths.items()})
    return Content(content.header, node, leaves, tensors, False), old


def with_prefix(name: str, prefixes: dict[str, str]) -> str:
    """The name with another prefix, by the longest of the old prefixes that fits."""
    fitting = [old for old in prefixes if old in ("", name) or name.startswith(f"{old}/")]
    if not fitting:
        return name
    old = max(fitting, key=len)
    rest = name[len(old) :].removeprefix("/") if old else name
    return "/".join(part for part in (prefixes[old], rest) if part)


def _check_distinct(file: str, paths: dict[str, Path]) -> None:
    """Raise Misfit if two leaves have the same new path, or if one would lie below another."""
    taken: dict[Path, str] = {}
    for name, path in paths.items():
        if path in taken:
            text = f"rename gives this path to '{shown(taken[path])}' and '{shown(name)}'"
            raise Misfit(file, leaf_name(path), text)
        taken[path] = name
    for path in taken:
        above = next((path[:i] for i in range(len(path)) if path[:i] in taken), None)
        if above is not None:
            text = (
                f"rename makes '{shown(taken[above])}' of the file a leaf here, and puts "
                f"'{shown(taken[path])}' below it"
            )
            raise Misfit(file, leaf_name(above), text)
