"""The engine for a tree that is spread over several processes: each process writes a part, and the
file at the path lists the parts.

    state.safetensors                                the manifest: structure, metadata, digests
    state.safetensors.part-0123456789abcdef-00000    of process 0: {leaf: {"0,4": piece from there}}
    state.safetensors.part-0123456789abcdef-00001

A part is itself a checkpoint, a single file. Each save has a new number and so never touches the
parts of earlier saves. The manifest is written when all parts are on the disk; older parts are
deleted afterwards.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxnet.checkpoint import container, manifests, outside, places, processes, single, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import BITS
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.format import Header
from jaxnet.checkpoint.grids import Piece, cuts_of, overlap, place_of
from jaxnet.checkpoint.jobs import job_of
from jaxnet.checkpoint.protocol import Allocate, Engine, Job, Needed, Source
from jaxnet.checkpoint.tensors import Tensor
from jaxnet.checkpoint.words import shown

__all__ = ["ENGINE", "pieces", "read_from_parts", "write_to_parts"]


def write_to_parts(job: Job, *, snapshot: bool) -> Callable[[], None]:
    """`protocol.Writer` for parts.

    Collective: all processes must call both functions, and all of them raise if one fails. The
    arrays are never copied, so the caller must not ask for a snapshot.
    """
    assert not snapshot
    container.check_names(job.file, job.nodes, len(json.dumps(job.manifest)))
    return lambda: _write(job)


def _write(job: Job) -> None:
    import jax

    me = jax.process_index()
    first = me == 0
    identity, held = processes.new_number(), contextlib.ExitStack()
    with held:
        with processes.together(job.file, job.target, held):
            if first:
                held.enter_context(outside.reserved(job.target, identity))
            path = outside.path_of(job.target, identity, me)
            part = job_of(path, _owned(job.leaves, everything=first), {}, follow=False)
            single.write_to_file(part, snapshot=False)()
        with processes.together(job.file, job.target, held):
            if first:
                entry = _parts_entry(job, identity, jax.process_count())
                manifest = job.manifest | {"version": manifests.PARTS, "crc32": [], "parts": entry}
                container.replace(job.target, fmt.write_header(job.file, [], manifest))
                held.close()
                outside.sweep(job.target)


def _owned(leaves: dict[str, Any], *, everything: bool) -> dict[str, dict[str, Any]]:
    """The first replicas of the shards on this process and, with `everything`, all leaves that are
    not spread.
    """
    tree = {}
    for name, x in leaves.items():
        if processes.is_spread(x):
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


def _parts_entry(job: Job, identity: str, count: int) -> dict[str, Any]:
    """The entry of the manifest for parts, all of which are on the disk.

    Raises CheckpointError if a part is missing, or if they do not fill the tensors.
    """
    with contextlib.ExitStack() as stack:
        opened = []
        for number in range(count):
            path = outside.path_of(job.target, identity, number)
            try:
                opened.append(stack.enter_context(container.opened(path)))
            except FileNotFoundError as e:
                text = (
                    f"the part {shown(e.filename)} is not there: all processes must save to one "
                    "folder, which they share"
                )
                raise CheckpointError(job.file, None, text) from e
        headers = [container.read_content(*part).header for part in opened]
    pieces(job.file, job.tensors, headers)
    digests = [header.metadata["jaxnet_sha256"] for header in headers]
    return {
        "id": identity,
        "files": [[digest, size] for digest, (_, _, size) in zip(digests, opened, strict=True)],
        "tensors": [[t.name, t.code, t.shape] for t in job.tensors],
    }


def read_from_parts(
    source: Source, tensors: Sequence[Tensor], allocate: Allocate | None, needed: Needed
) -> dict[str, Any]:
    """`protocol.Reader` for parts. Pieces that are not needed are not read."""
    with _opened(source) as parts:
        found = pieces(source.file, source.header.tensors, [part.header for part in parts])
        # `pieces` has checked that the parts hold all these bytes.
        out = {t.name: allocate(t.nbytes) for t in tensors} if allocate else {}
        for t in tensors:
            blocks = needed.get(t.name)
            for number, piece, start in found[t.name]:
                if blocks is None or any(overlap(t, piece, start, block) for block in blocks):
                    whole = out[t.name] if allocate else None
                    _read_piece(parts[number], t, piece, start, whole, allocate)
    return out


def _read_piece(
    part: Source,
    tensor: Tensor,
    piece: Tensor,
    start: tuple[int, ...],
    whole: Any,
    allocate: Allocate | None,
) -> None:
    """Read a piece of a tensor into its place in `whole`; without `allocate`, check its bytes."""
    if allocate is None:
        single.read_from_file(part, [piece], None, {})
        return
    itemsize = BITS[tensor.code] // 8
    place = whole.reshape(*tensor.shape, itemsize)[place_of(start, piece.shape)]
    # A contiguous piece is read in place, without a copy.
    if place.flags.c_contiguous:
        single.read_from_file(part, [piece], lambda _: place.reshape(-1), {})
    else:
        raw = single.read_from_file(part, [piece], allocate, {})[piece.name]
        place[...] = raw.reshape(place.shape)


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[list[Source]]:
    """Open all parts, check their digests against the manifest, and yield them."""
    file, _, header = source
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
            found = container.read_content(part, fd, size).header
            if found.metadata.get("jaxnet_sha256") != digest:
                text = f"its part {shown(path)} is that of another checkpoint or was replaced"
                raise CheckpointError(file, None, f"{text}; {RESTORE}")
            result.append(Source(part, fd, found))
        yield result


def pieces(file: str, tensors: Iterable[Tensor], parts: Iterable[Header]) -> dict[str, list[Piece]]:
    """The pieces of each tensor in the parts.

    Args:
      file: how errors name the file.
      tensors: the tensors that the manifest lists.
      parts: the headers of the parts, in order.

    Returns:
      The pieces by the name of the tensor.

    Raises:
      CheckpointError: they do not fill the tensors exactly, or a part has something else.
    """
    found: dict[str, list[Piece]] = {t.name: [] for t in tensors}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            name, start = (*structure.leaf_path(tensor.name), "")[:2]
            if name not in found or not re.fullmatch(r"(\d{1,18}(,\d{1,18})*)?", start):
                text = f"part {number} has a tensor '{shown(tensor.name)}'; {RESTORE}"
                raise CheckpointError(file, None, text)
            first = tuple(int(position) for position in start.split(",") if position)
            first += (0,) * (len(tensor.shape) - len(first))
            found[name].append(Piece(number, tensor, first))
    for t in tensors:
        cuts_of(file, t, found[t.name])
    return found


ENGINE = Engine(write_to_parts, read_from_parts)
