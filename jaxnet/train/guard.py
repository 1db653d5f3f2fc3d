"""Optimizers that skip steps whose loss or gradients are not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.train.finite import all_finite, keep
from jaxnet.train.optimizers import as_optax

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    import optax

    from jaxnet.train.optimizers import Optimizer

__all__ = ["Guarded", "guarded"]

# The largest power of two in float32.
_LARGEST_SCALE = 2.0**127


class Guarded(NamedTuple):
    """The state of `guarded`.

    Attributes:
      inner: the state of the optimizer inside.
      scale: the factor of the loss, float32 [].
      clean: steps since the scale changed, int32 [].
      skipped: steps skipped in a row until now, int32 [].
      in_all: steps skipped since the start, int32 [].
      limit: more skipped steps in a row than this are an error, int32 [].
    """

    inner: Any
    scale: jax.Array
    clean: jax.Array
    skipped: jax.Array
    in_all: jax.Array
    limit: jax.Array


def guarded(
    optimizer: Optimizer, *, limit: int = 10, loss_scale: float | None = None, interval: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Skip each step whose loss or gradients are not finite.

    Such a step leaves parameters, state and optimizer as they were, so no NaN is ever applied.
    `train_step` counts it in the metric 'skipped'. More than `limit` such steps in a row are an
    error, which `fit` raises.

    Source: the scaling is that of Micikevicius et al., "Mixed Precision Training", ICLR 2018.

    Args:
      optimizer: an optax transformation, a learning rate, or a schedule.
      limit: the most skipped steps in a row; one more is an error.
      loss_scale: for float16, whose gradients underflow: the loss is multiplied by this number,
        such as 2.0**15, and the gradients are divided by it. The scale is halved at each skipped
        step, down to 1 (or `loss_scale`, if that is smaller), and doubled after `interval` steps
        without one, up to 2.0**127.
      interval: steps after which the scale is doubled.

    Returns:
      An optax transformation.

    Raises:
      ValueError: `limit` or `interval` is not an int, or too small, or `loss_scale` is not in
        (0, 2**127].
      TypeError: `optimizer` is not an optimizer.
    """
    import optax

    limit, interval = size_of("guarded: limit", limit, 0), size_of("guarded: interval", interval)
    if loss_scale is not None and not 0 < loss_scale <= _LARGEST_SCALE:
        raise ValueError(f"guarded: loss_scale must be in (0, 2**127], got {loss_scale}")
    inner = optax.with_extra_args_support(as_optax(optimizer))

    def init(params):
        scale = jnp.float32(1.0 if loss_scale is None else loss_scale)
        return Guarded(inner.init(params), scale, *(jnp.int32(n) for n in (0, 0, 0, limit)))

    def update(updates, state, params=None, **extra):
        good = all_finite(updates) & (state.skipped <= state.limit)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
        inner_state = keep(good, inner_state, state.inner)
        scale, clean = state.scale, jnp.where(good, state.clean + 1, 0)
        if loss_scale is not None:
            grown = clean >= interval
            lower = jnp.minimum(scale, jnp.maximum(scale / 2, 1.0))
            upper = jnp.where(grown, jnp.minimum(scale * 2, _LARGEST_SCALE), scale)
            scale = jnp.where(good, upper, lower)
            clean = jnp.where(grown, 0, clean)
        skipped = jnp.where(good, 0, state.skipped + 1)
        return updates, Guarded(
            inner_state, scale, clean, skipped, state.in_all + jnp.where(good, 0, 1), state.limit
        )

    return optax.GradientTransformationExtraArgs(init, update)
