"""The bytes of one file: write tensors with checksums, and check everything that is read."""

import contextlib
import errno
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxnet.checkpoint import atomic, header_types, places, structure, tree_json
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import DTYPES
from jaxnet.checkpoint.format import CheckpointError, Misfit
from jaxnet.checkpoint.header_types import Header, Tensor
from jaxnet.checkpoint.structure import Node

# Bytes that are read and summed at a time, few enough to be in the processor's cache when they are
# summed.
READ = 1 << 20
# Bytes that are written and summed at a time; it divides header_types.CHUNK.
WRITE = 4 << 20
# Tensors up to this number of bytes are written together with others.
SMALL = 64 << 10


def replace(target: str, content: bytes) -> None:
    """Write a file durably, replacing an existing one. `target` is a result of `places.real`."""
    if places.is_url(target):
        return places.put(target, content)
    with atomic.replacing(target, target) as fd:
        atomic.write(fd, memoryview(content))


def write_tensors(fd: int, tensors: list[Tensor], to_bytes: Callable[[str], Any]) -> list[str]:
    """Write the bytes of all tensors, one tensor at a time, and return their checksums.

    A second thread syncs the bytes written so far, so that the disk works while the next bytes are
    fetched and summed.
    """
    crcs, sync, unsynced = [], None, 0
    # Small tensors are written together, because a system call costs more than copying them.
    waiting = bytearray()
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
                        # The system reports a failed write to one fsync only, so this one must be
                        # looked at.
                        sync.result()
                        sync = None
                    # While the interpreter shuts down, no thread can be started.
                    with contextlib.suppress(RuntimeError):
                        sync = pool.submit(os.fsync, fd)
                    unsynced = 0
                sums[start // header_types.CHUNK] = zlib.crc32(
                    block, sums[start // header_types.CHUNK]
                )
            crcs.append("".join(f"{crc:08x}" for crc in sums))
        atomic.write(fd, memoryview(waiting))
        if sync:
            sync.result()
    return crcs


# Reading. Every value is checked before it is used, and no allocation exceeds what the size of the
# file justifies.


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Open a file for reading and yield its name, descriptor and size.

    Raises:
      CheckpointError: it is not a regular file.
      OSError: it cannot be opened, or it is a folder.
    """
    file = os.fsdecode(path)
    if places.is_url(file):
        # Objects are usually small: the arrays are in the folder of Orbax.
        with tempfile.TemporaryFile() as copy:
            copy.write(content := places.fetch(file))
            copy.flush()
            yield file, copy.fileno(), len(content)
        return
    # O_NONBLOCK keeps a named pipe from blocking until there is a writer.
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
    """Call `read(file, descriptor, size)`, again if another save replaces the file meanwhile, and
    return its result.

    A save deletes the parts and the Orbax folder of the file that it replaces. A reader of the old
    file may then find them missing or truncated, and must start again with the new file.
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
    """Whether the path no longer leads to the open file. While the file is open, its inode number
    is not reused.
    """
    if places.is_url(file):
        return places.fetch(file) != os.pread(fd, size, 0)
    return not os.path.samestat(os.stat(file), os.fstat(fd))


def each(work: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Do all jobs in threads, or in the calling thread if no thread can be started. A job may be
    done twice.
    """
    running = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        # RuntimeError: the interpreter shuts down, or the system has no more threads.
        with contextlib.suppress(RuntimeError):
            for job in jobs:
                running.append(pool.submit(work, job))
        for job in jobs[len(running) :]:
            work(job)
        for future in running:
            future.result()


class Content(NamedTuple):
    """The checked header of a file.

    Attributes:
      header: the header itself.
      node: the structure of the tree.
      leaves: the leaves of the structure by name.
      tensors: the tensors by the names of their leaves, which may differ from the names in files of
        other programs.
      structured: whether the file records the containers of the tree.
    """

    header: Header
    node: Node
    leaves: dict[str, Node]
    tensors: dict[str, Tensor]
    structured: bool


def longest_names(header: int) -> int:
    """The most characters that all paths in a file may have together, for a header of this number
    of bytes.

    Without a limit, nested dicts with long keys could turn a header of a few kB into paths of
    several GB.
    """
    return (4 << 20) + 16 * header


def check_names(file: str, nodes: dict[str, Node], header: int) -> None:
    """Raise CheckpointError if `read_content` would refuse these names."""
    if (size := sum(map(len, nodes))) > (most := longest_names(header)):
        text = (
            f"the paths of its leaves together have {size:,} characters, at most {most:,} are "
            "possible here"
        )
        raise CheckpointError(file, None, f"{text}: shorten the keys of nested dicts")


def read_content(file: str, fd: int, size: int) -> Content:
    """Read and check the header of an open file. Raises CheckpointError if it is damaged or not a
    safetensors file.
    """
    first = bytearray(min(8, size))
    _read(file, fd, memoryview(first), 0)
    raw = bytearray(fmt.header_length(file, bytes(first), size))
    _read(file, fd, memoryview(raw), 8)
    header = fmt.read_header(file, bytes(raw), size)
    if header.manifest is None:
        paths = structure.foreign_paths([t.name for t in header.tensors])
        dtypes = [Node("jax", DTYPES.get(t.code, t.code)) for t in header.tensors]
        tensors = {
            structure.leaf_name(path): t for path, t in zip(paths, header.tensors, strict=True)
        }
        node = structure.nest(dict(zip(paths, dtypes, strict=True)))
        return Content(header, node, structure.leaves(node), tensors, False)
    node = tree_json.from_json(file, header.manifest.get("tree"))
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
    file: str,
    fd: int,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
) -> dict[str, Any]:
    """Read and check the bytes of some tensors of a file.

    Args:
      file: how errors name the file.
      fd: the descriptor of the file.
      header: the header of the file.
      tensors: the tensors to read.
      empty: (number of bytes) -> memory to read into; None to check the bytes and return nothing.

    Returns:
      The bytes by name.

    Raises:
      CheckpointError: bytes are missing or do not match their checksum.
    """
    out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}
    crcs = (
        dict(zip((t.name for t in header.tensors), header.manifest["crc32"], strict=True))
        if header.manifest
        else {}
    )
    jobs = [
        (t, i, crcs.get(t.name, "")[8 * i : 8 * i + 8]) for t in tensors for i in range(t.chunks)
    ]

    def check(job):
        tensor, i, expected = job
        start = tensor.start + i * header_types.CHUNK
        stop = min(start + header_types.CHUNK, tensor.stop)
        data = memoryview(out[tensor.name])[i * header_types.CHUNK :] if out else None
        crc = _read_chunk(
            file, fd, header.data + start, stop - start, data, fmt.crc_start(tensor, i)
        )
        if expected and crc != int(expected, 16):
            text = (
                f"its bytes ({header.data + start} to {header.data + stop} of the file) are not "
                "those that were saved"
            )
            raise CheckpointError(
                file, tensor.name, f"{text}: CRC-32 {crc:08x}, expected {expected}; {fmt.RESTORE}"
            )

    large = [job for job in jobs if job[0].stop - job[0].start > READ]
    for job in jobs:
        if job[0].stop - job[0].start <= READ:
            check(job)
    # Reading and summing both release the global interpreter lock, so threads run in parallel.
    each(check, large)
    return out


def _read_chunk(
    file: str, fd: int, position: int, length: int, data: memoryview | None, crc: int
) -> int:
    """Read bytes, into `data` if it is given, and return their CRC-32 continued from `crc`."""
    block = memoryview(bytearray(min(READ, length))) if data is None else data
    for done in range(0, length, READ):
        part = (
            block[: min(READ, length - done)]
            if data is None
            else data[done : min(done + READ, length)]
        )
        _read(file, fd, part, position + done)
        crc = zlib.crc32(part, crc)
    return crc


def _read(file: str, fd: int, data: memoryview, position: int):
    """Fill `data` from the file."""
    while data:
        try:
            got = os.preadv(fd, [data], position)
        except OSError as e:
            raise CheckpointError(
                file, None, f"cannot be read at byte {position} ({e}): restore it from a copy"
            ) from e
        if got == 0:
            raise CheckpointError(
                file, None, f"ends at byte {position}, before its data does: it is being changed"
            )
        data, position = data[got:], position + got
