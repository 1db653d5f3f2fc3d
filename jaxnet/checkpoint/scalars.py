"""Python scalars, which a file holds exactly: their kinds and their JSON."""

import base64
import reprlib
from collections.abc import Callable
from typing import Any

__all__ = ["KINDS", "NAMES", "from_json", "show", "to_json"]

# The name of each kind by its type.
KINDS = {
    type(None): "none",
    bool: "bool",
    int: "int",
    float: "float",
    complex: "complex",
    str: "str",
    bytes: "bytes",
}

NAMES = tuple(KINDS.values())

# The functions to JSON and back, of each kind. Both are exact.
_JSON: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "none": (lambda x: None, lambda x: None),
    "bool": (lambda x: x, bool),
    "int": (hex, lambda x: int(x, 16)),
    "float": (float.hex, float.fromhex),
    "complex": (lambda x: [x.real.hex(), x.imag.hex()], lambda x: complex(*map(float.fromhex, x))),
    "str": (lambda x: x, str),
    "bytes": (lambda x: base64.b64encode(x).decode(), lambda x: base64.b64decode(x, validate=True)),
}


def to_json(kind: str, value: Any) -> Any:
    """The JSON of a scalar."""
    return _JSON[kind][0](value)


def from_json(kind: str, content: Any) -> Any:
    """The scalar with this JSON. Raises ValueError if `to_json` would not give the same JSON."""
    if kind not in _JSON:
        raise ValueError(f"unknown kind {reprlib.repr(kind)} of a key")
    value = _JSON[kind][1](content)
    if (back := to_json(kind, value)) != content or type(back) is not type(content):
        raise ValueError(f"{reprlib.repr(content)} is not the form of a {kind}")
    return value


def show(x: Any) -> str:
    """A scalar as Python writes it. Python writes very long ints in hexadecimal only."""
    return hex(x) if isinstance(x, int) and x.bit_length() > 10_000 else repr(x)
