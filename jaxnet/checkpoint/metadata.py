"""The user's metadata, which JSON must hold exactly."""

import json
from typing import Any

from jaxnet.checkpoint.errors import CheckpointError

__all__ = ["exact_json"]

MAX_DEPTH = 100


def exact_json(file: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata. Raises CheckpointError if JSON would change them."""

    def depth(x: Any) -> int:
        branches = x.values() if isinstance(x, dict) else x
        return 1 + max(map(depth, branches), default=0) if isinstance(x, dict | list) else 0

    try:
        if isinstance(metadata, dict):
            same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
            if same and depth(metadata) <= MAX_DEPTH:
                return metadata
        reason = (
            "it does not come back from JSON as it was, or is nested deeper than "
            f"{MAX_DEPTH} levels"
        )
    except (TypeError, ValueError, RecursionError, OverflowError) as e:
        reason = str(e)
    text = (
        "metadata must be a dict of str keys with str, int, float, bool, None, lists and dicts "
        "inside"
    )
    raise CheckpointError(
        file, None, f"{text} (no tuples, NaN, infinities, arrays or NumPy numbers): {reason}"
    )
