"""The header of a safetensors file, which also carries a manifest, checksums and its own digest.

    8 bytes      N, the length of the header, unsigned little-endian
    N bytes      the header: JSON, padded with spaces
    the rest     the bytes of the tensors, one after the other, without holes

The module needs only the standard library, so `inspect` starts fast. docs/checkpoint_format.md
describes the whole format, with a worked example; the tests hold the two together.
"""

import hashlib
import json
import math
import re
import reprlib
from typing import Any, NamedTuple

from jaxnet.checkpoint import manifests
from jaxnet.checkpoint.dtypes import BITS
from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.manifests import Orbax, Parts
from jaxnet.checkpoint.tensors import Tensor, are_sizes
from jaxnet.checkpoint.words import shown

__all__ = [
    "PREFIX",
    "Header",
    "digest_of",
    "header_length",
    "read_header",
    "with_digest",
    "with_manifest",
    "write_header",
]

# The official reader has the same limit.
MAX_HEADER = 100_000_000
# The position of the first tensor in the file is a multiple of this number.
ALIGNMENT = 64
# Every header of jaxnet starts with these bytes, and the digest follows.
PREFIX = b'{"__metadata__":{"jaxnet_sha256":"'


class Header(NamedTuple):
    """A checked header.

    Attributes:
      tensors: the tensors in the order of their data.
      metadata: the strings below `__metadata__`.
      manifest: the manifest of jaxnet; None for the file of another program.
      data: the position in the file at which the tensors begin.
      parts: where the tensors are, in a file of version 2.
      orbax: where the tensors are, in a file of version 3.
    """

    tensors: list[Tensor]
    metadata: dict[str, str]
    manifest: dict[str, Any] | None
    data: int
    parts: Parts | None = None
    orbax: Orbax | None = None

    @property
    def outside(self) -> Parts | Orbax | None:
        """Where the tensors are, if they are not in the file itself."""
        return self.parts or self.orbax


def write_header(file: str, tensors: list[Tensor], manifest: dict[str, Any]) -> bytes:
    """The first 8 + N bytes of a file.

    Of the manifest, only the lengths of its strings determine N.
    """
    header: dict[str, Any] = {
        "__metadata__": {"jaxnet_sha256": "0" * 64, "jaxnet": _dumps(manifest)}
    }
    for name, code, shape, start, stop in tensors:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, stop]}
    raw = _dumps(header).encode("ascii")
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER:
        text = (
            f"the header needs {len(raw)} bytes, the format allows {MAX_HEADER}: save fewer "
            "leaves or less metadata"
        )
        raise CheckpointError(file, None, text)
    return len(raw).to_bytes(8, "little") + with_digest(raw, digest_of(raw))


def with_manifest(header: bytes, manifest: dict[str, Any]) -> bytes:
    """The result of `write_header` with another manifest of the same length."""
    raw, text = header[8:], _dumps(_dumps(manifest)).encode("ascii")
    start = len(PREFIX) + 64 + len(',"jaxnet":') + 1
    raw = raw[:start] + text + raw[start + len(text) :]
    return header[:8] + with_digest(raw, digest_of(raw))


def header_length(file: str, first: bytes, size: int) -> int:
    """N, from the first 8 bytes and the size of a file."""
    if len(first) < 8 or size < 10:
        text = f"{size} bytes are too few for a safetensors file: it is cut off, or something else"
        raise CheckpointError(file, None, text)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER or 8 + length > size:
        text = f"its first 8 bytes announce a header of {length} bytes, the file has {size}"
        raise CheckpointError(file, None, f"{text}: it is cut off, or not a safetensors file")
    return length


def read_header(file: str, raw: bytes, size: int) -> Header:
    """Parse and check a header.

    Args:
      file: how errors name the file.
      raw: the N bytes of the header.
      size: the number of bytes of the whole file.

    Returns:
      The header.

    Raises:
      CheckpointError: the header is damaged, or not that of a safetensors file.
    """
    ours = raw.startswith(PREFIX)
    if ours:
        _check_digest(file, raw)
    elif not raw.startswith(b"{"):
        text = f"the header begins with {raw[:1]!r}, expected '{{': not a safetensors file"
        raise CheckpointError(file, None, text)
    header = _parse_json(file, raw, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(file, None, f"__metadata__ must be an object of strings; {RESTORE}")
    data = 8 + len(raw)
    if not ours:
        if found := sorted(name for name in metadata if name.startswith("jaxnet")):
            text = f"its header has {found}, but not at the beginning; {RESTORE}"
            remedy = "a program that rewrites a checkpoint must leave these out"
            raise CheckpointError(file, None, f"{text} ({remedy})")
        return Header(_tensors(file, header, size - data), metadata, None, data)
    text = metadata.get("jaxnet", "").encode("utf-8", "replace")
    manifest = _parse_json(file, text, "the manifest")
    manifests.check_version(file, manifest.get("version"))
    tensors = _tensors(file, header, size - data)
    manifests.check_manifest(file, manifest, tensors)
    parts, orbax = None, None
    if manifest["version"] == manifests.PARTS:
        parts, tensors = manifests.read_parts_entry(file, manifest, tensors)
    elif manifest["version"] == manifests.ORBAX:
        orbax, tensors = manifests.read_orbax_entry(file, manifest, tensors)
    return Header(tensors, metadata, manifest, data, parts, orbax)


def digest_of(raw: bytes) -> str:
    """The SHA-256 of a header, computed with zeros in the place of the digest."""
    return hashlib.sha256(with_digest(raw, "0" * 64)).hexdigest()


def with_digest(raw: bytes, digest: str) -> bytes:
    """The header with another digest."""
    return raw[: len(PREFIX)] + digest.encode() + raw[len(PREFIX) + 64 :]


def _check_digest(file: str, raw: bytes) -> None:
    stored = raw[len(PREFIX) : len(PREFIX) + 64].decode("ascii", "replace")
    if stored != (digest := digest_of(raw)):
        text = f"the header's SHA-256 is {digest}, expected {stored}"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")


def _parse_json(file: str, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without double names, NaN or infinities."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        text = f"{what} is not the JSON of a safetensors file ({shown(e, 3000)})"
        raise CheckpointError(file, None, f"{text}; {RESTORE}") from e
    if not isinstance(value, dict):
        text = f"{what} must be a JSON object, got {type(value).__name__}"
        raise CheckpointError(file, None, f"{text}; {RESTORE}")
    return value


def _tensors(file: str, header: dict[str, Any], size: int) -> list[Tensor]:
    """The tensors of a header in the order of their data.

    Raises CheckpointError unless they fill the `size` bytes of data exactly.
    """
    tensors = [_tensor(file, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
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
        text = f"the tensors need {end} bytes, the file has {size} for them: it is {what}"
        raise CheckpointError(file, None, text)
    return tensors


def _tensor(file: str, name: str, entry: Any) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not name.isascii() and re.search("[\ud800-\udfff]", name):
        reason = "its name is not Unicode text"
    elif not isinstance(code, str) or code not in BITS:
        reason = f"unknown dtype {reprlib.repr(code)}, expected one of {', '.join(BITS)}"
    elif not are_sizes(shape) or len(shape) > 64:
        reason = f"shape {reprlib.repr(shape)} is not a list of at most 64 sizes"
    elif not are_sizes(offsets) or len(offsets) != 2:
        reason = f"data_offsets {reprlib.repr(offsets)} are not two positions"
    elif math.prod(shape) * BITS[code] != 8 * (offsets[1] - offsets[0]):
        reason = (
            f"{code}{shape} does not take {offsets[1] - offsets[0]} bytes, as its data_offsets "
            f"{offsets} say"
        )
    else:
        return Tensor(name, code, tuple(shape), *offsets)
    raise CheckpointError(file, ascii(name)[1:-1], f"{reason}; {RESTORE}")


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"two entries are called {reprlib.repr(name)}")
        result[name] = value
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
