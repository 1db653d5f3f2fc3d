"""Stacks of the batches of an iterable, pass after pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxnet import tree
from jaxnet.train.arrays import fitting
from jaxnet.train.iterator_state import from_json, to_json
from jaxnet.train.stacks import Stack, stack_size
from jaxnet.train.weighted import check_weights

__all__ = ["stacks_of_iterable"]

# Seconds for which a batch waits for others, to be copied to the device together.
HELD = 0.1

# Returned by `next` at the end of a pass.
_END = object()
# The end of the run, whether or not the pass ends too.
_STOP = object()


def stacks_of_iterable(
    data: Any,
    position: dict[str, Any],
    next_cut: Callable[[int], int],
    step: int,
    *,
    total: int | None = None,
    epochs: int | None = None,
) -> Iterator[Stack]:
    """Yield stacks of batches from an iterable, pass after pass. Batches of one kind are copied to
    the device together.

    Args:
      data: an iterable of batches, or a function from the number of the pass to one. An iterator
        ends with its first pass.
      position: {} or the position of a `Stack` at which to resume. If the iterator has `get_state`
        and `set_state` (Grain), or the iterable has `state_dict` and `load_state_dict` (torchdata),
        the state is restored. Otherwise, the used batches are drawn again and dropped.
      next_cut: the first step after this one at which a stack must end.
      step: the step at which to begin.
      total: the step at which the run ends; no further batch is drawn. A pass of unknown length
        that ends there may lack a stack with `end`.
      epochs: the number of passes after which the run ends.

    Raises:
      ValueError: a pass has no batches. Errors of the iterable are raised as well.
    """
    # The position is given by the number of passes, a state of the iterator (or None), and the
    # number of batches since this state.
    passes, anchor = position.get("passes", 0), position.get("state")
    since = position.get("skip", 0)
    reach = 1
    while True:
        batches = _begun(data, position, passes, anchor, since)
        first = position.get("first") if since else None
        length = _length_of(data)
        drawn = since if anchor is None else None
        held, before, kind, size, room = [], {}, None, 0, 0
        after: dict[str, Any] = {}
        begun = time.monotonic()
        try:
            while True:
                # Count positions from this state on.
                if len(held) == room and (state := _state_of(data, batches)) is not None:
                    anchor, since = state, 0
                try:
                    if step + len(held) != total:
                        batch = next(batches, _END)
                    else:
                        batch = _END if drawn is not None and drawn == length else _STOP
                except Exception:
                    # Train on the batches before the error first.
                    if held:
                        yield _stacked(held, size, before, {})
                    raise
                if batch is _END:
                    # An iterable that draws at random may draw otherwise in the next pass.
                    state = _state_of(data, None)
                    after = {"passes": passes + 1, "skip": 0, "state": state}
                # Slow batches are not held back until there are many.
                full = len(held) == room or time.monotonic() - begun > HELD
                if held and (batch is _END or batch is _STOP or full or _signature(batch) != kind):
                    yield _stacked(held, size, before, after)
                    step, held = step + len(held), []
                if batch is _STOP or (batch is _END and step == total):
                    return
                if batch is _END:
                    break
                if not held:
                    if anchor is None and since == 0:
                        first = _digest(batch)
                    before = {"passes": passes, "skip": since, "state": anchor, "first": first}
                    kind, size = _signature(batch), stack_size(_bytes(batch))
                    room = min(size, reach, next_cut(step) - step)
                    # The first steps do not wait for many batches.
                    reach *= 2
                    begun = time.monotonic()
                held.append(batch)
                since += 1
                drawn = None if drawn is None else drawn + 1
        finally:
            # Close a generator now, so that its `finally` does not wait for garbage collection.
            if close := getattr(batches, "close", None):
                close()
        if not before and not position:
            text = "data: the iterable has no batches"
            if batches is data:
                text += (
                    "; an iterator can be used once, and this one is used up: make a new one, or "
                    "pass a list or a function"
                )
            raise ValueError(text)
        if batches is data or passes + 1 == epochs:
            return
        passes, since, anchor, position = passes + 1, 0, None, {}


def _length_of(data: Any) -> int | None:
    """The number of batches per pass; None if the iterable has no length."""
    try:
        return None if callable(data) else len(data)
    except (TypeError, NotImplementedError):
        return None


def _stacked(batches: list, size: int, before: dict, after: dict) -> Stack:
    def stack(*leaves):
        out = np.zeros((size, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            out[i] = leaf
        return out

    arrays = [tree.map_with_path(fitting, batch) for batch in batches]
    for batch in arrays:
        check_weights(batch, some=False)
    inputs = jax.device_put(jax.tree.map(stack, *arrays))
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(arrays[0])]
    samples = max((shape[0] for shape in shapes if shape), default=1)
    return Stack((inputs,), size, len(batches), len(batches) * samples, before, after, bool(after))


def _signature(batch: Any) -> Any:
    """The structure, shapes and dtypes of a batch. Only batches of one signature can be stacked."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]


def _bytes(batch: Any) -> int:
    return sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(batch))


def _begun(data: Any, position: dict[str, Any], passes: int, state: Any, skip: int) -> Iterator:
    """The iterator of a pass, advanced to a position.

    Raises:
      ValueError: the run resumes at `position`, and the iterable yields other batches than before.
    """
    if state is not None:
        state = from_json(state)
        if hasattr(data, "load_state_dict"):
            data.load_state_dict(state)
    iterable: Any = data(passes) if callable(data) else data
    batches: Any = iter(iterable)
    if state is not None and not hasattr(data, "load_state_dict"):
        batches.set_state(state)
    first = position.get("first") if state is None else None
    again = state is None and not callable(data) and batches is not data
    if again and _saves_nothing(data, batches) and position and passes and skip == 0:
        return _checked_pass(data, batches, passes)
    for i in range(skip):
        batch = next(batches, _END)
        if batch is _END:
            raise ValueError(
                f"data: the run had used {skip} batches of this pass, and now there are fewer; "
                "resume with the data of the interrupted run"
            )
        if i == 0 and first is not None and _digest(batch) != first:
            raise ValueError(_OTHER_ORDER.format(passes + 1))
    return batches


def _checked_pass(data: Any, batches: Iterator, passes: int) -> Iterator:
    """Yield the batches of a later pass. The run can resume only if all passes have one order, so
    the first batches of two passes are compared.
    """
    batch, other = next(batches, _END), next(iter(data), _END)
    if batch is not _END and other is not _END and _digest(batch) != _digest(other):
        raise ValueError(_OTHER_ORDER.format(passes + 1))
    if batch is not _END:
        yield batch
    yield from batches


_OTHER_ORDER = (
    "data: pass {} does not begin with the batch that the interrupted run saw, or may not: the "
    "iterable takes another order whenever it is iterated, and its order is not saved. To go on "
    "from a checkpoint, give a function (number of the pass) -> iterable, which seeds its order "
    "with that number, or a loader with state_dict and load_state_dict"
)


def _saves_nothing(data: Any, batches: Any) -> bool:
    return not hasattr(data, "load_state_dict") and not hasattr(batches, "set_state")


def _digest(batch: Any) -> str:
    """A digest of a batch, to recognize it later."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in tree.flatten(batch).items():
        array = np.asarray(fitting(path, leaf))
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _state_of(data: Any, batches: Any) -> Any:
    """The position of an iterator, as JSON can hold it; None if the iterator does not tell it."""
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        state = data.state_dict()
    elif hasattr(batches, "get_state") and hasattr(batches, "set_state"):
        state = batches.get_state()
    else:
        return None
    return to_json(state)
