"""Compare the content of a file with a template, and name the part of a run's file that the
template describes.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from jaxnet.checkpoint import match, structure
from jaxnet.checkpoint.container import Content
from jaxnet.checkpoint.format import Misfit
from jaxnet.checkpoint.words import shown

if TYPE_CHECKING:
    from jaxnet.checkpoint.casting import Target

# The nodes of a file of `jaxnet.train.fit` that users ask for, in the order of preference.
PLACES = ("train_state/params", "train_state", "best/params", "best")


def fit(
    file: str, what: str, like: Any, content: Content, *, strict: bool, cast: bool, part: bool
) -> tuple[dict[str, Target], dict[str, Any]]:
    """`match.fit` for the leaves of a file and their containers; `part` if `pattern` has selected
    some of its leaves.
    """
    from jaxnet.checkpoint import arrays

    template, leaves = structure.encode(
        file, like, functools.partial(arrays.describe_template, file)
    )
    nodes = structure.leaves(template)
    containers = (template, content.node) if content.structured else None
    if containers and part:
        # A part of a file has no empty containers, so those of the template count for nothing.
        containers = match.prune(template, set(nodes)) or template, content.node
    found = structure.specs_in_file(content.leaves, content.tensors)
    try:
        return match.fit(file, what, nodes, leaves, found, containers, strict=strict, cast=cast)
    except Misfit as error:
        raise _with_remedy(error, content, nodes) from None


def _with_remedy(error: Misfit, content: Content, wanted: Collection[str]) -> Misfit:
    """The error with the call that loads the part of a run's file where the paths `wanted` are, if
    there is one.
    """
    manifest = content.header.manifest
    if manifest is None or "fit" not in manifest["metadata"]:
        return error
    hits = {
        place: [name for name in wanted if _below(place, name) in content.leaves]
        for place in ("", *PLACES)
    }
    place = max(PLACES, key=lambda place: len(hits[place]))
    if len(hits[place]) <= len(hits[""]):
        return error
    first = {name.partition("/")[0] for name in hits[place]}
    inside = [
        name.removeprefix(f"{place}/") for name in content.leaves if name.startswith(f"{place}/")
    ]
    whole = all(name.partition("/")[0] in first for name in inside)
    pattern = place if whole else sorted(_below(place, glob.escape(step)) for step in first)
    call = (
        f"load({shown(repr(error.path), 5000)}, like=like, pattern={shown(repr(pattern), 3000)}, "
        f"rename={{'{place}': ''}})"
    )
    text = f"fit wrote this file, and paths of `like` are below '{place}' there: {call}"
    # If all paths are there, the list of differences would only say that the file holds a whole
    # run.
    reason = (
        error.reason
        if len(hits[place]) < len(wanted)
        else error.reason.partition("\n")[0].rstrip(":")
    )
    return Misfit(error.path, error.leaf, f"{reason}\n  {text}")


def _below(place: str, name: str) -> str:
    return "/".join(filter(None, (place, name)))
