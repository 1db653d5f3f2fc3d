"""Mixtures of experts: a router sends each token to a few of many feed-forward blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.combinators import vmap
from jaxnet.core import Layer, check_input, interned, layer, wire
from jaxnet.layers import initializers
from jaxnet.layers.feed_forward import gated_mlp
from jaxnet.layers.linear import dense
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import widened

__all__ = ["moe"]


@interned
def moe(
    experts: int,
    top: int,
    hidden: int,
    features: int,
    *,
    activation: Callable[..., Any] = jax.nn.silu,
    normalize: bool = True,
    capacity: float | None = None,
    ragged: bool = False,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
) -> Layer:
    """Mix the outputs of the best experts: y = sum over the top experts e of g_e(x) expert_e(x).

    g = softmax(W x), of which the `top` largest are kept. The experts are copies of `gated_mlp`.

    There are three forms with the same parameters and, if no token is dropped, the same numbers.
    The dense form computes every expert for every token. With `ragged`, tokens are sorted by expert
    and each expert computes its own (`jax.lax.ragged_dot`); no token is dropped. With `capacity`,
    an expert takes at most ceil(top T capacity / experts) tokens of each sequence of T, and drops
    later ones.

    Children: `router`, a dense layer; `experts`; and `aux`, the identity of a dict of two loss
    terms, which `capture(net, "**/aux")` returns. "balance" is experts * sum over e of (share of
    tokens with expert e) * (mean gate of e), which is `top` if the load is even. "z" is the mean of
    logsumexp(W x)^2.

    Source: Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017; Fedus, Zoph & Shazeer,
    "Switch Transformers", JMLR 23, 2022 (balance, capacity); Zoph et al., "ST-MoE", 2022 (z).

    Args:
      experts: the number of experts.
      top: the number of experts of a token.
      hidden: the number of features inside an expert.
      features: the number of features of the output.
      activation: the activation of the experts.
      normalize: whether the kept gates are divided by their sum, as in Mixtral.
      capacity: the places of an expert over those of an even load; None drops no token.
      ragged: whether tokens are sorted by expert.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, x [..., T, C] -> y [..., T, features].

    Raises:
      ValueError: a size is not a positive integer, `top` exceeds `experts`, or both `capacity` and
        `ragged` are given; in `apply`, C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    label = f"moe({experts}, {top})"
    experts, top = size_of(f"{label}: experts", experts), size_of(f"{label}: top", top)
    hidden, features = size_of(f"{label}: hidden", hidden), size_of(f"{label}: features", features)
    if top > experts:
        raise ValueError(f"{label}: top must be at most experts, got {top=} and {experts=}")
    if capacity is not None and (ragged or not capacity > 0):
        raise ValueError(
            f"{label}: capacity must be positive, and ragged drops no token, got {capacity=} and "
            f"{ragged=}"
        )
    one = gated_mlp(hidden, features, activation=activation, kernel_init=kernel_init)
    if ragged:
        many = _ragged_experts(experts, hidden, features, activation, kernel_init)
    else:
        many = vmap(one, experts, in_axes=None if capacity is None else 0)
    children = {
        "router": dense(experts, bias=False, kernel_init=kernel_init),
        "experts": many,
        "aux": identity,
    }

    def mix(f, x):
        check_input(label, x, rank=2)
        logits = widened(f.router(x))
        gates = jax.nn.softmax(logits)
        best, chosen = jax.lax.top_k(gates, top)
        if normalize:
            best = best / jnp.broadcast_to(best.sum(-1, keepdims=True), best.shape)
        f.aux(_losses(logits, gates, chosen))
        if ragged:
            return _by_sorting(f.experts, x, best, chosen, experts)
        # [..., T, experts]: the gate of each pair, zero for those that are not chosen.
        picked = jax.nn.one_hot(chosen, experts, dtype=best.dtype)
        weights = (best[..., None] * picked).sum(-2)
        if capacity is None:
            y = f.experts(x)
            return jnp.einsum("...e,e...f->...f", weights.astype(x.dtype), y)
        places = math.ceil(top * x.shape[-2] * capacity / experts)
        return _by_capacity(f.experts, x, weights, picked.sum(-2), min(places, x.shape[-2]))

    mix.__name__ = label
    return wire(**children)(mix)


def identity(losses):
    return losses


def _losses(logits, gates, chosen):
    tokens = tuple(range(gates.ndim - 1))
    count = gates.shape[-1]
    shares = jax.nn.one_hot(chosen, count, dtype=gates.dtype).sum(-2).mean(tokens)
    balance = count * jnp.sum(shares * gates.mean(tokens))
    return {"balance": balance, "z": jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()}


def _by_capacity(run, x, weights, picked, places: int):
    """Each expert has `places` rows for the tokens of a sequence: GShard's dispatch by products."""
    rank = jnp.cumsum(picked, -2) - picked
    slots = jax.nn.one_hot(rank.astype(jnp.int32), places, dtype=x.dtype)
    dispatch = slots * picked[..., None].astype(x.dtype)
    y = run(jnp.einsum("...tep,...tc->e...pc", dispatch, x))
    return jnp.einsum("...tep,e...pf->...tf", dispatch * weights[..., None].astype(x.dtype), y)


def _by_sorting(run, x, best, chosen, experts: int):
    """Rows sorted by expert, [N top, C], and the number of rows of each expert."""
    top = chosen.shape[-1]
    flat, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    y = run(flat[order // top], sizes)
    y = y * jnp.broadcast_to(best.reshape(-1)[order][:, None].astype(y.dtype), y.shape)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    y = y.reshape(-1, top, y.shape[-1]).sum(1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@interned
def _ragged_experts(experts, hidden, features, activation, kernel_init) -> Layer:
    """`vmap(gated_mlp(...), experts)` for rows that are sorted by expert: (x, sizes) -> y."""
    gate, down = (_ragged_dense(experts, n, kernel_init) for n in (hidden, features))

    def feed(f, x, sizes):
        return f.down(f.act(f.gate(x, sizes)) * f.up(x, sizes), sizes)

    feed.__name__ = f"ragged_experts({experts})"
    return wire(gate=gate, up=gate, act=activation, down=down)(feed)


@interned
def _ragged_dense(experts, features, kernel_init) -> Layer:
    label = f"ragged_dense({experts}, {features})"

    def init(key, x, sizes):
        keys = jax.random.split(key, experts)
        shape = (x.shape[-1], features)
        return {"kernel": jnp.stack([kernel_init(key, shape, x.dtype) for key in keys])}

    def fn(params, x, sizes):
        check_real(label, params)
        kernel = params["kernel"]
        check_input(label, x, width=kernel.shape[1], like=kernel)
        return jax.lax.ragged_dot(x, kernel, sizes)

    return layer(init, fn, label=label)
