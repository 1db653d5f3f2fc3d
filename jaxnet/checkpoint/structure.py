"""The tree: its structure as JSON and back, and the names of its leaves.

In JSON a node is [kind, content]:

    ["dict", [[key, node], ...]]        also "ordered_dict"; a key is a string, or else a node
    ["list", [node, ...]]               also "tuple"
    ["record", [[field, node], ...]]    NamedTuple, dataclass, registered node: never its class
    ["none", null]  ["bool", true]  ["int", "-0x1f"]  ["float", "0x1.8p+0"]
    ["complex", [float, float]]  ["str", "text"]  ["bytes", base64]
    ["jax", "float32"]                  a tensor of the file; also "numpy" and "numpy_scalar"
    ["key", "threefry2x32"]             a tensor that holds random keys
"""

import collections
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxnet.checkpoint.dtypes import CODES, WIDENED
from jaxnet.checkpoint.format import RESTORE, CheckpointError
from jaxnet.checkpoint.header_types import Tensor
from jaxnet.checkpoint.scalars import KINDS, SCALARS, collisions
from jaxnet.checkpoint.words import shown

MAX_DEPTH = 100
DICTS = {"dict": dict, "ordered_dict": collections.OrderedDict}
LISTS = {"list": list, "tuple": tuple}
ARRAYS = ("jax", "numpy", "numpy_scalar", "key")
Path = tuple[str, ...]


class Node(NamedTuple):
    """A container (keys and children), a Python scalar (its value) or an array (its dtype, or the
    kind of its keys).
    """

    kind: str
    value: Any = None
    keys: Sequence[Any] = ()
    children: Sequence["Node"] = ()

    @property
    def is_leaf(self) -> bool:
        return self.kind in ARRAYS or self.kind in SCALARS and self.kind != "none"


class Spec(NamedTuple):
    """What a template and a file must agree on for one leaf; `shape` is None for a Python
    scalar.
    """

    dtype: str
    shape: tuple[int, ...] | None

    def __str__(self):
        dtype = shown(self.dtype)  # the kind of random keys is a word from the file
        return dtype if self.shape is None else f"{dtype}[{','.join(map(str, self.shape))}]"


def leaf_name(path: Path) -> str:
    """Join the steps of a path with '/', each escaped as in RFC 6901: different paths have
    different names.
    """
    name = "/".join(map(_escaped, path))
    # In a safetensors header, `__metadata__` has another meaning.
    return "~__metadata__" if name == "__metadata__" else name


def _escaped(step: str) -> str:
    return step.replace("~", "~0").replace("/", "~1") if "~" in step or "/" in step else step


def leaf_path(name: str) -> Path:
    """The path whose `leaf_name` this is."""
    if name == "~__metadata__":
        return ("__metadata__",)
    return (
        tuple(step.replace("~1", "/").replace("~0", "~") for step in name.split("/"))
        if name
        else ()
    )


def encode(
    file: str, tree: Any, describe: Callable[[str, Any], Node]
) -> tuple[Node, dict[str, Any]]:
    """The node of a tree, and its array leaves by name; `describe(name, leaf)` gives the node of
    such a leaf.
    """
    from jax.tree_util import all_leaves

    arrays = {}

    def visit(x, path):
        if len(path) > MAX_DEPTH:
            text = f"the tree is nested deeper than {MAX_DEPTH} levels: does it contain itself?"
            raise CheckpointError(file, leaf_name(path[:8]) + "/...", text)
        kind = KINDS.get(type(x))
        if kind in SCALARS:
            return Node(kind, x)
        if kind in DICTS:
            return visit_all(kind, list(x.keys()), x.values(), path)
        if kind in LISTS:
            return visit_all(kind, range(len(x)), x, path)
        if not all_leaves([x]):
            fields = _fields(x)
            return visit_all(
                "record", [name for name, _ in fields], [child for _, child in fields], path
            )
        name = leaf_name(path)
        arrays[name] = x
        return describe(name, x)

    def visit_all(kind, keys, children, path):
        for key in keys if kind in DICTS else ():
            _check_key(file, path, key)
        if kind in DICTS and (text := collisions(keys)):
            raise CheckpointError(file, leaf_name(path), f"{text}: use strings")
        steps = [str(key) for key in keys]
        if len(set(steps)) < len(steps):
            name = leaf_name((*path, next(step for step in steps if steps.count(step) > 1)))
            raise CheckpointError(
                file, name, f"two keys of type {types(keys)} give this one name: rename one"
            )
        return Node(
            kind,
            None,
            keys,
            [visit(x, (*path, step)) for step, x in zip(steps, children, strict=True)],
        )

    return visit(tree, ()), arrays


def walk(node: Node) -> Iterator[tuple[Path, Node]]:
    """This node and all below it, parents first."""
    waiting: list[tuple[Path, Node]] = [((), node)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        if node.children:
            below = zip(node.keys, node.children, strict=True)
            waiting += reversed([((*path, str(key)), child) for key, child in below])


def leaves(node: Node, most: float = math.inf) -> dict[str, Node]:
    """The leaves by `leaf_name`; ValueError if the names together have more than `most`
    characters.
    """
    found, size = {}, 0

    def visit(node, name):
        nonlocal size
        if node.is_leaf:
            found["~__metadata__" if name == "__metadata__" else name or ""] = node
            size += len(name or "")
            if size > most:
                raise ValueError(
                    f"the paths of its leaves together have more than {most:,} characters"
                )
        for key, child in zip(node.keys, node.children, strict=True):
            visit(child, _escaped(str(key)) if name is None else f"{name}/{_escaped(str(key))}")

    visit(node, None)
    return found


def show(x: Any) -> str:
    """A scalar as Python writes it, which for an int of more than some thousand digits it does only
    in hexadecimal.
    """
    return hex(x) if isinstance(x, int) and x.bit_length() > 10_000 else repr(x)


def stored_as(node: Node, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The safetensors type and the shape of an array in the file; for random keys `shape` is that
    of their data.
    """
    if node.kind == "key":
        return "U32", shape
    return CODES.get(node.value) or WIDENED[node.value], (
        *shape,
        2,
    ) if node.value == "complex128" else shape


def check_arrays(file: str, nodes: dict[str, Node], tensors: dict[str, Tensor]):
    """Raise CheckpointError unless each array of the tree has its tensor, of the right type, and
    there is no other.
    """
    names = {name for name, node in nodes.items() if node.kind in ARRAYS}
    if odd := sorted(names ^ tensors.keys()):
        raise CheckpointError(
            file, odd[0], f"it is in the tree or in the header, but not in both; {RESTORE}"
        )
    for name, tensor in tensors.items():
        node, axes = nodes[name], tensor.shape[-1:]
        if node.kind != "key" and node.value not in CODES and node.value not in WIDENED:
            raise CheckpointError(
                file, name, f"the tree gives it an unknown dtype, '{shown(node.value)}'; {RESTORE}"
            )
        code, _ = stored_as(node, ())
        if (
            tensor.code != code
            or node.kind == "key"
            and not axes
            or node.value == "complex128"
            and axes != (2,)
        ):
            text = (
                f"the tree calls it {shown(node.value)}, which is not stored as "
                f"{Spec(tensor.code, tensor.shape)}"
            )
            raise CheckpointError(file, name, f"{text}; {RESTORE}")


def spec(node: Node, shape: tuple[int, ...] | None) -> Spec:
    if node.kind in ARRAYS:
        return Spec(f"key<{node.value}>" if node.kind == "key" else node.value, shape)
    return Spec(node.kind, None)


def specs_in_file(nodes: dict[str, Node], tensors: dict[str, Tensor]) -> dict[str, Spec]:
    """What each leaf is, with the axes that are only the file's taken off."""
    result = {}
    for name, node in nodes.items():
        shape = tensors[name].shape if name in tensors else None
        result[name] = spec(
            node,
            shape[:-1] if shape and (node.kind == "key" or node.value == "complex128") else shape,
        )
    return result


def build(node: Node, arrays: dict[str, Any], path: Path = ()) -> Any:
    """The tree of a node; its arrays are looked up by name, and a record becomes the dict of its
    fields.
    """
    if node.kind in ARRAYS:
        return arrays[leaf_name(path)]
    if node.kind in SCALARS:
        return node.value
    children = [
        build(child, arrays, (*path, str(key)))
        for key, child in zip(node.keys, node.children, strict=True)
    ]
    if node.kind in LISTS:
        return LISTS[node.kind](children)
    return DICTS.get(node.kind, dict)(zip(node.keys, children, strict=True))


def refill(like: Any, leaves: dict[str, Any]) -> Any:
    """A tree exactly as `like`, with other leaves."""
    from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

    paths, treedef = tree_flatten_with_path(like)
    names = [leaf_name(tuple(keystr((step,), simple=True) for step in path)) for path, _ in paths]
    return tree_unflatten(treedef, [leaves[name] for name in names])


def foreign_paths(names: Sequence[str]) -> list[Path]:
    """Paths for the tensors of another program: split at '/', or not at all if that gives no tree
    of moderate depth.
    """
    flat: list[Path] = [(name,) for name in names]
    if any(name.count("/") >= MAX_DEPTH for name in names):
        return flat
    nested = [tuple(name.split("/")) for name in names]
    leaves = set(nested)
    # Such a path would be both a leaf and a dict.
    both = any(path[:i] in leaves for path in nested for i in range(1, len(path)))
    return flat if both else nested


def nest(leaves: dict[Path, Node]) -> Node:
    """Nested dicts with these leaves."""
    if () in leaves:
        return leaves[()]
    root: dict[str, Any] = {}
    for (*path, last), leaf in leaves.items():
        branch = root
        for step in path:
            branch = branch.setdefault(step, {})
        branch[last] = leaf

    def visit(x):
        return (
            Node("dict", None, list(x), [visit(child) for child in x.values()])
            if isinstance(x, dict)
            else x
        )

    return visit(root)


def _fields(x: Any) -> list[tuple[str, Any]]:
    """The children of a registered node by name."""
    from jax.tree_util import keystr, tree_flatten_with_path

    pairs, _ = tree_flatten_with_path(x, is_leaf=lambda child: child is not x)
    return [(keystr(path, simple=True), child) for path, child in pairs]


def _check_key(file: str, path: Path, key: Any):
    for part in key if type(key) is tuple else [key]:
        if (
            KINDS.get(type(part)) not in SCALARS
            or isinstance(part, int)
            and part.bit_length() > 10_000
        ):
            text = (
                f"it has a key of type {type(part).__name__}: use str, int, float, bool, bytes, "
                "None or tuples of these"
            )
            raise CheckpointError(file, leaf_name(path), text)
        if isinstance(part, str) and re.search("[\ud800-\udfff]", part):
            text = f"its key {part!a} is not Unicode text (it has lone surrogates): rename it"
            raise CheckpointError(file, leaf_name(path), text)


def types(keys: Sequence[Any]) -> str:
    return " and ".join(sorted({type(key).__name__ for key in keys}))
