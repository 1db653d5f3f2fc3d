"""A tree that is spread over several processes: each process writes a part, and the file at the
path lists the parts.

    state.safetensors                                the manifest: structure, metadata, digests
    state.safetensors.part-0123456789abcdef-00000    of process 0: {leaf: {"0,4": piece from there}}
    state.safetensors.part-0123456789abcdef-00001

A part is itself a checkpoint, written by `save`. Each save has a new number and so never touches
the parts of earlier saves. The manifest is written when all parts are on the disk; older parts are
deleted afterwards.
"""

import contextlib
import itertools
import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxnet.checkpoint import container, header_types, outside, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.header_types import Header, Tensor
from jaxnet.checkpoint.watch import Gone
from jaxnet.checkpoint.words import shown


class Piece(NamedTuple):
    """A block of a tensor, `tensor` in the file of part `part`, which begins at index `start` of
    the whole.
    """

    part: int
    tensor: Tensor
    start: tuple[int, ...]


def is_spread(tree: Any) -> bool:
    """Whether some array of a tree lies on devices of several processes."""
    import jax
    from jax.core import Tracer

    arrays = [
        x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    ]
    return (
        bool(arrays) and jax.process_count() > 1 and not all(x.is_fully_addressable for x in arrays)
    )


def write(
    file: str,
    target: str,
    tensors: list[Tensor],
    manifest: dict[str, Any],
    leaves: dict[str, Any],
    save_part: Callable[[str, Any], None],
) -> None:
    """Write a tree. Collective: all processes must call this, and all of them raise if one
    fails.
    """
    import jax

    me, identity, held = jax.process_index(), new_number(), contextlib.ExitStack()

    def commit() -> None:
        paths = [outside.path_of(target, identity, i) for i in range(jax.process_count())]
        with contextlib.ExitStack() as stack:
            try:
                opened = [stack.enter_context(container.opened(path)) for path in paths]
            except FileNotFoundError as e:
                text = (
                    f"the part {shown(e.filename)} is not there: all processes must save to one "
                    "folder, which they share"
                )
                raise CheckpointError(file, None, text) from e
            headers = [container.read_content(*part).header for part in opened]
            pieces(file, tensors, headers)
            parts = [
                [header.metadata["jaxnet_sha256"], size]
                for header, (_, _, size) in zip(headers, opened, strict=True)
            ]
        described = {
            "id": identity,
            "files": parts,
            "tensors": [[t.name, t.code, t.shape] for t in tensors],
        }
        container.replace(
            target,
            fmt.write_header(file, [], manifest | {"version": 2, "crc32": [], "parts": described}),
        )
        held.close()
        outside.sweep(target)

    with held:
        with together(file, target, held):
            if me == 0:
                held.enter_context(outside.reserved(target, identity))
            save_part(outside.path_of(target, identity, me), _owned(leaves, everything=me == 0))
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
def together(file: str, target: str, held: contextlib.ExitStack) -> Iterator[None]:
    """A block that all processes execute. If it fails in any of them, all processes raise and
    unfinished files are deleted.

    `held` is closed before the files are deleted.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except Gone:
        # Other processes are dead, so a collective would hang.
        held.close()
        outside.sweep(target)
        raise
    except Exception as e:
        # Other processes wait for this one, so they must learn of the error before it is raised.
        error = e
    well = np.array([error is None])
    if jax.process_count() > 1:
        well = multihost_utils.process_allgather(well).ravel()
    if not well.all():
        held.close()
        outside.sweep(target)
    if error:
        raise error
    if not well.all():
        failed = np.flatnonzero(~well).tolist()
        raise CheckpointError(
            file, None, f"processes {failed} failed to save; what they raise says why"
        )


def _owned(leaves: dict[str, Any], *, everything: bool) -> dict[str, dict[str, Any]]:
    """The first replicas of the shards on this process and, with `everything`, all leaves that are
    not spread.
    """
    tree = {}
    for name, x in leaves.items():
        if is_spread(x):
            shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
            found = {
                ",".join(str(axis.start or 0) for axis in shard.index): shard.data
                for shard in shards
            }
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
    """`container.read_tensors` for tensors in parts."""
    with opened(file, header) as parts:
        found = pieces(file, header.tensors, [part for _, _, part in parts])
        # `pieces` has checked that the parts hold all these bytes.
        out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}
        for t in tensors:
            for number, tensor, start in found[t.name]:
                path, fd, part = parts[number]
                blocks = needed.get(t.name)
                if blocks is not None and not any(
                    overlap(t, tensor, start, block) for block in blocks
                ):
                    continue
                if not empty:
                    container.read_tensors(path, fd, part, [tensor], None)
                    continue
                block = tuple(
                    slice(first, first + size)
                    for first, size in zip(start, tensor.shape, strict=True)
                )
                place = out[t.name].reshape(*t.shape, header_types.BITS[t.code] // 8)[block]
                # A contiguous piece is read in place, without a copy.
                if place.flags.c_contiguous:
                    container.read_tensors(
                        path, fd, part, [tensor], lambda _, place=place: place.reshape(-1)
                    )
                else:
                    raw = container.read_tensors(path, fd, part, [tensor], empty)[tensor.name]
                    place[...] = raw.reshape(place.shape)
    return out


def overlap(whole: Tensor, piece: Tensor, start: tuple[int, ...], block: tuple[slice, ...]) -> bool:
    """Whether a piece has elements in a block. The block may omit trailing axes."""
    ranges = [axis.indices(size)[:2] for axis, size in zip(block, whole.shape, strict=False)]
    return all(
        a < high and low < a + n
        for (low, high), a, n in zip(ranges, start, piece.shape, strict=False)
    )


@contextlib.contextmanager
def opened(file: str, header: Header) -> Iterator[list[tuple[str, int, Header]]]:
    """Open all parts, check their digests against the manifest, and yield the path, descriptor and
    header of each.
    """
    assert header.parts
    target, result = places.real(file), []
    with contextlib.ExitStack() as stack:
        for i, (digest, _) in enumerate(header.parts.files):
            path = outside.path_of(target, header.parts.id, i)
            try:
                part, fd, size = stack.enter_context(container.opened(path))
            except FileNotFoundError as e:
                text = f"its part {shown(path)} is missing: copy and rename it with its parts"
                raise CheckpointError(file, None, text) from e
            content = container.read_content(part, fd, size)
            if content.header.metadata.get("jaxnet_sha256") != digest:
                text = (
                    f"its part {shown(path)} is that of another checkpoint or was replaced; "
                    f"{fmt.RESTORE}"
                )
                raise CheckpointError(file, None, text)
            result.append((part, fd, content.header))
        yield result


def pieces(file: str, tensors: Iterable[Tensor], parts: Iterable[Header]) -> dict[str, list[Piece]]:
    """The pieces of each tensor in the parts. Raises CheckpointError unless they fill it
    exactly.
    """
    found: dict[str, list[Piece]] = {t.name: [] for t in tensors}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            name, start = (*structure.leaf_path(tensor.name), "")[:2]
            if name not in found or not re.fullmatch(r"(\d{1,18}(,\d{1,18})*)?", start):
                raise CheckpointError(
                    file, None, f"part {number} has a tensor '{shown(tensor.name)}'; {fmt.RESTORE}"
                )
            first = tuple(int(position) for position in start.split(",") if position)
            found[name].append(
                Piece(number, tensor, first + (0,) * (len(tensor.shape) - len(first)))
            )
    for t in tensors:
        grid(file, t, found[t.name])
    return found


def grid(file: str, whole: Tensor, found: list[Piece]) -> list[list[int]]:
    """The starts of a tensor's pieces along each axis. Raises CheckpointError unless they fill it
    exactly.
    """
    cuts = _cuts(whole, found)
    if cuts is None:
        where = [f"{p.tensor.code}{list(p.tensor.shape)} at {list(p.start)}" for p in found[:20]]
        where += ["..."] if len(found) > 20 else []
        text = (
            f"its pieces do not fill {whole.code}{list(whole.shape)}: they are "
            f"{', '.join(where) or 'missing'}"
        )
        raise CheckpointError(file, whole.name, f"{text} (did all processes save the same tree?)")
    return cuts


def _cuts(whole: Tensor, found: list[Piece]) -> list[list[int]] | None:
    """The starts of the pieces along each axis, or None unless the pieces form a grid, as those of
    every sharding do.
    """
    if any(
        p.tensor.code != whole.code or not len(p.start) == len(p.tensor.shape) == len(whole.shape)
        for p in found
    ):
        return None
    cuts = [sorted({p.start[axis] for p in found}) for axis in range(len(whole.shape))]
    ends = [
        dict(itertools.pairwise([*cut, size])) for cut, size in zip(cuts, whole.shape, strict=True)
    ]
    cells = {p.start for p in found}
    # Compare the counts first: a few pieces on a diagonal would span a grid of astronomically many
    # cells.
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
