"""The engine for one file that holds everything: its tensors follow its header."""

import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxnet.checkpoint import atomic, container, outside
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.protocol import Allocate, Engine, Job, Needed, Source
from jaxnet.checkpoint.tensors import CHUNK, Tensor, crc_start

__all__ = ["ENGINE", "each", "read_from_file", "write_to_file"]

# Bytes that are read and summed at a time, few enough to be in the processor's cache when they are
# summed.
READ = 1 << 20
# Bytes that are written and summed at a time; the number divides CHUNK.
WRITE = 4 << 20
# Tensors up to this number of bytes are written together with others.
SMALL = 64 << 10


def write_to_file(job: Job, *, snapshot: bool) -> Callable[[], None]:
    """`protocol.Writer` for one file. Without `snapshot`, leaves are fetched one at a time."""
    from jaxnet.checkpoint import arrays

    zeros = ["0" * 8 * t.chunks for t in job.tensors]
    header = fmt.write_header(job.file, job.tensors, job.manifest | {"crc32": zeros})
    container.check_names(job.file, job.nodes, len(header))

    def fetch(name: str) -> Any:
        return arrays.to_bytes(job.nodes[name], job.leaves[name])

    copies = {name: fetch(name).copy() for name in job.leaves} if snapshot else None
    to_bytes = fetch if copies is None else copies.pop

    def write() -> None:
        with atomic.replacing(job.file, job.target) as fd:
            os.lseek(fd, len(header), os.SEEK_SET)
            crcs = _write_tensors(fd, job.tensors, to_bytes)
            os.lseek(fd, 0, os.SEEK_SET)
            manifest = job.manifest | {"crc32": crcs}
            atomic.write(fd, memoryview(fmt.with_manifest(header, manifest)))
        outside.sweep(job.target)

    return write


def _write_tensors(fd: int, tensors: list[Tensor], to_bytes: Callable[[str], Any]) -> list[str]:
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
            sums = [crc_start(t, i) for i in range(t.chunks)]
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
                        # The system reports a failed write to one fsync only, so the result of
                        # each must be looked at.
                        sync.result()
                        sync = None
                    # While the interpreter shuts down, no thread can be started.
                    with contextlib.suppress(RuntimeError):
                        sync = pool.submit(os.fsync, fd)
                    unsynced = 0
                sums[start // CHUNK] = zlib.crc32(block, sums[start // CHUNK])
            crcs.append("".join(f"{crc:08x}" for crc in sums))
        atomic.write(fd, memoryview(waiting))
        if sync:
            sync.result()
    return crcs


def read_from_file(
    source: Source, tensors: Sequence[Tensor], allocate: Allocate | None, needed: Needed
) -> dict[str, Any]:
    """`protocol.Reader` for one file. All blocks are read, whatever is needed."""
    file, fd, header = source
    out = {t.name: allocate(t.nbytes) for t in tensors} if allocate else {}
    crcs = {}
    if header.manifest:
        names = [t.name for t in header.tensors]
        crcs = dict(zip(names, header.manifest["crc32"], strict=True))

    def check(chunk: tuple[Tensor, int]) -> None:
        tensor, i = chunk
        expected = crcs.get(tensor.name, "")[8 * i : 8 * i + 8]
        start = header.data + tensor.start + i * CHUNK
        stop = min(start + CHUNK, header.data + tensor.stop)
        data = memoryview(out[tensor.name])[i * CHUNK :] if out else None
        crc = _read_chunk(file, fd, start, stop - start, data, crc_start(tensor, i))
        if expected and crc != int(expected, 16):
            text = (
                f"its bytes ({start} to {stop} of the file) are not those that were saved: "
                f"CRC-32 {crc:08x}, expected {expected}; {RESTORE}"
            )
            raise CheckpointError(file, tensor.name, text)

    chunks = [(t, i) for t in tensors for i in range(t.chunks)]
    for chunk in chunks:
        if chunk[0].nbytes <= READ:
            check(chunk)
    # Reading and summing both release the global interpreter lock, so threads run in parallel.
    each(check, [chunk for chunk in chunks if chunk[0].nbytes > READ])
    return out


def each(work: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Do all jobs in threads, or in the calling thread if no thread can be started.

    A job may be done twice.
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


def _read_chunk(
    file: str, fd: int, position: int, length: int, data: memoryview | None, crc: int
) -> int:
    """Read bytes, into `data` if it is given, and return their CRC-32 continued from `crc`."""
    scratch = memoryview(bytearray(min(READ, length) if data is None else 0))
    for done in range(0, length, READ):
        size = min(READ, length - done)
        part = scratch[:size] if data is None else data[done : done + size]
        container.read_into(file, fd, part, position + done)
        crc = zlib.crc32(part, crc)
    return crc


ENGINE = Engine(write_to_file, read_from_file)
