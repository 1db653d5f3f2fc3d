"""Read the folder of Orbax with TensorStore alone, block by block, and check every block against
its checksum.
"""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxnet.checkpoint import places, single, structure
from jaxnet.checkpoint.dtypes import BITS, DTYPES
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.grids import Grid, overlap, place_of
from jaxnet.checkpoint.outside import orbax_path
from jaxnet.checkpoint.protocol import Allocate, Needed, Source
from jaxnet.checkpoint.tensors import Tensor, crcs
from jaxnet.checkpoint.words import shown

__all__ = ["BYTES", "database", "keys", "read_from_orbax", "readable"]

# OCDBT may put blocks of up to this number of bytes into a node, which is compressed.
INLINE = 1024
# Reading chunks repeatedly may cost this number of bytes beyond twice the size of a tensor.
MARGIN = 1 << 20
# TensorStore's zarr driver lacks these dtypes, so they are written as U8.
BYTES = ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# The words in TensorStore's errors that tell of a state that may pass.
TEMPORARY = "UNAVAILABLE|DEADLINE|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EX"


def read_from_orbax(
    source: Source, tensors: Sequence[Tensor], allocate: Allocate | None, needed: Needed
) -> dict[str, Any]:
    """`protocol.Reader` for Orbax. Blocks that are not needed are not read."""
    import numpy as np

    file, _, header = source
    assert header.orbax
    folder, grids = orbax_path(places.real(file), header.orbax.id), header.orbax.grids
    arrays = _open(file, folder, [t for t in tensors if t.nbytes], grids)
    # `_open` has checked that arrays of these sizes exist.
    out = {t.name: allocate(t.nbytes) for t in tensors} if allocate else {}
    jobs = []
    for t in tensors:
        wanted = needed.get(t.name)
        for start, block, expected in grids[t.name].blocks(t):
            if wanted is None or any(overlap(t, block, start, other) for other in wanted):
                jobs.append((t, start, block, expected))

    def read(job: tuple[Tensor, tuple[int, ...], Tensor, str]) -> None:
        t, start, block, expected = job
        place = place_of(start, block.shape)
        raw = np.empty(0, np.uint8)
        if t.name in arrays:
            with readable(file, t.name, folder):
                values = np.ascontiguousarray(arrays[t.name][place].read().result())
                raw = values.reshape(-1).view(np.uint8)
        if (found := crcs(block, raw)) != expected:
            text = (
                f"its block {list(block.shape)} at {list(start)} is not what was saved: CRC-32 "
                f"{found}, expected {expected}"
            )
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
        if out and raw.size:
            itemsize = BITS[t.code] // 8
            out[t.name].reshape(*t.shape, itemsize)[place] = raw.reshape(*block.shape, itemsize)

    single.each(read, jobs)
    return out


def _open(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> dict[str, Any]:
    """Open the arrays of some tensors, and check them against the manifest."""
    if not tensors:
        return {}
    try:
        import tensorstore
    except ImportError as e:
        text = "Orbax has written it, and is needed to read it: pip install 'jaxnet[orbax]'"
        raise ImportError(f"{shown(file)}: {text}") from e
    if not places.is_url(folder) and not os.path.isdir(folder):
        text = (
            f"its arrays in {shown(folder, 5000)} are missing: copy and rename it with this folder"
        )
        raise CheckpointError(file, None, text)
    _check_size(file, folder, tensors, grids)
    context, found = tensorstore.Context(), {}
    for t in tensors:
        store = database(folder) | {"path": ".".join(keys(t.name)) + "/"}
        # The folder does not change, and blocks of zeros are stored as well.
        spec = {
            "driver": "zarr",
            "kvstore": store,
            "recheck_cached_data": "open",
            "fill_missing_data_reads": False,
        }
        with readable(file, t.name, folder):
            found[t.name] = tensorstore.open(spec, open=True, read=True, context=context)
    for t in tensors:
        with readable(file, t.name, folder):
            found[t.name] = found[t.name].result()
        _check_array(file, folder, t, found[t.name], len(grids[t.name].crcs))
    return found


def _check_array(file: str, folder: str, t: Tensor, array: Any, blocks: int) -> None:
    """Raise CheckpointError unless an array is stored as the manifest says."""
    code = "U8" if t.code in BYTES else t.code
    dtype, chunk = array.dtype.name, math.prod(array.chunk_layout.read_chunk.shape or ())
    if dtype != DTYPES[code] or array.shape != t.shape or chunk > math.prod(t.shape):
        text = (
            f"it is {dtype}{list(array.shape)} in {shown(folder, 5000)}, expected "
            f"{DTYPES[code]}{list(t.shape)}"
        )
        raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
    # Otherwise, a few bytes could decompress to many, or each of many blocks could read all bytes.
    compressor = array.codec.to_json().get("compressor")
    most = 2 * t.nbytes + MARGIN
    if compressor is not None or blocks * chunk * BITS[t.code] // 8 > most:
        text = (
            f"it is stored in chunks of {chunk} elements with {compressor}, expected {blocks} and "
            "no compressor"
        )
        raise CheckpointError(file, t.name, f"{text}; {RESTORE}")


def _check_size(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> None:
    """Raise CheckpointError if tensors are larger than all files in a folder.

    This runs before memory is allocated.
    """
    blocks = (block for t in tensors for _, block, _ in grids[t.name].blocks(t))
    # Smaller blocks may be in compressed nodes.
    needed = sum(block.nbytes for block in blocks if block.nbytes > INLINE)
    with readable(file, None, folder):
        size = places.size(folder)
    if needed > size:
        text = f"its arrays need {needed:,} bytes, {shown(folder, 5000)} has {size:,}"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")


def keys(name: str) -> list[str]:
    """The keys of a leaf in Orbax.

    Orbax joins keys with dots, so each key is quoted as in a URL to keep names unique.
    """

    def quoted(step: str) -> str:
        return re.sub("[^A-Za-z0-9_-]", _as_bytes, step) or "%"

    return [quoted(step) for step in structure.leaf_path(name)] or ["%"]


def _as_bytes(found: "re.Match[str]") -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode())


def database(folder: str) -> dict[str, Any]:
    """TensorStore's specification of Orbax's folder."""
    return {"driver": "ocdbt", "base": places.base(folder)}


@contextlib.contextmanager
def readable(file: str, leaf: str | None, folder: str) -> Iterator[None]:
    """Turn TensorStore's errors into OSError if they may be temporary, and into CheckpointError
    otherwise.
    """
    try:
        yield
    except (ImportError, TimeoutError):
        # A missing package or a silent object store tells nothing about the file.
        raise
    except Exception as e:
        if re.search(TEMPORARY, str(e)):
            raise OSError(errno.EIO, f"cannot be read now ({e})", folder) from e
        text = f"{shown(folder, 5000)} cannot be read ({shown(e, 3000)})"
        raise CheckpointError(file, leaf, f"{text}; {RESTORE}") from e
