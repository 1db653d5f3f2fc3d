"""Convert the arrays of another library, by path, to variables with jaxnet's names and layouts."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxnet.checkpoint import match, structure
from jaxnet.checkpoint.format import CheckpointError, Misfit
from jaxnet.checkpoint.structure import Node, Spec, leaf_name
from jaxnet.checkpoint.words import shown
from jaxnet.interop.collect import to_numpy

__all__ = ["STATE", "Convention", "Rename", "convert", "merged", "unstacked"]

# Without a template, arrays with these names belong to `state`.
STATE = ("mean", "var")

Rename = dict[str, str] | Callable[[str], str] | None


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
    file: str,
    source: Mapping[str, Any],
    convention: Convention,
    like: Any,
    *,
    rename: Rename,
    pattern: str | Iterable[str] | None,
    strict: bool,
    cast: bool,
) -> Any:
    """Make variables from the arrays of another library.

    Args:
      file: how errors name the source.
      source: the arrays by path.
      convention: the names and layouts of the library.
      like: as in `from_torch`.
      rename: as in `from_torch`.
      pattern: as in `from_torch`.
      strict: as in `from_torch`.
      cast: as in `from_torch`.

    Returns:
      As `from_torch`.

    Raises:
      CheckpointError, ValueError: as `from_torch`.
    """
    import jax.numpy as jnp

    if like is None and (cast or not strict):
        raise ValueError(
            "cast=True and strict=False need variables `like`: they say how these and the source "
            "may differ"
        )
    nodes, templates, whole = _template(file, like)
    moved = {
        leaf_name(path): name for name, path in match.renamed(file, source, rename or {}).items()
    }
    placed = {
        path: _place(path, len(getattr(source[name], "shape", ())), convention, nodes)
        for path, name in moved.items()
    }
    new = {path: name for path, name in placed.items() if name is not None}
    if pattern is not None:
        new = _chosen(
            file, new, moved, nodes, whole, [pattern] if isinstance(pattern, str) else list(pattern)
        )
    found = {moved[path]: to_numpy(file, moved[path], source[moved[path]]) for path in new}
    floats = {path for path in new if jnp.issubdtype(found[moved[path]].dtype, jnp.inexact)}
    new = {
        path: name
        for path, name in new.items()
        if path in floats or _in_stack(name, nodes)[0] in nodes
    }
    # This raises if two arrays get the same path.
    match.renamed(file, new, new.__getitem__)
    arrays = _stack(
        {name: _layout(found[moved[path]], name, convention) for path, name in new.items()}, nodes
    )
    if like is None:
        return _variables(file, arrays)
    return _filled(file, like, arrays, nodes, templates, whole, strict, cast)


def merged(
    file: str, what: str, variables: Any, describe: Callable[[str, str, Any], Node]
) -> tuple[dict[str, Node], dict[str, Any], dict[str, str]]:
    """The leaves of params and state together: node, array and full path by the path below params
    or state.
    """
    if not isinstance(variables, Mapping) or not {"params"} <= set(variables) <= {
        "params",
        "state",
    }:
        got = list(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise ValueError(
            f"{what} must be {{'params': params, 'state': state}} or {{'params': params}}, got "
            f"{got}"
        )
    template, leaves = structure.encode(file, dict(variables), functools.partial(describe, file))
    nodes = structure.leaves(template)
    short = {name: name.partition("/")[2] for name in nodes}
    if twice := [
        name for name in short if name.startswith("state/") and f"params/{short[name]}" in nodes
    ]:
        raise ValueError(
            f"{what}: '{shown(short[twice[0]])}' is in params and in state: rename one"
        )
    whole = {below: name for name, below in short.items()}
    return {short[n]: x for n, x in nodes.items()}, {short[n]: x for n, x in leaves.items()}, whole


def unstacked(leaves: dict[str, Any], path: str) -> dict[str, Any]:
    """The inverse of stacking numbered modules, for the leaves below a path."""
    inside = {name: x for name, x in leaves.items() if name.startswith(f"{path}/") or not path}
    sizes = {x.shape[:1] for x in inside.values()}
    if len(sizes) != 1 or sizes == {()}:
        text = (
            f"have first axes of sizes {sorted(s[0] if s else 1 for s in sizes)}"
            if sizes
            else "do not exist"
        )
        raise ValueError(
            f"stacked: the leaves below '{shown(path)}' must share a leading axis, these {text}"
        )
    rest = {name: x for name, x in leaves.items() if name not in inside}
    for name, x in inside.items():
        for number, part in enumerate(x):
            rest[
                "/".join(
                    step
                    for step in (path, str(number), name[len(path) :].removeprefix("/"))
                    if step
                )
            ] = part
    return rest


def _template(file: str, like: Any) -> tuple[dict[str, Node], dict[str, Any], dict[str, str]]:
    from jaxnet.checkpoint import arrays

    return ({}, {}, {}) if like is None else merged(file, "like", like, arrays.describe_template)


def _variables(file: str, found: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts of the arrays under the names of the source, if there is no template."""
    from jaxnet.checkpoint import arrays, casting

    if not found:
        text = (
            "no array of floats is in it: expected parameters by name, in dicts, lists, tuples "
            "or dataclasses"
        )
        raise CheckpointError(file, None, f"{text}; integers need variables `like` that have them")
    kinds = {name: Node("jax", x.dtype.name) for name, x in found.items()}
    values = arrays.place(
        file, kinds, found, {name: casting.Target("jax", n.value) for name, n in kinds.items()}
    )
    paths = {name: structure.leaf_path(_whole(name)) for name in found}
    tree = structure.nest({path: kinds[name] for name, path in paths.items()})
    return {"params": {}, "state": {}} | structure.build(
        tree, {leaf_name(paths[n]): x for n, x in values.items()}
    )


def _filled(
    file: str,
    like: Any,
    found: dict[str, Any],
    nodes: dict[str, Node],
    templates: dict[str, Any],
    whole: dict[str, str],
    strict: bool,
    cast: bool,
) -> Any:
    """The variables `like` with the values that were found. Raises Misfit if values are missing or
    do not fit.
    """
    from jaxnet.checkpoint import arrays, casting

    # A network with only some of its trained parameters would train without any sign of the error.
    # So strict=False ignores only arrays that `like` lacks. The error lists these as well, because
    # a missing array may have another name.
    if not strict and nodes.keys() <= found.keys():
        found = {name: x for name, x in found.items() if name in nodes}
    kinds = {name: Node("jax", x.dtype.name) for name, x in found.items()}
    specs = {name: Spec(x.dtype.name, x.shape) for name, x in found.items()}
    try:
        targets, _ = match.fit(file, "it", nodes, templates, specs, None, strict=True, cast=cast)
    except Misfit as error:
        if strict or nodes.keys() <= found.keys():
            raise
        text = (
            "strict=False leaves out what only the source has; `like` must be found whole: split "
            "off with"
        )
        text += " jaxnet.tree.split what shall keep its values, and merge it again"
        raise Misfit(file, error.leaf, f"{error.reason}\n  {text}") from None
    values = arrays.place(
        file, kinds, casting.cast(file, found, targets) if cast else found, targets
    )
    return structure.refill(like, {whole[name]: x for name, x in values.items()})


def _chosen(
    file: str,
    new: dict[str, str],
    moved: dict[str, str],
    nodes: Mapping[str, Any],
    whole: Mapping[str, str],
    patterns: list[str],
) -> dict[str, str]:
    """The part of `new` that the patterns of `pattern` select, by new paths or, if none matches, by
    paths of the source.
    """
    from jaxnet import tree

    if not patterns:
        raise ValueError("pattern must be a pattern of paths or several, got none")
    names = {}
    for path, name in new.items():
        short = _in_stack(name, nodes)[0]
        names[path] = (short, whole.get(short) or _whole(short), moved[path])
    kept = set()
    for pattern in patterns:
        hits = [
            {path for path, x in names.items() if tree.matches(x[which], pattern)}
            for which in range(3)
        ]
        if not any(hits):
            known = list(
                dict.fromkeys(x for which in (0, 2) for x in (y[which] for y in names.values()))
            )
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
            raise Misfit(
                file,
                None,
                (
                    f"pattern: no path matches '{shown(pattern)}'; the nearest of {len(known)} are "
                    f"{close}"
                ),
            )
        kept |= next(filter(None, hits))
    return {path: name for path, name in new.items() if path in kept}


def _whole(name: str) -> str:
    """The full path of an array without a template: its path below params or state."""
    return f"{'state' if name.rpartition('/')[2] in STATE else 'params'}/{name}"


def _place(path: str, ndim: int, convention: Convention, wanted: Mapping[str, Any]) -> str | None:
    """jaxnet's path for an array of another library; None if the array is left out."""
    for end, name in convention.names.items():
        if path == end or path.endswith(f"/{end}"):
            return None if name is None else path[: len(path) - len(end)] + name
    if convention.features_first and path.rpartition("/")[2] == "weight":
        module = path.removesuffix("weight")
        if ndim < 2:
            return f"{module}scale"
        embedding = f"{module}embedding"
        return (
            embedding
            if ndim == 2 and _in_stack(embedding, wanted)[0] in wanted
            else f"{module}kernel"
        )
    return path


def _layout(x: Any, name: str, convention: Convention) -> Any:
    """A copy of the array in jaxnet's layout."""
    last = name.rpartition("/")[2]
    if last == "kernel" and convention.features_first and x.ndim > 1:
        x = x.transpose(*range(2, x.ndim), 1, 0)
    if (
        last in ("bias", "scale", *STATE)
        and convention.broadcast
        and x.ndim > 1
        and x.size == max(x.shape)
    ):
        x = x.reshape(-1)
    return x.copy(order="C")


def _stack(leaves: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Stack `blocks/0/kernel`, `blocks/1/kernel`, ... to `blocks/kernel` if the template has the
    latter.
    """
    import numpy as np

    result, groups = {}, {}
    for name, x in leaves.items():
        target, number = _in_stack(name, wanted)
        if number is None:
            result[name] = x
        else:
            groups.setdefault(target, {})[number] = name
    for target, names in groups.items():
        parts = [leaves[names[number]] for number in sorted(names)]
        if (
            sorted(names) == list(range(len(names)))
            and len({(x.shape, x.dtype) for x in parts}) == 1
        ):
            result[target] = np.stack(parts)
        else:
            # These do not form a stack, so errors report each under its own name.
            result |= {name: leaves[name] for name in names.values()}
    return result


def _in_stack(name: str, wanted: Mapping[str, Any]) -> tuple[str, int | None]:
    """The wanted name that results from removing one number from this name, and that number; else
    the name and None.
    """
    steps = name.split("/")
    for i, step in enumerate(steps):
        short = "/".join(steps[:i] + steps[i + 1 :])
        if name not in wanted and step.isdecimal() and short in wanted:
            return short, int(step)
    return name, None
