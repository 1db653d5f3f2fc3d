"""The engine for a tree whose arrays Orbax writes: from all processes of a pod at once, and to
object stores.

    state.safetensors                           the manifest: structure, metadata, block checksums
    state.safetensors.orbax-0123456789abcdef    Orbax's folder: nested dicts of arrays

The manifest is renamed into place after Orbax has finished and its folder is synced. That one
rename replaces the old checkpoint; older folders are deleted afterwards. This module adds the parts
that Orbax lacks: checksums, containers, unambiguous names, arrays without elements, and dtypes that
it cannot store. The module `zarr` reads the folder.
"""

import collections
import contextlib
import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxnet.checkpoint import (
    atomic,
    container,
    manifests,
    orbax_library,
    outside,
    places,
    processes,
    zarr,
)
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import DTYPES
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.grids import Piece, cuts_of
from jaxnet.checkpoint.outside import orbax_path
from jaxnet.checkpoint.protocol import Engine, Job
from jaxnet.checkpoint.structure import Node
from jaxnet.checkpoint.tensors import Tensor, crcs
from jaxnet.checkpoint.watch import Elsewhere, Watch
from jaxnet.checkpoint.words import shown

__all__ = ["ENGINE", "write_to_orbax"]


def write_to_orbax(job: Job, *, snapshot: bool) -> Callable[[], None]:
    """`protocol.Writer` for Orbax. With `snapshot`, Orbax starts to write before this returns.

    Collective: every process calls this function, and then the function that it returns (with
    `snapshot`, from any thread).
    """
    container.check_names(job.file, job.nodes, len(json.dumps(job.manifest)))
    orbax_library.check_installed()
    if "[" in job.target or "**" in job.target:
        text = (
            "Orbax takes the '[' or '**' in the path for a pattern: use another name, or save "
            "without engine='orbax'"
        )
        raise CheckpointError(job.file, None, text)
    save = _Save(job, snapshot)
    if snapshot:
        try:
            return functools.partial(save.finish, save.begin())
        except BaseException:
            save.give_up()
            raise

    def write() -> None:
        with save.held, processes.together(job.file, job.target, save.held):
            save.finish(save.begin())

    return write


class _Begun(NamedTuple):
    """A save that Orbax has begun.

    Attributes:
      number: the number of the save.
      folder: the folder that Orbax writes.
      header: the file that will be renamed into place.
      blocks: how many blocks of each array the folder must have.
      watch: shows this process the status of the others.
      checkpointer: Orbax's checkpointer.
    """

    number: str
    folder: str
    header: bytes
    blocks: dict[str, int]
    watch: Watch
    checkpointer: Any


class _Save:
    """A save of one tree.

    Args:
      job: the tree to write.
      beside: whether `finish` may be called in another thread, while the arrays change.

    Attributes:
      held: the lock of this save, on process 0.
    """

    def __init__(self, job: Job, beside: bool):
        import jax

        self.job, self.beside = job, beside
        self.first = jax.process_index() == 0
        self.held = contextlib.ExitStack()

    def begin(self) -> _Begun:
        """Collect the checksums of all processes, and let Orbax begin."""
        file, target, tensors, *_ = self.job
        number = processes.new_number()
        with processes.together(file, target, self.held):
            if self.first and not places.is_url(target):
                atomic.check_target(file, target)
                self.held.enter_context(outside.reserved(target, number))
            arrays = {t.name: _as_stored(self.job, t, self.beside) for t in tensors}
            sums = {t.name: _sums(t, arrays[t.name], self.first) for t in tensors}
        everyones = processes.gather(sums)
        with processes.together(file, target, self.held):
            _check_shared(file, target, number)
            entries = []
            for t in tensors:
                blocks = [block for sums in everyones for block in sums.get(t.name, [])]
                entries.append(_entry(file, t, blocks))
        orbax = {"id": number, "tensors": entries}
        manifest = self.job.manifest | {"version": manifests.ORBAX, "crc32": [], "orbax": orbax}
        header = fmt.write_header(file, [], manifest)
        arrays = {t.name: arrays[t.name] for t in tensors if t.nbytes}
        counts = {name: len(sums) for name, *_, sums in entries if name in arrays}
        folder, watch = orbax_path(target, number), Watch(file, number)
        try:
            checkpointer = orbax_library.begin(number, folder, _nested(arrays), watch.run)
        except BaseException as e:
            self._failed(number, watch, e)
            raise
        return _Begun(number, folder, header, counts, watch, checkpointer)

    def finish(self, begun: _Begun) -> None:
        """Wait for Orbax, and then replace the old checkpoint."""
        number, folder, header, blocks, watch, checkpointer = begun
        try:
            with orbax_library.writing(folder):
                watch.run(lambda: orbax_library.finish(checkpointer))
            if self.first:
                if blocks:
                    _check_complete(self.job.file, folder, blocks)
                if blocks and not places.is_url(folder):
                    _sync(folder)
                container.replace(self.job.target, header)
        except BaseException as e:
            self._failed(number, watch, e)
            raise
        finally:
            self.give_up()
        try:
            # When one process has waited for the save, the manifest must be in place for all of
            # them.
            if self.beside:
                watch.run(lambda: orbax_library.meet(folder))
        finally:
            watch.end("done")

    def give_up(self) -> None:
        """Release the lock, and delete the older folders or, after a failure, the new one."""
        self.held.close()
        if self.first:
            outside.sweep(self.job.target)

    def _failed(self, number: str, watch: Watch, error: BaseException) -> None:
        watch.end("done" if isinstance(error, Elsewhere) else "failed")
        if self.first:
            outside.undo(self.job.target, number)


def _check_shared(file: str, target: str, number: str) -> None:
    """Raise CheckpointError if this process does not see the lock of process 0."""
    sign = outside.lock_path(target, number)
    if not places.is_url(target) and not os.path.exists(sign):
        text = (
            f"{shown(sign, 5000)} of process 0 is not there: all processes must save to one "
            "folder, which they share"
        )
        raise CheckpointError(file, None, text)


def _entry(file: str, t: Tensor, blocks: list[Any]) -> list[Any]:
    """The manifest's entry for a tensor, from the blocks that all processes report."""
    blocks = sorted((start, shape, crcs) for start, shape, crcs in blocks)
    found = [Piece(0, t._replace(shape=tuple(shape)), tuple(start)) for start, shape, _ in blocks]
    return [t.name, t.code, t.shape, cuts_of(file, t, found), [crcs for _, _, crcs in blocks]]


def _as_stored(job: Job, t: Tensor, beside: bool) -> Any:
    """A leaf as Orbax writes it: in the blocks that lie on the devices, or as a NumPy array from
    the first process.
    """
    import jax
    import numpy as np

    from jaxnet.checkpoint import arrays, shards

    node, x = job.nodes[t.name], job.leaves[t.name]
    dtype = arrays.dtype_of("uint8" if t.code in zarr.BYTES else DTYPES[t.code])
    spread = processes.is_spread(x)
    if spread and all(device.process_index for device in x.sharding.device_set):
        text = "it has no part on process 0, which Orbax needs: save without engine='orbax'"
        raise CheckpointError(job.file, t.name, text)
    # The first process writes an array that other processes cannot see.
    everyones = spread or jax.process_count() == 1
    if isinstance(x, jax.Array) and not x.sharding.is_fully_replicated and everyones:
        x = shards.as_stored(node, x, dtype)
        return shards.copy_on_host(x) if beside else x
    if jax.process_index():
        # Orbax ignores the values on all processes but the first.
        return np.broadcast_to(np.zeros((), dtype), t.shape)
    return _on_host(node, x, t, dtype, beside)


def _on_host(node: Node, x: Any, t: Tensor, dtype: Any, beside: bool) -> Any:
    """A leaf as a NumPy array with the bytes of the file."""
    import numpy as np

    from jaxnet.checkpoint import arrays

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

    blocks: list[tuple[list[int], Any]] = []
    if isinstance(x, jax.Array):
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                start = [axis.start or 0 for axis in shard.index]
                blocks.append((start, arrays.fetch(shard.data)))
    elif first:
        blocks.append(([0] * x.ndim, x))
    result = []
    for start, block in blocks:
        raw = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        place = t._replace(shape=block.shape, start=0, stop=raw.size)
        result.append((start, list(block.shape), crcs(place, raw)))
    return result


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with the keys that `zarr` reads."""
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *path, last = zarr.keys(name)
        functools.reduce(lambda branch, key: branch.setdefault(key, {}), path, tree)[last] = x
    return tree


def _check_complete(file: str, folder: str, blocks: dict[str, int]) -> None:
    """Raise CheckpointError unless a folder has the blocks of all processes.

    It lacks some if the processes do not share it.
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


ENGINE = Engine(write_to_orbax, zarr.read_from_orbax)
