"""A tree whose arrays Orbax writes: from all processes of a pod at once, and to object stores.

    state.safetensors                           the manifest: structure, metadata, block checksums
    state.safetensors.orbax-0123456789abcdef    Orbax's folder: nested dicts of arrays

The manifest is renamed into place after Orbax has finished and its folder is synced. That one
rename replaces the old checkpoint; older folders are deleted afterwards. This module adds the parts
that Orbax lacks: checksums, containers, unambiguous names, arrays without elements, and dtypes that
it cannot store.
"""

import collections
import contextlib
import errno
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxnet.checkpoint import atomic, container, header_types, outside, parts, places, zarr
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import DTYPES
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.header_types import Tensor
from jaxnet.checkpoint.outside import orbax_path
from jaxnet.checkpoint.parts import Piece
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.watch import Elsewhere, Watch
from jaxnet.checkpoint.words import shown

# Seconds for which processes wait for each other in Orbax.
TIMEOUT = 1200


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
    """Return a function that writes a tree; with `beside`, start writing a copy and return a
    function that finishes.

    Collective: every process calls `start`, and then the function that it returns (with `beside`,
    from any thread).
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as e:
        raise ImportError("engine='orbax' needs Orbax: pip install 'jaxnet[orbax]'") from e
    import jax

    first, held = jax.process_index() == 0, contextlib.ExitStack()
    if "[" in target or "**" in target:
        text = (
            "Orbax takes the '[' or '**' in the path for a pattern: use another name, or save "
            "without engine='orbax'"
        )
        raise CheckpointError(file, None, text)

    def begin() -> Callable[[], None]:
        number = parts.new_number()
        folder = orbax_path(target, number)
        with parts.together(file, target, held):
            if first and not places.is_url(target):
                atomic.check_target(file, target)
                held.enter_context(outside.reserved(target, number))
            arrays = {
                t.name: _as_stored(file, nodes[t.name], leaves[t.name], t, beside) for t in tensors
            }
            sums = {t.name: _sums(t, arrays[t.name], first) for t in tensors}
        everyones = _gather(sums)
        with parts.together(file, target, held):
            if not places.is_url(target) and not os.path.exists(
                sign := outside.lock_path(target, number)
            ):
                text = (
                    f"{shown(sign, 5000)} of process 0 is not there: all processes must save to "
                    "one folder, which they share"
                )
                raise CheckpointError(file, None, text)
            entries = [
                _entry(file, t, [block for sums in everyones for block in sums.get(t.name, [])])
                for t in tensors
            ]
        arrays = {t.name: arrays[t.name] for t in tensors if t.stop > t.start}
        orbax = {"id": number, "tensors": entries}
        header = fmt.write_header(
            file, [], manifest | {"version": header_types.ORBAX, "crc32": [], "orbax": orbax}
        )
        blocks = {name: len(crcs) for name, *_, crcs in entries if name in arrays}
        watch = Watch(file, number)
        try:
            with _writing(folder), _one_at_a_time:
                checkpointer = _checkpointer(number)
                # Orbax refuses a tree without arrays.
                if arrays:
                    watch.run(
                        lambda: _begun(checkpointer, folder, ocp.args.PyTreeSave(_nested(arrays)))
                    )
        except BaseException as e:
            failed(watch, number, e)
            raise
        return lambda: end(watch, checkpointer, number, header, blocks)

    def end(
        watch: Watch, checkpointer: Any, number: str, header: bytes, blocks: dict[str, int]
    ) -> None:
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
            # When one process has waited for the save, the manifest must be in place for all of
            # them.
            if beside:
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
            # This deletes the older folders or, after a failure, the new one.
            outside.sweep(target)

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
    """Orbax's checkpointer. Its barriers have a timeout and unique names, so a failed save does not
    disturb later ones.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(
        active_processes=processes, barrier_sync_key_prefix=number
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        # The blocks are those of one replica.
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
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
        ocp.multihost.sync_global_processes(
            name, processes=set(range(jax.process_count())), timeout=TIMEOUT
        )


def _entry(file: str, t: Tensor, blocks: list[Any]) -> list[Any]:
    """The manifest's entry for a tensor, from the blocks that all processes report."""
    blocks = sorted((start, shape, crcs) for start, shape, crcs in blocks)
    found = [Piece(0, t._replace(shape=tuple(shape)), tuple(start)) for start, shape, _ in blocks]
    return [t.name, t.code, t.shape, parts.grid(file, t, found), [crcs for _, _, crcs in blocks]]


def _as_stored(file: str, node: Node, x: Any, t: Tensor, beside: bool) -> Any:
    """A leaf as Orbax writes it: in the blocks that lie on the devices, or as a NumPy array from
    the first process.
    """
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays, casting

    dtype = casting.dtype_of("uint8" if t.code in zarr.BYTES else DTYPES[t.code])
    # The first process writes an array that other processes cannot see.
    everyones = jax.process_count() == 1 or parts.is_spread(x)
    if parts.is_spread(x) and all(device.process_index for device in x.sharding.device_set):
        raise CheckpointError(
            file,
            t.name,
            "it has no part on process 0, which Orbax needs: save without engine='orbax'",
        )
    if isinstance(x, jax.Array) and not x.sharding.is_fully_replicated and everyones:
        x = arrays.as_stored(node, x, dtype)
        return arrays.copy(x) if beside else x
    if jax.process_index():
        # Orbax ignores the values on all processes but the first.
        return np.broadcast_to(np.zeros((), dtype), t.shape)
    raw = arrays.to_bytes(node, x)
    if t.code == "BOOL":
        # TensorStore accepts only the byte 1 for True.
        raw = (raw != 0).view(np.uint8)
    return (raw.copy() if beside else raw).view(dtype).reshape(t.shape)


def _sums(t: Tensor, x: Any, first: bool) -> list[tuple[list[int], list[int], str]]:
    """The start, the shape and the CRC-32s of each block that this process writes of an array."""
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays

    if not isinstance(x, jax.Array):
        blocks = [((), x)] if first else []
    else:
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        blocks = [
            ([axis.start or 0 for axis in shard.index], arrays.fetch(shard.data))
            for shard in shards
        ]
    result = []
    for start, block in blocks:
        raw = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        place = t._replace(shape=block.shape, start=0, stop=raw.size)
        result.append((list(start) or [0] * block.ndim, list(block.shape), fmt.crcs(place, raw)))
    return result


def _gather(value: Any) -> list[Any]:
    """Gather one value per process. JSON must be able to hold it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)
    ]


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *path, last = zarr.keys(name)
        functools.reduce(lambda branch, key: branch.setdefault(key, {}), path, tree)[last] = x
    return tree


def _check_complete(file: str, folder: str, blocks: dict[str, int]) -> None:
    """Raise CheckpointError unless a folder has the blocks of all processes. It lacks some if they
    do not share it.
    """
    with zarr.readable(file, None, folder):
        import tensorstore

        keys = tensorstore.KvStore.open(zarr.database(folder)).result().list().result()
    names = collections.Counter(key.decode().rpartition("/")[0] for key in keys)
    for name, count in blocks.items():
        # One of the files describes the array; the others are blocks.
        found = names[".".join(zarr.keys(name))] - 1
        if found < count:
            text = (
                f"only {max(found, 0)} of its {count} blocks are in {shown(folder, 5000)}: do "
                "all processes share it?"
            )
            raise CheckpointError(file, name, text)


def _sync(folder: str) -> None:
    """Sync all files and the name of a folder. Orbax does not sync the files that describe its
    arrays.
    """
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
    """Turn the various errors that Orbax and TensorStore raise, for instance for a full disk, into
    OSError.
    """
    try:
        yield
    except (OSError, CheckpointError):
        raise
    except Exception as e:
        raise OSError(errno.EIO, f"Orbax could not write: {type(e).__name__}: {e}", folder) from e


# Two Orbax saves that begin at the same time in two threads receive each other's signals.
_one_at_a_time = threading.Lock()
