"""Match the content of a file with a template, and name the part of a run's file that the template
describes.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from jaxnet.checkpoint import matching, pytrees, selection, structure
from jaxnet.checkpoint.container import Content
from jaxnet.checkpoint.errors import Misfit
from jaxnet.checkpoint.request import Request
from jaxnet.checkpoint.words import shown

if TYPE_CHECKING:
    from jaxnet.checkpoint.placement import Target

__all__ = ["match_file"]

# The nodes of a file of `jaxnet.train.fit` that users ask for, in the order of preference.
PLACES = ("train_state/params", "train_state", "best/params", "best")


def match_file(
    file: str, content: Content, request: Request
) -> tuple[dict[str, Target], dict[str, Any]]:
    """`matching.match` for the requested content of a file."""
    from jaxnet.checkpoint import arrays

    describe = functools.partial(arrays.describe_template, file)
    template, leaves = pytrees.encode(file, request.like, describe)
    nodes = structure.leaves(template)
    part = request.patterns is not None
    containers = (template, content.node) if content.structured else None
    if containers and part:
        # A part of a file has no empty containers, so those of the template count for nothing.
        containers = selection.prune(template, set(nodes)) or template, content.node
    found = structure.specs_in_file(content.leaves, content.tensors)
    what = "what `pattern` selects" if part else "it"
    strict, cast = request.strict, request.cast
    try:
        return matching.match(
            file, what, nodes, leaves, found, containers, strict=strict, cast=cast
        )
    except Misfit as error:
        raise _with_remedy(error, content, nodes) from None


def _with_remedy(error: Misfit, content: Content, wanted: Collection[str]) -> Misfit:
    """The error with the call that loads the part of a run's file that has the paths `wanted`, if
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
    pattern = shown(repr(_pattern(place, hits[place], content)), 3000)
    path = shown(repr(error.path), 5000)
    call = f"load({path}, like=like, pattern={pattern}, rename={{'{place}': ''}})"
    text = f"fit wrote this file, and paths of `like` are below '{place}' there: {call}"
    reason = error.reason
    if len(hits[place]) == len(wanted):
        # The list of differences would only say that the file holds a whole run.
        reason = reason.partition("\n")[0].rstrip(":")
    return Misfit(error.path, error.leaf, f"{reason}\n  {text}")


def _pattern(place: str, hits: list[str], content: Content) -> str | list[str]:
    """The argument `pattern` that selects the nodes below `place` in which the hits are."""
    first = {name.partition("/")[0] for name in hits}
    below = [name for name in content.leaves if name.startswith(f"{place}/")]
    whole = all(name.removeprefix(f"{place}/").partition("/")[0] in first for name in below)
    return place if whole else sorted(_below(place, glob.escape(step)) for step in first)


def _below(place: str, name: str) -> str:
    return "/".join(filter(None, (place, name)))
