"""Stacks of arrays that are read on the host, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.arrays import fitting, rows_of
from jaxnet.train.plan import Batching, planned
from jaxnet.train.stacks import Stack, stack_size
from jaxnet.train.uneven import Uneven
from jaxnet.train.weighted import check_weights

__all__ = ["stacks_of_rows"]


def stacks_of_rows(
    data: Any,
    batching: Batching,
    key: jax.Array,
    step: int,
    next_cut: Callable[[int], int],
    total: int,
) -> Iterator[Stack]:
    """Yield stacks of arrays that are read by rows, with the same batches as `train_steps`.

    Args:
      data: a pytree of arrays.
      batching: how examples become batches.
      key: the PRNG key of the run.
      step: the step at which to begin.
      next_cut: a function from a step to the first later step at which a stack must end.
      total: the last step.
    """
    check_weights(data)
    n, batch_size, *_ = batching
    size = stack_size(sum(_row_bytes(leaf) for leaf in jax.tree.leaves(data)) * batch_size)
    plan_from = jax.jit(lambda key, step: planned(key, step, size, batching))
    while step < total:
        count = min(size, next_cut(step) - step)
        plan = jax.tree.map(np.asarray, plan_from(key, jnp.int32(step)))
        if plan is None:
            plan = np.broadcast_to(np.arange(n, dtype=np.int32), (size, n))
        rows = (plan.batch if isinstance(plan, Uneven) else plan)[:count]
        if rows.min() < 0 or rows.max() >= n:
            raise ValueError(
                f"order: rows must be within 0 .. {n - 1}, got {rows.min()} .. {rows.max()}"
            )

        def read(path, leaf, rows=rows):
            values = fitting(path, rows_of(path, leaf, rows.reshape(-1)))
            out = np.zeros((size, *rows.shape[1:], *values.shape[1:]), values.dtype)
            out[: len(rows)] = values.reshape(*rows.shape, *values.shape[1:])
            return out

        batch, samples = tree.map_with_path(read, data), count * batch_size
        if isinstance(plan, Uneven):
            batch = Uneven(batch, plan.last, plan.rest)
            samples -= int(plan.last[:count].sum()) * (batch_size - plan.rest)
        yield Stack((jax.device_put(batch),), size, count, samples, {}, {}, False)
        step += count


def _row_bytes(leaf: Any) -> int:
    return int(np.prod(leaf.shape[1:], dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
