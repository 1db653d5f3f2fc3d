"""Noise in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, interned, layer, no_params

__all__ = ["dropout"]


@interned
def dropout(rate: float) -> Layer:
    """Zero each element with probability `rate` in training.

    y = x m / (1 - rate), m ~ Bernoulli(1 - rate), so the mean of y is x. Evaluation is the identity
    and needs no key.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014. There, evaluation is scaled instead of
    training.

    Args:
      rate: the probability to zero an element, in [0, 1).

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: the rate is not in [0, 1); in `apply`, training has no key.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate is the probability to drop, in [0, 1), got {rate}")

    def fn(params, x, key, train):
        check_input(f"dropout({rate})", x, rank=0)
        if not train or rate == 0:
            return x
        if key is None:
            raise ValueError(f"dropout({rate}): training draws random numbers: pass key= to apply")
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0)

    return layer(no_params, fn, label=f"dropout({rate})")
