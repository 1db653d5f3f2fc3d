"""Feeds of a run: they make the stacks of data for compiled calls, and define how a call reads
batches from a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.checks import size_of
from jaxnet.train import source
from jaxnet.train.loop import planned_ahead, steps_per_epoch, take
from jaxnet.train.order import Order, shuffle
from jaxnet.train.prefetch import Prefetch
from jaxnet.train.step import examples

__all__ = ["ArrayFeed", "Feed", "RowFeed", "StreamFeed", "arrays_of"]

LIMIT = 2**31 - 1
"""Steps are counted in int32, and so are the rows of the data."""


class Feed:
    """The source of the batches of a run. Each subclass has its own plan: which part of a stack a
    step uses.

    Attributes:
      data: the data that `fit` received, or its copy on the device.
      total: the step at which the run ends; None if it depends on the data.
      epochs: the passes after which the run ends; None if `total` is known.
      epoch_steps: steps per epoch; None if it depends on the data.
      facts: values that must be the same when the run resumes from a checkpoint.
    """

    data: Any = None
    total: int | None = None
    epochs: int | None = None
    epoch_steps: int | None = None
    facts: dict[str, Any] = {}

    def stacks(
        self,
        train_state: Any,
        step: int,
        position: dict,
        next_cut: Callable[[int], int],
        abandoned: Callable[..., Any],
    ) -> Iterator[source.Stack]:
        """Yield stacks of data from this step on. Each ends at the next step at which the host
        acts.
        """
        raise NotImplementedError

    def batches(self, size: int) -> Callable[..., Any]:
        """A function that makes the plan of a compiled call of at most `size` steps, and reads
        batches; see `chunk_of`.

        By default, the stack is the plan: its batches have a leading axis of steps.
        """
        return lambda n, train_state, stack: (stack, lambda batch: batch)

    def first(self, done: int) -> int:
        """The index in the plan of the step after `done` steps of a stack."""
        return done

    def spec(self, inputs: tuple) -> dict[str, str]:
        """Shape and dtype of each part of a batch, by path."""
        return {
            path: f"{leaf.dtype}{list(leaf.shape[1:])}"
            for path, leaf in tree.flatten(inputs).items()
        }

    def batch_of(self, train_state: Any, i: jax.Array, *inputs: Any) -> Any:
        """The batch at index i of the plan, to repeat a single step."""
        return jax.tree.map(lambda leaf: leaf[i], inputs[0])


class RowFeed(Feed):
    """Arrays that are read on the host, row by row."""

    def __init__(self, data, batch_size, epochs, steps, order, drop_last):
        self.n = examples(data)
        batch_size = size_of("batch_size", batch_size)
        self.epoch_steps = steps_per_epoch(self.n, batch_size, drop_last=drop_last)
        self.total = self.last = steps if epochs is None else epochs * self.epoch_steps
        if self.epoch_steps * batch_size > LIMIT:
            raise ValueError(
                f"fit: rows are counted in int32: at most {LIMIT:,} examples, got {self.n:,}"
            )
        self.batching = {"batch_size": batch_size, "order": order, "drop_last": drop_last}
        self.facts = {
            "examples": self.n,
            "batch_size": batch_size,
            "drop_last": drop_last,
            "order": _name_of(order),
        }
        self.data = data

    @property
    def left_out(self) -> str | None:
        """A note about the examples that the batches of an epoch leave out, if there are many."""
        batch_size, order, drop_last = self.batching.values()
        rest = self.n - self.epoch_steps * batch_size if drop_last else 0
        always = order is None and rest > 0
        if not always and rest * 10 < self.n:
            return None
        which = f"the last {rest} of {self.n:,} examples are never used" if always else ""
        which = which or f"each epoch leaves out {rest} of {self.n:,} examples"
        return f"with batch_size={batch_size} {which}; drop_last=False takes them all"

    def stacks(self, train_state, step, position, next_cut, abandoned):
        key = jnp.copy(train_state.key)
        stacks = source.stacks_of_rows(
            self.data, self.n, key, step, next_cut, self.last, **self.batching
        )
        return Prefetch(stacks, abandoned)


class ArrayFeed(RowFeed):
    """Arrays on the device. The compiled call draws the rows, and its plan begins with its first
    step.
    """

    def __init__(self, data, *settings):
        super().__init__(data, *settings)
        self.data = source.on_device(data)

    def stacks(self, train_state, step, position, next_cut, abandoned):
        batch_size = self.batching["batch_size"]
        size = source.plan_size(batch_size)
        while step < self.last:
            n = min(next_cut(step), self.last) - step
            yield source.Stack((self.data,), size, n, n * batch_size, {}, {}, False)
            step += n

    def batches(self, size):
        def of_rows(n, train_state, data):
            return planned_ahead(train_state, self.n, size, n, **self.batching), lambda rows: take(
                data, rows
            )

        return of_rows

    def first(self, done):
        return 0

    def spec(self, inputs):
        return {
            path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in tree.flatten(inputs).items()
        }

    def batch_of(self, train_state, i, *inputs):
        plan, batch_of = self.batches(1)(1, train_state, *inputs)
        return batch_of(jax.tree.map(lambda leaf: leaf[0], plan))


class StreamFeed(Feed):
    """Batches from an iterable."""

    left_out = None

    def __init__(self, data, epochs, steps):
        self.data, self.epochs, self.total = data, epochs, steps
        self.facts = {}

    def stacks(self, train_state, step, position, next_cut, abandoned):
        stacks = source.stacks_of_iterable(
            self.data, position, next_cut, step, total=self.total, epochs=self.epochs
        )
        return Prefetch(stacks, abandoned)


def arrays_of(
    data: Any,
    batch_size: int,
    epochs: int | None,
    steps: int | None,
    order: Order | None,
    drop_last: bool,
) -> RowFeed:
    """A feed of arrays: on the device, or read row by row if one of them is lazy."""
    lazy = any(source.is_lazy(leaf) for leaf in jax.tree.leaves(data))
    return (RowFeed if lazy else ArrayFeed)(data, batch_size, epochs, steps, order, drop_last)


def _name_of(order: Any) -> str:
    """The name of an order, the same in every process."""
    if order is None:
        return "None"
    if order is shuffle:
        return "shuffle"
    name = getattr(order, "__qualname__", type(order).__name__)
    return name.partition(".<locals>")[0]
