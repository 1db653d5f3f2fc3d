"""A tree whose arrays Orbax writes: from all processes of a pod at once, and to object stores.

    state.safetensors                           the manifest: structure, metadata, and the checksum of each block
    state.safetensors.orbax-0123456789abcdef    Orbax's folder: nested dicts of arrays

The manifest is put in place when Orbax has ended and its folder is synced, and only then are older folders removed: with
that one rename the new checkpoint takes the place of the old one. What Orbax lacks is here: checksums, containers, names that
cannot be mistaken for each other, arrays without elements and types that it cannot store.
"""

import collections
import contextlib
import errno
import functools
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxnet.checkpoint import atomic, parts, places, structure
from jaxnet.checkpoint import file as files
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import RESTORE, CheckpointError, Grid, Header, Tensor
from jaxnet.checkpoint.parts import Piece, orbax_path
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.words import shown

INLINE = 1024  # bytes of a block up to which Orbax lets OCDBT put it into a node, which is compressed
MARGIN = 1 << 20  # bytes of a tensor that may be read again and again
TIMEOUT = 1200  # seconds that the processes wait for each other in Orbax
BYTES = ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # what TensorStore's zarr lacks: written as U8


def start(
    file: str,
    target: str,
    tensors: list[Tensor],
    manifest: dict[str, Any],
    nodes: dict[str, Node],
    leaves: dict[str, Any],
    *,
    beside: bool,
) -> Callable[[], None]:
    """Return what writes a tree, or if `beside`, give Orbax a copy of it and return what waits for that and ends it.

    All processes must call this and what it returns, which if `beside` may be called in another thread.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as e:
        raise ImportError("engine='orbax' needs Orbax: pip install 'jaxnet[orbax]'") from e
    import jax

    first, held = jax.process_index() == 0, contextlib.ExitStack()
    if "[" in target or "**" in target:
        text = "Orbax takes the '[' or '**' in the path for a pattern: use another name, or save without engine='orbax'"
        raise CheckpointError(file, None, text)

    def begin() -> Callable[[], None]:
        number = parts.new_number()
        folder = orbax_path(target, number)
        with parts.together(file, target, held):
            if first and not places.is_url(target):
                atomic.check_target(file, target)
                held.enter_context(parts.reserved(target, number))
            arrays = {t.name: _as_stored(file, nodes[t.name], leaves[t.name], t, beside) for t in tensors}
            sums = {t.name: _sums(t, arrays[t.name], first) for t in tensors}
        everyones = _gather(sums)
        with parts.together(file, target, held):
            if not places.is_url(target) and not os.path.exists(sign := parts.lock_path(target, number)):
                text = f"{shown(sign, 5000)} of process 0 is not there: all processes must save to one folder, which they share"
                raise CheckpointError(file, None, text)
            entries = [
                _entry(file, t, [block for sums in everyones for block in sums.get(t.name, [])]) for t in tensors
            ]
        arrays = {t.name: arrays[t.name] for t in tensors if t.stop > t.start}
        orbax = {"id": number, "tensors": entries}
        header = fmt.write_header(file, [], manifest | {"version": fmt.ORBAX, "crc32": [], "orbax": orbax})
        blocks = {name: len(crcs) for name, *_, crcs in entries if name in arrays}
        checkpointer = _checkpointer(number)
        try:
            with _writing(folder), _one_at_a_time:
                if arrays:  # Orbax refuses a tree without any
                    checkpointer.save(folder, args=ocp.args.PyTreeSave(_nested(arrays)))
        except BaseException:
            checkpointer.close()
            if first:
                parts.undo(target, number)
            raise
        return lambda: end(checkpointer, number, header, blocks)

    def end(checkpointer: Any, number: str, header: bytes, blocks: dict[str, int]) -> None:
        folder = orbax_path(target, number)
        try:
            with _writing(folder), contextlib.closing(checkpointer):
                checkpointer.wait_until_finished()
            if first:
                if blocks:
                    _check_complete(file, folder, blocks)
                if blocks and not places.is_url(folder):
                    _sync(folder)
                files.replace(target, header)
        except BaseException:
            if first:
                parts.undo(target, number)
            raise
        finally:
            give_up()
            if beside:  # so that it is in place for all when one of them has waited for it
                _meet(folder)

    def give_up() -> None:
        held.close()
        if first:
            parts.sweep(target)  # the older folders or, if something has failed, the new one

    def write() -> None:
        with held, parts.together(file, target, held):
            begin()()

    if not beside:
        return write
    try:
        return begin()
    except BaseException:
        give_up()
        raise


def _checkpointer(number: str) -> Any:
    """Orbax's, with barriers that end after a time and have names of their own: a failed save disturbs no later one."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(active_processes=processes, barrier_sync_key_prefix=number)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),  # the blocks are those of one replica
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=options, type_handler_registry=registry
    )
    waits = ocp.AsyncOptions(timeout_secs=TIMEOUT)
    return ocp.AsyncCheckpointer(handler, async_options=waits, multiprocessing_options=options)


def _meet(name: str) -> None:
    """Wait until all processes are here, in any thread."""
    import jax
    import orbax.checkpoint as ocp

    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(name, processes=set(range(jax.process_count())), timeout=TIMEOUT)


def _entry(file: str, t: Tensor, blocks: list[Any]) -> list[Any]:
    """What the manifest says of a tensor, from what all processes say of its blocks."""
    blocks = sorted((start, shape, crcs) for start, shape, crcs in blocks)
    found = [Piece(0, t._replace(shape=tuple(shape)), tuple(start)) for start, shape, _ in blocks]
    return [t.name, t.code, t.shape, parts.grid(file, t, found), [crcs for _, _, crcs in blocks]]


def _as_stored(file: str, node: Node, x: Any, t: Tensor, beside: bool) -> Any:
    """A leaf as Orbax shall write it: cut into blocks as it is on the devices, or an array of NumPy from the first process."""
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays

    dtype = arrays.dtype_of("uint8" if t.code in BYTES else structure.DTYPES[t.code])
    everyones = jax.process_count() == 1 or parts.is_spread(x)  # what only one process can see, the first one writes
    if parts.is_spread(x) and all(device.process_index for device in x.sharding.device_set):
        raise CheckpointError(
            file, t.name, "it has no part on process 0, which Orbax needs: save without engine='orbax'"
        )
    if isinstance(x, jax.Array) and not x.sharding.is_fully_replicated and everyones:
        x = arrays.as_stored(node, x, dtype)
        return arrays.copy(x) if beside else x
    if jax.process_index():
        return np.broadcast_to(np.zeros((), dtype), t.shape)  # Orbax does not look at it
    raw = arrays.to_bytes(node, x)
    if t.code == "BOOL":
        raw = (raw != 0).view(np.uint8)  # TensorStore knows no other bytes for True than 1
    return (raw.copy() if beside else raw).view(dtype).reshape(t.shape)


def _sums(t: Tensor, x: Any, first: bool) -> list[tuple[list[int], list[int], str]]:
    """Where each block begins that this process writes of an array, its shape and its CRC-32s."""
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays

    if not isinstance(x, jax.Array):
        blocks = [((), x)] if first else []
    else:
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        blocks = [([axis.start or 0 for axis in shard.index], arrays.fetch(shard.data)) for shard in shards]
    result = []
    for start, block in blocks:
        raw = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        place = t._replace(shape=block.shape, start=0, stop=raw.size)
        result.append((list(start) or [0] * block.ndim, list(block.shape), fmt.crcs(place, raw)))
    return result


def _gather(value: Any) -> list[Any]:
    """A value that JSON can hold, of each process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)]


def _keys(name: str) -> list[str]:
    """The keys of a leaf in Orbax, which joins them with dots: each quoted as in a URL, so that no two leaves get one name."""

    def quoted(step):
        return (
            re.sub("[^A-Za-z0-9_-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), step) or "%"
        )

    return [quoted(step) for step in structure.leaf_path(name)] or ["%"]


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *path, last = _keys(name)
        functools.reduce(lambda branch, key: branch.setdefault(key, {}), path, tree)[last] = x
    return tree


def _check_complete(file: str, folder: str, blocks: dict[str, int]) -> None:
    """Raise CheckpointError unless a folder has all blocks of all processes, as it has not if they share no folder."""
    with _readable(file, None, folder):
        import tensorstore

        keys = tensorstore.KvStore.open(_database(folder)).result().list().result()
    names = collections.Counter(key.decode().rpartition("/")[0] for key in keys)
    for name, count in blocks.items():
        found = names[".".join(_keys(name))] - 1  # one describes the array
        if found < count:
            text = (
                f"only {max(found, 0)} of its {count} blocks are in {shown(folder, 5000)}: do all processes share it?"
            )
            raise CheckpointError(file, name, text)


def _sync(folder: str) -> None:
    """Orbax leaves the files that describe its arrays, and the folder's own name, to the system's leisure."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            fd = os.open(os.path.join(place, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        atomic.sync_folder(place)
    atomic.sync_folder(os.path.dirname(folder))


def _database(folder: str) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": places.base(folder)}


def read_tensors(
    file: str,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
    needed: Mapping[str, Sequence[tuple[slice, ...]] | None],
) -> dict[str, Any]:
    """As `file.read_tensors`, from Orbax's folder: block by block, each with its checksum."""
    import numpy as np

    assert header.orbax
    folder, grids = orbax_path(places.real(file), header.orbax.id), header.orbax.grids
    arrays = _open(file, folder, [t for t in tensors if t.stop > t.start], grids)
    out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}  # the arrays are there, in these sizes
    jobs = []
    for t in tensors:
        for start, block, expected in grids[t.name].blocks(t):
            wanted = needed.get(t.name)
            if wanted is None or any(parts.overlap(t, block, start, other) for other in wanted):
                jobs.append((t, start, block, expected))

    def read(job):
        t, start, block, expected = job
        place = tuple(slice(first, first + size) for first, size in zip(start, block.shape, strict=True))
        raw = np.empty(0, np.uint8)
        if t.name in arrays:
            with _readable(file, t.name, folder):
                raw = np.ascontiguousarray(arrays[t.name][place].read().result()).reshape(-1).view(np.uint8)
        if (crcs := fmt.crcs(block, raw)) != expected:
            text = f"its block {list(block.shape)} at {list(start)} is not what was saved: CRC-32 {crcs}, expected {expected}"
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
        if out and raw.size:
            itemsize = fmt.BITS[t.code] // 8
            out[t.name].reshape(*t.shape, itemsize)[place] = raw.reshape(*block.shape, itemsize)

    files.each(read, jobs)
    return out


def _open(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> dict[str, Any]:
    """Open the arrays of some tensors, and check that they are what the manifest says."""
    if not tensors:
        return {}
    try:
        import tensorstore
    except ImportError as e:
        raise ImportError(
            f"{shown(file)}: Orbax has written it, and is needed to read it: pip install 'jaxnet[orbax]'"
        ) from e
    if not places.is_url(folder) and not os.path.isdir(folder):
        text = f"its arrays in {shown(folder, 5000)} are missing: copy and rename it with this folder"
        raise CheckpointError(file, None, text)
    _check_size(file, folder, tensors, grids)
    context, found = tensorstore.Context(), {}
    for t in tensors:
        store = _database(folder) | {"path": ".".join(_keys(t.name)) + "/"}
        # The folder does not change, and nothing in it is left out for being zero.
        spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": "open", "fill_missing_data_reads": False}
        with _readable(file, t.name, folder):
            found[t.name] = tensorstore.open(spec, open=True, read=True, context=context)
    for t in tensors:
        with _readable(file, t.name, folder):
            array = found[t.name] = found[t.name].result()
        code = "U8" if t.code in BYTES else t.code
        dtype, chunk = array.dtype.name, math.prod(array.chunk_layout.read_chunk.shape or ())
        if dtype != structure.DTYPES[code] or array.shape != t.shape or chunk > math.prod(t.shape):
            text = f"it is {dtype}{list(array.shape)} in {shown(folder, 5000)}, expected {structure.DTYPES[code]}{list(t.shape)}"
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
        # Else a few bytes could unfold to many, or each of many blocks could ask for all bytes.
        compressor, blocks = array.codec.to_json().get("compressor"), len(grids[t.name].crcs)
        if compressor is not None or blocks * chunk * fmt.BITS[t.code] // 8 > 2 * (t.stop - t.start) + MARGIN:
            text = f"it is stored in chunks of {chunk} elements with {compressor}, expected {blocks} and no compressor"
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
    return found


def _check_size(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> None:
    """Raise CheckpointError if some tensors are larger than all that is in a folder, before memory is taken for them."""
    blocks = (block for t in tensors for _, block, _ in grids[t.name].blocks(t))
    needed = sum(block.stop for block in blocks if block.stop > INLINE)  # smaller ones may be in compressed nodes
    with _readable(file, None, folder):
        size = places.size(folder)
    if needed > size:
        text = f"its arrays need {needed:,} bytes, {shown(folder, 5000)} has {size:,}"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")


@contextlib.contextmanager
def _readable(file: str, leaf: str | None, folder: str) -> Iterator[None]:
    """TensorStore raises ValueError for damage, and for what passes."""
    try:
        yield
    except Exception as e:
        if re.search("UNAVAILABLE|DEADLINE|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EX", str(e)):
            raise OSError(errno.EIO, f"cannot be read now ({e})", folder) from e
        raise CheckpointError(file, leaf, f"{shown(folder, 5000)} cannot be read ({e}); {RESTORE}") from e


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    """Orbax and TensorStore raise errors of many types for a full disk."""
    try:
        yield
    except (OSError, CheckpointError):
        raise
    except Exception as e:
        raise OSError(errno.EIO, f"Orbax could not write: {type(e).__name__}: {e}", folder) from e


_one_at_a_time = threading.Lock()  # two saves of Orbax that begin at once in two threads take each other's signals
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def outlive(thread: threading.Thread) -> None:
    """See that the program's end waits for a thread before it closes the thread pools that Orbax needs."""
    _threads.add(thread)
    _join_at_the_end()


@functools.cache
def _join_at_the_end() -> None:
    def join():
        for thread in list(_threads):
            thread.join()

    with contextlib.suppress(AttributeError, RuntimeError):  # not public, and too late while the program ends
        threading._register_atexit(join)  # type: ignore
