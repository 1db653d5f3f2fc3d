"""Words for errors that come out of a loss or a metric: what it was given, and what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["batch_in_words", "explained"]

LOOKS = ("has no attribute", "indices must be", "unpack", "not subscriptable")
"""Parts of the messages of Python about a value that is of another form than the code expects."""


@contextlib.contextmanager
def explained(batch: Any, state: Any) -> Iterator[None]:
    """Add to an error that leaves the block what the batch is, or that the train state has no state
    of the network.

    Args:
      batch: what the function was given.
      state: of the network; None if the function does not take it.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        text = str(error)
        if "state" in text and not jax.tree.leaves(state) and isinstance(error, ValueError):
            where = "the function takes no `state`, and the" if state is None else "the"
            error.args = (
                f"{text}; {where} state of a network comes from TrainState.create(params, "
                "optimizer, key, state=net.init_state(x))",
            )
        elif isinstance(error, LookupError) or any(look in text for look in LOOKS):
            error.add_note(f"the batch is {batch_in_words(batch)}; it has the form of the data")
        raise


def batch_in_words(batch: Any) -> str:
    """The form of a batch, with the shapes and dtypes of its parts."""
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return f"{batch.dtype}{list(np.shape(batch))}"
    if isinstance(batch, Mapping):
        parts = list(batch.items())[:8]
        return f"a dict with {', '.join(f'{name!r}: {batch_in_words(x)}' for name, x in parts)}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        parts = zip(batch._fields, batch, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        return (
            f"a {type(batch).__name__} with "
            f"{', '.join(f'{name}: {batch_in_words(part)}' for name, part in parts)}"
        )
    if isinstance(batch, tuple | list):
        return (
            f"a {type(batch).__name__} of {len(batch)}: "
            f"{', '.join(batch_in_words(part) for part in batch[:8])}"
        )
    return f"a {type(batch).__name__}"
