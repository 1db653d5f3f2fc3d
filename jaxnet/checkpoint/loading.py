"""Load a tree. Nothing in a file is trusted before it is checked."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxnet.checkpoint import pytrees, renaming, selection
from jaxnet.checkpoint import template as templates
from jaxnet.checkpoint.container import Content, read_content, steadily
from jaxnet.checkpoint.engines import engine_of
from jaxnet.checkpoint.inspection import Info, info_of
from jaxnet.checkpoint.protocol import Source
from jaxnet.checkpoint.renaming import Rename
from jaxnet.checkpoint.request import Request, checked_request

__all__ = ["load", "load_with_info"]


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    pattern: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Read a tree from a file and check every byte of it.

    Without `like`, dicts, lists, tuples, None, scalars and arrays come back as they were saved;
    NamedTuples, dataclasses and other registered nodes come back as dicts of their fields, because
    no class is ever imported by name. A file that jaxnet did not write comes back as nested dicts,
    its names split at '/'.

    With `like`, a tree of arrays or `jax.ShapeDtypeStruct`s, the result has exactly its structure,
    containers, shapes, dtypes and shardings; nothing is cast. If a leaf of `like` is a NumPy array,
    the result has one, too. The values in `like` do not matter, and its arrays may be deleted
    (donated) ones.

    Arrays of 64 bits stay NumPy arrays while `jax_enable_x64` is off: JAX would truncate them.

    Args:
      path: the file.
      like: what the result shall look like, or None.
      pattern: a pattern of paths as in `jaxnet.tree` ('blocks/*/kernel', 'head'), or several, each
        of which must match something. Only these leaves are read and checked. The result, and
        `like`, is the part of the tree that holds them, as `jaxnet.tree.split(tree, pattern)[0]`
        gives it.
      rename: new paths for leaves of the file: a dict {path or node in the file: path or node in
        the result}, of which the longest that fits counts, or a function from path to path. The
        leaves then have no containers but those of `like` or, without it, nested dicts. A pattern
        in `pattern` applies to the new paths or, if it matches none of them, to the paths of the
        file.
      strict: False (with `like`) to keep the leaves of `like` that the file lacks, which must have
        values, and to leave out those of the file that `like` lacks. Leaves that both have must
        still fit, and there must be some.
      cast: True (with `like`) to convert arrays to the dtypes of `like`. Between floats, values are
        rounded to the nearest; all else must be exact. It is an error if a value overflows, if NaN
        or a fraction becomes an integer, if an integer is out of range or between two floats, or if
        an imaginary part is lost.

    Returns:
      The tree.

    Raises:
      CheckpointError: the file is damaged, is not a checkpoint, or does not match the request (all
        differences in one error, with guesses at leaves that have been renamed; for a part of a
        file that `fit` wrote, the call that loads it).
      ValueError: `strict` or `cast` without `like`, or no pattern in `pattern`.
      OSError: the file is missing or cannot be opened.

    Example:
      >>> state = load("run/state.safetensors", like=state)  # doctest: +SKIP
    """
    request = checked_request(like, pattern, rename, strict, cast)
    return _load(path, request, None)[0]


def load_with_info(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    pattern: str | Iterable[str] | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    template: Callable[[Info], Any] | None = None,
) -> tuple[Any, Info]:
    """Load a file and inspect it.

    Both results come from the same file, even if another process replaces it meanwhile.

    Args:
      path: as in `load`.
      like: as in `load`.
      pattern: as in `load`.
      rename: as in `load`.
      strict: as in `load`.
      cast: as in `load`.
      template: a function from the `Info` of the file to `like`, for a `like` that depends on the
        file.

    Returns:
      The results of `load` and of `inspect`.

    Raises:
      CheckpointError: as `load`.
      ValueError: as `load`.
      OSError: as `load`.
    """
    later = template is not None
    request = checked_request(like, pattern, rename, strict, cast, later=later)
    tree, info = _load(path, request, template)
    return tree, info()


class _Found(NamedTuple):
    """The bytes of a file, read for a request.

    Attributes:
      file: the path of the file.
      info: makes the result of `inspect`.
      request: the request, with the `like` of this file.
      content: the part of the content that was requested, under its new names.
      targets: how the arrays shall come back, by name.
      kept: the leaves of `like` that the file lacks, by name.
      raw: the bytes of the arrays by the names of their tensors.
    """

    file: str
    info: Callable[[], Info]
    request: Request
    content: Content
    targets: dict[str, Any]
    kept: dict[str, Any]
    raw: dict[str, Any]


def _load(
    path: str | os.PathLike[str], request: Request, template: Callable[[Info], Any] | None
) -> tuple[Any, Callable[[], Info]]:
    """The tree, and a function that makes the result of `inspect`."""
    from jaxnet.checkpoint import arrays, casting, placement

    def read(file: str, fd: int, size: int) -> _Found:
        whole = read_content(file, fd, size)
        info = functools.partial(info_of, file, size, whole)
        wanted = request if template is None else request._replace(like=template(info()))
        content = _requested(file, whole, wanted)
        targets, kept = _targets(file, content, wanted)
        tensors = {name: content.tensors[name] for name in targets}
        # Blocks that only other processes need are not read. A cast must look at all values.
        needed = {}
        if not wanted.cast:
            for name, t in tensors.items():
                needed[t.name] = placement.local_blocks(file, targets[name], t.shape)
        source = Source(file, fd, whole.header)
        reader = engine_of(whole.header).reader
        raw = reader(source, list(tensors.values()), arrays.empty, needed)
        return _Found(file, info, wanted, content, targets, kept, raw)

    found: _Found = steadily(path, read)
    file, content, targets = found.file, found.content, found.targets
    stored = {}
    for name in targets:
        tensor = content.tensors[name]
        raw = found.raw.pop(tensor.name)
        stored[name] = arrays.from_bytes(file, name, content.leaves[name], tensor.shape, raw)
    if found.request.cast:
        stored = casting.cast(file, stored, targets)
    values = placement.place(file, content.leaves, stored, targets)
    if found.request.like is None:
        return pytrees.build(content.node, values), found.info
    leaves = content.scalars | values | found.kept
    return pytrees.refill(found.request.like, leaves), found.info


def _requested(file: str, content: Content, request: Request) -> Content:
    """The requested part of the content of a file, under its new names."""
    old: dict[str, str] = {}
    if request.rename is not None:
        content, old = renaming.rename_all(file, content, request.rename)
    if request.patterns is not None:
        content = selection.select_part(file, content, request.patterns, old)
    return content


def _targets(
    file: str, content: Content, request: Request
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the arrays shall come back, and the leaves of `like` that the file lacks."""
    from jaxnet.checkpoint.placement import Target

    if request.like is not None:
        return templates.match_file(file, content, request)
    nodes = content.leaves
    return {name: Target(nodes[name].kind, nodes[name].value) for name in content.tensors}, {}
