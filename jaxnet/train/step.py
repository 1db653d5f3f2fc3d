"""One step of training: a pure function made of a loss and an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.train.accumulation import one_part, parts_of
from jaxnet.train.batch import Weighted, check_shape, examples, unweighted
from jaxnet.train.finite import keep
from jaxnet.train.optimizers import Guarded, check_optimizer, check_state, find
from jaxnet.train.pairs import refuse_pairs
from jaxnet.train.sharding import zeros_like_spec
from jaxnet.train.state import Step, TrainState, check_params, check_train_state, sgd
from jaxnet.train.told import explained

if TYPE_CHECKING:
    from jaxnet.train.optimizers import Optimizer

__all__ = [
    "TrainState",
    "Weighted",
    "augmented",
    "check_train_state",
    "examples",
    "sgd",
    "train_step",
]


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
      ValueError: when the step is traced: a value has another shape, the batch cannot be divided,
        an operation pairs all examples by broadcasting (see `all_pairs`), or the train state was
        made with another optimizer.
      TypeError: when the step is traced: the loss returns something else, or parameters are not
        real floats.
    """
    wanted = {"key", "state"} & set(inspect.signature(loss).parameters)
    accumulate = size_of("train_step: accumulate", accumulate)
    check_optimizer("train_step", optimizer)

    def call_loss(batch, params, state, key):
        offered = {"state": state, "key": key}
        with explained(batch, state if "state" in wanted else None):
            return loss(params, batch, **{name: offered[name] for name in wanted})

    def objective(params, batch, weights, state, key, scale):
        """The mean over this part, and (new state, metrics, sum of weights)."""
        value, new_state, metrics = _parts(
            call_loss(batch, params, state, key), state, stateful="state" in wanted
        )
        value, weights = _weighing(value, weights, batch)
        means = {
            name: _mean(name, metric, batch, weights)
            for name, metric in {**metrics, "loss": value}.items()
        }
        total = jnp.float32(1) if weights is None else weights.sum()
        value = (
            means["loss"] if scale is None else means["loss"] * scale.astype(means["loss"].dtype)
        )
        if weights is not None:
            means["weight"] = total
        return value, (new_state, means, total)

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def gradients(params, batch, state, key, scale):
        batch, weights = unweighted(batch)
        if accumulate == 1:
            (_, (state, metrics, _)), grads = differentiate(
                params, batch, weights, state, key, scale
            )
            return grads, state, metrics
        parts = jax.tree.map(lambda leaf: parts_of(leaf, accumulate), (batch, weights))

        def add(carry, part):
            (state, total, sums), (i, part) = carry, part
            part_key = jax.random.fold_in(key, i)
            (_, (state, metrics, weight)), grads = differentiate(
                params, *part, state, part_key, scale
            )
            sums = jax.tree.map(
                lambda a, b: a + weight.astype(a.dtype) * b.astype(a.dtype), sums, (metrics, grads)
            )
            return (state, total + weight, sums), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        (_, (_, *shapes)), grads = jax.eval_shape(
            lambda: differentiate(params, *first, state, key, scale)
        )
        like = (shapes[0], grads)
        zeros = jax.tree.map(
            lambda x: zeros_like_spec(x).astype(jnp.promote_types(x.dtype, jnp.float32)), like
        )
        (state, total, sums), _ = jax.lax.scan(
            add, (state, jnp.zeros_like(shapes[1]), zeros), (jnp.arange(accumulate), parts)
        )
        divisor = jnp.where(total == 0, 1, total)
        metrics, grads = jax.tree.map(
            lambda a, x: (a / divisor.astype(a.dtype)).astype(x.dtype), sums, like
        )
        if "weight" in metrics:
            metrics["weight"] = total
        return grads, state, metrics

    def step(train_state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        check(train_state, batch)
        params, state, opt, key, count = train_state
        guard = find(opt, Guarded)
        scale = None if guard is None else guard.scale
        grads, new_state, metrics = gradients(params, batch, state, key_of(train_state), scale)
        if guard is not None:
            blame = jnp.where(jnp.isfinite(metrics["loss"]), guard.scale, jnp.nan)
            grads = jax.tree.map(
                lambda g: (g / blame.astype(jnp.promote_types(g.dtype, blame.dtype))).astype(
                    g.dtype
                ),
                grads,
            )
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
        """Check the arguments, once for each kind of them that passes. A kind that fails is checked
        again.
        """
        check_train_state("train_step", train_state)
        if (kind := _kind((train_state[:3], batch))) in checked:
            return
        params, state, opt, key, _ = train_state
        check_params("train_step", params)
        check_state("train_step", optimizer, params, opt)
        batch, weights = unweighted(batch)
        sizes = _sizes(batch)
        if weights is not None:
            check_shape("train_step: the weights of a batch", weights, max(sizes, default=0))
        part = jax.tree.map(lambda leaf: one_part(leaf, accumulate), batch)
        refuse_pairs("train_step: the loss", call_loss, part, params, state, key)
        checked.add(kind)

    def key_of(train_state):
        return jax.random.fold_in(train_state.key, train_state.step)

    def value_of(train_state, batch):
        batch, weights = unweighted(batch)
        return objective(
            train_state.params, batch, weights, train_state.state, key_of(train_state), None
        )[0]

    def gradients_of(train_state, batch):
        return gradients(train_state.params, batch, train_state.state, key_of(train_state), None)[0]

    _parts_of_step(step, value=value_of, gradients=gradients_of)
    return step


def augmented(step: Step, change: Callable[[jax.Array, Any], Any]) -> Step:
    """Make the step that changes its batch at random first: `change(key, batch) -> batch`, a pure
    function.

    The key follows from the run's key and the step, so that each step draws its own and a resumed
    run draws the same. Nested `augmented` calls and the step itself draw from different keys. The
    outermost change is applied first.

    Args:
      step: (train_state, batch) -> (train_state, metrics), as from `train_step`.
      change: (key, batch) -> batch. Of a `Weighted` batch, it receives the examples without their
        weights.

    Returns:
      The step on changed batches.
    """

    def on_changed(f):
        def run(train_state, batch):
            own, inner = (
                jax.random.fold_in(train_state.key, purpose) for purpose in (_CHANGE, _INSIDE)
            )
            batch, weights = unweighted(batch)
            batch = change(jax.random.fold_in(own, train_state.step), batch)
            return f(
                train_state._replace(key=inner),
                batch if weights is None else Weighted(batch, weights),
            )

        return run

    inside = on_changed(step)

    def changed(train_state, batch):
        check_train_state("augmented", train_state)
        new, metrics = inside(train_state, batch)
        return new._replace(key=train_state.key), metrics

    return _parts_of_step(
        changed, **{name: on_changed(f) for name, f in getattr(step, "parts", {}).items()}
    )


# These numbers separate the keys of a change and of the step inside it from the keys of steps,
# which are small numbers.
_CHANGE, _INSIDE = 0x63686E67, 0x696E7369


def _parts_of_step(step: Any, **parts: Callable[..., Any]) -> Step:
    """Attach what a step consists of, functions (train_state, batch) -> value, for whoever wants to
    look into it.
    """
    step.parts = parts
    return step


def _kind(args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple(
        (np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves
    )


def _parts(outputs: Any, state: Any, *, stateful: bool) -> tuple[Any, Any, Mapping[str, Any]]:
    """What a loss returned as (value, state, metrics)."""
    outputs = (
        outputs if isinstance(outputs, tuple) and not isinstance(outputs, Weighted) else (outputs,)
    )
    value, *rest = outputs
    if stateful and not rest:
        raise TypeError(
            "train_step: a loss with `state` returns (value, new_state) or (value, new_state, "
            "metrics)"
        )
    if stateful:
        state, *rest = rest
    metrics = rest[0] if rest else {}
    if clash := {"loss", "weight", "skipped"} & set(
        metrics if isinstance(metrics, Mapping) else ()
    ):
        raise ValueError(
            f"train_step: a metric is called {sorted(clash)[0]!r}, a name that the step itself "
            "gives; use another"
        )
    if len(rest) > 1 or not isinstance(metrics, Mapping):
        form = "(value, new_state, metrics)" if stateful else "(value, metrics)"
        raise TypeError(
            f"train_step: a loss returns a scalar or {form} with a dict of metrics, got "
            f"{len(outputs)} parts"
        )
    return value, state, metrics


def _weighing(value: Any, weights: Any, batch: Any) -> tuple[Any, Any]:
    """The value of a loss, and the product of the weights of the batch and of the loss; None if
    there are no weights.
    """
    own = None
    if isinstance(value, Weighted):
        value, own = value
        if np.ndim(value) != 1:
            raise ValueError(
                "train_step: a Weighted loss has one number per example [B], got shape "
                f"{list(np.shape(value))}"
            )
        check_shape("train_step: the weights of the loss", own, np.shape(value)[0])
    if weights is None and own is None:
        return value, None
    if not np.ndim(value):
        raise ValueError(
            "train_step: with weights the loss must be one value per example [B], got a scalar; "
            "return it before its mean is taken"
        )
    factors = [
        jnp.asarray(w, jnp.result_type(w, jnp.float32)) for w in (weights, own) if w is not None
    ]
    weights = jax.lax.stop_gradient(factors[0] * factors[1] if len(factors) == 2 else factors[0])
    # A traced value cannot raise an error, so invalid weights make the loss NaN.
    return value, jnp.where((weights >= 0).all() & jnp.isfinite(weights.sum()), weights, jnp.nan)


def _mean(name: str, value: Any, batch: Any, weights: jax.Array | None) -> jax.Array:
    """The (weighted) mean of one value per example. A scalar is returned unchanged."""
    value = jnp.asarray(value)
    what = "the loss" if name == "loss" else f"metric '{name}'"
    if jnp.iscomplexobj(value):
        raise TypeError(f"train_step: {what} must be real, got {value.dtype}")
    sizes = _sizes(batch)
    if not value.ndim:
        return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(jnp.float32)
    if value.ndim > 1 or len(value) not in sizes:
        raise ValueError(
            f"train_step: {what} must be a scalar or one value per example {[*sizes]}, got shape "
            f"{value.shape}; take its mean"
        )
    value = jnp.asarray(value, jnp.result_type(value, jnp.float32))
    if weights is None:
        return value.mean()
    shares = weights / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)
    return (value * shares.astype(value.dtype)).sum()


def _sizes(batch: Any) -> set[int]:
    """The lengths of the leading axes in a batch."""
    return {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}
