"""A host loop over compiled chunks of training: progress, history, evaluation."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.train.progress import Progress
from jaxnet.train.step import TrainState, examples, steps_per_epoch, train_state, train_step, train_steps

__all__ = ["Result", "evaluate", "fit"]


class Result(NamedTuple):
    """What `fit` returns: the last train state, and the history, a list of records (dicts of plain numbers)."""

    train_state: TrainState
    history: list[dict[str, float]]


def fit(
    loss: Callable,
    params: Any,
    data: Any,
    *,
    optimizer: Any,
    epochs: int,
    batch_size: int,
    key: jax.Array,
    state: Any = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    progress: bool | None = None,
) -> Result:
    """Train on data in memory: every chunk of steps is one compiled call, and the host looks in between.

    It is `train_steps` in a loop, and nothing more: write your own where it does not fit.

    Args:
      loss, optimizer: as in `train_step`.
      params, state: where to start; they are copied, never donated.
      data: a pytree of arrays with a leading axis of examples, handed to the loss in batches.
      epochs: passes over the data. batch_size: examples a step; the last len(data) % batch_size of a pass are left out.
      key: PRNG key for the order of the data and the noise: the same key gives the same run, bit for bit on a CPU.
      evaluate: (train_state) -> dict of numbers, called after each epoch and joined to its last record.
      progress: a line on stderr, rewritten in place on a terminal, one plain line an epoch elsewhere; False is silent.

    Returns: a `Result`; one record a chunk, with 'step', 'epoch', the mean over the chunk of each metric, 'samples_per_second'
    and 'seconds' since the start without compiling.

    Raises: ValueError for empty data, a batch larger than the data, epochs below 1; FloatingPointError when the loss is no
    longer finite, which names the step.
    """
    if epochs < 1:
        raise ValueError(f"fit: epochs must be at least 1, got {epochs}")
    epoch_steps = steps_per_epoch(examples(data), batch_size)
    chunk = _chunk(epoch_steps)
    total = epochs * epoch_steps
    data = jax.tree.map(jnp.asarray, data)
    current = jax.tree.map(_copy, train_state(params, optimizer, key, state=state))

    run = jax.jit(train_steps(train_step(loss, optimizer), batch_size, chunk), donate_argnums=0)
    started = time.perf_counter()
    run = run.lower(current, data).compile()
    show = Progress(total, compile_seconds=time.perf_counter() - started, show=progress)

    history: list[dict[str, float]] = []
    clock, waiting = time.perf_counter(), None
    idle = 0.0  # spent in `evaluate`
    try:
        for done in range(chunk, total + 1, chunk):
            current, metrics = run(current, data)
            if waiting is not None:
                show(_note(history, *waiting, clock=clock + idle))  # while the device works on the next chunk
            waiting = (metrics, done, epoch_steps, chunk * batch_size)
            if done % epoch_steps == 0:
                record, waiting = _note(history, *waiting, clock=clock + idle), None
                if evaluate is not None:
                    before = time.perf_counter()
                    record |= {name: float(value) for name, value in evaluate(current).items()}
                    idle += time.perf_counter() - before
                show(record, newline=True)
    finally:
        show.close()
    return Result(current, history)


def evaluate(metrics: Callable, data: Any, *, batch_size: int = 500) -> Callable[[TrainState], dict[str, jax.Array]]:
    """A function (train_state) -> the mean of each metric over all of the data, every example once, in one compiled call.

    Args:
      metrics: `metrics(params, batch)`, or `metrics(params, batch, state)`, -> dict of values, each a mean over the batch or
        one value an example.
      batch_size: how many examples at once; the last batch is smaller, and weighs less.

    >>> count = evaluate(lambda params, batch: {"mean": batch.mean()}, jnp.arange(5.0), batch_size=2)
    >>> float(count(TrainState({}, {}, (), None, None))["mean"])
    2.0
    """
    n = examples(data)
    size = min(batch_size, n)
    full = n // size
    data = jax.tree.map(jnp.asarray, data)
    stateful = "state" in inspect.signature(metrics).parameters

    def means(params, state, batch):
        values = metrics(params, batch, state) if stateful else metrics(params, batch)
        return {name: jnp.mean(value) for name, value in values.items()}

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


def _chunk(epoch_steps: int) -> int:
    """Steps a compiled call: a divisor of the epoch, so that one program serves; about 100 cost no more than the whole epoch."""
    divisors = [d for d in range(1, epoch_steps + 1) if epoch_steps % d == 0]
    return min((d for d in divisors if d >= min(50, epoch_steps)), key=lambda d: abs(d - 100))


def _copy(leaf: Any) -> jax.Array:
    return jax.device_put(jnp.asarray(leaf), may_alias=False)  # unlike jnp.array(copy=True), it compiles nothing


def _note(history: list, metrics: dict, step: int, epoch_steps: int, samples: int, *, clock: float) -> dict[str, float]:
    """Wait for the metrics of a chunk and write them down as one record."""
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    broken = np.flatnonzero(~np.isfinite(values["loss"]))
    if broken.size:
        first = step - len(values["loss"]) + int(broken[0])
        raise FloatingPointError(
            f"fit: the loss is {values['loss'][broken[0]]} at step {first}; a smaller learning rate may help, and labels "
            "outside 0 .. classes - 1 also give nan (jaxnet.data.check_labels finds them)"
        )
    seconds = time.perf_counter() - clock
    before = history[-1]["seconds"] if history else 0.0
    record = {"step": step, "epoch": math.ceil(step / epoch_steps)}
    record |= {name: float(value.mean()) for name, value in sorted(values.items(), key=lambda item: item[0] != "loss")}
    record |= {"samples_per_second": samples / max(seconds - before, 1e-9), "seconds": seconds}
    history.append(record)
    return record
