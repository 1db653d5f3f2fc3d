"""Errors that come out of a loss or a metric: what the function received, and what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxnet.train.words import batch_in_words

__all__ = ["explained"]

# Parts of the messages of Python about a value that has another form than the code expects.
FORMS = ("has no attribute", "indices must be", "unpack", "not subscriptable")


@contextlib.contextmanager
def explained(batch: Any, state: Any) -> Iterator[None]:
    """Add to an error of the block what the batch is, or that the train state has no network state.

    Args:
      batch: what the function received.
      state: the state of the network; None if the function does not take it.
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
        elif isinstance(error, LookupError) or any(form in text for form in FORMS):
            error.add_note(f"the batch is {batch_in_words(batch)}; it has the form of the data")
        raise
