"""Forged headers: random changes, with a right digest, so only the checks behind it refuse them."""

import contextlib
import copy
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.tensors import Tensor, crcs

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**53,
    2**56,
    2**62,
    2**63,
    2**64,
    10**400,
    0.5,
    1e300,
    float("inf"),
]
ODD += [
    "",
    "a",
    "w",
    "0",
    "0x1",
    "-0x1",
    "../../x",
    "a/b",
    "~",
    "~2",
    "\0",
    "\x1b[31m",
    "\ud800",
    "é",
    "a" * 3000,
    "0" * 8,
]
ODD += [
    "f" * 16,
    "jax",
    "numpy",
    "key",
    "float32",
    "complex128",
    "int4",
    "F32",
    "F64",
    "F4",
    "U8",
    "dict",
    "list",
    "none",
]
ODD += [
    [],
    {},
    [[]],
    [0],
    [1, 2],
    [0, 0],
    [[0]],
    ["jax", "float32"],
    ["none", None],
    ["int", "0x1"],
    ["key", "rbg"],
]
ODD += [["dict", []], ["list", []], [1] * 65, [2**32] * 2, [2**62, 0], {"": 0}]


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The entries, the manifest and the data of a file."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    return entries, json.loads(entries.pop("__metadata__")["jaxnet"]), data[8 + length :]


def sealed(entries: Any, manifest: Any, data: bytes) -> bytes:
    """The file with these contents, and a right digest."""
    header = {"__metadata__": {"jaxnet_sha256": "0" * 64, "jaxnet": json.dumps(manifest)}} | entries
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)
    return len(raw).to_bytes(8, "little") + fmt.with_digest(raw, fmt.digest_of(raw)) + data


def forgeries(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Files with one to three changes in the entries or in the manifest, of the structure or of its
    text.
    """
    entries, manifest, rest = split(data)
    rng = random.Random(seed)
    while count:
        both = [copy.deepcopy(entries), copy.deepcopy(manifest)]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            change(both, rng)
        if isinstance(both[0], dict) and (both[0], both[1]) != (entries, manifest):
            if rng.random() < 0.5:
                sum_again(both[0], both[1], rest)
            yield sealed(both[0], both[1], rest)
            count -= 1


def sum_again(entries: dict[str, Any], manifest: Any, data: bytes) -> None:
    """Give the manifest the checksums of the entries as they are now, if these can have some."""
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError, OverflowError):
        sums = []
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= len(data):
                return
            sums.append(
                crcs(
                    Tensor(name, entry["dtype"], tuple(entry["shape"]), start, stop),
                    data[start:stop],
                )
            )
        manifest["crc32"] = sums


def change(value: Any, rng: random.Random) -> None:
    """Change something in nested lists and dicts: replace, delete, repeat, swap, or alter a
    text.
    """
    places = [
        (holder, key)
        for holder in holders(value)
        for key in (holder if isinstance(holder, dict) else range(len(holder)))
    ]
    holder, key = rng.choice(places[2:] or places)
    what = rng.randrange(6)
    if what == 0 and len(holder) > 1 and holder is not value:
        del holder[key]
    elif what == 1 and isinstance(holder, list) and holder is not value:
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif what == 2:
        other, there = rng.choice(places[2:] or places)
        holder[key] = copy.deepcopy(other[there])
    elif what == 3 and isinstance(holder, dict):
        holder[rng.choice([x for x in ODD if isinstance(x, str)])] = holder.pop(key)
    elif what == 4 and isinstance(holder[key], str) and holder[key]:
        text, at = holder[key], rng.randrange(len(holder[key]))
        holder[key] = (
            text[:at]
            + rng.choice(["", "0", "f", "/", "~", "\0", "\n", text])
            + text[at + rng.randrange(2) :]
        )
    elif what == 5 and type(holder[key]) is int:
        holder[key] += rng.choice([-1, 1, 2**31, -(2**31), 2**60])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for x in value.values() if isinstance(value, dict) else value:
            yield from holders(x)


def forge_file(path: pathlib.Path, count: int, seed: int) -> Iterator[None]:
    """Put each forgery of a file in its place; for a part, put its digest into the manifest.

    At the end, restore everything.
    """
    main = path.with_name(path.name.partition(".part-")[0])
    data, whole = path.read_bytes(), main.read_bytes()
    entries, manifest, rest = split(whole)
    for forged in forgeries(data, count, seed):
        path.write_bytes(forged)
        if path != main:
            manifest["parts"]["files"][int(path.name[-5:])] = [forged[42:106].decode(), len(forged)]
            main.write_bytes(sealed(entries, manifest, rest))
        yield
    path.write_bytes(data)
    main.write_bytes(whole)
