"""One step of training: a pure function made of a loss and an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.train.accumulation import Gradients, one_part
from jaxnet.train.finite import keep
from jaxnet.train.guard import Guarded
from jaxnet.train.objective import Objective, sizes_of
from jaxnet.train.optimizers import check_optimizer, check_state, find
from jaxnet.train.pairs import refuse_pairs
from jaxnet.train.state import TrainState, check_params, check_train_state, sgd
from jaxnet.train.weighted import Weighted, check_shape, unweighted

if TYPE_CHECKING:
    from jaxnet.train.optimizers import Optimizer

__all__ = ["Step", "augmented", "train_step"]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A step of training, and two functions of the same arguments that an error looks into.

    Attributes:
      run: (train_state, batch) -> (train_state, metrics).
      value: (train_state, batch) -> the loss, a scalar; None if it is unknown.
      gradients: (train_state, batch) -> the gradients, like the parameters; None if they are
        unknown.
    """

    run: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    value: Callable[[TrainState, Any], jax.Array] | None = None
    gradients: Callable[[TrainState, Any], Any] | None = None

    def __call__(self, train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Take the step."""
        return self.run(train_state, batch)

    @property
    def __name__(self) -> str:
        """The name of the function, after which JAX names the compiled program."""
        return getattr(self.run, "__name__", "step")


def train_step(loss: Callable[..., Any], optimizer: Optimizer, *, accumulate: int = 1) -> Step:
    """Make a pure step (train_state, batch) -> (train_state, metrics) from a loss and an optimizer.

    The step works under `jax.jit`, `jax.lax.scan` and `jax.vmap`. Its metrics are those of the
    loss, and 'loss' itself. With weights, all means are weighted, and the sum of the weights is the
    metric 'weight'. With a `guarded` optimizer, a step that is not finite changes nothing and
    counts in the metric 'skipped'.

    Args:
      loss: `loss(params, batch)` -> value or (value, metrics), where metrics is a dict. The value
        and each metric are a scalar, or one number per example [B], which the step averages. If
        examples have different weights, return `Weighted(values [B], weights [B])` as the value:
        all means are then sum(w x) / sum(w). With a `Weighted` batch, its weights are multiplied
        in, and the value must be [B]. A loss that draws random numbers has a parameter `key`. The
        loss of a stateful network has a parameter `state` and returns (value, new_state) or (value,
        new_state, metrics).
      optimizer: the optimizer that was passed to `TrainState.create`.
      accumulate: compute the gradient in this number of equal parts of the batch, one after the
        other, which needs the memory of one part. The step is the same up to rounding if the loss
        returns one number per example, or `Weighted`. If the loss itself takes a mean, for instance
        over the tokens under a mask, the parts are averaged with equal weights. Batch statistics
        and random numbers always differ per part.

    Returns:
      The step.

    Raises:
      ValueError: `accumulate` is not an int of at least 1; when the step is traced: a value has
        another shape, the batch cannot be divided, an operation pairs all examples by broadcasting
        (see `all_pairs`), or the train state was made with another optimizer.
      TypeError: `optimizer` is not an optimizer; when the step is traced: the loss returns
        something else, or parameters are not real floats.
    """
    objective = Objective(loss)
    accumulate = size_of("train_step: accumulate", accumulate)
    check_optimizer("train_step", optimizer)
    gradients = Gradients(objective, accumulate)

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        check(train_state, batch)
        params, state, opt, key, count = train_state
        guard = find(opt, Guarded)
        scale = None if guard is None else guard.scale
        grads, new_state, metrics = gradients(params, batch, state, _key_of(train_state), scale)
        if guard is not None:
            blame = jnp.where(jnp.isfinite(metrics["loss"]), guard.scale, jnp.nan)
            grads = jax.tree.map(lambda g: _unscaled(g, blame), grads)
        if hasattr(optimizer, "init"):
            import optax

            update = optax.with_extra_args_support(optimizer).update  # pyright: ignore[reportArgumentType]
            # Some optimizers look at the loss.
            updates, opt = update(grads, opt, params, value=metrics["loss"])
            params = optax.apply_updates(params, updates)
        else:
            params = sgd(params, grads, optimizer(count) if callable(optimizer) else optimizer)
        if guard is not None:
            taken = find(opt, Guarded).skipped == 0
            new_state = keep(taken, new_state, state)
            metrics["skipped"] = jnp.where(taken, 0.0, 1.0)
        return TrainState(params, new_state, opt, key, count + 1), metrics

    checked = set()

    def check(train_state, batch):
        """Check the arguments, once for each kind of them that passes."""
        check_train_state("train_step", train_state)
        if (kind := _kind((train_state[:3], batch))) in checked:
            return
        params, state, opt, key, _ = train_state
        check_params("train_step", params)
        check_state("train_step", optimizer, params, opt)
        batch, weights = unweighted(batch)
        if weights is not None:
            size = max(sizes_of(batch), default=0)
            check_shape("train_step: the weights of a batch", weights, size)
        part = jax.tree.map(lambda leaf: one_part(leaf, accumulate), batch)
        refuse_pairs("train_step: the loss", objective.call_loss, part, params, state, key)
        checked.add(kind)

    def value_of(train_state, batch):
        (params, state), (batch, weights) = train_state[:2], unweighted(batch)
        return objective(params, batch, weights, state, _key_of(train_state), None)[0]

    def gradients_of(train_state, batch):
        params, state = train_state[:2]
        return gradients(params, batch, state, _key_of(train_state), None)[0]

    return Step(step, value_of, gradients_of)


def augmented(step: Callable[..., Any], change: Callable[[jax.Array, Any], Any]) -> Step:
    """Make the step that first changes its batch at random.

    The key of a change follows from the run's key and the step, so that each step draws its own
    numbers and a resumed run draws the same. Nested `augmented` calls and the step itself draw from
    different keys. The outermost change is applied first.

    Args:
      step: (train_state, batch) -> (train_state, metrics), as from `train_step`.
      change: a pure function (key, batch) -> batch. Of a `Weighted` batch, it receives the examples
        without their weights.

    Returns:
      The step on changed batches.
    """

    def on_changed(f):
        def run(train_state, batch):
            own = jax.random.fold_in(train_state.key, _CHANGE)
            inner = jax.random.fold_in(train_state.key, _INSIDE)
            batch, weights = unweighted(batch)
            batch = change(jax.random.fold_in(own, train_state.step), batch)
            batch = batch if weights is None else Weighted(batch, weights)
            return f(train_state._replace(key=inner), batch)

        return run

    inside = on_changed(step)

    def changed(train_state, batch):
        check_train_state("augmented", train_state)
        new, metrics = inside(train_state, batch)
        return new._replace(key=train_state.key), metrics

    parts = (step.value, step.gradients) if isinstance(step, Step) else (None, None)
    return Step(changed, *(None if part is None else on_changed(part) for part in parts))


# These numbers separate the keys of a change and of the step inside it from the keys of steps,
# which are small numbers.
_CHANGE, _INSIDE = 0x63686E67, 0x696E7369


def _key_of(train_state: TrainState) -> jax.Array:
    """The key of the next step."""
    return jax.random.fold_in(train_state.key, train_state.step)


def _unscaled(grad: jax.Array, scale: jax.Array) -> jax.Array:
    wide = jnp.promote_types(grad.dtype, scale.dtype)
    return (grad / scale.astype(wide)).astype(grad.dtype)


def _kind(args: Any) -> Any:
    """The structure, shapes and dtypes of arguments."""
    leaves, structure = jax.tree.flatten(args)
    specs = [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]
    return structure, tuple(specs)
