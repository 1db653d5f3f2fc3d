"""A tree's structure as JSON and back."""

import reprlib
from typing import Any

from jaxnet.checkpoint.format import RESTORE, CheckpointError
from jaxnet.checkpoint.scalars import SCALARS, collisions, key_from_json, key_to_json, scalar
from jaxnet.checkpoint.structure import ARRAYS, DICTS, LISTS, MAX_DEPTH, Node, Path, leaf_name
from jaxnet.checkpoint.words import shown

__all__ = ["from_json", "to_json"]


def to_json(node: Node) -> list[Any]:
    """A node and all below it as JSON."""
    kind, value, keys, children = node
    if kind in DICTS or kind == "record":
        return [
            kind,
            [[key_to_json(key), to_json(child)] for key, child in zip(keys, children, strict=True)],
        ]
    if kind in LISTS:
        return [kind, [to_json(child) for child in children]]
    return [kind, value if kind in ARRAYS else SCALARS[kind][0](value)]


def from_json(file: str, json: Any, path: Path = ()) -> Node:
    """The node that `to_json` wrote; CheckpointError for anything else."""
    try:
        kind, content = json
        if len(path) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if kind in ARRAYS and isinstance(content, str):
            return Node(kind, content)
        if kind in SCALARS:
            return Node(kind, scalar(kind, content))
        if not isinstance(content, list) or kind not in (*DICTS, *LISTS, "record"):
            raise ValueError(f"unknown kind {reprlib.repr(kind)}, or the wrong content")
        pairs = (
            enumerate(content)
            if kind in LISTS
            else ((key_from_json(key), child) for key, child in content)
        )
        keys, children = zip(*pairs, strict=True) if content else ((), ())
        steps = [str(key) for key in keys]
        if kind in DICTS and (text := collisions(keys)):
            raise ValueError(text)
        if len(set(steps)) < len(steps) or len(set(keys)) < len(steps):
            raise ValueError("two keys are alike")
        if kind == "record" and not all(isinstance(key, str) for key in keys):
            raise ValueError("the names of fields are strings")
    except (ValueError, TypeError, OverflowError, LookupError) as e:
        text = (
            f"the manifest's tree is not well-formed at '{shown(leaf_name(path))}' "
            f"({shown(e, 3000)}); {RESTORE}"
        )
        raise CheckpointError(file, None, text) from e
    return Node(
        kind,
        None,
        keys,
        [from_json(file, x, (*path, step)) for step, x in zip(steps, children, strict=True)],
    )
