"""Chunks: a number of steps that is known only at run time, as one compiled call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.train.plan import Plan
from jaxnet.train.sharding import zeros_like_spec
from jaxnet.train.state import TrainState
from jaxnet.train.step_checks import check_metrics, check_outputs, check_same
from jaxnet.train.uneven import on_uneven

__all__ = ["chunk_of"]


def chunk_of(
    step: Callable[..., Any],
    size: int,
    plan_of: Callable[..., Plan],
    *,
    check_finite: bool = True,
) -> Callable[..., Any]:
    """Make one function of up to `size` steps.

    With `check_finite`, if a value that was finite is no longer finite after the n steps, or a loss
    is not, then the function returns the state that it received, and `good` is False from then on.
    The host may thus look later, and still finds the last good state.

    Args:
      step: (train_state, batch) -> (train_state, metrics).
      size: the most steps.
      plan_of: (train_state, first, n, size, *inputs) -> the plan of the call.
      check_finite: whether to check for values that are not finite.

    Returns:
      A function (train_state, good, first, n, *inputs) -> (train_state, good, metrics [size]) that
      takes the steps first .. first + n - 1 of the inputs. One program serves every n.
    """
    # The step is traced once, for its shapes and in the loop.
    step = jax.jit(on_uneven(step), inline=True)

    def run(train_state: TrainState, good: jax.Array, first: jax.Array, n: jax.Array, *inputs: Any):
        plan = plan_of(train_state, first, n, size, *inputs)
        outputs = jax.eval_shape(lambda: step(train_state, plan.batch(0)))
        check_outputs(outputs)
        new, metrics = outputs
        check_same(train_state, new)
        check_metrics(metrics)

        def body(i, carry):
            train_state, values = carry
            train_state, metrics = step(train_state, plan.batch(i))
            # `.at[i].set` would add instructions for a negative i.
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return train_state, jax.tree.map(put, values, metrics)

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
    """Whether a number is no longer finite. Some optimizers keep an infinity on purpose, so only a
    change counts.
    """
    states = [jax.tree.leaves((state.params, state.state, state.opt)) for state in (old, new)]
    floats = [(a, b) for a, b in zip(*states, strict=True) if jnp.issubdtype(a.dtype, jnp.inexact)]
    # inf * 0 and nan * 0 are nan. This sum compiles faster than a count.
    zeros = [jnp.sum(jnp.where(jnp.isfinite(a), b * 0, 0)) for a, b in floats]
    return sum((zero != 0 for zero in zeros), jnp.bool_(False))
