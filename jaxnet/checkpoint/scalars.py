"""Python scalars and the keys of dicts as JSON and back, exactly."""

import base64
import collections
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["collisions", "KINDS", "SCALARS", "key_from_json", "key_to_json", "scalar"]


def key_to_json(key: Any) -> Any:
    """A key of a dict as JSON."""
    if isinstance(key, tuple):
        return ["tuple", [key_to_json(part) for part in key]]
    kind = KINDS[type(key)]
    return key if kind == "str" else [kind, SCALARS[kind][0](key)]


def key_from_json(json: Any) -> Any:
    """The key that `key_to_json` wrote."""
    if isinstance(json, list) and json[:1] == ["tuple"]:
        return tuple(part if isinstance(part, str) else scalar(*part) for part in json[1])
    return json if isinstance(json, str) else scalar(*json)


def scalar(kind: str, content: Any) -> Any:
    """The value of a scalar in JSON. Raises ValueError for content in another form."""
    if kind not in SCALARS:
        raise ValueError(f"unknown kind {reprlib.repr(kind)} of a key")
    to_json, from_json = SCALARS[kind]
    value = from_json(content)
    if (back := to_json(value)) != content or type(back) is not type(content):
        raise ValueError(f"{reprlib.repr(content)} is not the form of a {kind}")
    return value


# Each pair of functions converts to JSON and back, exactly.
SCALARS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "none": (lambda x: None, lambda x: None),
    "bool": (lambda x: x, bool),
    "int": (hex, lambda x: int(x, 16)),
    "float": (float.hex, float.fromhex),
    "complex": (lambda x: [x.real.hex(), x.imag.hex()], lambda x: complex(*map(float.fromhex, x))),
    "str": (lambda x: x, str),
    "bytes": (lambda x: base64.b64encode(x).decode(), lambda x: base64.b64decode(x, validate=True)),
}


KINDS = {
    type(None): "none",
    **{t: t.__name__ for t in (bool, int, float, complex, str, bytes, list, tuple, dict)},
}


KINDS |= {collections.OrderedDict: "ordered_dict", collections.defaultdict: "dict"}


# Keys of one dict that have the same hash: the time grows with the square of their number.
MAX_ALIKE = 100


def collisions(keys: Sequence[Any]) -> str | None:
    """What is wrong with keys that a dict could only hold slowly: numbers whose hash is the same
    (those of text are random).
    """
    if all(type(key) is str for key in keys):
        return None
    hashes = collections.Counter(map(hash, keys))
    value, count = hashes.most_common(1)[0]
    return (
        f"{count} of its keys have the hash {value}, at most {MAX_ALIKE} may"
        if count > MAX_ALIKE
        else None
    )
