"""Convert the arrays of another library, by path, to variables with jaxnet's names and layouts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxnet.checkpoint import matching, pytrees, renaming, structure
from jaxnet.checkpoint.errors import CheckpointError, Misfit
from jaxnet.checkpoint.request import Request
from jaxnet.checkpoint.structure import Node, Spec, leaf_name
from jaxnet.checkpoint.words import shown
from jaxnet.interop.collect import to_numpy
from jaxnet.interop.stacks import in_stack, stacked
from jaxnet.interop.variables import STATE, Variables, full_path, variables_of

__all__ = ["Convention", "convert"]


class Convention(NamedTuple):
    """How a library names and stores the arrays of a layer.

    Attributes:
      names: jaxnet's names by the ends of the library's names; None leaves an array out.
      features_first: whether kernels are [out, in, *window] instead of [*window, in, out].
      broadcast: whether vectors may have axes of size 1.
    """

    names: Mapping[str, str | None]
    features_first: bool = False
    broadcast: bool = False


def convert(
    file: str, source: Mapping[str, Any], convention: Convention, request: Request
) -> dict[str, Any]:
    """Make variables from the arrays of another library.

    Args:
      file: how errors name the source.
      source: the arrays by path.
      convention: the names and layouts of the library.
      request: what the user asks for.

    Returns:
      The variables, as `from_torch` returns them.

    Raises:
      CheckpointError: an array has no plain values, or the source does not match the request.
      ValueError: `like` does not have the form of variables, or has a path in both parts.
    """
    import jax.numpy as jnp

    template = _template(file, request.like)
    paths = renaming.renamed(file, source, request.rename or {})
    moved = {leaf_name(path): name for name, path in paths.items()}
    new = {}
    for path, name in moved.items():
        rank = len(getattr(source[name], "shape", ()))
        if (placed := _place(path, rank, convention, template.nodes)) is not None:
            new[path] = placed
    if request.patterns is not None:
        new = _chosen(file, new, moved, template, request.patterns)
    found = {path: to_numpy(file, moved[path], source[moved[path]]) for path in new}
    for path, name in list(new.items()):
        is_float = jnp.issubdtype(found[path].dtype, jnp.inexact)
        if not is_float and in_stack(name, template.nodes)[0] not in template.nodes:
            del new[path]
    # This raises if two arrays get the same path.
    renaming.renamed(file, new, new.__getitem__)
    layouts = {name: _layout(found[path], name, convention) for path, name in new.items()}
    arrays = stacked(layouts, template.nodes)
    if request.like is None:
        return _nested(file, arrays)
    return _filled(file, arrays, template, request)


def _template(file: str, like: Any) -> Variables:
    from jaxnet.checkpoint import arrays

    if like is None:
        return Variables({}, {}, {})
    return variables_of(file, "like", like, arrays.describe_template)


def _nested(file: str, found: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of the arrays under the names of the source, if there is no template."""
    from jaxnet.checkpoint import placement

    if not found:
        text = (
            "no array of floats is in it: expected parameters by name, in dicts, lists, tuples or "
            "dataclasses; integers need variables `like` that have them"
        )
        raise CheckpointError(file, None, text)
    nodes = {name: Node("jax", x.dtype.name) for name, x in found.items()}
    targets = {name: placement.Target("jax", node.value) for name, node in nodes.items()}
    values = placement.place(file, nodes, found, targets)
    paths = {name: structure.leaf_path(full_path(name)) for name in found}
    tree = structure.nest({path: nodes[name] for name, path in paths.items()})
    leaves = {leaf_name(paths[name]): x for name, x in values.items()}
    return {"params": {}, "state": {}} | pytrees.build(tree, leaves)


def _filled(
    file: str, found: dict[str, Any], template: Variables, request: Request
) -> dict[str, Any]:
    """The variables `like` with the values that were found.

    Raises Misfit if values are missing or do not fit.
    """
    from jaxnet.checkpoint import casting, placement

    # A network with only some of its trained parameters would train without any sign of the error.
    # So strict=False ignores only arrays that `like` lacks. The error lists these as well, because
    # a missing array may have another name.
    complete = template.nodes.keys() <= found.keys()
    if not request.strict and complete:
        found = {name: x for name, x in found.items() if name in template.nodes}
    nodes = {name: Node("jax", x.dtype.name) for name, x in found.items()}
    specs = {name: Spec(x.dtype.name, x.shape) for name, x in found.items()}
    try:
        targets, _ = matching.match(
            file,
            "it",
            template.nodes,
            template.leaves,
            specs,
            None,
            strict=True,
            cast=request.cast,
        )
    except Misfit as error:
        if request.strict or complete:
            raise
        text = (
            "strict=False leaves out only arrays that `like` lacks, and every array of `like` must "
            "be found: split off with jaxnet.tree.split what shall keep its values, and merge it "
            "again"
        )
        raise Misfit(file, error.leaf, f"{error.reason}\n  {text}") from None
    if request.cast:
        found = casting.cast(file, found, targets)
    values = placement.place(file, nodes, found, targets)
    return pytrees.refill(request.like, {template.whole[name]: x for name, x in values.items()})


def _chosen(
    file: str,
    new: dict[str, str],
    moved: dict[str, str],
    template: Variables,
    patterns: list[str],
) -> dict[str, str]:
    """The part of `new` that the patterns select.

    A pattern applies to the paths below params or state, or, if it matches none, to the full paths,
    or else to the paths in the source.
    """
    from jaxnet import tree

    names = {}
    for path, name in new.items():
        short = in_stack(name, template.nodes)[0]
        names[path] = (short, template.whole.get(short) or full_path(short), moved[path])
    kept = set()
    for pattern in patterns:
        for which in range(3):
            hits = {path for path, x in names.items() if tree.matches(x[which], pattern)}
            if hits:
                kept |= hits
                break
        else:
            # The short paths and those in the source, each once.
            known = list(dict.fromkeys(x[which] for which in (0, 2) for x in names.values()))
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
            text = f"no path matches '{shown(pattern)}'; the nearest of {len(known)} are {close}"
            raise Misfit(file, None, f"pattern: {text}")
    return {path: name for path, name in new.items() if path in kept}


def _place(path: str, rank: int, convention: Convention, wanted: Mapping[str, Any]) -> str | None:
    """jaxnet's path for an array of another library; None if the array is left out."""
    for end, name in convention.names.items():
        if path == end or path.endswith(f"/{end}"):
            return None if name is None else path[: len(path) - len(end)] + name
    if not convention.features_first or path.rpartition("/")[2] != "weight":
        return path
    module = path.removesuffix("weight")
    if rank < 2:
        return f"{module}scale"
    embedding = f"{module}embedding"
    is_embedding = rank == 2 and in_stack(embedding, wanted)[0] in wanted
    return embedding if is_embedding else f"{module}kernel"


def _layout(x: Any, name: str, convention: Convention) -> Any:
    """A copy of the array in jaxnet's layout."""
    last = name.rpartition("/")[2]
    if last == "kernel" and convention.features_first and x.ndim > 1:
        x = x.transpose(*range(2, x.ndim), 1, 0)
    is_vector = x.ndim > 1 and x.size == max(x.shape)
    if convention.broadcast and is_vector and last in ("bias", "scale", *STATE):
        x = x.reshape(-1)
    return x.copy(order="C")
