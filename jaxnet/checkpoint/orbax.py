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
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from jaxnet.checkpoint import atomic, container, outside, parts, places, structure, zarr
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.format import CheckpointError, Tensor
from jaxnet.checkpoint.outside import orbax_path
from jaxnet.checkpoint.parts import Piece
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.watch import Elsewhere, Watch
from jaxnet.checkpoint.words import shown

TIMEOUT = 1200  # seconds that the processes wait for each other in Orbax


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
                held.enter_context(outside.reserved(target, number))
            arrays = {t.name: _as_stored(file, nodes[t.name], leaves[t.name], t, beside) for t in tensors}
            sums = {t.name: _sums(t, arrays[t.name], first) for t in tensors}
        everyones = _gather(sums)
        with parts.together(file, target, held):
            if not places.is_url(target) and not os.path.exists(sign := outside.lock_path(target, number)):
                text = f"{shown(sign, 5000)} of process 0 is not there: all processes must save to one folder, which they share"
                raise CheckpointError(file, None, text)
            entries = [
                _entry(file, t, [block for sums in everyones for block in sums.get(t.name, [])]) for t in tensors
            ]
        arrays = {t.name: arrays[t.name] for t in tensors if t.stop > t.start}
        orbax = {"id": number, "tensors": entries}
        header = fmt.write_header(file, [], manifest | {"version": fmt.ORBAX, "crc32": [], "orbax": orbax})
        blocks = {name: len(crcs) for name, *_, crcs in entries if name in arrays}
        watch = Watch(file, number)
        try:
            with _writing(folder), _one_at_a_time:
                checkpointer = _checkpointer(number)
                if arrays:  # Orbax refuses a tree without any
                    watch.run(lambda: _begun(checkpointer, folder, ocp.args.PyTreeSave(_nested(arrays))))
        except BaseException as e:
            failed(watch, number, e)
            raise
        return lambda: end(watch, checkpointer, number, header, blocks)

    def end(watch: Watch, checkpointer: Any, number: str, header: bytes, blocks: dict[str, int]) -> None:
        folder = orbax_path(target, number)
        try:
            with _writing(folder):
                watch.run(lambda: _ended(checkpointer))
            if first:
                if blocks:
                    _check_complete(file, folder, blocks)
                if blocks and not places.is_url(folder):
                    _sync(folder)
                container.replace(target, header)
        except BaseException as e:
            failed(watch, number, e)
            raise
        finally:
            give_up()
        try:
            if beside:  # so that it is in place for all when one of them has waited for it
                watch.run(lambda: _meet(folder))
        finally:
            watch.end("done")

    def failed(watch: Watch, number: str, error: BaseException) -> None:
        watch.end("done" if isinstance(error, Elsewhere) else "failed")
        if first:
            outside.undo(target, number)

    def give_up() -> None:
        held.close()
        if first:
            outside.sweep(target)  # the older folders or, if something has failed, the new one

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


def _begun(checkpointer: Any, folder: str, args: Any) -> None:
    try:
        checkpointer.save(folder, args=args)
    except BaseException:
        checkpointer.close()
        raise


def _ended(checkpointer: Any) -> None:
    with contextlib.closing(checkpointer):
        checkpointer.wait_until_finished()


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

    dtype = arrays.dtype_of("uint8" if t.code in zarr.BYTES else structure.DTYPES[t.code])
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


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *path, last = zarr.keys(name)
        functools.reduce(lambda branch, key: branch.setdefault(key, {}), path, tree)[last] = x
    return tree


def _check_complete(file: str, folder: str, blocks: dict[str, int]) -> None:
    """Raise CheckpointError unless a folder has all blocks of all processes, as it has not if they share no folder."""
    with zarr.readable(file, None, folder):
        import tensorstore

        keys = tensorstore.KvStore.open(zarr.database(folder)).result().list().result()
    names = collections.Counter(key.decode().rpartition("/")[0] for key in keys)
    for name, count in blocks.items():
        found = names[".".join(zarr.keys(name))] - 1  # one describes the array
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
