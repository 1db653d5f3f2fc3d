"""A tree that is spread over several processes: each writes a part, and a file at the path says what belongs together.

    state.safetensors                                  the manifest: structure, metadata, and the digest of each part
    state.safetensors.part-0123456789abcdef-00000      what process 0 owns: {leaf: {"0,4": piece that starts there}}
    state.safetensors.part-0123456789abcdef-00001

A part is a checkpoint itself, written by `save`. Each save has a new number, so that it never touches the parts of the
one before; the manifest is written when all parts are on the disk, and only then are older parts removed.
"""

import contextlib
import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxnet.checkpoint import file as files
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint import structure
from jaxnet.checkpoint.format import CheckpointError, Header, Parts, Tensor


class Piece(NamedTuple):
    """A block of a tensor, `tensor` in the file of part `part`, which begins at index `start` of the whole."""

    part: int
    tensor: Tensor
    start: tuple[int, ...]


def is_spread(tree: Any) -> bool:
    """Whether some array of a tree lies on devices of several processes."""
    import jax
    from jax.core import Tracer

    arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    return not all(x.is_fully_addressable for x in arrays)


def write(file: str, tensors: list[Tensor], manifest: dict[str, Any], leaves: dict[str, Any]) -> None:
    """Write a tree together with all other processes, which must call this, too; all of them raise if one fails."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    target, me = os.path.realpath(file), jax.process_index()
    number = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint8))
    identity = np.asarray(number).tobytes().hex()

    def together(step: Callable[[], None]) -> None:
        error = None
        try:
            step()
        except Exception as e:  # the others wait: say so before raising it
            error = e
        well = multihost_utils.process_allgather(np.array(error is None))
        if not well.all():
            sweep(target)
        if error:
            raise error
        if not well.all():
            failed = np.flatnonzero(~well).tolist()
            raise CheckpointError(file, None, f"processes {failed} failed to save; what they raise says why")

    def commit() -> None:
        paths = [path_of(target, identity, i) for i in range(jax.process_count())]
        with contextlib.ExitStack() as stack:
            try:
                opened = [stack.enter_context(files.opened(path)) for path in paths]
            except FileNotFoundError as e:
                text = f"the part {e.filename} is not there: all processes must save to one folder, which they share"
                raise CheckpointError(file, None, text) from e
            headers = [files.read_content(*part).header for part in opened]
            pieces(file, tensors, headers)
            parts = [
                [header.metadata["jaxnet_sha256"], size] for header, (_, _, size) in zip(headers, opened, strict=True)
            ]
        described = {"id": identity, "files": parts, "tensors": [[t.name, t.code, t.shape] for t in tensors]}
        files.replace(target, fmt.write_header(file, [], manifest | {"version": 2, "crc32": [], "parts": described}))
        sweep(target)

    together(lambda: files.save(path_of(target, identity, me), _owned(leaves, everything=me == 0)))
    together(commit if me == 0 else lambda: None)


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
    """As `file.read_tensors`, from the parts."""
    with opened(file, header) as parts:
        found = pieces(file, header.tensors, [part for _, _, part in parts])
        out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}  # no more than the parts have
        for t in tensors:
            for number, tensor, start in found[t.name]:
                path, fd, part = parts[number]
                blocks = needed.get(t.name)
                if blocks is not None and not any(_overlap(t, tensor, start, block) for block in blocks):
                    continue
                if not empty:
                    files.read_tensors(path, fd, part, [tensor], None)
                    continue
                block = tuple(slice(first, first + size) for first, size in zip(start, tensor.shape, strict=True))
                place = out[t.name].reshape(*t.shape, fmt.BITS[t.code] // 8)[block]
                if place.flags.c_contiguous:  # straight to where it belongs
                    files.read_tensors(path, fd, part, [tensor], lambda _, place=place: place.reshape(-1))
                else:
                    raw = files.read_tensors(path, fd, part, [tensor], empty)[tensor.name]
                    place[...] = raw.reshape(place.shape)
    return out


def _overlap(whole: Tensor, piece: Tensor, start: tuple[int, ...], block: tuple[slice, ...]) -> bool:
    """Whether a piece has elements in a block; for a block, axes at the end may be left out."""
    ranges = [axis.indices(size)[:2] for axis, size in zip(block, whole.shape, strict=False)]
    return all(a < high and low < a + n for (low, high), a, n in zip(ranges, start, piece.shape, strict=False))


@contextlib.contextmanager
def opened(file: str, header: Header) -> Iterator[list[tuple[str, int, Header]]]:
    """Open all parts and check that they are those which the manifest means: give path, descriptor, header of each."""
    assert header.parts
    target, result = os.path.realpath(file), []
    with contextlib.ExitStack() as stack:
        for i, (digest, _) in enumerate(header.parts.files):
            path = path_of(target, header.parts.id, i)
            try:
                part, fd, size = stack.enter_context(files.opened(path))
            except FileNotFoundError as e:
                text = f"its part {path} is missing: copy and rename it with its parts (or it has just been replaced)"
                raise CheckpointError(file, None, text) from e
            content = files.read_content(part, fd, size)
            if content.header.metadata.get("jaxnet_sha256") != digest:
                text = f"its part {path} is that of another checkpoint or was replaced; {fmt.RESTORE}"
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
                raise CheckpointError(file, None, f"part {number} has a tensor '{tensor.name}'; {fmt.RESTORE}")
            first = tuple(int(position) for position in start.split(",") if position)
            found[name].append(Piece(number, tensor, first + (0,) * (len(tensor.shape) - len(first))))
    for t in tensors:
        if not _fill(t, found[t.name]):
            places = [f"{p.tensor.code}{list(p.tensor.shape)} at {list(p.start)}" for p in found[t.name]]
            text = f"its pieces do not fill {t.code}{list(t.shape)}: they are {', '.join(places) or 'missing'}"
            raise CheckpointError(file, t.name, f"{text} (did all processes save the same tree?)")
    return found


def _fill(whole: Tensor, found: list[Piece]) -> bool:
    """Whether these blocks are the cells of a grid over the whole, as those of every sharding are."""
    if any(p.tensor.code != whole.code or not len(p.start) == len(p.tensor.shape) == len(whole.shape) for p in found):
        return False
    cuts = [sorted({p.start[axis] for p in found}) for axis in range(len(whole.shape))]
    ends = [dict(itertools.pairwise([*cut, size])) for cut, size in zip(cuts, whole.shape, strict=True)]
    cells = {p.start for p in found}
    regular = (
        len(found) == len(cells) and cells == set(itertools.product(*cuts)) and all(cut[:1] == [0] for cut in cuts)
    )
    return regular and all(
        start + size == end[start]
        for p in found
        for start, size, end in zip(p.start, p.tensor.shape, ends, strict=True)
    )


def path_of(target: str, identity: str, number: int) -> str:
    return f"{target}.part-{identity}-{number:05d}"


def sweep(target: str) -> None:
    """Remove the parts of a path that its file does not mean: of older saves, and of those that failed."""
    folder, name = os.path.split(target)
    with contextlib.suppress(OSError, CheckpointError):  # a file that cannot be read keeps whatever is there
        with os.scandir(folder) as entries:
            found = [(e.path, re.fullmatch(re.escape(name) + r"\.part-([0-9a-f]{16})-\d{5,}", e.name)) for e in entries]
        if not any(match for _, match in found):
            return
        parts = _parts(target)
        for path, match in found:
            if match and (parts is None or match[1] != parts.id):
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _parts(target: str) -> Parts | None:
    try:
        with files.opened(target) as (file, fd, size):
            return files.read_content(file, fd, size).header.parts
    except FileNotFoundError:
        return None


def remove(path: str) -> None:
    """Delete a checkpoint with its parts, the manifest first."""
    target = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    sweep(target)
