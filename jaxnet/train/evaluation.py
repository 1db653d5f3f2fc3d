"""Means over a whole data set, with every example counted once."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.train.arrays import is_lazy, on_device
from jaxnet.train.leading import count_examples
from jaxnet.train.loss_errors import explained
from jaxnet.train.pairs import refuse_pairs
from jaxnet.train.sharding import sliced
from jaxnet.train.state import TrainState, check_train_state
from jaxnet.train.weighted import Weighted
from jaxnet.train.words import batch_in_words, describe

__all__ = ["Evaluation", "evaluate"]

Means = Callable[[Any, Any, Any], dict[str, jax.Array]]
"""(params, state, batch) -> the mean of each metric, scalars by name."""


def evaluate(
    metrics: Callable[..., Mapping[str, Any]], data: Any, *, batch_size: int | None = 500
) -> Callable[[TrainState], dict[str, jax.Array]]:
    """Make a function (train_state) -> the mean of each metric over all of the data.

    Every example counts once.

    Args:
      metrics: `metrics(params, batch)`, or `metrics(params, batch, state)`, -> dict of values, each
        a mean over the batch or one value per example [B].
      data: a pytree of arrays [N, ...]: one compiled call, or one per batch if they are read lazily
        (memory maps). With `batch_size=None`, an iterable of batches that can be iterated again and
        again.
      batch_size: the most examples per batch. The last batch may be smaller, and then weighs less.

    Returns:
      A function of a train state. Its result is a dict of scalars.

    Raises:
      ValueError: the data is empty or has leaves of unequal length; when the function is called, a
        metric pairs all examples by broadcasting (see `all_pairs`).
      TypeError: the data is not an array of numbers; when the function is called, `metrics` does
        not return a dict.

    Example:
      >>> mean = lambda params, batch: {"mean": batch.mean()}
      >>> count = evaluate(mean, jnp.arange(5.0), batch_size=2)
      >>> float(count(TrainState({}, {}, (), None, None))["mean"])
      2.0
    """
    if not callable(metrics):
        raise TypeError(
            "evaluate: metrics must be a function (params, batch) -> dict, got "
            f"{batch_in_words(metrics)}; the function comes first: evaluate(metrics, data)"
        )
    if isinstance(data, Weighted):
        raise TypeError(
            "evaluate: every example counts once, got Weighted data; pass its `batch`, and weigh "
            "in metrics"
        )
    means = _means_of(metrics)
    if batch_size is None:
        batches = hasattr(data, "__iter__") and not isinstance(data, dict | jax.Array)
        if not batches:
            raise TypeError(
                "evaluate: without batch_size the data is an iterable of batches, got "
                f"{type(data).__name__}; for arrays say batch_size"
            )
        return _over_batches(means, lambda: data)
    n = count_examples(data)
    size = min(size_of("evaluate: batch_size", batch_size), n)
    if any(is_lazy(leaf) for leaf in jax.tree.leaves(data)):
        cuts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
        return _over_batches(
            means, lambda: (jax.tree.map(operator.itemgetter(cut), data) for cut in cuts)
        )
    return Evaluation(_over_arrays(means, n, size), on_device(data))


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """An evaluation over arrays on the device. JAX can trace it.

    Attributes:
      run: (params, state, data) -> the mean of each metric.
      data: the arrays.
    """

    run: Means
    data: Any

    def __call__(self, train_state: TrainState) -> dict[str, jax.Array]:
        """Evaluate a train state."""
        check_train_state("evaluate", train_state)
        return self.run(train_state.params, train_state.state, self.data)


def _means_of(metrics: Callable[..., Mapping[str, Any]]) -> Means:
    """The mean of each metric over one batch."""
    stateful = "state" in inspect.signature(metrics).parameters

    def values_of(batch, params, state):
        with explained(batch, state if stateful else None):
            return metrics(params, batch, state) if stateful else metrics(params, batch)

    def means(params, state, batch):
        refuse_pairs("evaluate: a metric", values_of, batch, params, state)
        values = values_of(batch, params, state)
        if not isinstance(values, Mapping):
            raise TypeError(
                "evaluate: metrics must return a dict of values by name, got "
                f"{describe(values)}; write for instance {{'test_loss': value}}"
            )
        return {
            name: jnp.mean(value, dtype=jnp.result_type(value, jnp.float32))
            for name, value in values.items()
        }

    return means


def _over_arrays(means: Means, n: int, size: int) -> Means:
    """The means over arrays on the device [n, ...], in one compiled call."""
    full, rest = divmod(n, size)

    @jax.jit
    def run(params, state, data):
        def part(start, length):
            return jax.tree.map(lambda leaf: sliced(leaf, start, length), data)

        sums = jax.lax.map(lambda i: means(params, state, part(i * size, size)), jnp.arange(full))
        total = jax.tree.map(lambda values: values.sum() * size, sums)
        if rest:
            last = means(params, state, part(full * size, rest))
            total = jax.tree.map(lambda a, b: a + b * rest, total, last)
        return jax.tree.map(lambda value: value / n, total)

    return run


def _over_batches(
    means: Means, batches: Callable[[], Iterable[Any]]
) -> Callable[[TrainState], dict[str, jax.Array]]:
    """The means over batches from the host, one compiled call per batch."""
    means = jax.jit(means)

    def run(train_state):
        check_train_state("evaluate", train_state)
        total, n = None, 0
        # The batches come from the host.
        with jax.transfer_guard("allow"):
            for batch in batches():
                size = count_examples(batch)
                part = means(train_state.params, train_state.state, on_device(batch))
                part = jax.tree.map(lambda value, size=size: value * size, part)
                total = part if total is None else jax.tree.map(jnp.add, total, part)
                n += size
            if total is None:
                raise ValueError(
                    "evaluate: the iterable has no batches (left): it must be one that can be "
                    "iterated again"
                )
            return jax.tree.map(lambda value: value / n, total)

    return run
