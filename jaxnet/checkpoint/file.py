"""Save a tree to a file, load it, inspect it and verify it. Nothing in a file is trusted before it
is checked.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxnet.checkpoint import atomic, container, header_types, match, places, structure, tree_json
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint import template as template_of
from jaxnet.checkpoint.container import read_content, steadily
from jaxnet.checkpoint.header_types import Header, Tensor
from jaxnet.checkpoint.inspection import Info, info_of
from jaxnet.checkpoint.metadata import exact_json


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: dict[str, Any] | None = None,
    engine: Literal["orbax"] | None = None,
) -> None:
    """Write a tree to a file, durably: after any failure the file holds either the whole old tree
    or the whole new one.

    Args:
      path: the file, by custom called `*.safetensors`; missing folders are made, an existing file
        is replaced. With `engine="orbax"` also a URL of an object store, as in
        "gs://bucket/run/state.safetensors".
      tree: any pytree. Leaves: JAX and NumPy arrays, typed random keys, bool, int, float, complex,
        str, bytes, None. Nothing in it is changed.
      metadata: a dict that JSON can hold exactly (str keys; no tuples, no NaN); `inspect` returns
        it.
      engine: "orbax" to let Orbax (`pip install 'jaxnet[orbax]'`) write the arrays into a folder
        beside the file, for pods and for object stores. The file then holds everything else, and
        the checksums; `load`, `inspect` and `verify` find the folder.

    Raises:
      CheckpointError: the tree holds something that cannot be stored; nothing has been written.
      ValueError: another engine, or a URL without `engine="orbax"`.
      OSError: from the operating system (no space, no permission). The old file is unchanged and
        the temporary file is removed, with one exception: if only the last step fails (fsync of the
        folder), the new file is in place but might not survive a power cut.

    Saving makes no second copy of the tree in memory: leaves are copied to the host one at a time.

    If an array lies on devices of several processes, all of them must call `save` with the same
    tree and a path that they share. Each process writes a part, the file at `path` lists the parts,
    and all processes raise if one fails. Values that are not spread over processes are saved from
    process 0. With Orbax, all processes must always call `save`, and the host holds a second copy
    of the tree.
    """
    prepare(path, tree, metadata, engine)()


def prepare(
    path: str | os.PathLike[str],
    tree: Any,
    metadata: dict[str, Any] | None,
    engine: str | None = None,
    *,
    snapshot: bool = False,
    follow: bool = True,
) -> Callable[[], None]:
    """Check a tree and return a function that writes it, which may be called once.

    Args:
      path: as in `save`.
      tree: as in `save`.
      metadata: as in `save`.
      engine: as in `save`.
      snapshot: True to write a copy on the host. The arrays of the tree may then be donated,
        deleted or changed. A tree that is spread over several processes is never copied, except by
        Orbax.
      follow: whether a symbolic link at `path` stays and the file behind it is replaced. If False,
        the link is replaced.

    Returns:
      The function that writes.

    Raises:
      CheckpointError, ValueError, OSError: as `save`.
    """
    from jaxnet.checkpoint import arrays, orbax, outside, parts

    if isinstance(tree, str | os.PathLike) and not isinstance(path, str | bytes | os.PathLike):
        raise TypeError("save takes the path first: save(path, tree)")
    file = os.fsdecode(path)
    places.check_engine(file, engine)
    target = places.real(file, follow=follow)
    if not places.is_url(target):
        atomic.check_target(file, target)
    node, leaves = structure.encode(file, tree, functools.partial(arrays.describe, file))
    nodes = structure.leaves(node)
    shapes = {name: arrays.shape_in_file(nodes[name], x) for name, x in leaves.items()}
    tensors = fmt.layout(
        [(name, *structure.stored_as(nodes[name], shape)) for name, shape in shapes.items()]
    )
    manifest = {
        "version": header_types.VERSION,
        "metadata": exact_json(file, metadata or {}),
        "tree": tree_json.to_json(node),
    }
    if engine or parts.is_spread(leaves):
        container.check_names(file, nodes, len(json.dumps(manifest)))
    if engine == "orbax":
        return orbax.start(file, target, tensors, manifest, nodes, leaves, beside=snapshot)
    if parts.is_spread(leaves):
        return functools.partial(parts.write, file, target, tensors, manifest, leaves, _save_part)
    empty = fmt.write_header(
        file, tensors, manifest | {"crc32": ["0" * 8 * t.chunks for t in tensors]}
    )
    container.check_names(file, nodes, len(empty))

    def fetch(name):
        return arrays.to_bytes(nodes[name], leaves[name])

    copies = {name: fetch(name).copy() for name in leaves} if snapshot else None

    def write():
        with atomic.replacing(file, target) as fd:
            os.lseek(fd, len(empty), os.SEEK_SET)
            crcs = container.write_tensors(fd, tensors, fetch if copies is None else copies.pop)
            os.lseek(fd, 0, os.SEEK_SET)
            atomic.write(fd, memoryview(fmt.with_manifest(empty, manifest | {"crc32": crcs})))
        outside.sweep(target)

    return write


def _save_part(path: str, tree: Any) -> None:
    prepare(path, tree, None, follow=False)()


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    pattern: str | Iterable[str] | None = None,
    rename: dict[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Read a tree from a file and check every byte of it.

    Without `like` dicts, lists, tuples, None, scalars and arrays come back as they were saved;
    NamedTuples, dataclasses and other registered nodes come back as dicts of their fields, since no
    class is ever imported by name. A file that jaxnet did not write comes back as nested dicts, its
    names split at '/'.

    With `like`, a tree of arrays or `jax.ShapeDtypeStruct`s, the result has exactly its structure,
    containers, shapes, dtypes and shardings; nothing is cast. Where `like` has a NumPy array, so
    has the result. Its values do not matter, and its arrays may be deleted (donated) ones.

    Arrays of 64 bits stay NumPy arrays while `jax_enable_x64` is off: JAX would truncate them.

    Args:
      path: the file.
      like: what the result shall look like, or None.
      pattern: a pattern of paths as in `jaxnet.tree` ('blocks/*/kernel', 'head'), or several, of
        which each must match something. Only these leaves are read and checked. The result, and
        `like`, is the part of the tree that holds them, as `jaxnet.tree.split(tree, pattern)[0]`
        gives it.
      rename: new paths for leaves of the file: a dict {path or node in the file: path or node in
        the result}, of which the longest that fits counts, or a function from path to path. The
        leaves then have no containers but those of `like` or, without it, nested dicts. A pattern
        in `pattern` applies to the new paths or, if it matches none of them, to the paths of the
        file.
      strict: False (with `like`) to keep the leaves of `like` that the file lacks, which must have
        values, and to leave out those of the file that `like` lacks. What both have must still fit,
        and they must share something.
      cast: True (with `like`) to convert arrays to the dtypes of `like`. Between floats, values are
        rounded to the nearest; all else must be exact. What overflows, is NaN or a fraction and
        becomes an integer, is an integer out of range or between two floats, or loses an imaginary
        part is an error.

    Raises:
      CheckpointError: the file is damaged, not a checkpoint, or is not what was asked for (all
        differences in one error, with guesses at what has been renamed; for a part of a file that
        `fit` wrote, the call that loads it).
      OSError: the file is missing or cannot be opened.
    """
    return _load(path, like, pattern, rename, strict, cast)[0]


def load_with_info(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    pattern: str | Iterable[str] | None = None,
    rename: dict[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
    cast: bool = False,
    template: Callable[[Info], Any] | None = None,
) -> tuple[Any, Info]:
    """Load a file and inspect it. Both results come from the same file, even if another process
    replaces it meanwhile.

    Args:
      path, like, pattern, rename, strict, cast: as in `load`.
      template: a function from the `Info` of the file to `like`, for a `like` that depends on the
        file.

    Returns:
      The results of `load` and of `inspect`.

    Raises:
      CheckpointError, OSError: as `load`; and whatever `template` raises.
    """
    tree, info = _load(path, like, pattern, rename, strict, cast, template)
    return tree, info()


def _load(
    path: str | os.PathLike[str],
    like: Any,
    pattern: Any,
    rename: Any,
    strict: bool,
    cast: bool,
    template: Callable[[Info], Any] | None = None,
) -> tuple[Any, Callable[[], Info]]:
    from jaxnet.checkpoint import arrays, casting

    if like is None and template is None and (cast or not strict):
        raise ValueError(
            "cast=True and strict=False need a tree `like`: they say how it and the file may differ"
        )
    patterns = None if pattern is None else [pattern] if isinstance(pattern, str) else list(pattern)

    def read(file, fd, size):
        content = read_content(file, fd, size)
        info, kept = functools.partial(info_of, file, size, content), {}
        wanted = like if template is None else template(info())
        old = {}
        if rename is not None:
            content, old = match.rename_all(file, content, rename)
        if patterns is not None:
            content = match.select_part(file, content, patterns, old)
        header, node, nodes, tensors = content[:4]
        targets = {name: casting.Target(nodes[name].kind, nodes[name].value) for name in tensors}
        if wanted is not None:
            what = "it" if pattern is None else "what `pattern` selects"
            part = patterns is not None
            targets, kept = template_of.fit(
                file, what, wanted, content, strict=strict, cast=cast, part=part
            )
        # Blocks of a tree in parts that only other processes need are not read. A cast must look at
        # all values.
        needed = {
            tensors[n].name: arrays.blocks(file, t, tensors[n].shape)
            for n, t in targets.items()
            if not cast
        }
        raw = read_tensors(
            file, fd, header, [tensors[name] for name in targets], arrays.empty, needed
        )
        return file, info, wanted, kept, node, nodes, tensors, targets, raw

    file, info, wanted, kept, node, nodes, tensors, targets, raw = steadily(path, read)
    stored = {
        n: arrays.from_bytes(file, n, nodes[n], tensors[n].shape, raw.pop(tensors[n].name))
        for n in targets
    }
    if cast:
        stored = casting.cast(file, stored, targets)
    values = arrays.place(file, nodes, stored, targets)
    if wanted is None:
        return structure.build(node, values), info
    scalars = {name: n.value for name, n in nodes.items() if name not in tensors}
    return structure.refill(wanted, scalars | values | kept), info


def verify(path: str | os.PathLike[str]) -> Info:
    """Read a whole file, and check its structure and all checksums.

    This takes a few MB of memory and needs neither JAX nor NumPy. (Arrays that Orbax wrote need
    memory for one block, and TensorStore and NumPy.) Files of other programs have no checksums, so
    only their headers and lengths are checked.

    Args:
      path: the file.

    Returns:
      The result of `inspect`.

    Raises:
      CheckpointError: the file is damaged or not a checkpoint.
      OSError: the file is missing or cannot be opened.
    """

    def read(file, fd, size):
        content = read_content(file, fd, size)
        read_tensors(file, fd, content.header, content.header.tensors, None)
        return info_of(file, size, content)

    return steadily(path, read)


def read_tensors(
    file: str,
    fd: int,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
    needed: Mapping[str, Sequence[tuple[slice, ...]] | None] | None = None,
) -> dict[str, Any]:
    """`container.read_tensors` for tensors in the file, in its parts or in the folder of Orbax.

    If `needed` has blocks for a tensor outside the file, only pieces that overlap one of these
    blocks are read.
    """
    if not header.outside:
        return container.read_tensors(file, fd, header, tensors, empty)
    from jaxnet.checkpoint import parts, zarr

    return (zarr if header.orbax else parts).read_tensors(
        file, header, tensors, empty, needed or {}
    )
