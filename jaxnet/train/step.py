"""One step of training, and many of them as one compiled call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.train.shuffle import shuffled

__all__ = ["TrainState", "sgd", "train_epoch", "train_state", "train_step", "train_steps"]


class TrainState(NamedTuple):
    """All that training carries from step to step: one pytree, to be saved, restored or mapped over as a whole.

    Attributes:
      params: the network's parameters.
      state: the network's state, {} where it has none.
      opt: the optimizer's state, () for plain SGD.
      key: PRNG key of the run; it never changes, every random number is drawn from it and the step.
      step: steps done, int32 []; also the position in the data.
    """

    params: Any
    state: Any
    opt: Any
    key: jax.Array
    step: jax.Array


def sgd(params: Any, grads: Any, lr: Any) -> Any:
    """Plain gradient descent, w <- w - lr * dL/dw, for trees of equal structure. The dtype of w is kept.

    >>> sgd({"w": 1.0}, {"w": 0.5}, 0.1)
    {'w': 0.95}
    """
    return jax.tree.map(lambda w, g: w - _like(lr, w) * g, params, grads)


def train_state(params: Any, optimizer: Any, key: jax.Array, *, state: Any = None) -> TrainState:
    """The start of a run.

    Args:
      optimizer: an optax transformation, or a learning rate (a number, or an optax schedule of the step) for plain SGD.
      key: PRNG key; the order of the data and the noise in training follow from it.
      state: of a stateful network, `net.init_state(*inputs)`.
    """
    opt = optimizer.init(params) if hasattr(optimizer, "init") else ()
    return TrainState(params, {} if state is None else state, opt, key, jnp.int32(0))


def train_step(loss: Callable, optimizer: Any) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """A pure step (train_state, batch) -> (train_state, metrics) from a loss and an optimizer.

    Args:
      loss: `loss(params, batch)` -> a scalar, or (scalar, metrics), metrics being a dict of scalars. It names `key` among its
        parameters if it draws random numbers, and `state` if the network is stateful: then it returns (scalar, new_state)
        or (scalar, new_state, metrics).
      optimizer: as in `train_state`.

    The metrics are those of the loss, and 'loss' itself. The step is for `jax.jit`, `jax.lax.scan`, `jax.vmap` as it is.

    Raises: ValueError if the loss is not a scalar, TypeError if it returns something else than the above.
    """
    wanted = {"key", "state"} & set(inspect.signature(loss).parameters)

    def scalar_loss(params, batch, state, key):
        offered = {"state": state, "key": key}
        outputs = loss(params, batch, **{name: offered[name] for name in wanted})
        value, new_state, metrics = _parts(outputs, state, stateful="state" in wanted)
        if jnp.shape(value) != ():
            raise ValueError(f"train_step: the loss must be a scalar, got shape {jnp.shape(value)}; take its mean")
        return value, (new_state, {**metrics, "loss": value})

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        params, state, opt, key, count = train_state
        step_key = jax.random.fold_in(key, count)
        (_, (state, metrics)), grads = jax.value_and_grad(scalar_loss, has_aux=True)(params, batch, state, step_key)
        if hasattr(optimizer, "init"):
            import optax

            updates, opt = optimizer.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
        else:
            params = sgd(params, grads, optimizer(count) if callable(optimizer) else optimizer)
        return TrainState(params, state, opt, key, count + 1), metrics

    return step


def train_steps(step: Callable, batch_size: int, steps: int) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """Many steps over data in memory as one pure function (train_state, data) -> (train_state, metrics [steps]).

    Each epoch goes through the data in an order of its own, drawn from the key and the number of the epoch, and leaves out
    the len(data) % batch_size examples that come last in it. Which batch a step sees follows from `train_state.step`
    alone: any chunks of the same run see the same batches.

    Args:
      step: (train_state, batch) -> (train_state, metrics), as from `train_step`.
      batch_size: examples a step.
      steps: how many; `jax.jit` the result, once, and call it again and again.

    Raises: ValueError for empty data, leaves of unequal length, or a batch larger than the data.
    """
    if steps < 1:
        raise ValueError(f"train_steps: steps must be at least 1, got {steps}")

    def run(train_state: TrainState, data: Any) -> tuple[TrainState, dict]:
        n = examples(data)
        epoch_steps = steps_per_epoch(n, batch_size)

        if batch_size == n:  # the order within a full batch is all one
            batch = jax.tree.map(jnp.asarray, data)
            return jax.lax.scan(lambda train_state, _: step(train_state, batch), train_state, length=steps)

        def rows_of(count):
            epoch, position = jnp.divmod(count, epoch_steps)
            order = jax.random.fold_in(jax.random.fold_in(train_state.key, _ORDER), epoch)
            return shuffled(order, n, position * batch_size + jnp.arange(batch_size, dtype=jnp.int32))

        def body(train_state, rows):
            batch = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[rows].get(mode="promise_in_bounds"), data)
            return step(train_state, batch)

        rows = jax.vmap(rows_of)(train_state.step + jnp.arange(steps, dtype=jnp.int32))
        return jax.lax.scan(body, train_state, rows)

    return run


def train_epoch(step: Callable, batch_size: int) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """One pass over data in memory as one pure function: `train_steps` with as many steps as there are full batches."""

    def run(train_state: TrainState, data: Any) -> tuple[TrainState, dict]:
        return train_steps(step, batch_size, steps_per_epoch(examples(data), batch_size))(train_state, data)

    return run


def examples(data: Any) -> int:
    """The length of the leading axis that all leaves share.

    Raises: ValueError where there is no such length, or it is zero.
    """
    lengths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not jnp.shape(leaf):
            raise ValueError(f"data: every leaf needs a leading axis of examples, '{name}' is a scalar")
        lengths[name] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"data: all leaves must have as many examples, got {lengths}")
    if not lengths or not max(lengths.values()):
        raise ValueError("data: there are no examples")
    return max(lengths.values())


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Full batches in n examples. Raises ValueError if there is none."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    if batch_size > n:
        raise ValueError(f"batch_size {batch_size} is larger than the data, {n} examples; use at most {n}")
    return n // batch_size


_ORDER = 0x6F726465  # separates the keys of the data's order from those of the steps, which are small numbers


def _like(x, w):
    """A learning rate in the dtype of the weight, so that float32 weights stay float32 beside a float64 rate."""
    return jnp.asarray(x, w.dtype) if hasattr(w, "dtype") else x


def _parts(outputs: Any, state: Any, *, stateful: bool) -> tuple[Any, Any, Mapping]:
    """What a loss returned as (value, state, metrics)."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    value, *rest = outputs
    if stateful and not rest:
        raise TypeError("train_step: a loss with `state` returns (value, new_state) or (value, new_state, metrics)")
    if stateful:
        state, *rest = rest
    metrics = rest[0] if rest else {}
    if len(rest) > 1 or not isinstance(metrics, Mapping):
        form = "(value, new_state, metrics)" if stateful else "(value, metrics)"
        raise TypeError(
            f"train_step: a loss returns a scalar or {form} with a dict of metrics, got {len(outputs)} parts"
        )
    return value, state, metrics
