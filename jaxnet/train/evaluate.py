"""Means over a whole data set, every example counted once."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.train.source import is_lazy, on_device
from jaxnet.train.step import TrainState, examples

__all__ = ["evaluate"]


def evaluate(
    metrics: Callable, data: Any, *, batch_size: int | None = 500
) -> Callable[[TrainState], dict[str, jax.Array]]:
    """A function (train_state) -> the mean of each metric over all of the data, every example once.

    Args:
      metrics: `metrics(params, batch)`, or `metrics(params, batch, state)`, -> dict of values, each a mean over the batch or
        one value an example.
      data: a pytree of arrays with a leading axis of examples: one compiled call, or one a batch where they are read
        lazily (memory maps). With `batch_size=None`, an iterable of batches that can be iterated again and again.
      batch_size: how many examples at once; the last batch is smaller, and weighs less.

    Raises: ValueError for empty data and leaves of unequal length.

    >>> count = evaluate(lambda params, batch: {"mean": batch.mean()}, jnp.arange(5.0), batch_size=2)
    >>> float(count(TrainState({}, {}, (), None, None))["mean"])
    2.0
    """
    stateful = "state" in inspect.signature(metrics).parameters

    def means(params, state, batch):
        values = metrics(params, batch, state) if stateful else metrics(params, batch)
        return {name: jnp.mean(value, dtype=jnp.result_type(value, jnp.float32)) for name, value in values.items()}

    if batch_size is None:
        return _over_batches(means, lambda: data)
    n = examples(data)
    size = min(batch_size, n)
    if any(is_lazy(leaf) for leaf in jax.tree.leaves(data)):
        cuts = [slice(i, i + size) for i in range(0, n, size)]
        return _over_batches(means, lambda: (jax.tree.map(operator.itemgetter(cut), data) for cut in cuts))
    full = n // size
    data = on_device(data)

    @jax.jit
    def run(params, state, data):
        def batch(i):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size), data)

        sums = jax.lax.map(lambda i: means(params, state, batch(i)), jnp.arange(full))
        total = jax.tree.map(lambda values: values.sum() * size, sums)
        if full * size < n:
            rest = means(params, state, jax.tree.map(lambda leaf: leaf[full * size :], data))
            total = jax.tree.map(lambda a, b: a + b * (n - full * size), total, rest)
        return jax.tree.map(lambda value: value / n, total)

    return lambda train_state: run(train_state.params, train_state.state, data)


def _over_batches(means: Callable, batches: Callable) -> Callable[[TrainState], dict[str, jax.Array]]:
    means = jax.jit(means)

    def run(train_state):
        total, n = None, 0
        for batch in batches():
            batch = on_device(batch)
            size = examples(batch)
            part = jax.tree.map(
                lambda value, size=size: value * size, means(train_state.params, train_state.state, batch)
            )
            total, n = part if total is None else jax.tree.map(jnp.add, total, part), n + size
        if total is None:
            raise ValueError("evaluate: the iterable has no batches (left): it must be one that can be iterated again")
        return jax.tree.map(lambda value: value / n, total)

    return run
