"""The container: a safetensors file whose header also carries a manifest, checksums and a digest of
itself.

    8 bytes      N, the length of the header, unsigned little-endian
    N bytes      the header: JSON, padded with spaces
    the rest     the tensors' bytes, one after the other, without holes

Only the standard library is needed here, so that `inspect` starts fast.  The whole format, with a
worked example, is written down in docs/checkpoint_format.md; the tests hold the two together.
"""

import contextlib
import hashlib
import itertools
import math
import re
import reprlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxnet.checkpoint import header_types
from jaxnet.checkpoint.errors import RESTORE, CheckpointError, Misfit
from jaxnet.checkpoint.header_types import Grid, Header, Orbax, Parts, Tensor
from jaxnet.checkpoint.strict_json import dumps, parse_json
from jaxnet.checkpoint.words import shown

MAX_HEADER = 100_000_000  # the official reader's limit
# Every header of ours starts with these bytes, and the digest follows.
PREFIX = b'{"__metadata__":{"jaxnet_sha256":"'


def layout(tensors: list[tuple[str, str, tuple[int, ...]]]) -> list[Tensor]:
    """Place (name, code, shape) one after the other, large elements first: each tensor is aligned
    to its elements.
    """
    placed, start = [], 0
    for name, code, shape in sorted(tensors, key=lambda t: -header_types.BITS[t[1]]):
        stop = start + math.prod(shape) * header_types.BITS[code] // 8
        placed.append(Tensor(name, code, shape, start, stop))
        start = stop
    return placed


def write_header(file: str, tensors: list[Tensor], manifest: dict[str, Any]) -> bytes:
    """The first 8 + N bytes of the file; their number depends on the lengths of the manifest's
    strings alone.
    """
    header: dict[str, Any] = {
        "__metadata__": {"jaxnet_sha256": "0" * 64, "jaxnet": dumps(manifest)}
    }
    for name, code, shape, start, stop in tensors:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
    raw = dumps(header).encode("ascii")
    raw += b" " * (-(8 + len(raw)) % header_types.ALIGNMENT)
    if len(raw) > MAX_HEADER:
        text = (
            f"the header needs {len(raw)} bytes, the format allows {MAX_HEADER}: save fewer "
            "leaves or less metadata"
        )
        raise CheckpointError(file, None, text)
    return len(raw).to_bytes(8, "little") + _with_digest(raw, _digest(raw))


def with_manifest(header: bytes, manifest: dict[str, Any]) -> bytes:
    """What `write_header` gave, with another manifest of the same length."""
    raw, text = header[8:], dumps(dumps(manifest)).encode("ascii")
    start = len(PREFIX) + 64 + len(',"jaxnet":') + 1
    raw = raw[:start] + text + raw[start + len(text) :]
    return header[:8] + _with_digest(raw, _digest(raw))


def header_length(file: str, first: bytes, size: int) -> int:
    """N, from the file's first 8 bytes and its size."""
    if len(first) < 8 or size < 10:
        text = f"{size} bytes are too few for a safetensors file: it is cut off, or something else"
        raise CheckpointError(file, None, text)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or 8 + length > size:
        text = f"its first 8 bytes announce a header of {length} bytes, the file has {size}"
        raise CheckpointError(file, None, f"{text}: it is cut off, or not a safetensors file")
    return length


def read_header(file: str, raw: bytes, size: int) -> Header:
    """Parse and check the N bytes of a header; `size` is that of the whole file."""
    if raw.startswith(PREFIX):
        stored = raw[len(PREFIX) : len(PREFIX) + 64].decode("ascii", "replace")
        if stored != _digest(raw):
            text = f"the header's SHA-256 is {_digest(raw)}, expected {stored}"
            raise CheckpointError(file, None, f"{text}; {RESTORE}")
    elif not raw.startswith(b"{"):
        raise CheckpointError(
            file, None, f"the header begins with {raw[:1]!r}, expected '{{': not a safetensors file"
        )
    header = parse_json(file, raw, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(file, None, f"__metadata__ must be an object of strings; {RESTORE}")
    if not raw.startswith(PREFIX):
        if found := sorted(name for name in metadata if name.startswith("jaxnet")):
            text = f"its header has {found}, but not at the beginning; {RESTORE}"
            raise CheckpointError(
                file, None, f"{text} (a program that rewrites a checkpoint must leave these out)"
            )
        return Header(_tensors(file, header, size - 8 - len(raw)), metadata, None, 8 + len(raw))
    manifest = parse_json(
        file, metadata.get("jaxnet", "").encode("utf-8", "replace"), "the manifest"
    )
    _check_version(file, manifest.get("version"))
    tensors = _tensors(file, header, size - 8 - len(raw))
    _check_manifest(file, manifest, tensors)
    parts, orbax = None, None
    if manifest["version"] == header_types.PARTS:
        parts, tensors = _read_parts(file, manifest, tensors)
    elif manifest["version"] == header_types.ORBAX:
        orbax, tensors = _read_orbax(file, manifest, tensors)
    return Header(tensors, metadata, manifest, 8 + len(raw), parts, orbax)


def crc_start(tensor: Tensor, chunk: int) -> int:
    """The CRC-32 that a chunk's bytes continue: a tensor under another name, type, shape or order
    is damaged too.
    """
    shape = ",".join(map(str, tensor.shape))
    return zlib.crc32(f"{tensor.name}\0{tensor.code}\0{shape}\0{chunk}\0".encode())


def crcs(tensor: Tensor, data: Any) -> str:
    """The CRC-32s of the chunks of a tensor whose bytes these are, as a manifest has them."""
    parts = [
        data[i * header_types.CHUNK : (i + 1) * header_types.CHUNK] for i in range(tensor.chunks)
    ]
    return "".join(f"{zlib.crc32(part, crc_start(tensor, i)):08x}" for i, part in enumerate(parts))


def _tensors(file: str, header: dict[str, Any], size: int) -> list[Tensor]:
    """The entries in the order of their data, which they must fill exactly: no hole, no overlap,
    nothing behind.
    """
    tensors = sorted(
        (_tensor(file, name, entry) for name, entry in header.items()),
        key=lambda t: (t.start, t.stop),
    )
    end = 0
    for t in tensors:
        if t.start != end:
            text = (
                f"its data starts at byte {t.start}, expected {end} (tensors lie one after the "
                f"other); {RESTORE}"
            )
            raise CheckpointError(file, t.name, text)
        end = t.stop
    if end != size:
        what = "cut off" if size < end else "followed by bytes of something else"
        raise CheckpointError(
            file, None, f"the tensors need {end} bytes, the file has {size} for them: it is {what}"
        )
    return tensors


def _tensor(file: str, name: str, entry: Any) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not name.isascii() and re.search("[\ud800-\udfff]", name):
        reason = "its name is not Unicode text"
    elif not isinstance(code, str) or code not in header_types.BITS:
        reason = (
            f"unknown dtype {reprlib.repr(code)}, expected one of {', '.join(header_types.BITS)}"
        )
    elif not _sizes(shape) or len(shape) > 64:
        reason = f"shape {reprlib.repr(shape)} is not a list of at most 64 sizes"
    elif not _sizes(offsets) or len(offsets) != 2:
        reason = f"data_offsets {reprlib.repr(offsets)} are not two positions"
    elif math.prod(shape) * header_types.BITS[code] != 8 * (offsets[1] - offsets[0]):
        reason = (
            f"{code}{shape} does not take {offsets[1] - offsets[0]} bytes, as its data_offsets "
            f"{offsets} say"
        )
    else:
        return Tensor(name, code, tuple(shape), *offsets)
    raise CheckpointError(file, ascii(name)[1:-1], f"{reason}; {RESTORE}")


def _sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for v in value:  # quicker than all(...)
        if type(v) is not int or not 0 <= v < 1 << 63:
            return False
    return True


def _is_crcs(value: Any, tensor: Tensor) -> bool:
    """Whether a value can be the CRC-32s of a tensor's chunks, which may be more than a regular
    expression can count.
    """
    return (
        isinstance(value, str)
        and len(value) == 8 * tensor.chunks
        and re.fullmatch("[0-9a-f]*", value) is not None
    )


def _check_version(file: str, version: Any):
    if type(version) is not int or version < 1:
        raise CheckpointError(
            file,
            None,
            f"the manifest's version is {reprlib.repr(version)}, expected a number; {RESTORE}",
        )
    if version > header_types.ORBAX:
        text = (
            f"it has format version {reprlib.repr(version)}, this jaxnet reads versions up to "
            f"{header_types.ORBAX}: install a newer jaxnet"
        )
        raise Misfit(file, None, text)


def _check_manifest(file: str, manifest: dict[str, Any], tensors: list[Tensor]):
    crcs = manifest.get("crc32")
    if not isinstance(crcs, list) or len(crcs) != len(tensors):
        raise CheckpointError(
            file, None, f"the manifest must have one crc32 for each of {len(tensors)} tensors"
        )
    for t, crc in zip(tensors, crcs, strict=True):
        if not _is_crcs(crc, t):
            text = f"its crc32 must be {8 * t.chunks} hexadecimal digits, got {reprlib.repr(crc)}"
            raise CheckpointError(file, t.name, text)
    if not isinstance(manifest.get("metadata"), dict):
        raise CheckpointError(file, None, "the manifest's metadata must be an object")


def _read_parts(
    file: str, manifest: dict[str, Any], tensors: list[Tensor]
) -> tuple[Parts, list[Tensor]]:
    """The parts of a file of version 2 and its tensors, placed as in one file."""
    with _well_formed(file, "parts"):
        described = manifest["parts"]
        placed = _placed(
            tensors,
            described["id"],
            [(name, code, shape) for name, code, shape in described["tensors"]],
        )
        parts = Parts(described["id"], [(digest, size) for digest, size in described["files"]])
        if not all(isinstance(digest, str) and _sizes([size]) for digest, size in parts.files):
            raise ValueError("a part is not a digest and a size")
    if sum(t.stop - t.start for t in placed) > sum(size for _, size in parts.files):
        raise CheckpointError(
            file, None, f"the tensors need more bytes than the parts have; {RESTORE}"
        )
    return parts, placed


def _read_orbax(
    file: str, manifest: dict[str, Any], tensors: list[Tensor]
) -> tuple[Orbax, list[Tensor]]:
    """The blocks of the tensors of a file of version 3, and these, placed as in one file."""
    with _well_formed(file, "orbax"):
        described = manifest["orbax"]
        entries = [(name, code, shape) for name, code, shape, _, _ in described["tensors"]]
        placed = _placed(tensors, described["id"], entries)
        grids = {name: Grid(cuts, crcs) for name, _, _, cuts, crcs in described["tensors"]}
        for t in placed:
            cuts, crcs = grids[t.name]
            if len(cuts) != len(t.shape) or not all(
                _sizes(cut)
                and cut[:1] == [0]
                and all(a < b for a, b in itertools.pairwise([*cut, max(size, 1)]))
                for cut, size in zip(cuts, t.shape, strict=True)
            ):
                raise ValueError(f"the blocks of '{shown(t.name)}' do not fill it")
            if math.prod(map(len, cuts)) != len(crcs):
                raise ValueError(f"'{shown(t.name)}' has not one CRC-32 for each block")
            for _, block, crc in grids[t.name].blocks(t):
                if not _is_crcs(crc, block):
                    raise ValueError(
                        f"the CRC-32 of a block of '{shown(t.name)}' is {reprlib.repr(crc)}"
                    )
    return Orbax(described["id"], grids), placed


@contextlib.contextmanager
def _well_formed(file: str, entry: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(
            file, None, f"the manifest's {entry} are not well-formed ({shown(e, 3000)}); {RESTORE}"
        ) from e


def _placed(
    tensors: list[Tensor], number: Any, entries: list[tuple[Any, Any, Any]]
) -> list[Tensor]:
    """The tensors that a manifest describes, of a file that has none itself; ValueError for what
    cannot be.
    """
    if (
        tensors
        or not re.fullmatch("[0-9a-f]{16}", number)
        or len({name for name, _, _ in entries}) < len(entries)
    ):
        raise ValueError("it has tensors itself, no number, or two tensors of one name")
    if not all(
        isinstance(name, str) and isinstance(code, str) and _sizes(shape)
        for name, code, shape in entries
    ):
        raise ValueError("a tensor is not a name, a dtype and a shape")
    if any(
        header_types.BITS.get(code, 0) % 8 or code not in header_types.BITS or len(shape) > 64
        for _, code, shape in entries
    ):
        raise ValueError("a tensor has an unknown dtype or more than 64 axes")
    return layout([(name, code, tuple(shape)) for name, code, shape in entries])


def _digest(raw: bytes) -> str:
    return hashlib.sha256(_with_digest(raw, "0" * 64)).hexdigest()


def _with_digest(raw: bytes, digest: str) -> bytes:
    return raw[: len(PREFIX)] + digest.encode() + raw[len(PREFIX) + 64 :]
