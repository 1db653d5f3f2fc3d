"""The objective of a step: what a loss returns, as one number to differentiate and as metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.train.loss_errors import explained
from jaxnet.train.weighted import Weighted, check_shape

__all__ = ["Objective", "sizes_of"]

# The metrics that a step itself returns.
OWN = ("loss", "weight", "skipped")


class Objective:
    """The mean of a loss over a batch.

    Args:
      loss: as in `train_step`.
    """

    def __init__(self, loss: Callable[..., Any]):
        self.loss = loss
        self.wanted = {"key", "state"} & set(inspect.signature(loss).parameters)

    def call_loss(self, batch: Any, params: Any, state: Any, key: jax.Array) -> Any:
        """Call the loss with the arguments that it takes; return what it returns."""
        stateful = "state" in self.wanted
        offered = {"state": state, "key": key}
        with explained(batch, state if stateful else None):
            return self.loss(params, batch, **{name: offered[name] for name in self.wanted})

    def __call__(
        self, params: Any, batch: Any, weights: Any, state: Any, key: jax.Array, scale: Any
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array], jax.Array]]:
        """Compute the mean over a batch, for `jax.value_and_grad`.

        Args:
          params: the parameters.
          batch: the examples, leaves [B, ...].
          weights: the weights of the batch, [B], or None.
          state: the state of the network.
          key: the PRNG key of the step.
          scale: the factor of the loss, a scalar, or None.

        Returns:
          The mean times `scale`, and (new state, metrics, sum of weights).
        """
        outputs = self.call_loss(batch, params, state, key)
        value, new_state, metrics = _parts(outputs, state, stateful="state" in self.wanted)
        value, weights = _weighing(value, weights)
        means = {
            name: _mean(name, metric, batch, weights)
            for name, metric in {**metrics, "loss": value}.items()
        }
        total = jnp.float32(1) if weights is None else weights.sum()
        mean = means["loss"]
        mean = mean if scale is None else mean * scale.astype(mean.dtype)
        if weights is not None:
            means["weight"] = total
        return mean, (new_state, means, total)


def sizes_of(batch: Any) -> set[int]:
    """The lengths of the leading axes in a batch."""
    return {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}


def _parts(outputs: Any, state: Any, *, stateful: bool) -> tuple[Any, Any, Mapping[str, Any]]:
    """The result of a loss as (value, state, metrics)."""
    several = isinstance(outputs, tuple) and not isinstance(outputs, Weighted)
    value, *rest = outputs if several else (outputs,)
    n = 1 + len(rest)
    if stateful and not rest:
        raise TypeError(
            "train_step: a loss with `state` returns (value, new_state) or (value, new_state, "
            "metrics), got the value alone"
        )
    if stateful:
        state, *rest = rest
    metrics = rest[0] if rest else {}
    if clash := set(OWN) & set(metrics if isinstance(metrics, Mapping) else ()):
        raise ValueError(
            f"train_step: a metric is called {sorted(clash)[0]!r}, a name that the step itself "
            "gives; use another"
        )
    if len(rest) > 1 or not isinstance(metrics, Mapping):
        form = "(value, new_state, metrics)" if stateful else "(value, metrics)"
        raise TypeError(
            f"train_step: a loss returns a scalar or {form} with a dict of metrics, got {n} parts"
        )
    return value, state, metrics


def _weighing(value: Any, weights: Any) -> tuple[Any, Any]:
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
        raise TypeError(
            f"train_step: {what} must be real, got {value.dtype}; take its real part or its "
            "absolute value"
        )
    sizes = sizes_of(batch)
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
