"""Compare a template with the leaves of a source, and decide where each leaf of the result comes
from.
"""

from __future__ import annotations

import difflib
import itertools
from typing import TYPE_CHECKING, Any

from jaxnet.checkpoint import structure
from jaxnet.checkpoint.errors import Misfit
from jaxnet.checkpoint.renaming import with_prefix
from jaxnet.checkpoint.structure import DICTS, Node, Spec, leaf_name
from jaxnet.checkpoint.words import shown

if TYPE_CHECKING:
    from jaxnet.checkpoint.placement import Target

__all__ = ["differences", "match"]

# The most leaves whose new names are guessed, because each is compared with all candidates.
GUESSES = 50
# The least similarity of two names, between 0 and 1, for a guess.
LIKELY = 0.3


def match(
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
    """Decide where each leaf of the result comes from.

    Args:
      file: how errors name the source.
      what: how errors name the part of the source, such as "it".
      nodes: the leaves of the template.
      leaves: the arrays of the template.
      found: the specs of the leaves of the source.
      containers: the structures of the template and of the source; None if the source has no known
        structure.
      strict: False to keep leaves of the template that the source lacks, and to ignore leaves that
        the template lacks.
      cast: whether dtypes may differ.

    Returns:
      The target of each array to take, and the values of the template to keep.

    Raises:
      Misfit: the template does not fit.
    """
    from jaxnet.checkpoint import placement

    wanted = {
        name: structure.spec(node, tuple(leaves[name].shape) if name in leaves else None)
        for name, node in nodes.items()
    }
    lines = differences(wanted, found, containers, strict=strict, cast=cast)
    kept = {}
    if not strict:
        lacking = {name: node for name, node in nodes.items() if name not in found}
        kept = {name: leaves.get(name, node.value) for name, node in lacking.items()}
    for name, x in kept.items():
        if placement.is_abstract(x):
            text = f"missing from the file: {shown(name)} {wanted[name]}, and `like` has no value"
            lines.append(text)
    if kept and kept.keys() == nodes.keys():
        lines.append("strict=False, but the file and the template have no path in common")
    if lines:
        text = f"{what} does not fit the template `like` (without `like` it loads as saved):"
        raise Misfit(file, None, "\n  ".join([text, *lines]))
    targets = {
        name: placement.Target(nodes[name].kind, nodes[name].value, placement.sharding_of(x))
        for name, x in leaves.items()
        if name in found
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
    """One line for each difference between a template and a source.

    Args:
      wanted: the specs of the leaves of the template.
      found: the specs of the leaves of the source.
      containers: as in `match`.
      strict: False to ignore leaves that only one of them has.
      cast: True to ignore the dtypes of arrays.

    Returns:
      The lines, with guesses at leaves that have been renamed.
    """
    missing = {name: spec for name, spec in wanted.items() if name not in found}
    unexpected = {name: spec for name, spec in found.items() if name not in wanted}
    lines = []
    if strict:
        lines += [f"missing from the file: {shown(name)} {spec}" for name, spec in missing.items()]
        lines += [f"not in the template: {shown(name)} {spec}" for name, spec in unexpected.items()]
    for name, spec in wanted.items():
        if name in found and (what := _difference(spec, found[name], cast)):
            lines.append(f"{what} differs: {shown(name)}: template {spec}, file {found[name]}")
    if containers is not None:
        lines += _container_differences(*containers, strict)
    if strict or missing.keys() == wanted.keys():
        lines += _guesses(missing, unexpected, found)
    return lines


def _difference(wanted: Spec, found: Spec, cast: bool) -> str | None:
    """The first difference between two specs, "dtype" or "shape"; None if they are equal."""
    if wanted == found:
        return None
    if wanted.shape != found.shape:
        return "shape"
    # Neither Python scalars nor random keys are cast.
    fixed = wanted.shape is None or "key<" in wanted.dtype + found.dtype
    return "dtype" if fixed or not cast else None


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
            name = shown(leaf_name(path) if path else "the root")
            text = f"template {_in_words(here)}, file {_in_words(there)}"
            lines.append(f"container differs: {name}: {text}")
    return lines


def _in_words(container: Node | None) -> str:
    if container is None:
        return "nothing"
    names = {"none": "None", "record": "record of named fields", "ordered_dict": "OrderedDict"}
    name = names.get(container.kind, container.kind)
    if container.kind in DICTS and not all(isinstance(key, str) for key in container.keys):
        name += f" with keys of type {structure.type_names(container.keys)}"
    return name


def _guesses(
    missing: dict[str, Spec], unexpected: dict[str, Spec], found: dict[str, Spec]
) -> list[str]:
    """Guesses which leaves of the source have another name in the template, and the argument
    `rename` that would say so.
    """
    lines, rename, left, free = [], {}, dict(missing), dict(unexpected)
    for name, spec in list(missing.items())[:GUESSES]:
        if name not in left:
            continue
        candidates = [other for other, s in free.items() if s == spec][:GUESSES]
        likeness = {other: _likeness(other, name) for other in candidates}
        best = max(candidates, key=lambda other: (likeness[other], other), default=None)
        if best is None or likeness[best] < (0, LIKELY):
            continue
        old, new, below = _widest(best, name, left, free, found)
        for leaf in below:
            del free[leaf], left[with_prefix(leaf, {old: new})]
        what = f" ({len(below)} leaves)" if len(below) > 1 else ""
        lines.append(
            f"perhaps renamed: {shown(old) or 'the root'} in the file is "
            f"{shown(new) or 'the root'} in the template{what}"
        )
        rename[old] = new
    return [*lines, f"if so: rename={rename}"] if rename else []


def _likeness(a: str, b: str) -> tuple[int, float]:
    """The number of equal steps at the ends of two paths, and the similarity of their texts."""
    pairs = zip(reversed(a.split("/")), reversed(b.split("/")), strict=False)
    steps = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return steps, difflib.SequenceMatcher(None, a, b).ratio()


def _widest(
    old: str,
    new: str,
    missing: dict[str, Spec],
    unexpected: dict[str, Spec],
    found: dict[str, Spec],
) -> tuple[str, str, list[str]]:
    """The highest nodes whose renaming explains that of a leaf and of everything else below them;
    and these leaves.
    """
    best = old, new, [old]
    while old.rpartition("/")[2] == new.rpartition("/")[2] and (old or new):
        old, new = old.rpartition("/")[0], new.rpartition("/")[0]
        below = [name for name in found if not old or name.startswith(f"{old}/")]
        targets = {name: with_prefix(name, {old: new}) for name in below}
        if any(
            name not in unexpected or missing.get(targets[name]) != found[name] for name in below
        ):
            break
        best = old, new, below
    return best
