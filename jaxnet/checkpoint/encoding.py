"""The structure of a tree as JSON. A node is [kind, content]:

["dict", [[key, node], ...]]        also "ordered_dict"; a key is a string, or else a node
["list", [node, ...]]               also "tuple"
["record", [[field, node], ...]]    NamedTuple, dataclass, registered node: never its class
["none", null]  ["bool", true]  ["int", "-0x1f"]  ["float", "0x1.8p+0"]
["complex", [float, float]]  ["str", "text"]  ["bytes", base64]
["jax", "float32"]                  a tensor of the file; also "numpy" and "numpy_scalar"
["key", "threefry2x32"]             a tensor that holds random keys
"""

import reprlib
from typing import Any

from jaxnet.checkpoint import scalars
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.structure import (
    ARRAYS,
    DICTS,
    LISTS,
    MAX_DEPTH,
    Node,
    Path,
    collisions,
    leaf_name,
)
from jaxnet.checkpoint.words import shown

__all__ = ["from_json", "to_json"]


def to_json(node: Node) -> list[Any]:
    """The JSON of a node and of all nodes below it."""
    kind, value, keys, children = node
    if kind in LISTS:
        return [kind, [to_json(child) for child in children]]
    if kind in DICTS or kind == "record":
        pairs = zip(keys, children, strict=True)
        return [kind, [[_key_to_json(key), to_json(child)] for key, child in pairs]]
    return [kind, value if kind in ARRAYS else scalars.to_json(kind, value)]


def from_json(file: str, json: Any, path: Path = ()) -> Node:
    """The node with this JSON. Raises CheckpointError if `to_json` cannot have written it."""
    try:
        kind, content = json
        if len(path) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if kind in ARRAYS and isinstance(content, str):
            return Node(kind, content)
        if kind in scalars.NAMES:
            return Node(kind, scalars.from_json(kind, content))
        keys, children = _container(kind, content)
        steps = [str(key) for key in keys]
    except (ValueError, TypeError, OverflowError, LookupError) as e:
        text = (
            f"the manifest's tree is not well-formed at '{shown(leaf_name(path))}' "
            f"({shown(e, 3000)}); {RESTORE}"
        )
        raise CheckpointError(file, None, text) from e
    below = [from_json(file, x, (*path, step)) for step, x in zip(steps, children, strict=True)]
    return Node(kind, None, keys, below)


def _container(kind: str, content: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The keys of a container, and the JSON of its children."""
    if not isinstance(content, list) or kind not in (*DICTS, *LISTS, "record"):
        raise ValueError(f"unknown kind {reprlib.repr(kind)}, or the wrong content")
    if kind in LISTS:
        return tuple(range(len(content))), tuple(content)
    pairs = [(_key_from_json(key), child) for key, child in content]
    keys, children = zip(*pairs, strict=True) if pairs else ((), ())
    if kind in DICTS and (text := collisions(keys)):
        raise ValueError(text)
    if len({str(key) for key in keys}) < len(keys) or len(set(keys)) < len(keys):
        raise ValueError("two keys are alike")
    if kind == "record" and not all(isinstance(key, str) for key in keys):
        raise ValueError("the names of fields are strings")
    return keys, children


def _key_to_json(key: Any) -> Any:
    if isinstance(key, tuple):
        return ["tuple", [_key_to_json(part) for part in key]]
    kind = scalars.KINDS[type(key)]
    return key if kind == "str" else [kind, scalars.to_json(kind, key)]


def _key_from_json(json: Any) -> Any:
    if isinstance(json, list) and json[:1] == ["tuple"]:
        return tuple(
            part if isinstance(part, str) else scalars.from_json(*part) for part in json[1]
        )
    return json if isinstance(json, str) else scalars.from_json(*json)
