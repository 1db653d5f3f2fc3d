"""Many steps over data in memory, as one pure function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.checks import size_of
from jaxnet.train.arrays import fitting
from jaxnet.train.leading import count_examples
from jaxnet.train.order import Order, shuffle
from jaxnet.train.plan import Batching, planned, take
from jaxnet.train.sharding import on_mesh_of
from jaxnet.train.state import StepFunction, TrainState, check_train_state
from jaxnet.train.step_checks import check_same
from jaxnet.train.uneven import on_uneven

__all__ = ["train_epoch", "train_steps"]


def train_steps(
    step: Callable[..., Any],
    batch_size: int,
    steps: int,
    *,
    order: Order | None = shuffle,
    drop_last: bool = True,
) -> StepFunction:
    """Make one pure function (train_state, data) -> (train_state, metrics [steps]) of many steps
    over data in memory.

    Which batch a step sees follows from `train_state.step` and the key alone: any chunks of the
    same run see the same batches.

    Args:
      step: (train_state, batch) -> (train_state, metrics), as from `train_step`.
      batch_size: examples per step.
      steps: steps per call of the result. Apply `jax.jit` to the result once, and call it
        repeatedly.
      order: the rows of an epoch: `shuffle` (a different order each epoch), `balanced(labels)`,
        your own function, or None for the order of the data.
      drop_last: leave out the last n % batch_size examples of an epoch. If False, they form a
        separate, shorter batch. The program then contains the step twice, the shapes of metrics
        must not depend on the size of the batch, and a metric 'weight' counts the examples. Under
        `jax.vmap` with different values of `train_state.step`, both forms of the step are computed
        and one is kept.

    Returns:
      The function of many steps. Its data is a pytree of arrays [N, ...].

    Raises:
      ValueError: a size is not positive; when the result is traced, the data is empty or has leaves
        of unequal length, a batch is larger than the data, or rows of `order` are out of range.
      TypeError: when the result is traced, the step changes the structure, a shape or a dtype of
        the train state.
    """
    steps = _steps_of("train_steps: steps", steps)

    def run(train_state: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
        check_train_state("train_steps", train_state)
        _check_counter(train_state.step, steps)
        data = jax.tree.map(jnp.asarray, tree.map_with_path(fitting, data))
        train_state = on_mesh_of(data, train_state)
        batching = Batching.of(count_examples(data), batch_size, order, drop_last)
        plan = planned(train_state.key, train_state.step, steps, batching)
        one = on_uneven(step)

        def body(train_state, rows):
            new, metrics = one(train_state, take(data, rows))
            check_same(train_state, new)
            return new, metrics

        return jax.lax.scan(body, train_state, plan, length=steps)

    return run


def train_epoch(
    step: Callable[..., Any],
    batch_size: int,
    *,
    order: Order | None = shuffle,
    drop_last: bool = True,
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """Make `train_steps` with as many steps as an epoch has batches: one pass over data in memory.

    Args:
      step: as in `train_steps`.
      batch_size: as in `train_steps`.
      order: as in `train_steps`.
      drop_last: as in `train_steps`.

    Returns:
      The function of one epoch, (train_state, data) -> (train_state, metrics [steps]).

    Raises:
      ValueError: as `train_steps`.
      TypeError: as `train_steps`.
    """

    def run(train_state: TrainState, data: Any) -> tuple[TrainState, dict]:
        batching = Batching.of(count_examples(data), batch_size, order, drop_last)
        steps = train_steps(
            step, batch_size, batching.epoch_steps, order=order, drop_last=drop_last
        )
        return steps(train_state, data)

    return run


def _steps_of(what: str, steps: Any) -> int:
    steps = size_of(what, steps)
    if steps >= 2**31:
        raise ValueError(
            f"{what} must be less than 2**31, since steps are counted in int32, got {steps}"
        )
    return steps


def _check_counter(start: Any, steps: int) -> None:
    """Raise ValueError if the counter of a train state cannot hold the last step. A traced counter
    is not checked.
    """
    if isinstance(start, jax.core.Tracer) or np.ndim(start):
        return
    last = int(start) + steps
    if last >= 2**31:
        raise ValueError(
            "train_steps: steps are counted in int32, so the last one must be less than 2**31, "
            f"got {int(start)} done + {steps} = {last}; start again with step 0, as "
            "TrainState.create(params, optimizer, key) makes it"
        )
