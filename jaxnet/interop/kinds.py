"""Recognize files of other libraries by their first bytes, and check their archives."""

from __future__ import annotations

import os
import zipfile
from typing import BinaryIO, Literal

from jaxnet.checkpoint.container import opened
from jaxnet.checkpoint.errors import RESTORE, CheckpointError

__all__ = ["check_archive", "kind_of", "kind_of_file", "refused_kind"]

Kind = Literal["safetensors", "torch", "keras"]
NAMES = {
    "safetensors": "a safetensors file",
    "torch": "a file of torch.save",
    "keras": "a file of Keras",
}

HDF5 = b"\x89HDF\r\n\x1a\n"
PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
# The attribute of a zip record that marks a folder.
FOLDER = 0x10
# The flags of a zip record for the three kinds of encryption.
ENCRYPTED = 0x2041
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Recognize the format of a file by its first bytes, not by its name.

    Args:
      path: the file.

    Returns:
      "safetensors" (including jaxnet's checkpoints), "torch" (`torch.save`) or "keras".

    Raises:
      CheckpointError: the file has none of these formats.
      OSError: the file cannot be opened.
    """
    with opened(path) as (file, fd, _):
        return kind_of_file(file, fd)


def kind_of_file(file: str, fd: int) -> Kind:
    """`kind_of` for an open file.

    Args:
      file: how errors name the file.
      fd: its descriptor.

    Returns:
      As `kind_of`.
    """
    first = os.pread(fd, 512, 0)
    # The test for safetensors comes first: their JSON begins at byte 8, and the eight bytes before
    # it, a length, may look like another format.
    if first[8:9] == b"{":
        return "safetensors"
    if first.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_archive(file, fd)
    if any(os.pread(fd, len(HDF5), start) == HDF5 for start in (0, 512, 1024, 2048)):
        return "keras"
    if first.startswith(PICKLE):
        return "torch"
    text = f"{_unknown(first)}; expected safetensors, torch.save or Keras"
    raise CheckpointError(file, None, text)


def check_archive(file: str, kind: Kind, archive: BinaryIO, size: int) -> list[str]:
    """Check that every record of a zip archive is uncompressed and has the right CRC-32.

    Reading then never needs more memory than the file has bytes, and damage is always detected:
    torch ignores checksums.

    Args:
      file: how errors name the file.
      kind: "torch" or "keras".
      archive: the open archive.
      size: the number of bytes of the file.

    Returns:
      The names of the records.

    Raises:
      CheckpointError: the archive is damaged, or has records that neither library writes.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            records = content.infolist()
            _check_records(file, records, size)
            for record in records:
                with content.open(record) as data:
                    while data.read(1 << 20):
                        pass
    except CheckpointError:
        raise
    except Exception as e:
        # Damage causes errors of many types.
        text = f"it is {NAMES[kind]}, whose zip archive is damaged ({e}); {RESTORE}"
        if kind == "torch" and "CRC" in str(e):
            text += (
                " (or it was saved with torch.serialization.set_crc32_options(False): save it "
                "again without)"
            )
        raise CheckpointError(file, None, text) from e
    return [record.filename for record in records]


def refused_kind(kind: Kind) -> str:
    """The text of the error for a file that another function reads.

    Args:
      kind: the kind of the file.

    Returns:
      The text, with the function that reads the file.
    """
    function = "from_keras" if kind == "keras" else "from_torch"
    return f"it is {NAMES[kind]}: read it with {function}"


def _kind_of_archive(file: str, fd: int) -> Kind:
    try:
        with os.fdopen(os.dup(fd), "rb") as raw, zipfile.ZipFile(raw) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception as e:
        text = (
            f"its zip archive is damaged or cut off ({e}), expected one of torch.save or of Keras"
        )
        raise CheckpointError(file, None, f"{text}; {RESTORE}") from e
    if "constants.pkl" in names:
        text = (
            "it is a TorchScript program: open it with torch.jit.load if you trust it, and save "
            "its state_dict()"
        )
        raise CheckpointError(file, None, text)
    if "data.pkl" in names:
        return "torch"
    if {"config.json", "metadata.json"} <= names:
        return "keras"
    if names and all(name.endswith(".npy") for name in names):
        text = "it is an archive of NumPy: from_torch(dict(numpy.load(file))) takes its arrays"
        raise CheckpointError(file, None, text)
    text = "it is a zip archive, but neither of torch.save nor of Keras: unpack it first"
    raise CheckpointError(file, None, text)


def _check_records(file: str, records: list[zipfile.ZipInfo], size: int) -> None:
    for record in records:
        stored = record.compress_type == zipfile.ZIP_STORED
        packed = not stored or record.compress_size != record.file_size
        # torch reads a record with the attribute of a folder as an array and returns uninitialized
        # memory.
        if record.is_dir() or record.external_attr & FOLDER:
            text = f"the record is marked as a folder; {RESTORE}"
            raise CheckpointError(file, record.filename, text)
        if packed or record.flag_bits & ENCRYPTED:
            text = (
                "the record is compressed or encrypted, expected bytes as they are (what "
                "torch.save and Keras write): write it again, or unpack it yourself"
            )
            raise CheckpointError(file, record.filename, text)
    names = [record.filename for record in records]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(file, name, f"the archive has two records of this name; {RESTORE}")
    if (total := sum(record.file_size for record in records)) > size:
        text = (
            f"the records of the archive announce {total:,} bytes, the file has {size:,}; {RESTORE}"
        )
        raise CheckpointError(file, None, text)


def _unknown(first: bytes) -> str:
    if not first:
        return "it is empty"
    if first.startswith(COMPRESSED):
        return "it is compressed as a whole: unpack it first"
    if first[257:262] == b"ustar":
        return (
            "it is a tar archive: unpack it first (torch no longer reads those that it wrote "
            "before version 0.2)"
        )
    if first.startswith(b"version https://git-lfs"):
        return (
            "it is the pointer that Git LFS leaves instead of a file: fetch the file, `git lfs "
            "pull`"
        )
    return f"its first bytes are {first[:16]!r}, those of no kind of file that holds parameters"
