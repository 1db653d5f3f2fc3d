"""Where batches come from: arrays in memory, arrays that are read where they are needed, iterables of batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.arrays import fitting, is_lazy, on_device, rows_of
from jaxnet.train.batch import Uneven
from jaxnet.train.iterator_state import from_json, to_json
from jaxnet.train.loop import planned

__all__ = ["Stack", "is_lazy", "on_device", "stacks_of_iterable", "stacks_of_rows"]

STACK = 32 << 20  # bytes of batches that go to the device at once
PLAN = 1 << 19  # rows that there is room for in a compiled call: 2 MB


class Stack(NamedTuple):
    """Some steps' work: inputs of a compiled call, and where in the data they stand.

    Attributes:
      inputs: of the compiled call, beside the train state.
      size: steps that the inputs have room for; n: steps that are in it.
      samples: examples in the n steps.
      before: the position in front of its first step, to be kept in a checkpoint; after: behind its last, if `end`.
      end: whether a pass over the data ends with it.
    """

    inputs: tuple
    size: int
    n: int
    samples: int
    before: dict[str, Any]
    after: dict[str, Any]
    end: bool


def plan_size(batch_size: int) -> int:
    """Steps that there is room for in a compiled call."""
    return int(np.clip(PLAN // batch_size, 16, 1 << 17))


def stacks_of_rows(
    data: Any, n: int, key: jax.Array, step: int, next_cut: Callable[[int], int], total: int, **batching
):
    """Batches of arrays that are too large for memory, by random access: the same batches as `train_steps` makes.

    Args: next_cut: as in `stacks_of_iterable`; total: the last step; batching: as in `planned`.
    """
    size = _stack_size(sum(_row_bytes(leaf) for leaf in jax.tree.leaves(data)) * batching["batch_size"])

    class At(NamedTuple):
        key: jax.Array
        step: jax.Array

    plan_from = jax.jit(lambda key, step: planned(At(key, step), n, size, **batching))  # pyright: ignore[reportArgumentType]
    while step < total:
        count = min(size, next_cut(step) - step)
        plan = jax.tree.map(np.asarray, plan_from(key, jnp.int32(step)))
        if plan is None:
            plan = np.broadcast_to(np.arange(n, dtype=np.int32), (size, n))
        rows = plan.batch if isinstance(plan, Uneven) else plan
        if rows[:count].min() < 0 or rows[:count].max() >= n:
            raise ValueError(
                f"order: rows must be within 0 .. {n - 1}, got {rows[:count].min()} .. {rows[:count].max()}"
            )

        def read(path, leaf, rows=rows[:count], count=count):
            values = fitting(path, rows_of(path, leaf, rows.reshape(-1)))
            out = np.zeros((size, *rows.shape[1:], *values.shape[1:]), values.dtype)
            out[:count] = values.reshape(*rows.shape, *values.shape[1:])
            return out

        batch, samples = tree.map_with_path(read, data), count * batching["batch_size"]
        if isinstance(plan, Uneven):
            batch = Uneven(batch, plan.last, plan.rest)
            samples -= int(plan.last[:count].sum()) * (batching["batch_size"] - plan.rest)
        yield Stack((jax.device_put(batch),), size, count, samples, {}, {}, False)
        step += count


def stacks_of_iterable(
    data: Any, position: dict[str, Any], next_cut: Callable[[int], int], step: int
) -> Iterator[Stack]:
    """Batches of an iterable, as many of one kind as fit, put on the device together; passes follow each other.

    Args:
      data: an iterable of batches, or a function from the number of the pass to one. What can be iterated only once ends
        with its first pass.
      position: {} or a position that a `Stack` gave: where to go on. Where the iterator offers `get_state` and `set_state`
        (Grain), or the iterable `state_dict` and `load_state_dict` (torchdata), the state is restored, else the
        batches that have been used are drawn again and passed over.
      next_cut: the first step after this one at which a stack has to end.
    Raises: ValueError for a pass without batches; whatever the iterable raises.
    """
    passes, since, anchor = position.get("passes", 0), position.get("skip", 0), position.get("state")
    reach = 1
    while True:
        batches = _begun(data, passes, anchor, since)
        held, before, kind, size, room = [], {}, None, 0, 0
        after: dict[str, Any] = {}
        while True:
            if len(held) == room and (state := _state_of(data, batches)) is not None:
                anchor, since = state, 0  # from here on, positions are counted from this state
            try:
                batch = next(batches, _END)
            except Exception:
                if held:  # what came before is not lost
                    yield _stacked(held, size, before, {})
                raise
            if batch is _END:  # what draws at random may draw otherwise in the next pass
                state = _state_of(data, None)
                after = {"passes": passes + 1, "skip": 0, "state": state}
            if held and (batch is _END or len(held) == room or _kind(batch) != kind):
                yield _stacked(held, size, before, after)
                step, held = step + len(held), []
            if batch is _END:
                break
            if not held:
                before = {"passes": passes, "skip": since, "state": anchor}
                kind, size = _kind(batch), _stack_size(_bytes(batch))
                room = min(size, reach, next_cut(step) - step)
                reach *= 2  # the first steps do not wait for many batches
            held.append(batch)
            since += 1
        if not before and not position:
            raise ValueError("data: the iterable has no batches")
        if batches is data:
            return
        passes, since, anchor, position = passes + 1, 0, None, {}


class Prefetch:
    """Run an iterator in a thread, at most `depth` items ahead. What it raises is raised here, in its place.

    Args: abandoned: while an item is waited for, whether to wait no longer; then the iteration ends.
    """

    def __init__(self, items: Iterator, abandoned: Callable[[], Any] = lambda: False, depth: int = 2):
        self.queue: queue.Queue = queue.Queue(depth)
        self.abandoned, self.closed = abandoned, threading.Event()
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]: of this thread
        self.thread = threading.Thread(target=self._fill, args=(items, x64), daemon=True, name="jaxnet-prefetch")
        self.thread.start()

    def _fill(self, items, x64):
        try:
            with jax.enable_x64(x64):
                for item in items:
                    if not self._put((item, None)):
                        return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item) -> bool:
        while not self.closed.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            try:
                item, error = self.queue.get(timeout=0.1)
                break
            except queue.Empty:
                if self.abandoned():
                    raise StopIteration from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self.closed.set()
        self.thread.join(2)  # it may be waiting for its source


_END = object()


def _stacked(batches: list, size: int, before: dict, after: dict) -> Stack:
    def stack(*leaves):
        out = np.zeros((size, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            out[i] = leaf
        return out

    fitting = [tree.map_with_path(fitting, batch) for batch in batches]
    inputs = jax.device_put(jax.tree.map(stack, *fitting))
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(fitting[0])]
    samples = max((shape[0] for shape in shapes if shape), default=1)
    return Stack((inputs,), size, len(batches), len(batches) * samples, before, after, bool(after))


def _kind(batch: Any) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]


def _bytes(batch: Any) -> int:
    return sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(batch))


def _row_bytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape[1:], dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def _stack_size(batch_bytes: int) -> int:
    return int(np.clip(STACK // max(batch_bytes, 1), 1, 64))


def _begun(data: Any, passes: int, state: Any, skip: int) -> Iterator:
    """The iterator of a pass, taken to a position in it."""
    if state is not None:
        state = from_json(state)
        if hasattr(data, "load_state_dict"):
            data.load_state_dict(state)
    iterable: Any = data(passes) if callable(data) else data
    batches: Any = iter(iterable)
    if state is not None and not hasattr(data, "load_state_dict"):
        batches.set_state(state)
    for _ in range(skip):
        if next(batches, _END) is _END:
            raise ValueError(f"data: the run had used {skip} batches of this pass, and now there are fewer")
    return batches


def _state_of(data: Any, batches: Any) -> Any:
    """Where an iterator stands, as JSON can hold it; None if it does not say."""
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        state = data.state_dict()
    elif hasattr(batches, "get_state") and hasattr(batches, "set_state"):
        state = batches.get_state()
    else:
        return None
    return to_json(state)
