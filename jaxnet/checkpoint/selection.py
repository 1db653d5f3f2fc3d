"""Select leaves of a file by patterns of their paths."""

from collections.abc import Iterable, Mapping

from jaxnet.checkpoint.container import Content
from jaxnet.checkpoint.errors import Misfit
from jaxnet.checkpoint.structure import Node, Path, leaf_name
from jaxnet.checkpoint.words import shown

__all__ = ["prune", "select", "select_part"]


def select(file: str, names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of the patterns, as in `jaxnet.tree`.

    Raises Misfit, with the nearest names, if a pattern matches none.
    """
    from jaxnet import tree

    try:
        return set(tree.select(dict.fromkeys(names, True), *patterns))
    except KeyError as e:
        raise Misfit(file, None, shown(e.args[0], 3000)) from None


def select_part(
    file: str, content: Content, patterns: list[str], old: Mapping[str, str]
) -> Content:
    """The part of a file's tree that matches the patterns.

    Args:
      file: how errors name the file.
      content: the content of the file.
      patterns: patterns of paths. A pattern applies to the names in `content` or, if it matches
        none of them, to the old names.
      old: the names in the file by the names in `content`, if leaves were renamed.

    Returns:
      The part.

    Raises:
      Misfit: a pattern matches nothing.
    """
    from jaxnet import tree

    names: set[str] = set()
    for pattern in patterns:
        chosen = {name for name in content.leaves if tree.matches(name, pattern)}
        chosen = chosen or {new for new, name in old.items() if tree.matches(name, pattern)}
        # Without a match, `select` raises an error that names the nearest of all paths.
        names |= chosen or select(file, [*content.leaves, *old.values()], [pattern])
    node = prune(content.node, names) or content.node
    leaves = {name: x for name, x in content.leaves.items() if name in names}
    tensors = {name: t for name, t in content.tensors.items() if name in names}
    return content._replace(node=node, leaves=leaves, tensors=tensors)


def prune(node: Node, names: set[str], path: Path = ()) -> Node | None:
    """The tree of these leaves alone, as `jaxnet.tree.split` makes it.

    In lists, tuples and records, None fills the gaps. The result is None if no leaf is left.
    """
    if not node.children:
        return node if node.is_leaf and leaf_name(path) in names else None
    below = zip(node.keys, node.children, strict=True)
    kept = [prune(child, names, (*path, str(key))) for key, child in below]
    if not any(kept):
        return None
    if node.kind == "dict":
        pairs = [(key, child) for key, child in zip(node.keys, kept, strict=True) if child]
        return Node("dict", None, [key for key, _ in pairs], [child for _, child in pairs])
    return node._replace(children=[child or Node("none") for child in kept])
