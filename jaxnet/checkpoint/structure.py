"""The structure of a tree: nodes, the paths to its leaves, and the names of these paths."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxnet.checkpoint import scalars
from jaxnet.checkpoint.dtypes import CODES, WIDENED
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.tensors import Tensor
from jaxnet.checkpoint.words import shown

__all__ = [
    "ARRAYS",
    "DICTS",
    "LISTS",
    "MAX_DEPTH",
    "Node",
    "Path",
    "Spec",
    "check_arrays",
    "collisions",
    "foreign_paths",
    "has_more_axes",
    "leaf_name",
    "leaf_path",
    "leaves",
    "nest",
    "spec",
    "specs_in_file",
    "stored_as",
    "type_names",
    "walk",
]

MAX_DEPTH = 100
# Keys of one dict that have the same hash: the time grows with the square of their number.
MAX_ALIKE = 100
DICTS = {"dict": dict, "ordered_dict": collections.OrderedDict}
LISTS = {"list": list, "tuple": tuple}
ARRAYS = ("jax", "numpy", "numpy_scalar", "key")
# None counts as a container without children.
LEAVES = {*ARRAYS, *scalars.NAMES} - {"none"}

Path = tuple[str, ...]


class Node(NamedTuple):
    """A container, a Python scalar or an array.

    Attributes:
      kind: the name of the kind, as in docs/checkpoint_format.md.
      value: the scalar; or the dtype of an array, for random keys their implementation.
      keys: the keys, fields or positions of the children.
      children: the nodes below a container.
    """

    kind: str
    value: Any = None
    keys: Sequence[Any] = ()
    children: Sequence["Node"] = ()

    @property
    def is_leaf(self) -> bool:
        return self.kind in LEAVES


class Spec(NamedTuple):
    """The properties of one leaf in which a template and a file must agree.

    Attributes:
      dtype: the dtype of an array, or the type of a Python scalar.
      shape: the shape of an array; None for a Python scalar.
    """

    dtype: str
    shape: tuple[int, ...] | None

    def __str__(self):
        # The implementation of random keys is a word from the file.
        dtype = shown(self.dtype)
        return dtype if self.shape is None else f"{dtype}[{','.join(map(str, self.shape))}]"


def leaf_name(path: Path) -> str:
    """The name of a path: its steps, escaped as in RFC 6901 and joined with '/'.

    Different paths have different names.
    """
    name = "/".join(map(_escaped, path))
    # In the header of safetensors, `__metadata__` has another meaning.
    return "~__metadata__" if name == "__metadata__" else name


def _escaped(step: str) -> str:
    return step.replace("~", "~0").replace("/", "~1") if "~" in step or "/" in step else step


def leaf_path(name: str) -> Path:
    """The path with this `leaf_name`."""
    if name == "~__metadata__":
        return ("__metadata__",)
    if not name:
        return ()
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in name.split("/"))


def walk(node: Node) -> Iterator[tuple[Path, Node]]:
    """Yield this node and all nodes below it with their paths, parents first."""
    waiting: list[tuple[Path, Node]] = [((), node)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        if node.children:
            below = zip(node.keys, node.children, strict=True)
            waiting += reversed([((*path, str(key)), child) for key, child in below])


def leaves(node: Node, most: float = math.inf) -> dict[str, Node]:
    """The leaves by `leaf_name`.

    Raises ValueError if the names together have more than `most` characters.
    """
    found, size = {}, 0

    def visit(node: Node, name: str | None) -> None:
        nonlocal size
        if node.is_leaf:
            found["~__metadata__" if name == "__metadata__" else name or ""] = node
            size += len(name or "")
            if size > most:
                text = f"the paths of its leaves together have more than {most:,} characters"
                raise ValueError(text)
        for key, child in zip(node.keys, node.children, strict=True):
            visit(child, _escaped(str(key)) if name is None else f"{name}/{_escaped(str(key))}")

    visit(node, None)
    return found


def stored_as(node: Node, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The safetensors type and the shape of an array in the file.

    For random keys, `shape` is the shape of their data.
    """
    if node.kind == "key":
        return "U32", shape
    code = CODES.get(node.value) or WIDENED[node.value]
    return code, (*shape, 2) if node.value == "complex128" else shape


def has_more_axes(node: Node) -> bool:
    """Whether an array has one more axis in the file than in the tree."""
    return node.kind == "key" or node.value == "complex128"


def check_arrays(file: str, nodes: dict[str, Node], tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless arrays and tensors correspond, by name and by type."""
    names = {name for name, node in nodes.items() if node.kind in ARRAYS}
    if odd := sorted(names ^ tensors.keys()):
        text = f"it is in the tree or in the header, but not in both; {RESTORE}"
        raise CheckpointError(file, odd[0], text)
    for name, tensor in tensors.items():
        node, axes = nodes[name], tensor.shape[-1:]
        is_key = node.kind == "key"
        if not is_key and node.value not in CODES and node.value not in WIDENED:
            text = f"the tree gives it an unknown dtype, '{shown(node.value)}'; {RESTORE}"
            raise CheckpointError(file, name, text)
        code, _ = stored_as(node, ())
        wrong_axes = is_key and not axes or node.value == "complex128" and axes != (2,)
        if tensor.code != code or wrong_axes:
            text = (
                f"the tree calls it {shown(node.value)}, which is not stored as "
                f"{Spec(tensor.code, tensor.shape)}"
            )
            raise CheckpointError(file, name, f"{text}; {RESTORE}")


def spec(node: Node, shape: tuple[int, ...] | None) -> Spec:
    """The spec of a leaf; `shape` counts for arrays only."""
    if node.kind in ARRAYS:
        return Spec(f"key<{node.value}>" if node.kind == "key" else node.value, shape)
    return Spec(node.kind, None)


def specs_in_file(nodes: dict[str, Node], tensors: dict[str, Tensor]) -> dict[str, Spec]:
    """The specs of leaves by name, with the shapes that the arrays have in the tree."""
    result = {}
    for name, node in nodes.items():
        shape = tensors[name].shape if name in tensors else None
        result[name] = spec(node, shape[:-1] if shape and has_more_axes(node) else shape)
    return result


def foreign_paths(names: Sequence[str]) -> list[Path]:
    """Paths for the tensors of another program.

    The names are split at '/', or not at all if that does not give a tree of moderate depth.
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

    def visit(x: Any) -> Node:
        if isinstance(x, Node):
            return x
        return Node("dict", None, list(x), [visit(child) for child in x.values()])

    return visit(root)


def collisions(keys: Sequence[Any]) -> str | None:
    """Why a dict would take too long to hold these keys; None if it would not.

    Only numbers can have the same hash on purpose: the hashes of text are random.
    """
    if all(type(key) is str for key in keys):
        return None
    value, count = collections.Counter(map(hash, keys)).most_common(1)[0]
    if count <= MAX_ALIKE:
        return None
    return f"{count} of its keys have the hash {value}, at most {MAX_ALIKE} may"


def type_names(keys: Sequence[Any]) -> str:
    """The names of the types of keys, as words in an error."""
    return " and ".join(sorted({type(key).__name__ for key in keys}))
