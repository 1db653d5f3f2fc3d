"""Read the folder of Orbax with TensorStore alone, block by block, and check every block against
its checksum.
"""

import contextlib
import errno
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxnet.checkpoint import container, header_types, parts, places, structure
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.dtypes import DTYPES
from jaxnet.checkpoint.format import RESTORE, CheckpointError
from jaxnet.checkpoint.header_types import Grid, Header, Tensor
from jaxnet.checkpoint.outside import orbax_path
from jaxnet.checkpoint.words import shown

# OCDBT may put blocks of up to this number of bytes into a node, which is compressed.
INLINE = 1024
# Reading chunks repeatedly may cost this number of bytes beyond twice the size of a tensor.
MARGIN = 1 << 20
# TensorStore's zarr driver lacks these dtypes, so they are written as U8.
BYTES = ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def read_tensors(
    file: str,
    header: Header,
    tensors: Sequence[Tensor],
    empty: Callable[[int], Any] | None,
    needed: Mapping[str, Sequence[tuple[slice, ...]] | None],
) -> dict[str, Any]:
    """`container.read_tensors` for tensors in Orbax's folder."""
    import numpy as np

    assert header.orbax
    folder, grids = orbax_path(places.real(file), header.orbax.id), header.orbax.grids
    arrays = _open(file, folder, [t for t in tensors if t.stop > t.start], grids)
    # `_open` has checked that arrays of these sizes exist.
    out = {t.name: empty(t.stop - t.start) for t in tensors} if empty else {}
    jobs = []
    for t in tensors:
        for start, block, expected in grids[t.name].blocks(t):
            wanted = needed.get(t.name)
            if wanted is None or any(parts.overlap(t, block, start, other) for other in wanted):
                jobs.append((t, start, block, expected))

    def read(job):
        t, start, block, expected = job
        place = tuple(
            slice(first, first + size) for first, size in zip(start, block.shape, strict=True)
        )
        raw = np.empty(0, np.uint8)
        if t.name in arrays:
            with readable(file, t.name, folder):
                raw = (
                    np.ascontiguousarray(arrays[t.name][place].read().result())
                    .reshape(-1)
                    .view(np.uint8)
                )
        if (crcs := fmt.crcs(block, raw)) != expected:
            text = (
                f"its block {list(block.shape)} at {list(start)} is not what was saved: CRC-32 "
                f"{crcs}, expected {expected}"
            )
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
        if out and raw.size:
            itemsize = header_types.BITS[t.code] // 8
            out[t.name].reshape(*t.shape, itemsize)[place] = raw.reshape(*block.shape, itemsize)

    container.each(read, jobs)
    return out


def _open(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> dict[str, Any]:
    """Open the arrays of some tensors, and check their shapes and dtypes against the manifest."""
    if not tensors:
        return {}
    try:
        import tensorstore
    except ImportError as e:
        raise ImportError(
            f"{shown(file)}: Orbax has written it, and is needed to read it: pip install "
            "'jaxnet[orbax]'"
        ) from e
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
            array = found[t.name] = found[t.name].result()
        code = "U8" if t.code in BYTES else t.code
        dtype, chunk = array.dtype.name, math.prod(array.chunk_layout.read_chunk.shape or ())
        if dtype != DTYPES[code] or array.shape != t.shape or chunk > math.prod(t.shape):
            text = (
                f"it is {dtype}{list(array.shape)} in {shown(folder, 5000)}, expected "
                f"{DTYPES[code]}{list(t.shape)}"
            )
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
        # Otherwise, a few bytes could decompress to many, or each of many blocks could read all
        # bytes.
        compressor, blocks = array.codec.to_json().get("compressor"), len(grids[t.name].crcs)
        if (
            compressor is not None
            or blocks * chunk * header_types.BITS[t.code] // 8 > 2 * (t.stop - t.start) + MARGIN
        ):
            text = (
                f"it is stored in chunks of {chunk} elements with {compressor}, expected "
                f"{blocks} and no compressor"
            )
            raise CheckpointError(file, t.name, f"{text}; {RESTORE}")
    return found


def _check_size(file: str, folder: str, tensors: list[Tensor], grids: dict[str, Grid]) -> None:
    """Raise CheckpointError if tensors are larger than all files in a folder. This runs before
    memory is allocated.
    """
    blocks = (block for t in tensors for _, block, _ in grids[t.name].blocks(t))
    # Smaller blocks may be in compressed nodes.
    needed = sum(block.stop for block in blocks if block.stop > INLINE)
    with readable(file, None, folder):
        size = places.size(folder)
    if needed > size:
        text = f"its arrays need {needed:,} bytes, {shown(folder, 5000)} has {size:,}"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")


def keys(name: str) -> list[str]:
    """The keys of a leaf in Orbax. Orbax joins keys with dots, so each is quoted as in a URL to
    keep names unique.
    """

    def quoted(step):
        return (
            re.sub(
                "[^A-Za-z0-9_-]",
                lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()),
                step,
            )
            or "%"
        )

    return [quoted(step) for step in structure.leaf_path(name)] or ["%"]


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
    except Exception as e:
        if re.search(
            "UNAVAILABLE|DEADLINE|ABORTED|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EX",
            str(e),
        ):
            raise OSError(errno.EIO, f"cannot be read now ({e})", folder) from e
        raise CheckpointError(
            file, leaf, f"{shown(folder, 5000)} cannot be read ({shown(e, 3000)}); {RESTORE}"
        ) from e
