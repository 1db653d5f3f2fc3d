"""Means over a whole data set, every example counted once."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.train.batch import Weighted, examples
from jaxnet.train.pairs import refuse_pairs
from jaxnet.train.sharding import sliced
from jaxnet.train.source import is_lazy, on_device
from jaxnet.train.state import TrainState, check_train_state
from jaxnet.train.told import batch_in_words, explained

__all__ = ["evaluate"]


def evaluate(
    metrics: Callable[..., Mapping[str, Any]], data: Any, *, batch_size: int | None = 500
) -> Callable[[TrainState], dict[str, jax.Array]]:
    """Make a function (train_state) -> the mean of each metric over all of the data, every example
    once.

    Args:
      metrics: `metrics(params, batch)`, or `metrics(params, batch, state)`, -> dict of values, each
        a mean over the batch or one value per example.
      data: a pytree of arrays with a leading axis of examples: one compiled call, or one per batch
        if they are read lazily (memory maps). With `batch_size=None`, an iterable of batches that
        can be iterated again and again.
      batch_size: how many examples at once; the last batch is smaller, and weighs less.

    Returns:
      A function of a train state.

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
    stateful = "state" in inspect.signature(metrics).parameters

    def values_of(batch, params, state):
        with explained(batch, state if stateful else None):
            return metrics(params, batch, state) if stateful else metrics(params, batch)

    def means(params, state, batch):
        refuse_pairs("evaluate: a metric", values_of, batch, params, state)
        values = values_of(batch, params, state)
        if not isinstance(values, Mapping):
            raise TypeError(
                f"evaluate: metrics must return a dict of values by name, got {_brief(values)}; "
                "write for instance {'test_loss': value}"
            )
        return {
            name: jnp.mean(value, dtype=jnp.result_type(value, jnp.float32))
            for name, value in values.items()
        }

    if isinstance(data, Weighted):
        raise TypeError(
            "evaluate: every example counts once, got Weighted data; pass its `batch`, and weigh "
            "in metrics"
        )
    if batch_size is None:
        if not (hasattr(data, "__iter__") and not isinstance(data, dict)) or isinstance(
            data, jax.Array
        ):
            raise TypeError(
                "evaluate: without batch_size the data is an iterable of batches, got "
                f"{type(data).__name__}; for arrays say batch_size"
            )
        return _over_batches(means, lambda: data)
    n = examples(data)
    size = min(size_of("evaluate: batch_size", batch_size), n)
    if any(is_lazy(leaf) for leaf in jax.tree.leaves(data)):
        cuts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
        return _over_batches(
            means, lambda: (jax.tree.map(operator.itemgetter(cut), data) for cut in cuts)
        )
    full = n // size
    data = on_device(data)

    @jax.jit
    def run(params, state, data):
        def batch(i):
            return jax.tree.map(lambda leaf: sliced(leaf, i * size, size), data)

        sums = jax.lax.map(lambda i: means(params, state, batch(i)), jnp.arange(full))
        total = jax.tree.map(lambda values: values.sum() * size, sums)
        if full * size < n:
            rest = means(
                params,
                state,
                jax.tree.map(lambda leaf: sliced(leaf, full * size, n - full * size), data),
            )
            total = jax.tree.map(lambda a, b: a + b * (n - full * size), total, rest)
        return jax.tree.map(lambda value: value / n, total)

    def evaluated(train_state):
        check_train_state("evaluate", train_state)
        return run(train_state.params, train_state.state, data)

    # `fit` may find the names of the results by `jax.eval_shape`.
    evaluated.traceable = True  # pyright: ignore[reportFunctionMemberAccess]
    return evaluated


def _brief(x: Any) -> str:
    return (
        f"{x.dtype}{list(x.shape)}"
        if hasattr(x, "shape") and hasattr(x, "dtype")
        else f"a {type(x).__name__}"
    )


def _over_batches(
    means: Callable[..., Any], batches: Callable[..., Any]
) -> Callable[[TrainState], dict[str, jax.Array]]:
    means = jax.jit(means)

    def run(train_state):
        check_train_state("evaluate", train_state)
        total, n = None, 0
        # The batches come from the host.
        with jax.transfer_guard("allow"):
            for batch in batches():
                size = examples(batch)
                part = means(train_state.params, train_state.state, on_device(batch))
                part = jax.tree.map(lambda value, size=size: value * size, part)
                total, n = part if total is None else jax.tree.map(jnp.add, total, part), n + size
            if total is None:
                raise ValueError(
                    "evaluate: the iterable has no batches (left): it must be one that can be "
                    "iterated again"
                )
            return jax.tree.map(lambda value: value / n, total)

    return run
