"""Weights of attention from scores: softmax with masks and sinks, and a bound of the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, describe, interned, layer, no_params
from jaxnet.layers import initializers
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import widened

__all__ = ["masked_softmax", "sink_softmax", "soft_cap"]


@interned
def masked_softmax() -> Layer:
    """Compute weights, w = exp(s) / sum of exp(s) over the allowed keys.

    If no key is allowed, all weights are zero, and so are their gradients. The weights are at least
    float32.

    Twins: torch.nn.Softmax, keras.layers.Softmax.

    Returns:
      The layer, (scores [..., H, T, S], allowed=None) -> weights [..., H, T, S].

    Raises:
      TypeError: in `apply`, the scores are not an array of floats.
    """

    def fn(params, scores, allowed=None):
        check_input("masked_softmax", scores)
        return _softmax(_hidden(scores, allowed)).astype(scores.dtype)

    return layer(no_params, fn, label="masked_softmax")


@interned
def sink_softmax(*, sink_init: Callable[..., Any] = initializers.zeros) -> Layer:
    """Compute weights with a learned sink, w = exp(s) / (exp(sink_h) + sum of exp(s)).

    Parameters: sinks [H], one score per head of a key that has no value.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025; Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", ICLR 2024.

    Args:
      sink_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, (scores [..., H, T, S], allowed=None) -> weights [..., H, T, S].

    Raises:
      TypeError: in `apply`, the scores are not an array of floats.
      ValueError: in `apply`, H differs from that at `init`.
    """
    label = "sink_softmax"

    def init(key, scores, allowed=None):
        check_input(label, scores, rank=3)
        return {"sinks": sink_init(key, scores.shape[-3:-2], scores.dtype)}

    def fn(params, scores, allowed=None):
        check_real(label, params)
        check_input(label, scores, rank=3)
        sinks = params["sinks"]
        if scores.shape[-3] != sinks.shape[0]:
            raise ValueError(
                f"{label}: there must be {sinks.shape[0]} heads, got {describe(scores)}"
            )
        sinks = sinks.astype(scores.dtype).reshape((1,) * (scores.ndim - 3) + (-1, 1, 1))
        # The sum has the sharding of the scores.
        column = jnp.zeros_like(scores.sum(-1, keepdims=True))
        column = column + jnp.broadcast_to(sinks, column.shape)
        joined = jnp.concatenate([_hidden(scores, allowed), column], -1)
        return _softmax(joined)[..., :-1].astype(scores.dtype)

    return dataclasses.replace(layer(init, fn, label=label), wide=("sinks",))


def _hidden(scores, allowed):
    if allowed is None:
        return scores
    allowed = allowed.reshape((1,) * (scores.ndim - allowed.ndim) + allowed.shape)
    return jnp.where(jnp.broadcast_to(allowed, scores.shape), scores, -jnp.inf)


# The derivative needs the weights only. It is finite for rows without a key, which are all zero.
@jax.custom_jvp
def _softmax(scores):
    scores = widened(scores)
    # A row of -inf has no largest score to subtract.
    largest = jnp.maximum(
        scores.max(-1, keepdims=True, initial=-jnp.inf), jnp.finfo(scores.dtype).min
    )
    e = jnp.exp(scores - jnp.broadcast_to(jax.lax.stop_gradient(largest), scores.shape))
    total = e.sum(-1, keepdims=True)
    return e * jnp.broadcast_to(1 / jnp.where(total == 0, 1, total), e.shape)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    weights = _softmax(*primals)
    weighted = weights * tangents[0].astype(weights.dtype)
    return weights, weighted - weights * jnp.broadcast_to(
        weighted.sum(-1, keepdims=True), weights.shape
    )


def soft_cap(bound: float) -> Callable[[jax.Array], jax.Array]:
    """Bound scores smoothly: y = bound tanh(x / bound).

    Source: Gemma Team, "Gemma 2", 2024, arXiv:2408.00118.

    Args:
      bound: the bound.

    Returns:
      A function of scores [...], for `dot_product_attention(cap=...)` or as a layer.

    Raises:
      ValueError: the bound is not positive.
    """
    if not bound > 0:
        raise ValueError(f"soft_cap: the bound must be positive, got {bound}")

    def capped(scores):
        return bound * jnp.tanh(scores / bound)

    capped.__name__ = f"soft_cap({bound:g})"
    return capped
