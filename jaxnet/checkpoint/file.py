"""One file: write a tree into it, and read it without trusting it."""

import contextlib
import errno
import functools
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxnet.checkpoint import atomic, match, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import CheckpointError, Header, Misfit, Tensor
from jaxnet.checkpoint.structure import Node, Spec
from jaxnet.checkpoint.words import shown

if TYPE_CHECKING:
    from jaxnet.checkpoint.arrays import Target

READ = 1 << 20  # bytes read and summed at a time, so that the sum finds them in the processor's cache
WRITE = 4 << 20  # bytes written and summed at a time; a part of format.CHUNK
SMALL = 64 << 10  # bytes of a tensor that is written together with others


class Leaf(NamedTuple):
    """One array of a file; `nbytes` is the space it takes there."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Info(NamedTuple):
    """What a file says about itself; `version` is None for a safetensors file of another program."""

    path: str
    version: int | None
    metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    scalars: dict[str, Any]  # Python scalars and strings by path
    nbytes: int  # of the whole file and of its parts; for those of Orbax, of the arrays


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: dict[str, Any] | None = None,
    engine: Literal["orbax"] | None = None,
) -> None:
    """Write a tree to a file, durably: after any failure the file holds either the old tree or the new one, whole.

    Args:
      path: the file, by custom called `*.safetensors`; missing folders are made, an existing file is replaced.
        With `engine="orbax"` also a URL of an object store, as in "gs://bucket/run/state.safetensors".
      tree: any pytree. Leaves: JAX and NumPy arrays, typed random keys, bool, int, float, complex, str, bytes, None.
        Nothing in it is changed.
      metadata: a dict that JSON can hold exactly (str keys; no tuples, no NaN); `inspect` returns it.
      engine: "orbax" to let Orbax (`pip install 'jaxnet[orbax]'`) write the arrays, into a folder beside the file: for pods, and
        for object stores. The file then holds all the rest, and the checksums; `load` and the others find the folder.

    Raises:
      CheckpointError: the tree holds something that cannot be stored; nothing has been written.
      ValueError: another engine, or a URL without `engine="orbax"`.
      OSError: from the operating system (no space, no permission). The old file is as it was and the temporary file
        is gone, except when only the very last step fails (fsync of the folder): then the new file is in place, but
        might not survive a power cut.

    The tree costs no second copy in memory: one leaf at a time is brought to the host.

    If an array lies on devices of several processes, all of them must call this with the same tree and a path that they
    share; each writes a part, `path` names the parts, and all raise if one fails. What is not spread is saved as process
    0 has it. With Orbax all processes must always call it; it holds a second copy of the tree on the host.
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
    """Check all that can be wrong with a tree and return what writes it, once; from a copy if `snapshot`.

    If the path is a symbolic link, the file behind it is replaced or, without `follow`, the link itself.

    A copy is on the host and shares no memory with the tree, whose arrays may then be donated, deleted or changed. A
    tree that is spread over several processes is never copied, except by Orbax.
    """
    from jaxnet.checkpoint import arrays, orbax, parts

    file = os.fsdecode(path)
    check_engine(file, engine)
    target = places.real(file, follow=follow)
    if not places.is_url(target):
        atomic.check_target(file, target)
    node, leaves = structure.encode(file, tree, functools.partial(arrays.describe, file))
    nodes = structure.leaves(node)
    shapes = {name: arrays.shape_in_file(nodes[name], x) for name, x in leaves.items()}
    tensors = fmt.layout([(name, *structure.stored_as(nodes[name], shape)) for name, shape in shapes.items()])
    manifest = {"version": fmt.VERSION, "metadata": _exact_json(file, metadata or {}), "tree": structure.to_json(node)}
    if engine or parts.is_spread(leaves):
        _check_names(file, nodes, len(json.dumps(manifest)))
    if engine == "orbax":
        return orbax.start(file, target, tensors, manifest, nodes, leaves, beside=snapshot)
    if parts.is_spread(leaves):
        return functools.partial(parts.write, file, target, tensors, manifest, leaves)
    empty = fmt.write_header(file, tensors, manifest | {"crc32": ["0" * 8 * t.chunks for t in tensors]})
    _check_names(file, nodes, len(empty))

    def fetch(name):
        return arrays.to_bytes(nodes[name], leaves[name])

    copies = {name: fetch(name).copy() for name in leaves} if snapshot else None

    def write():
        with atomic.replacing(file, target) as fd:
            os.lseek(fd, len(empty), os.SEEK_SET)
            crcs = _write_tensors(fd, tensors, fetch if copies is None else copies.pop)
            os.lseek(fd, 0, os.SEEK_SET)
            atomic.write(fd, memoryview(fmt.with_manifest(empty, manifest | {"crc32": crcs})))
        parts.sweep(target)

    return write


def load(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: str | Iterable[str] | None = None,
    rename: dict[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Any:
    """Read a tree from a file and check every byte of it.

    Without `like` dicts, lists, tuples, None, scalars and arrays come back as they were saved; NamedTuples, dataclasses
    and other registered nodes come back as dicts of their fields, since no class is ever imported by name. A file that
    jaxnet did not write comes back as nested dicts, its names split at '/'.

    With `like`, a tree of arrays or `jax.ShapeDtypeStruct`s, the result has exactly its structure, containers, shapes,
    dtypes and shardings; nothing is cast. Where `like` has a NumPy array, so has the result. Its values do not matter,
    and its arrays may be deleted (donated) ones.

    Arrays of 64 bits stay NumPy arrays while `jax_enable_x64` is off: JAX would truncate them.

    Args:
      path: the file.
      like: what the result shall look like, or None.
      only: a pattern of paths as in `jaxnet.tree` ('blocks/*/kernel', 'head'), or several, of which each must match
        something. Only these leaves are read and checked. The result, and `like`, is the part of the tree that holds
        them, as `jaxnet.tree.split(tree, only)[0]` gives it.
      rename: new paths for leaves of the file: a dict {path or node in the file: path or node in the result}, of which
        the longest that fits counts, or a function from path to path. The leaves then have no containers but those of
        `like` or, without it, nested dicts. `only` speaks of the new paths.
      strict: False (with `like`) to keep the leaves of `like` that the file lacks, which must have values, and to
        leave out those of the file that `like` lacks. What both have must still fit, and they must share something.
      cast: True (with `like`) to convert arrays to the dtypes of `like`. Between floats, values are rounded to the
        nearest; all else must be exact. What overflows, is NaN or a fraction and becomes an integer, is an integer out
        of range or between two floats, or loses an imaginary part is an error.

    Raises:
      CheckpointError: the file is damaged, not a checkpoint, or is not what was asked for (all differences in one
        error, with guesses at what has been renamed).
      OSError: the file is missing or cannot be opened.
    """
    return _load(path, like, only, rename, strict, cast)[0]


def load_with_info(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: str | Iterable[str] | None = None,
    rename: dict[str, str] | Callable[[str], str] | None = None,
    strict: bool = True,
    cast: bool = False,
    template: Callable[[Info], Any] | None = None,
) -> tuple[Any, Info]:
    """What `load` and `inspect` return, from one and the same file, even while another replaces it.

    Args:
      template: a function from what `inspect` returns to `like`, if `like` depends on what the file holds.
    """
    tree, info = _load(path, like, only, rename, strict, cast, template)
    return tree, info()


def _load(
    path: str | os.PathLike[str],
    like: Any,
    only: Any,
    rename: Any,
    strict: bool,
    cast: bool,
    template: Callable[[Info], Any] | None = None,
) -> tuple[Any, Callable[[], Info]]:
    from jaxnet.checkpoint import arrays

    if like is None and template is None and (cast or not strict):
        raise ValueError("cast=True and strict=False need a tree `like`: they say how it and the file may differ")
    patterns = None if only is None else [only] if isinstance(only, str) else list(only)

    def read(file, fd, size):
        content = read_content(file, fd, size)
        info, kept = functools.partial(_info, file, size, content), {}
        wanted = like if template is None else template(info())
        if rename is not None:
            content = _rename(file, content, rename)
        if patterns is not None:
            content = _select(file, content, patterns)
        header, node, nodes, tensors = content[:4]
        targets = {name: arrays.Target(nodes[name].kind, nodes[name].value) for name in tensors}
        if wanted is not None:
            what = "it" if only is None else "what `only` selects"
            targets, kept = _match(file, what, wanted, content, strict, cast)
        # Of a tree in parts, what other processes will hold is not read. A cast looks at all values.
        needed = {tensors[n].name: arrays.blocks(file, t, tensors[n].shape) for n, t in targets.items() if not cast}
        raw = read_tensors(file, fd, header, [tensors[name] for name in targets], arrays.empty, needed)
        return file, info, wanted, kept, node, nodes, tensors, targets, raw

    file, info, wanted, kept, node, nodes, tensors, targets, raw = steadily(path, read)
    stored = {n: arrays.from_bytes(file, n, nodes[n], tensors[n].shape, raw.pop(tensors[n].name)) for n in targets}
    if cast:
        stored = arrays.cast(file, stored, targets)
    values = arrays.place(file, nodes, stored, targets)
    if wanted is None:
        return structure.build(node, values), info
    scalars = {name: n.value for name, n in nodes.items() if name not in tensors}
    return structure.refill(wanted, scalars | values | kept), info


def inspect(path: str | os.PathLike[str]) -> Info:
    """What a file holds, from its header alone: as fast for 10 GB as for 10 kB, and for any safetensors file (of those at
    a URL the whole object is fetched).

    Raises:
      CheckpointError: the header is damaged (the arrays' bytes are not read: `verify` does that).
      OSError: the file is missing or cannot be opened.
    """
    with opened(path) as (file, fd, size):
        return _info(file, size, read_content(file, fd, size))


def verify(path: str | os.PathLike[str]) -> Info:
    """Read a whole file, check its structure and all checksums, and return what `inspect` does.

    Takes no more memory than a few MB and needs neither JAX nor NumPy (for Orbax's arrays a block, and TensorStore and
    NumPy). The file of another program has no checksums: there only the header and the file's length are checked.

    Raises: as `load`.
    """

    def read(file, fd, size):
        content = read_content(file, fd, size)
        read_tensors(file, fd, content.header, content.header.tensors, None)
        return _info(file, size, content)

    return steadily(path, read)


def check_engine(file: str, engine: str | None) -> None:
    if engine not in (None, "orbax"):
        raise ValueError(f"engine must be 'orbax' or None, got {engine!r}")
    if engine is None and places.is_url(file):
        text = "say engine='orbax' (in `fit`: give it a `Checkpoints` with that), or save to a file"
        raise ValueError(f"{shown(file)} is in an object store: {text}")
    if places.is_url(file):
        places.check_url(file)


def replace(target: str, content: bytes) -> None:
    """Write a file, durably, in place of the one that may be there; `target` is as `places.real` gives it."""
    if places.is_url(target):
        return places.put(target, content)
    with atomic.replacing(target, target) as fd:
        atomic.write(fd, memoryview(content))


def _write_tensors(fd: int, tensors: list[Tensor], to_bytes: Callable[[str], Any]) -> list[str]:
    """Write the bytes of all tensors, one tensor at a time, and return their checksums.

    The disk works while the next bytes are fetched and summed: a second thread syncs what has been written so far.
    """
    crcs, sync, unsynced = [], None, 0
    waiting = bytearray()  # small tensors, which are written together: a call of the system costs more than their copy
    with ThreadPoolExecutor(1) as pool:
        for t in tensors:
            data = memoryview(to_bytes(t.name))
            sums = [fmt.crc_start(t, i) for i in range(t.chunks)]
            if len(data) <= SMALL:
                waiting += data
                sums = [zlib.crc32(data, sums[0])]
                data = data[:0]
            if waiting and (len(data) or len(waiting) >= 4 * SMALL):
                atomic.write(fd, memoryview(bytes(waiting)))
                unsynced += len(waiting)
                waiting.clear()
            for start in range(0, len(data), WRITE):
                block = data[start : start + WRITE]
                atomic.write(fd, block)
                unsynced += len(block)
                if unsynced >= 4 * WRITE and (sync is None or sync.done()):
                    if sync:
                        sync.result()  # raises what the disk reported, which it does only once
                        sync = None
                    with contextlib.suppress(RuntimeError):  # no new threads while the interpreter shuts down
                        sync = pool.submit(os.fsync, fd)
                    unsynced = 0
                sums[start // fmt.CHUNK] = zlib.crc32(block, sums[start // fmt.CHUNK])
            crcs.append("".join(f"{crc:08x}" for crc in sums))
        atomic.write(fd, memoryview(waiting))
        if sync:
            sync.result()
    return crcs


def _check_names(file: str, nodes: dict[str, Node], header: int) -> None:
    """Raise CheckpointError for what `read_content` would refuse."""
    if (size := sum(map(len, nodes))) > (most := structure.longest_names(header)):
        text = f"the paths of its leaves together have {size:,} characters, at most {most:,} are possible here"
        raise CheckpointError(file, None, f"{text}: shorten the keys of nested dicts")


def _exact_json(file: str, metadata: dict[str, Any]) -> dict[str, Any]:
    def depth(x):
        branches = x.values() if isinstance(x, dict) else x
        return 1 + max(map(depth, branches), default=0) if isinstance(x, dict | list) else 0

    try:
        if (
            isinstance(metadata, dict)
            and json.loads(json.dumps(metadata, allow_nan=False)) == metadata
            and depth(metadata) <= 100
        ):
            return metadata
        reason = "it does not come back from JSON as it was, or is nested deeper than 100 levels"
    except (TypeError, ValueError, RecursionError, OverflowError) as e:
        reason = str(e)
    text = "metadata must be a dict of str keys with str, int, float, bool, None, lists and dicts inside"
    raise CheckpointError(file, None, f"{text} (no tuples, NaN, infinities, arrays or NumPy numbers): {reason}")


# Reading: nothing is believed before it is checked, and nothing is allocated that the file's size does not justify.


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Give the file's name, descriptor and size."""
    file = os.fsdecode(path)
    if places.is_url(file):  # with nothing but its header in it, as a rule
        with tempfile.TemporaryFile() as copy:
            copy.write(content := places.fetch(file))
            copy.flush()
            yield file, copy.fileno(), len(content)
        return
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # do not wait for the other end of a pipe
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a checkpoint is a file, this is a folder", file)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(file, None, "not a regular file: copy it into one first")
        yield file, fd, status.st_size
    finally:
        os.close(fd)


def steadily(path: str | os.PathLike[str], read: Callable[[str, int, int], Any]) -> Any:
    """Return what `read(file, descriptor, size)` returns, from one save even if others replace it meanwhile.

    The parts of a file and its folder of Orbax are deleted when another save has taken its place. Who is just reading
    them then finds them missing or cut off, and reads the new ones.
    """
    tries = 0
    while True:
        with opened(path) as (file, fd, size):
            try:
                return read(file, fd, size)
            except Misfit:
                raise
            except CheckpointError as e:
                if not replaced(file, fd, size):
                    raise
                tries += 1
                if tries == 100:
                    raise CheckpointError(
                        file, None, f"it was replaced {tries} times while it was read, at last: {e}"
                    ) from e


def replaced(file: str, fd: int, size: int) -> bool:
    """Whether a path leads to another file than the open one, which keeps its number from being used again."""
    if places.is_url(file):
        return places.fetch(file) != os.pread(fd, size, 0)
    return not os.path.samestat(os.stat(file), os.fstat(fd))


def each(work: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Do all jobs: in threads, and those that no thread will take in this one. A job may be done twice."""
    running = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        with contextlib.suppress(RuntimeError):  # the interpreter shuts down, or the system gives no more threads
            for job in jobs:
                running.append(pool.submit(work, job))
        for job in jobs[len(running) :]:
            work(job)
        for future in running:
            future.result()


class Content(NamedTuple):
    """All that a file's first bytes say, checked."""

    header: Header
    node: Node
    leaves: dict[str, Node]
    tensors: dict[str, Tensor]  # by the names of the leaves, which in another program's file may not be their own
    structured: bool  # whether the file says which containers the tree has


def read_content(file: str, fd: int, size: int) -> Content:
    first = bytearray(min(8, size))
    _read(file, fd, memoryview(first), 0)
    raw = bytearray(fmt.header_length(file, bytes(first), size))
    _read(file, fd, memoryview(raw), 8)
    header = fmt.read_header(file, bytes(raw), size)
    if header.manifest is None:
        paths = structure.foreign_paths([t.name for t in header.tensors])
        dtypes = [Node("jax", structure.DTYPES.get(t.code, t.code)) for t in header.tensors]
        tensors = {structure.leaf_name(path): t for path, t in zip(paths, header.tensors, strict=True)}
        node = structure.nest(dict(zip(paths, dtypes, strict=True)))
        return Content(header, node, structure.leaves(node), tensors, False)
    node = structure.from_json(file, header.manifest.get("tree"))
    try:
        leaves = structure.leaves(node, structure.longest_names(header.data))
    except ValueError as e:
        raise CheckpointError(
            file, None, f"{e}, too many for its header of {header.data:,} bytes; {fmt.RESTORE}"
        ) from e
    tensors = {t.name: t for t in header.tensors}
    structure.check_arrays(file, leaves, tensors)
    return Content(header, node, leaves, tensors, True)


def _info(file: str, size: int, content: Content) -> Info:
    header, nodes, tensors = content.header, content.leaves, content.tensors
    specs = structure.specs_in_file(nodes, tensors)
    scalars = {name: n.value for name, n in nodes.items() if name not in tensors}
    sizes = {name: tensors[name].stop - tensors[name].start for name in nodes if name in tensors}
    leaves = tuple(Leaf(name, specs[name].shape or (), specs[name].dtype, size) for name, size in sizes.items())
    if header.manifest is None:
        return Info(file, None, header.metadata, leaves, scalars, size)
    size += sum(nbytes for _, nbytes in header.parts.files) if header.parts else 0
    size += sum(t.stop - t.start for t in header.tensors) if header.orbax else 0
    return Info(file, header.manifest["version"], header.manifest["metadata"], leaves, scalars, size)


def _rename(file: str, content: Content, rename: dict[str, str] | Callable[[str], str]) -> Content:
    """The same leaves under other names, without the containers."""
    paths = match.renamed(file, content.leaves, rename)
    leaves = {structure.leaf_name(path): content.leaves[name] for name, path in paths.items()}
    tensors = {structure.leaf_name(path): content.tensors[n] for n, path in paths.items() if n in content.tensors}
    node = structure.nest({path: content.leaves[name] for name, path in paths.items()})
    return Content(content.header, node, leaves, tensors, False)


def _select(file: str, content: Content, patterns: list[str]) -> Content:
    """The part of a file's tree that matches the patterns."""
    if not patterns:
        raise ValueError("only must be a pattern of paths or several, got none")
    names = match.select(file, content.leaves, patterns)
    node = match.prune(content.node, names) or content.node
    leaves, tensors = ({n: x for n, x in part.items() if n in names} for part in (content.leaves, content.tensors))
    return content._replace(node=node, leaves=leaves, tensors=tensors)


def _match(
    file: str, what: str, like: Any, content: Content, strict: bool, cast: bool
) -> tuple[dict[str, "Target"], dict[str, Any]]:
    """`fit` for the leaves of a file and their containers."""
    from jaxnet.checkpoint import arrays

    template, leaves = structure.encode(file, like, functools.partial(arrays.describe_template, file))
    containers = (template, content.node) if content.structured else None
    found = structure.specs_in_file(content.leaves, content.tensors)
    return fit(file, what, structure.leaves(template), leaves, found, containers, strict=strict, cast=cast)


def fit(
    file: str,
    what: str,
    nodes: dict[str, Node],
    leaves: dict[str, Any],
    found: dict[str, Spec],
    containers: tuple[Node, Node] | None,
    *,
    strict: bool,
    cast: bool,
) -> tuple[dict[str, "Target"], dict[str, Any]]:
    """How a template wants each array that it takes from what was found, if that fits it in all; and what it keeps.

    `nodes` are its leaves, `leaves` its arrays; `containers` are its structure and the one found, if that is known.
    """
    from jaxnet.checkpoint import arrays

    wanted = {n: structure.spec(node, tuple(leaves[n].shape) if n in leaves else None) for n, node in nodes.items()}
    lines = match.differences(wanted, found, containers, strict=strict, cast=cast)
    kept = {} if strict else {name: leaves.get(name, node.value) for name, node in nodes.items() if name not in found}
    empty = [name for name, x in kept.items() if arrays.is_abstract(x)]
    lines += [f"missing from the file: {shown(name)} {wanted[name]}, and `like` has no value" for name in empty]
    if kept and kept.keys() == nodes.keys():
        lines.append("strict=False, but the file and the template have no path in common")
    if lines:
        text = f"{what} does not fit the template `like` (without `like` it loads as saved):"
        raise Misfit(file, None, "\n  ".join([text, *lines]))
    targets = {
        n: arrays.Target(nodes[n].kind, nodes[n].value, arrays.sharding(x)) for n, x in leaves.items() if n in found
    }
    return targets, kept


def read_tensors(
    file: str,
    fd: int,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
    needed: Mapping[str, Sequence[tuple[slice, ...]] | None] | None = None,
) -> dict[str, Any]:
    """Read and check the bytes of some tensors; into memory that `empty(bytes)` gives, if it is given.

    Of tensors outside, only pieces that overlap one of the blocks in `needed` are read, where it names some.
    """
    if header.outside:
        from jaxnet.checkpoint import parts, zarr

        return (zarr if header.orbax else parts).read_tensors(file, header, tensors, empty, needed or {})
    out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}
    crcs = dict(zip((t.name for t in header.tensors), header.manifest["crc32"], strict=True)) if header.manifest else {}
    jobs = [(t, i, crcs.get(t.name, "")[8 * i : 8 * i + 8]) for t in tensors for i in range(t.chunks)]

    def check(job):
        tensor, i, expected = job
        start = tensor.start + i * fmt.CHUNK
        stop = min(start + fmt.CHUNK, tensor.stop)
        data = memoryview(out[tensor.name])[i * fmt.CHUNK :] if out else None
        crc = _read_chunk(file, fd, header.data + start, stop - start, data, fmt.crc_start(tensor, i))
        if expected and crc != int(expected, 16):
            text = (
                f"its bytes ({header.data + start} to {header.data + stop} of the file) are not those that were saved"
            )
            raise CheckpointError(file, tensor.name, f"{text}: CRC-32 {crc:08x}, expected {expected}; {fmt.RESTORE}")

    large = [job for job in jobs if job[0].stop - job[0].start > READ]
    for job in jobs:
        if job[0].stop - job[0].start <= READ:
            check(job)
    each(check, large)  # reading and summing both let other threads run
    return out


def _read_chunk(file: str, fd: int, position: int, length: int, data: memoryview | None, crc: int) -> int:
    """Read some bytes, into `data` if it is given, and return their CRC-32 in continuation of `crc`."""
    block = memoryview(bytearray(min(READ, length))) if data is None else data
    for done in range(0, length, READ):
        part = block[: min(READ, length - done)] if data is None else data[done : min(done + READ, length)]
        _read(file, fd, part, position + done)
        crc = zlib.crc32(part, crc)
    return crc


def _read(file: str, fd: int, data: memoryview, position: int):
    """Fill `data` from the file."""
    while data:
        try:
            got = os.preadv(fd, [data], position)
        except OSError as e:
            raise CheckpointError(file, None, f"cannot be read at byte {position} ({e}): restore it from a copy") from e
        if got == 0:
            raise CheckpointError(file, None, f"ends at byte {position}, before its data does: it is being changed")
        data, position = data[got:], position + got
