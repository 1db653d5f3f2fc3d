"""Match the contents of a file with a request: choose leaves, rename them, and compare them with a
template.
"""

from __future__ import annotations

import difflib
import glob
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxnet.checkpoint import structure
from jaxnet.checkpoint.container import Content
from jaxnet.checkpoint.format import Misfit
from jaxnet.checkpoint.structure import DICTS, Node, Path, Spec, leaf_name
from jaxnet.checkpoint.words import shown

if TYPE_CHECKING:
    from jaxnet.checkpoint.casting import Target


def select(file: str, names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of the patterns, as in `jaxnet.tree`. Raises Misfit if a pattern
    matches no name.
    """
    from jaxnet import tree

    try:
        return set(tree.select(dict.fromkeys(names, True), *patterns))
    except KeyError as e:
        raise Misfit(file, None, shown(e.args[0], 3000)) from None


def prune(node: Node, names: set[str], path: Path = ()) -> Node | None:
    """The tree of these leaves alone, as `jaxnet.tree.split` makes it: where positions count, None
    is left in a gap.
    """
    if not node.children:
        return node if node.is_leaf and leaf_name(path) in names else None
    kept = [
        prune(child, names, (*path, str(key)))
        for key, child in zip(node.keys, node.children, strict=True)
    ]
    if not any(kept):
        return None
    if node.kind == "dict":
        pairs = [(key, child) for key, child in zip(node.keys, kept, strict=True) if child]
        return Node("dict", None, [key for key, _ in pairs], [child for _, child in pairs])
    return node._replace(children=[child or Node("none") for child in kept])


def renamed(
    file: str, names: Iterable[str], rename: dict[str, str] | Callable[[str], str]
) -> dict[str, Path]:
    """The new path of each leaf: by a function of its name, or by the longest of the prefixes in a
    dict.
    """
    names = list(names)
    if callable(rename):
        new = {name: rename(name) for name in names}
    else:
        select(file, names, [glob.escape(old) for old in rename])
        new = {name: _with_prefix(name, rename) for name in names}
    if odd := [(name, x) for name, x in new.items() if not isinstance(x, str)]:
        raise TypeError(
            f"rename must give a str for each path, got {odd[0][1]!r} for '{shown(odd[0][0])}'"
        )
    paths = {name: structure.leaf_path(x) for name, x in new.items()}
    taken: dict[Path, str] = {}
    for name, path in paths.items():
        if path in taken:
            raise Misfit(
                file,
                leaf_name(path),
                f"rename gives this path to '{shown(taken[path])}' and '{shown(name)}'",
            )
        taken[path] = name
    for path in taken:
        if above := next((path[:i] for i in range(len(path)) if path[:i] in taken), None):
            text = (
                f"rename makes '{shown(taken[above])}' of the file a leaf here, and puts "
                f"'{shown(taken[path])}' below it"
            )
            raise Misfit(file, leaf_name(above), text)
    return paths


def rename_all(
    file: str, content: Content, rename: dict[str, str] | Callable[[str], str]
) -> tuple[Content, dict[str, str]]:
    """The same leaves under other names, without the containers; and the name in the file by the
    new name.
    """
    paths = renamed(file, content.leaves, rename)
    leaves = {leaf_name(path): content.leaves[name] for name, path in paths.items()}
    tensors = {
        leaf_name(path): content.tensors[n] for n, path in paths.items() if n in content.tensors
    }
    node = structure.nest({path: content.leaves[name] for name, path in paths.items()})
    old = {leaf_name(path): name for name, path in paths.items()}
    return Content(content.header, node, leaves, tensors, False), old


def select_part(
    file: str, content: Content, patterns: list[str], old: Mapping[str, str]
) -> Content:
    """The part of a file's tree that matches the patterns, each by the new names or, if none
    matches, by the old ones.
    """
    from jaxnet import tree

    if not patterns:
        raise ValueError("only must be a pattern of paths or several, got none")
    names: set[str] = set()
    for pattern in patterns:
        chosen = {name for name in content.leaves if tree.matches(name, pattern)}
        chosen = chosen or {new for new, name in old.items() if tree.matches(name, pattern)}
        # Without a match this raises, and names the nearest of all paths.
        names |= chosen or select(file, [*content.leaves, *old.values()], [pattern])
    node = prune(content.node, names) or content.node
    leaves, tensors = (
        {n: x for n, x in part.items() if n in names} for part in (content.leaves, content.tensors)
    )
    return content._replace(node=node, leaves=leaves, tensors=tensors)


def fit(
    file: str,
    what: str,
    nodes: dict[str, Node],
    leaves: dict[str, Any],
    found: dict[str, Spec],
    containers: tuple[Node, Node] | None,
    *,
    strict: bool,
    cast: bool,
) -> tuple[dict[str, Target], dict[str, Any]]:
    """Compare a template with the leaves that were found, and decide where each leaf of the result
    comes from.

    Args:
      file: how errors name the source.
      what: how errors name the part of the source, such as "it".
      nodes: the leaves of the template.
      leaves: the arrays of the template.
      found: shapes and dtypes of the leaves that were found.
      containers: the structures of the template and of the source, or None if the source has no
        known structure.
      strict: False to keep leaves of the template that were not found, and to ignore leaves that
        the template lacks.
      cast: whether dtypes may differ.

    Returns:
      The target of each array to take, and the values of the template to keep.

    Raises:
      Misfit: the template does not fit.
    """
    from jaxnet.checkpoint import arrays

    wanted = {
        n: structure.spec(node, tuple(leaves[n].shape) if n in leaves else None)
        for n, node in nodes.items()
    }
    lines = differences(wanted, found, containers, strict=strict, cast=cast)
    kept = (
        {}
        if strict
        else {
            name: leaves.get(name, node.value) for name, node in nodes.items() if name not in found
        }
    )
    empty = [name for name, x in kept.items() if arrays.is_abstract(x)]
    lines += [
        f"missing from the file: {shown(name)} {wanted[name]}, and `like` has no value"
        for name in empty
    ]
    if kept and kept.keys() == nodes.keys():
        lines.append("strict=False, but the file and the template have no path in common")
    if lines:
        text = f"{what} does not fit the template `like` (without `like` it loads as saved):"
        raise Misfit(file, None, "\n  ".join([text, *lines]))
    targets = {
        n: arrays.Target(nodes[n].kind, nodes[n].value, arrays.sharding(x))
        for n, x in leaves.items()
        if n in found
    }
    return targets, kept


def differences(
    wanted: dict[str, Spec],
    found: dict[str, Spec],
    containers: tuple[Node, Node] | None,
    *,
    strict: bool = True,
    cast: bool = False,
) -> list[str]:
    """One line for each way in which a file (its leaves `found`) misses a template (that has the
    leaves `wanted`).

    `containers` are the structures of the template and of the file, None if the file records none.
    Unless `strict`, what only one of them has is no difference; with `cast` neither is the dtype of
    an array.
    """
    missing = {name: spec for name, spec in wanted.items() if name not in found}
    unexpected = {name: spec for name, spec in found.items() if name not in wanted}
    lines = []
    if strict:
        lines += [f"missing from the file: {shown(name)} {spec}" for name, spec in missing.items()]
        lines += [f"not in the template: {shown(name)} {spec}" for name, spec in unexpected.items()]
    for name, spec in wanted.items():
        if name in found and spec != found[name]:
            what = "dtype" if spec.shape == found[name].shape else "shape"
            if (
                what == "shape"
                or not cast
                or spec.shape is None
                or "key<" in spec.dtype + found[name].dtype
            ):
                lines.append(f"{what} differs: {shown(name)}: template {spec}, file {found[name]}")
    if containers is not None:
        lines += _container_differences(*containers, strict)
    if strict or missing.keys() == wanted.keys():
        lines += _renames(missing, unexpected, found)
    return lines


def _with_prefix(name: str, prefixes: dict[str, str]) -> str:
    fitting = [old for old in prefixes if old in ("", name) or name.startswith(f"{old}/")]
    if not fitting:
        return name
    old = max(fitting, key=len)
    rest = name[len(old) :].removeprefix("/") if old else name
    return "/".join(part for part in (prefixes[old], rest) if part)


def _container_differences(template: Node, stored: Node, strict: bool) -> list[str]:
    ours, theirs = (
        {path: n for path, n in structure.walk(node) if not n.is_leaf}
        for node in (template, stored)
    )
    lines = []
    for path in ours | theirs:
        here, there = ours.get(path), theirs.get(path)
        if here and there:
            differ = _in_words(here) != _in_words(there)
        else:
            # Only one side has it. Its leaves have been reported one by one, but it may be empty.
            differ = strict and not (here or theirs[path]).children
        if differ:
            name = leaf_name(path) if path else "the root"
            lines.append(
                f"container differs: {shown(name)}: template {_in_words(here)}, file "
                f"{_in_words(there)}"
            )
    return lines


def _in_words(container: Node | None) -> str:
    if container is None:
        return "nothing"
    names = {"none": "None", "record": "record of named fields", "ordered_dict": "OrderedDict"}
    name = names.get(container.kind, container.kind)
    if container.kind in DICTS and not all(isinstance(key, str) for key in container.keys):
        name += f" with keys of type {structure.types(container.keys)}"
    return name


def _renames(
    missing: dict[str, Spec], unexpected: dict[str, Spec], found: dict[str, Spec]
) -> list[str]:
    """Guesses which leaves of the file have another name in the template, and the `rename` that
    would say so.
    """
    lines, rename, left, free = [], {}, dict(missing), dict(unexpected)
    # The number of guesses is bounded, because each guess compares the name with all candidates.
    for name, spec in list(missing.items())[:50]:
        candidates = [other for other, s in free.items() if s == spec][:50] if name in left else []
        likeness, best = max(
            ((_likeness(other, name), other) for other in candidates), default=((0, 0.0), "")
        )
        if likeness >= (0, 0.3):
            old, new, below = _widest(best, name, left, free, found)
            for leaf in below:
                del free[leaf], left[_with_prefix(leaf, {old: new})]
            what = f" ({len(below)} leaves)" if len(below) > 1 else ""
            lines.append(
                f"perhaps renamed: {shown(old) or 'the root'} in the file is "
                f"{shown(new) or 'the root'} in the template{what}"
            )
            rename[old] = new
    return [*lines, f"if so: rename={rename}"] if rename else []


def _likeness(a: str, b: str) -> tuple[int, float]:
    """How many of the last steps of two paths are the same, and how much of the text is."""
    pairs = zip(reversed(a.split("/")), reversed(b.split("/")), strict=False)
    return len(
        list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    ), difflib.SequenceMatcher(None, a, b).ratio()


def _widest(
    old: str,
    new: str,
    missing: dict[str, Spec],
    unexpected: dict[str, Spec],
    found: dict[str, Spec],
):
    """The highest nodes whose renaming explains that of a leaf and everything else below them; and
    these leaves.
    """
    best = old, new, [old]
    while old.rpartition("/")[2] == new.rpartition("/")[2] and (old or new):
        old, new = old.rpartition("/")[0], new.rpartition("/")[0]
        below = [name for name in found if not old or name.startswith(f"{old}/")]
        if not all(
            name in unexpected and missing.get(_with_prefix(name, {old: new})) == found[name]
            for name in below
        ):
            break
        best = old, new, below
    return best
