"""Feeds of a run: each makes stacks of data, and plans which part of a stack a step uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.train.arrays import is_lazy, on_device
from jaxnet.train.iterables import stacks_of_iterable
from jaxnet.train.leading import count_examples
from jaxnet.train.order import Order, order_name
from jaxnet.train.plan import Batching, Plan, RowPlan, StackPlan, planned_ahead
from jaxnet.train.prefetch import Prefetch
from jaxnet.train.rows import stacks_of_rows
from jaxnet.train.stacks import Stack, plan_size

__all__ = ["ArrayFeed", "Feed", "RowFeed", "StreamFeed", "feed_of_arrays"]

# Steps are counted in int32, and so are the rows of the data.
LIMIT = 2**31 - 1


class Feed:
    """The source of the batches of a run.

    Attributes:
      data: the data that `fit` received, or its copy on the device.
      total: the step at which the run ends; None if it depends on the data.
      epochs: the passes after which the run ends; None if `total` is known.
      epoch_steps: steps per epoch; None if it depends on the data.
      facts: values that must be the same when the run resumes from a checkpoint.
      left_out: a note about examples that no batch contains, or None.
    """

    data: Any
    total: int | None = None
    epochs: int | None = None
    epoch_steps: int | None = None
    facts: dict[str, Any]
    left_out: str | None = None

    def stacks(
        self,
        train_state: Any,
        step: int,
        position: dict[str, Any],
        next_cut: Callable[[int], int],
        abandoned: Callable[[], Any],
    ) -> Iterator[Stack]:
        """Yield stacks of data from a step on. Each ends at the next step at which the host acts.

        Args:
          train_state: the state at this step.
          step: the number of steps done.
          position: the position in an iterable.
          next_cut: a function from a step to the first later step at which the host acts.
          abandoned: a function that returns a true value if the run is about to end.
        """
        raise NotImplementedError

    def plan(self, train_state: Any, first: Any, n: Any, size: int, *inputs: Any) -> Plan:
        """Plan the data of n steps, inside a compiled call.

        By default, the inputs of a stack are the batches of its steps.

        Args:
          train_state: the state before the steps.
          first: the number of steps of the stack that are done, int32 [].
          n: the number of steps, int32 [].
          size: the most steps.
          *inputs: the inputs of the stack.
        """
        (batches,) = inputs
        return StackPlan(batches, first)


class RowFeed(Feed):
    """Arrays that are read on the host, row by row."""

    def __init__(self, data: Any, batching: Batching, epochs: int | None, steps: int | None):
        self.data, self.batching = data, batching
        self.epoch_steps = batching.epoch_steps
        self.last = (epochs or 0) * self.epoch_steps if steps is None else steps
        self.total = self.last
        if self.epoch_steps * batching.batch_size > LIMIT:
            raise ValueError(
                f"fit: rows are counted in int32: at most {LIMIT:,} examples, got {batching.n:,}; "
                "use a part of the data"
            )
        self.facts = {
            "examples": batching.n,
            "batch_size": batching.batch_size,
            "drop_last": batching.drop_last,
            "order": order_name(batching.order),
        }
        self.left_out = _left_out(batching)

    def stacks(self, train_state, step, position, next_cut, abandoned):
        # The state is donated to the first call.
        key = jnp.copy(train_state.key)
        stacks = stacks_of_rows(self.data, self.batching, key, step, next_cut, self.last)
        return Prefetch(stacks, abandoned)


class ArrayFeed(RowFeed):
    """Arrays on the device, from which the compiled call gathers rows. Its stack is all of the
    data, whatever the steps.
    """

    def __init__(self, data: Any, batching: Batching, epochs: int | None, steps: int | None):
        super().__init__(data, batching, epochs, steps)
        self.data = on_device(data)

    def stacks(self, train_state, step, position, next_cut, abandoned):
        batch_size = self.batching.batch_size
        size = plan_size(batch_size)
        while step < self.last:
            n = min(next_cut(step), self.last) - step
            yield Stack((self.data,), size, n, n * batch_size, {}, {}, False)
            step += n

    def plan(self, train_state, first, n, size, *inputs):
        (data,) = inputs
        rows = planned_ahead(train_state.key, train_state.step, n, size, self.batching)
        return RowPlan(data, rows)


class StreamFeed(Feed):
    """Batches from an iterable."""

    def __init__(self, data: Any, epochs: int | None, steps: int | None):
        self.data, self.epochs, self.total = data, epochs, steps
        self.facts = {}

    def stacks(self, train_state, step, position, next_cut, abandoned):
        stacks = stacks_of_iterable(
            self.data, position, next_cut, step, total=self.total, epochs=self.epochs
        )
        return Prefetch(stacks, abandoned)


def feed_of_arrays(
    data: Any,
    batch_size: Any,
    epochs: int | None,
    steps: int | None,
    order: Order | None,
    drop_last: bool,
) -> RowFeed:
    """A feed of arrays: on the device, or read row by row if one of them is lazy."""
    batching = Batching.of(count_examples(data), batch_size, order, drop_last)
    lazy = any(is_lazy(leaf) for leaf in jax.tree.leaves(data))
    return (RowFeed if lazy else ArrayFeed)(data, batching, epochs, steps)


def _left_out(batching: Batching) -> str | None:
    """A note about the examples that the batches of an epoch leave out, if there are many."""
    n, batch_size, order, drop_last = batching
    rest = n % batch_size if drop_last else 0
    always = order is None and rest > 0
    if always:
        which = f"the last {rest} of {n:,} examples are never used"
    elif rest and rest * 10 >= n:
        which = f"each epoch leaves out {rest} of {n:,} examples"
    else:
        return None
    return f"with batch_size={batch_size} {which}; drop_last=False takes them all"
