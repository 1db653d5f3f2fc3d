"""One step of training: a pure function made of a loss and an optimizer."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.train.optimizers import Guarded, find, keep

__all__ = ["TrainState", "Weighted", "augmented", "sgd", "train_state", "train_step"]


class TrainState(NamedTuple):
    """All that training carries from step to step: one pytree, to be saved, restored or mapped over as a whole.

    Attributes:
      params: the network's parameters.
      state: the network's state, {} where it has none.
      opt: the optimizer's state, () for plain SGD.
      key: PRNG key of the run; it never changes, every random number is drawn from it and the step.
      step: steps done, int32 []; the epoch and the position in its order follow from it.
    """

    params: Any
    state: Any
    opt: Any
    key: jax.Array
    step: jax.Array


class Weighted(NamedTuple):
    """Examples and how much each counts: as data for training, or as one batch.

    Attributes:
      batch: what the loss is given, leaves [B, ...].
      weights: float [B], at least 0; the mean of a value is sum(w x) / sum(w). The padding of a last batch has weight 0.
    """

    batch: Any
    weights: Any


def unweighted(batch: Any) -> tuple[Any, Any]:
    """A batch as (examples, their weights); None where it has no weights."""
    return (batch.batch, batch.weights) if isinstance(batch, Weighted) else (batch, None)


def weighted(batch: Any, weights: Any) -> Any:
    """The batch with these weights, times its own if it has some; as it is if the weights are None."""
    if weights is None:
        return batch
    batch, own = unweighted(batch)
    return Weighted(batch, weights if own is None else own * weights.astype(own.dtype))


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


def train_step(
    loss: Callable, optimizer: Any, *, accumulate: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """A pure step (train_state, batch) -> (train_state, metrics) from a loss and an optimizer.

    Args:
      loss: `loss(params, batch)` -> the loss, or (loss, metrics), metrics being a dict. The loss and each metric are a
        scalar, or one value an example [B], of which the step takes the mean (a scalar metric stays as it is). It names
        `key` among its parameters if it draws random numbers, and `state` if the network is stateful: then it returns
        (loss, new_state) or (loss, new_state, metrics).
      optimizer: as in `train_state`.
      accumulate: compute the gradient in so many equal parts of the batch, one after the other, in the memory of one:
        the same step to rounding (up to batch statistics and random numbers, which each part has of its own).

    The metrics are those of the loss, and 'loss' itself. The step is for `jax.jit`, `jax.lax.scan`, `jax.vmap` as it is.
    Where the batch is `Weighted` the loss must be one value an example, and all means are weighted ones; their sum of
    weights is the metric 'weight'. With a `guarded` optimizer a step that is not finite changes nothing and counts in
    the metric 'skipped'.

    Raises, when it is traced: ValueError if the loss is neither a scalar nor one value an example, if the batch does not
    divide, if prediction and target of shapes [B, 1] and [B] are subtracted; TypeError if the loss returns something else
    than the above.
    """
    wanted = {"key", "state"} & set(inspect.signature(loss).parameters)
    if accumulate < 1:
        raise ValueError(f"train_step: accumulate must be at least 1, got {accumulate}")

    def objective(params, batch, state, key, shares, scale):
        """This part's contribution to the mean over the whole batch."""
        offered = {"state": state, "key": key}
        with _crossing_refused(batch):
            outputs = loss(params, batch, **{name: offered[name] for name in wanted})
        value, new_state, metrics = _parts(outputs, state, stateful="state" in wanted)
        if shares is not None and jnp.ndim(value) == 0:
            raise ValueError(
                "train_step: with weights, or a padded last batch, the loss must be one value an example [B], got a "
                "scalar; return it before its mean is taken"
            )
        metrics = {name: _mean(name, metric, batch, shares) / accumulate for name, metric in metrics.items()}
        value = _mean("loss", value, batch, shares) / accumulate
        return value if scale is None else value * scale.astype(value.dtype), (new_state, {**metrics, "loss": value})

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def gradients(params, batch, state, key, scale):
        batch, weights = unweighted(batch)
        total = shares = None
        if weights is not None:
            weights = jnp.asarray(weights, jnp.result_type(weights, jnp.float32))
            total = jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)
            shares = weights / total * accumulate
        if accumulate == 1:
            (_, (state, metrics)), grads = differentiate(params, batch, state, key, shares, scale)
        else:
            parts = jax.tree.map(lambda leaf: _in_parts(leaf, accumulate), (batch, shares))

            def add(carry, part):
                (state, *sums), (i, (batch, shares)) = carry, part
                part_key = jax.random.fold_in(key, i)
                (_, (state, metrics)), grads = differentiate(params, batch, state, part_key, shares, scale)
                return (state, *jax.tree.map(lambda a, b: a + b.astype(a.dtype), tuple(sums), (metrics, grads))), None

            first = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(lambda: differentiate(params, first[0], state, key, first[1], scale))
            wide = (shapes[0][1][1], shapes[1])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), wide)
            (state, *sums), _ = jax.lax.scan(add, (state, *zeros), (jnp.arange(accumulate), parts))
            metrics, grads = jax.tree.map(lambda a, like: a.astype(like.dtype), tuple(sums), wide)
        if total is not None:
            metrics["weight"] = total
        return grads, state, metrics

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        params, state, opt, key, count = train_state
        guard = find(opt, Guarded)
        scale = None if guard is None else guard.scale
        grads, new_state, metrics = gradients(params, batch, state, key_of(train_state), scale)
        if guard is not None:
            blame = jnp.where(jnp.isfinite(metrics["loss"]), 1, jnp.nan) / guard.scale
            grads = jax.tree.map(lambda g: g * blame.astype(g.dtype), grads)
        if hasattr(optimizer, "init"):
            import optax

            update = optax.with_extra_args_support(optimizer).update
            updates, opt = update(grads, opt, params, value=metrics["loss"])  # for those that look at the loss
            params = optax.apply_updates(params, updates)
        else:
            params = sgd(params, grads, optimizer(count) if callable(optimizer) else optimizer)
        if guard is not None:
            taken = find(opt, Guarded).skipped == 0
            new_state = keep(taken, new_state, state)
            metrics["skipped"] = jnp.where(taken, 0.0, 1.0)
        return TrainState(params, new_state, opt, key, count + 1), metrics

    def key_of(train_state):
        return jax.random.fold_in(train_state.key, train_state.step)

    def value_of(train_state, batch):
        batch, weights = unweighted(batch)
        return objective(train_state.params, batch, train_state.state, key_of(train_state), weights, None)[0]

    def gradients_of(train_state, batch):
        return gradients(train_state.params, batch, train_state.state, key_of(train_state), None)[0]

    _parts_of_step(step, value=value_of, gradients=gradients_of)
    return step


def augmented(step: Callable, change: Callable[[jax.Array, Any], Any]) -> Callable:
    """The same step on a batch that was changed at random first: `change(key, batch) -> batch`, a pure function.

    The key follows from the run's key and the step, so that each step draws its own and a resumed run draws the same.
    """

    def changed(train_state, batch):
        key = jax.random.fold_in(jax.random.fold_in(train_state.key, _CHANGE), train_state.step)
        batch, weights = unweighted(batch)
        return weighted(change(key, batch), weights)

    def on_changed(f):
        return lambda train_state, batch: f(train_state, changed(train_state, batch))

    return _parts_of_step(on_changed(step), **{name: on_changed(f) for name, f in getattr(step, "parts", {}).items()})


_CHANGE = 0x63686E67  # separates the keys of the changes from those of the steps, which are small numbers


def _parts_of_step(step: Any, **parts: Callable) -> Callable:
    """Attach what a step consists of, functions (train_state, batch) -> value, for whoever wants to look into it."""
    step.parts = parts
    return step


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
    if clash := {"loss", "weight", "skipped"} & set(metrics if isinstance(metrics, Mapping) else ()):
        raise ValueError(
            f"train_step: a metric is called {sorted(clash)[0]!r}, a name that the step itself gives; use another"
        )
    if len(rest) > 1 or not isinstance(metrics, Mapping):
        form = "(value, new_state, metrics)" if stateful else "(value, metrics)"
        raise TypeError(
            f"train_step: a loss returns a scalar or {form} with a dict of metrics, got {len(outputs)} parts"
        )
    return value, state, metrics


def _mean(name: str, value: Any, batch: Any, shares: jax.Array | None) -> jax.Array:
    """The (weighted) mean of one value an example; a scalar is one already."""
    value = jnp.asarray(value)
    sizes = _sizes(batch)
    if not value.ndim:
        return value
    if value.ndim > 1 or len(value) not in sizes:
        what = "the loss" if name == "loss" else f"metric '{name}'"
        raise ValueError(
            f"train_step: {what} must be a scalar or one value an example {[*sizes]}, got shape {value.shape}; take its mean"
        )
    value = jnp.asarray(value, jnp.result_type(value, jnp.float32))
    return value.mean() if shares is None else (value * shares.astype(value.dtype)).sum()


def _sizes(batch: Any) -> set[int]:
    """The lengths of the leading axes in a batch."""
    return {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}


def _in_parts(leaf: jax.Array, parts: int) -> jax.Array:
    if leaf.shape[0] % parts:
        raise ValueError(f"train_step: a batch of {leaf.shape[0]} does not divide into accumulate={parts} equal parts")
    return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])


@contextlib.contextmanager
def _crossing_refused(batch: Any) -> Iterator[None]:
    """Refuse [B, 1] - [B], which broadcasts to all pairs [B, B] and trains on nonsense."""
    if jax.config.jax_numpy_rank_promotion != "allow":  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    with warnings.catch_warnings(record=True) as caught, jax.numpy_rank_promotion("warn"):
        warnings.simplefilter("always")
        yield
    sizes = _sizes(batch) - {1}
    for warning in caught:
        text = str(warning.message)
        if "automatic rank promotion" not in text:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif found := re.search(
            r"for subtract on shapes \((\d+), 1\) \((\d+),\)|subtract on shapes \((\d+),\) \((\d+), 1\)", text
        ):
            a, b = (int(n) for n in found.groups() if n)
            if a == b and a in sizes:
                raise ValueError(
                    f"train_step: the loss subtracts [{a}, 1] and [{a}], which makes [{a}, {a}], all pairs; give both "
                    f"one shape (x[:, 0] or y[:, None]), or write y[None, :] if all pairs are meant"
                )
