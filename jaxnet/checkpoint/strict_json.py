"""JSON with one form for each value."""

import json
import reprlib
from typing import Any

from jaxnet.checkpoint.errors import RESTORE, CheckpointError
from jaxnet.checkpoint.words import shown

__all__ = ["dumps", "parse_json"]


def parse_json(file: str, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without double names, NaN or infinities."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            file,
            None,
            f"{what} is not the JSON of a safetensors file ({shown(e, 3000)}); {RESTORE}",
        ) from e
    if not isinstance(value, dict):
        raise CheckpointError(
            file, None, f"{what} must be a JSON object, got {type(value).__name__}; {RESTORE}"
        )
    return value


def dumps(value: Any) -> str:
    """A value as compact JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _unique(pairs):
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"two entries are called {reprlib.repr(name)}")
        result[name] = value
    return result


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON number")
