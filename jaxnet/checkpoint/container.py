"""The bytes of one file: write tensors and their checksums, and read them without trusting anything."""

import contextlib
import errno
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxnet.checkpoint import atomic, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import CheckpointError, Header, Misfit, Tensor
from jaxnet.checkpoint.structure import Node

READ = 1 << 20  # bytes read and summed at a time, so that the sum finds them in the processor's cache
WRITE = 4 << 20  # bytes written and summed at a time; a part of format.CHUNK
SMALL = 64 << 10  # bytes of a tensor that is written together with others


def replace(target: str, content: bytes) -> None:
    """Write a file, durably, in place of the one that may be there; `target` is as `places.real` gives it."""
    if places.is_url(target):
        return places.put(target, content)
    with atomic.replacing(target, target) as fd:
        atomic.write(fd, memoryview(content))


def write_tensors(fd: int, tensors: list[Tensor], to_bytes: Callable[[str], Any]) -> list[str]:
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


def longest_names(header: int) -> int:
    """How many characters all paths of a file may have, whose header has so many bytes.

    Nested dicts with long keys would make a header of some kB ask for GBs.
    """
    return (4 << 20) + 16 * header


def check_names(file: str, nodes: dict[str, Node], header: int) -> None:
    """Raise CheckpointError for what `read_content` would refuse."""
    if (size := sum(map(len, nodes))) > (most := longest_names(header)):
        text = f"the paths of its leaves together have {size:,} characters, at most {most:,} are possible here"
        raise CheckpointError(file, None, f"{text}: shorten the keys of nested dicts")


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
        leaves = structure.leaves(node, longest_names(header.data))
    except ValueError as e:
        raise CheckpointError(
            file, None, f"{e}, too many for its header of {header.data:,} bytes; {fmt.RESTORE}"
        ) from e
    tensors = {t.name: t for t in header.tensors}
    structure.check_arrays(file, leaves, tensors)
    return Content(header, node, leaves, tensors, True)


def read_tensors(
    file: str, fd: int, header: Header, tensors: Sequence[Tensor], empty: Callable[[int], Any] | None
) -> dict[str, Any]:
    """Read and check the bytes of some tensors of a file; into memory that `empty(bytes)` gives, if it is given."""
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
