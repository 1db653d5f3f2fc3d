"""Averages of the parameters over the steps of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.train.optimizers import as_optax, find

if TYPE_CHECKING:
    import optax

    from jaxnet.train.optimizers import Optimizer

__all__ = ["Averaged", "averaged", "averaged_params"]


class Averaged(NamedTuple):
    """The state of `averaged`.

    Attributes:
      inner: the state of the optimizer inside.
      params: the average of the parameters, like the parameters.
      updates: the number of updates, int32 [].
    """

    inner: Any
    params: Any
    updates: jax.Array


def averaged(optimizer: Optimizer, decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Keep a moving average of the parameters in the optimizer's state.

    After update t, a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)). With this ramp,
    the average forgets the initial parameters. The training itself is unchanged, and
    `averaged_params(train_state)` reads the average. Half-precision parameters are averaged in
    float32.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992. The
    ramp is that of tf.train.ExponentialMovingAverage(num_updates).

    Args:
      optimizer: an optax transformation, a learning rate, or a schedule.
      decay: the largest weight of the previous average, in [0, 1).

    Returns:
      An optax transformation.

    Raises:
      ValueError: `decay` is not in [0, 1).
      TypeError: `optimizer` is not an optimizer.
    """
    import optax

    if not 0 <= decay < 1:
        raise ValueError(f"averaged: decay must be in [0, 1), got {decay}")
    inner = optax.with_extra_args_support(as_optax(optimizer))

    def init(params):
        copies = jax.tree.map(
            lambda w: jnp.array(w, jnp.promote_types(w.dtype, jnp.float32), copy=True), params
        )
        return Averaged(inner.init(params), copies, jnp.int32(0))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("averaged: update needs the parameters, update(grads, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        t = state.updates.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(
            lambda a, w: a + (1 - d).astype(a.dtype) * (w.astype(a.dtype) - a), state.params, new
        )
        return updates, Averaged(inner_state, mean, state.updates + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(train_state: Any) -> Any:
    """Return the averaged parameters of a run whose optimizer is `averaged`.

    Args:
      train_state: the train state.

    Returns:
      The averages, like the parameters and in their dtypes.

    Raises:
      ValueError: the optimizer keeps no average.
    """
    found = find(train_state.opt, Averaged)
    if found is None:
        raise ValueError("averaged_params: the optimizer keeps no average; wrap it in `averaged`")
    return jax.tree.map(lambda a, w: a.astype(w.dtype), found.params, train_state.params)
