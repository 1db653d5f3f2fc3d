"""A tree that is spread over several processes: each writes a part, and a file at the path says what belongs together.

    state.safetensors                                  the manifest: structure, metadata, and the digest of each part
    state.safetensors.part-0123456789abcdef-00000      what process 0 owns: {leaf: {"0,4": piece that starts there}}
    state.safetensors.part-0123456789abcdef-00001

A part is a checkpoint itself, written by `save`. Each save has a new number, so that it never touches the parts of the
one before; the manifest is written when all parts are on the disk, and only then are older parts removed.
"""

import contextlib
import errno
import fcntl
import itertools
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxnet.checkpoint import atomic, container, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import CheckpointError, Header, Orbax, Parts, Tensor
from jaxnet.checkpoint.watch import Gone
from jaxnet.checkpoint.words import shown


class Piece(NamedTuple):
    """A block of a tensor, `tensor` in the file of part `part`, which begins at index `start` of the whole."""

    part: int
    tensor: Tensor
    start: tuple[int, ...]


def is_spread(tree: Any) -> bool:
    """Whether some array of a tree lies on devices of several processes."""
    import jax
    from jax.core import Tracer

    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    return bool(arrays) and jax.process_count() > 1 and not all(x.is_fully_addressable for x in arrays)


def write(
    file: str,
    target: str,
    tensors: list[Tensor],
    manifest: dict[str, Any],
    leaves: dict[str, Any],
    save_part: Callable[[str, Any], None],
) -> None:
    """Write a tree together with all other processes, which must call this, too; all of them raise if one fails."""
    import jax

    me, identity, held = jax.process_index(), new_number(), contextlib.ExitStack()

    def commit() -> None:
        paths = [path_of(target, identity, i) for i in range(jax.process_count())]
        with contextlib.ExitStack() as stack:
            try:
                opened = [stack.enter_context(container.opened(path)) for path in paths]
            except FileNotFoundError as e:
                text = f"the part {shown(e.filename)} is not there: all processes must save to one folder, which they share"
                raise CheckpointError(file, None, text) from e
            headers = [container.read_content(*part).header for part in opened]
            pieces(file, tensors, headers)
            parts = [
                [header.metadata["jaxnet_sha256"], size] for header, (_, _, size) in zip(headers, opened, strict=True)
            ]
        described = {"id": identity, "files": parts, "tensors": [[t.name, t.code, t.shape] for t in tensors]}
        container.replace(
            target, fmt.write_header(file, [], manifest | {"version": 2, "crc32": [], "parts": described})
        )
        held.close()
        sweep(target)

    with held:
        with together(file, target, held):
            if me == 0:
                held.enter_context(reserved(target, identity))
            save_part(path_of(target, identity, me), _owned(leaves, everything=me == 0))
        with together(file, target, held):
            if me == 0:
                commit()


def new_number() -> str:
    """The number of a save, the same in all processes: 16 random hexadecimal digits."""
    import numpy as np
    from jax.experimental import multihost_utils

    number = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint8))
    return np.asarray(number).tobytes().hex()


@contextlib.contextmanager
def reserved(target: str, identity: str) -> Iterator[None]:
    """While this lasts, no other save to the same path sweeps what the save of this number has written."""
    atomic.make_folder(os.path.dirname(target))
    path = lock_path(target, identity)
    fd = atomic.open_locked(path)
    while fd is None:
        fd = atomic.open_locked(path)
    try:
        yield
    finally:
        atomic.discard(path, fd)


@contextlib.contextmanager
def _claimed(target: str, identity: str) -> Iterator[bool]:
    """Give whether no living save has reserved this number; while this lasts, none can, and then its lock is gone."""
    if places.is_url(target):
        yield True
        return
    try:
        fd = os.open(path := lock_path(target, identity), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    except OSError as e:
        if e.errno != errno.ELOOP:  # a symbolic link is no lock of ours
            raise
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it lives, or the file system has no locks: perhaps it lives
            yield False
            return
        yield True
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is locked: who has just made it sees that, and makes it again
    finally:
        os.close(fd)


@contextlib.contextmanager
def together(file: str, target: str, held: contextlib.ExitStack) -> Iterator[None]:
    """A block that all processes execute: if it fails in some of them, all raise, and what was begun is removed.

    What is `held` is given up before.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except Gone:  # others will not come
        held.close()
        sweep(target)
        raise
    except Exception as e:  # the others wait: say so before raising it
        error = e
    well = np.array([error is None])
    if jax.process_count() > 1:
        well = multihost_utils.process_allgather(well).ravel()
    if not well.all():
        held.close()
        sweep(target)
    if error:
        raise error
    if not well.all():
        failed = np.flatnonzero(~well).tolist()
        raise CheckpointError(file, None, f"processes {failed} failed to save; what they raise says why")


def _owned(leaves: dict[str, Any], *, everything: bool) -> dict[str, dict[str, Any]]:
    """The first replica of each shard that is here and, in one of the processes, all that is not spread."""
    tree = {}
    for name, x in leaves.items():
        if is_spread(x):
            shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
            found = {",".join(str(axis.start or 0) for axis in shard.index): shard.data for shard in shards}
        else:
            found = {"": x} if everything else {}
        if found:
            tree[name] = found
    return tree


def read_tensors(
    file: str,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
    needed: Mapping[str, Sequence[tuple[slice, ...]] | None],
) -> dict[str, Any]:
    """As `container.read_tensors`, from the parts."""
    with opened(file, header) as parts:
        found = pieces(file, header.tensors, [part for _, _, part in parts])
        out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}  # no more than the parts have
        for t in tensors:
            for number, tensor, start in found[t.name]:
                path, fd, part = parts[number]
                blocks = needed.get(t.name)
                if blocks is not None and not any(overlap(t, tensor, start, block) for block in blocks):
                    continue
                if not empty:
                    container.read_tensors(path, fd, part, [tensor], None)
                    continue
                block = tuple(slice(first, first + size) for first, size in zip(start, tensor.shape, strict=True))
                place = out[t.name].reshape(*t.shape, fmt.BITS[t.code] // 8)[block]
                if place.flags.c_contiguous:  # straight to where it belongs
                    container.read_tensors(path, fd, part, [tensor], lambda _, place=place: place.reshape(-1))
                else:
                    raw = container.read_tensors(path, fd, part, [tensor], empty)[tensor.name]
                    place[...] = raw.reshape(place.shape)
    return out


def overlap(whole: Tensor, piece: Tensor, start: tuple[int, ...], block: tuple[slice, ...]) -> bool:
    """Whether a piece has elements in a block; for a block, axes at the end may be left out."""
    ranges = [axis.indices(size)[:2] for axis, size in zip(block, whole.shape, strict=False)]
    return all(a < high and low < a + n for (low, high), a, n in zip(ranges, start, piece.shape, strict=False))


@contextlib.contextmanager
def opened(file: str, header: Header) -> Iterator[list[tuple[str, int, Header]]]:
    """Open all parts and check that they are those which the manifest means: give path, descriptor, header of each."""
    assert header.parts
    target, result = places.real(file), []
    with contextlib.ExitStack() as stack:
        for i, (digest, _) in enumerate(header.parts.files):
            path = path_of(target, header.parts.id, i)
            try:
                part, fd, size = stack.enter_context(container.opened(path))
            except FileNotFoundError as e:
                text = f"its part {shown(path)} is missing: copy and rename it with its parts"
                raise CheckpointError(file, None, text) from e
            content = container.read_content(part, fd, size)
            if content.header.metadata.get("jaxnet_sha256") != digest:
                text = f"its part {shown(path)} is that of another checkpoint or was replaced; {fmt.RESTORE}"
                raise CheckpointError(file, None, text)
            result.append((part, fd, content.header))
        yield result


def pieces(file: str, tensors: Iterable[Tensor], parts: Iterable[Header]) -> dict[str, list[Piece]]:
    """Where each tensor's blocks are; CheckpointError unless they fill it exactly."""
    found: dict[str, list[Piece]] = {t.name: [] for t in tensors}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            name, start = (*structure.leaf_path(tensor.name), "")[:2]
            if name not in found or not re.fullmatch(r"(\d{1,18}(,\d{1,18})*)?", start):
                raise CheckpointError(file, None, f"part {number} has a tensor '{shown(tensor.name)}'; {fmt.RESTORE}")
            first = tuple(int(position) for position in start.split(",") if position)
            found[name].append(Piece(number, tensor, first + (0,) * (len(tensor.shape) - len(first))))
    for t in tensors:
        grid(file, t, found[t.name])
    return found


def grid(file: str, whole: Tensor, found: list[Piece]) -> list[list[int]]:
    """Where the pieces of a tensor begin along each axis; CheckpointError unless they fill it."""
    cuts = _cuts(whole, found)
    if cuts is None:
        where = [f"{p.tensor.code}{list(p.tensor.shape)} at {list(p.start)}" for p in found[:20]]
        where += ["..."] if len(found) > 20 else []
        text = f"its pieces do not fill {whole.code}{list(whole.shape)}: they are {', '.join(where) or 'missing'}"
        raise CheckpointError(file, whole.name, f"{text} (did all processes save the same tree?)")
    return cuts


def _cuts(whole: Tensor, found: list[Piece]) -> list[list[int]] | None:
    """None if these blocks are not the cells of a grid over the whole, as those of every sharding are."""
    if any(p.tensor.code != whole.code or not len(p.start) == len(p.tensor.shape) == len(whole.shape) for p in found):
        return None
    cuts = [sorted({p.start[axis] for p in found}) for axis in range(len(whole.shape))]
    ends = [dict(itertools.pairwise([*cut, size])) for cut, size in zip(cuts, whole.shape, strict=True)]
    cells = {p.start for p in found}
    # The counts first: few pieces on a diagonal would ask for a grid of astronomically many cells.
    regular = (
        len(found) == len(cells) == math.prod(map(len, cuts))
        and cells == set(itertools.product(*cuts))
        and all(cut[:1] == [0] for cut in cuts)
    )
    filled = regular and all(
        start + size == end[start]
        for p in found
        for start, size, end in zip(p.start, p.tensor.shape, ends, strict=True)
    )
    return cuts if filled else None


def path_of(target: str, identity: str, number: int) -> str:
    return f"{target}.part-{identity}-{number:05d}"


def orbax_path(target: str, identity: str) -> str:
    return f"{target}.orbax-{identity}"


def lock_path(target: str, identity: str) -> str:
    return f"{target}.lock-{identity}"


# What follows a file's name in those of all the others. Orbax adds to its own while it writes.
OUTSIDE = r"\.(?:part|orbax|lock)-([0-9a-f]{16})(?:-\d{5,}|\.orbax-checkpoint-tmp.*)?"


def sweep(target: str) -> None:
    """Remove what a path has outside its file and does not mean: of older saves, and of those that failed."""
    folder, name = os.path.split(target)
    with contextlib.suppress(OSError, CheckpointError):  # a file that cannot be read keeps whatever is there
        found = [
            (entry, re.fullmatch(re.escape(name) + OUTSIDE, entry)) for entry in places.entries(folder, links=False)
        ]
        for identity in {match[1] for _, match in found if match}:
            with _claimed(target, identity) as dead:
                meant = _outside(target)  # read now, since a save gives itself up after it is meant
                if dead and (meant is None or meant.id != identity):
                    _remove_all(folder, [entry for entry, match in found if match and match[1] == identity])


def _remove_all(folder: str, names: Iterable[str]) -> None:
    """Delete the files and folders of a save; the lock last and by others, so that what a kill leaves can be told."""
    for name in names:
        if not re.search(r"\.lock-[0-9a-f]{16}$", name):
            with contextlib.suppress(OSError):
                places.remove(os.path.join(folder, name), folder_too=".orbax-" in name)


def owners(folder: str) -> set[str]:
    """The names of the files in a folder, there or not, of which a save is under way or was killed."""
    locks = (re.fullmatch(r"(.+)\.lock-[0-9a-f]{16}", entry) for entry in places.entries(folder, links=False))
    return {found[1] for found in locks if found}


def undo(target: str, identity: str) -> None:
    """Remove all that a save has written, of which the file does not yet know."""
    folder, name = os.path.split(target)
    with contextlib.suppress(OSError):
        found = [
            (entry, re.fullmatch(re.escape(name) + OUTSIDE, entry)) for entry in places.entries(folder, links=False)
        ]
        _remove_all(folder, [entry for entry, match in found if match and match[1] == identity])


def _outside(target: str) -> Parts | Orbax | None:
    try:
        with container.opened(target) as (file, fd, size):
            return container.read_content(file, fd, size).header.outside
    except FileNotFoundError:
        return None


def remove(path: str) -> None:
    """Delete a checkpoint with all that is outside its file, the file first; nothing if it is a symbolic link."""
    target = places.real(path, follow=False)
    if not places.is_url(target) and os.path.islink(target):
        return
    with contextlib.suppress(OSError, CheckpointError):
        if (outside := _outside(target)) and not places.is_url(target):  # so that what a kill leaves can be told
            flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            os.close(os.open(lock_path(target, outside.id), flags, 0o666))
    places.remove(target)
    sweep(target)
