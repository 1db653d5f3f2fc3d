"""Many steps as one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.checks import size_of
from jaxnet.train.arrays import fitting
from jaxnet.train.batch import Uneven, examples
from jaxnet.train.order import Order, check_order, shuffle
from jaxnet.train.sharding import gathered, on_mesh_of, zeros_like_spec
from jaxnet.train.state import Step
from jaxnet.train.step import TrainState, check_train_state
from jaxnet.train.step_checks import check_metrics, check_same, spec_of

__all__ = ["train_epoch", "train_steps"]


def train_steps(
    step: Step,
    batch_size: int,
    steps: int,
    *,
    order: Order | None = shuffle,
    drop_last: bool = True,
) -> Step:
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
      The function of many steps.

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
        plan = planned(train_state, examples(data), steps, batch_size, order, drop_last)
        one = on_uneven(step)

        def body(train_state, rows):
            new, metrics = one(train_state, take(data, rows))
            check_same(train_state, new)
            return new, metrics

        return jax.lax.scan(body, train_state, plan, length=steps)

    return run


def train_epoch(
    step: Step, batch_size: int, *, order: Order | None = shuffle, drop_last: bool = True
) -> Step:
    """Make `train_steps` with as many steps as an epoch has batches: one pass over data in memory.

    Args:
      step: as in `train_steps`.
      batch_size: as in `train_steps`.
      order: as in `train_steps`.
      drop_last: as in `train_steps`.

    Returns:
      The function of one epoch.

    Raises:
      ValueError, TypeError: as `train_steps`.
    """

    def run(train_state: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
        steps = steps_per_epoch(examples(data), batch_size, drop_last=drop_last)
        return train_steps(step, batch_size, steps, order=order, drop_last=drop_last)(
            train_state, data
        )

    return run


def steps_per_epoch(n: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Count the batches in n examples.

    Raises:
      ValueError: the batch size is larger than n, or it is not a positive int.
    """
    batch_size = size_of("batch_size", batch_size)
    if batch_size > n:
        raise ValueError(
            f"batch_size {batch_size} is larger than the data, {n} examples; use at most {n}"
        )
    return n // batch_size if drop_last else -(-n // batch_size)


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


def planned(
    train_state: TrainState,
    n: int,
    steps: int,
    batch_size: int,
    order: Order | None,
    drop_last: bool,
) -> Any:
    """The rows of the next steps: int32 [steps, B], or `Uneven` if the last batch of an epoch is
    shorter.

    None if every step takes all rows, because their order does not matter then.
    """
    epoch_steps = steps_per_epoch(n, batch_size, drop_last=drop_last)
    rest = 0 if drop_last else n % batch_size
    if batch_size == n and (order is None or order is shuffle):
        return None
    check_order(order, n, batch_size)
    key = jax.random.fold_in(_threefry(train_state.key), _ORDER)

    def rows_of(count):
        epoch, batch = jnp.divmod(count, epoch_steps)
        positions = batch * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        if rest:
            positions = jnp.minimum(positions, n - 1)
        rows = positions if order is None else order(key, n, epoch, positions)
        return Uneven(rows, batch == epoch_steps - 1, rest) if rest else rows

    return jax.vmap(rows_of)(train_state.step + jnp.arange(steps, dtype=jnp.int32))


def on_uneven(step: Callable[..., Any]) -> Callable[..., Any]:
    """Make a step that also takes `Uneven` batches, each with its true size."""
    # With `jit`, the step is traced once per size, although both its shapes and its branch need a
    # trace.
    traced = jax.jit(step, inline=True)

    def run(train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        if not isinstance(batch, Uneven):
            return step(train_state, batch)

        def of(examples_of, train_state):
            examples = examples_of()
            new, metrics = traced(train_state, examples)
            size = len(jax.tree.leaves(examples)[0])
            return new, {"weight": jnp.float32(size), **metrics} if isinstance(
                metrics, dict
            ) else metrics

        whole, short = (
            functools.partial(of, lambda: batch.batch),
            functools.partial(of, batch.short),
        )
        try:
            shapes = [jax.eval_shape(f, train_state)[1] for f in (whole, short)]
        except Exception as error:
            error.add_note(
                f"with drop_last=False an epoch ends with a batch of {batch.rest} examples"
            )
            raise
        if jax.tree.map(spec_of, shapes[0]) != jax.tree.map(spec_of, shapes[1]):
            changed = [
                path
                for path, leaf in tree.flatten(shapes[0]).items()
                if _differs(leaf, shapes[1], path)
            ]
            raise ValueError(
                f"drop_last=False: the metrics {changed} have another shape in the last batch, "
                f"of {batch.rest} examples; reduce them to scalars"
            )
        return jax.lax.cond(batch.last, short, whole, train_state)

    return run


def _differs(leaf: Any, others: Any, path: str) -> bool:
    other = tree.flatten(others).get(path)
    return other is None or spec_of(other) != spec_of(leaf)


def _threefry(key: jax.Array) -> jax.Array:
    """The key itself, or one of JAX's default generator made of it: of others a vmapped draw may
    not be that of each alone.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.stack([words[0], words[-1]]), impl="threefry2x32")


def planned_ahead(train_state: TrainState, n: int, size: int, count: jax.Array, **batching) -> Any:
    """A plan with room for `size` steps of which the first `count` are drawn, some at a time; see
    `planned`.
    """
    block = min(size, max(1, _DRAWN // batching["batch_size"]))
    blocks = -(-size // block)

    def draw(i):
        return planned(
            train_state._replace(step=train_state.step + i * block), n, block, **batching
        )

    def add(i, plan):
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * block, axis=0)
        return jax.tree.map(put, plan, draw(i))

    one = jax.eval_shape(draw, jnp.int32(0))
    room = jax.tree.map(lambda x: zeros_like_spec(x, blocks), one)
    room = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), room)
    return jax.lax.fori_loop(0, -(-count // block), add, room)


_DRAWN = 1 << 13  # rows that are drawn at once: enough for the arithmetic to be vectorised
# It separates the keys of the data's order from those of the steps, which are small numbers.
_ORDER = 0x6F726465


def take(data: Any, rows: Any) -> Any:
    """Gather the batch for one row of a plan."""
    if rows is None:
        return data
    if isinstance(rows, Uneven):
        return Uneven(take(data, rows.batch), rows.last, rows.rest)
    return jax.tree.map(lambda leaf: gathered(leaf, rows), data)


def chunk_of(
    step: Callable[..., Any], size: int, batches: Callable[..., Any], *, check_finite: bool = True
) -> Callable[..., Any]:
    """Up to `size` steps as one function (train_state, good, first, n, *inputs) -> (train_state,
    good, metrics [size]).

    It takes the steps first .. first + n - 1 of a plan; one program serves every n <= size - first.

    With `check_finite`, if a value that was finite is not so any more after the n steps, or a loss
    is not, then the state that comes back is the one that went in, and `good` is False from then
    on: whoever looks only later still finds the last good state.

    Args: batches: (n, train_state, *inputs) -> (plan with leaves [size, ...], function from one of
    its rows to a batch).
    """
    step = jax.jit(on_uneven(step), inline=True)  # traced once, for its shapes and in the loop

    def run(train_state: TrainState, good: jax.Array, first: jax.Array, n: jax.Array, *inputs: Any):
        plan, batch_of = batches(n, train_state, *inputs)

        def batch_at(i):
            return batch_of(jax.tree.map(lambda leaf: leaf[first + i], plan))

        outputs = jax.eval_shape(lambda: step(train_state, batch_at(0)))
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            got = (
                f"{len(outputs)} parts"
                if isinstance(outputs, tuple)
                else f"a {type(outputs).__name__}"
            )
            raise TypeError(
                f"a step returns (train_state, metrics), got {got}; train_step(loss, optimizer) "
                "makes a step of a loss"
            )
        new, metrics = outputs
        check_same(train_state, new)
        check_metrics(metrics)

        def body(i, carry):
            train_state, values = carry
            train_state, metrics = step(train_state, batch_at(i))
            set_one = functools.partial(
                jax.lax.dynamic_update_index_in_dim, index=i, axis=0
            )  # `.at` minds the sign of i
            return train_state, jax.tree.map(set_one, values, metrics)

        values = jax.tree.map(lambda x: zeros_like_spec(x, size), metrics)
        new, values = jax.lax.fori_loop(0, n, body, (train_state, values))
        if not check_finite:
            return new, good, values
        lost = ~jnp.isfinite(values["loss"]) if "loss" in values else jnp.zeros(size, bool)
        if "skipped" in values:
            lost &= values["skipped"] == 0
        good &= ~lost.any() & ~_breaks(train_state, new)
        # A `cond` compiles faster than a `where`.
        return jax.lax.cond(good, lambda: new, lambda: train_state), good, values

    return run


def _breaks(old: TrainState, new: TrainState) -> jax.Array:
    """Whether a number is no longer finite. (Some optimizers keep an infinity on purpose: only a
    change tells.)
    """
    pairs = zip(
        *(jax.tree.leaves((state.params, state.state, state.opt)) for state in (old, new)),
        strict=True,
    )
    floats = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.inexact)]
    # This sum compiles faster than a count.
    zeros = [jnp.sum(jnp.where(jnp.isfinite(a), b * 0, 0)) for a, b in floats]
    return sum((zero != 0 for zero in zeros), jnp.bool_(False))  # inf * 0 and nan * 0 are nan
