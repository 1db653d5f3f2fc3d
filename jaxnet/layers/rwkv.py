"""RWKV-7: mixing over time by a matrix-valued state, and over channels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.combinators import chain
from jaxnet.core import Layer, check_input, interned, layer, wire
from jaxnet.layers import initializers
from jaxnet.layers.gates import check_carry, zeros_beside
from jaxnet.layers.linear import dense
from jaxnet.layers.parameters import check_real
from jaxnet.mixed import computed_dtype, widened

__all__ = ["rwkv7_channel_mix", "rwkv7_time_mix"]


@interned
def rwkv7_time_mix(
    features: int,
    *,
    head_size: int = 64,
    rank: int = 32,
    first: bool = False,
    parallel: bool = False,
) -> Layer:
    """Mix over time by a matrix per head, S_t = S_{t-1} (diag(w) - k' (a k')^T) + v k^T, y = S r.

    r, w, k, v, a and the gate g are functions of x_t and x_{t-1}, where p_m = x_t + m (x_{t-1} -
    x_t) with one m for each of them. k' is k times `removal`, of norm 1; k is then scaled by
    1 + (a - 1) `change`. The output is W_o (g (norm(S r) + (r k `bonus`) v)), with the norm and the
    sum for each head. Blocks after the first draw their values towards those of the first, by a
    gate of their own.

    Parameters: receptance, keys, values, output (kernel [D, D]); decay, rate, gate, and without
    `first` blend, maps of low rank (down/kernel [D, rank], up/kernel [rank, D], up/bias [D] but for
    gate); vectors/mix [6, D] for r, w, k, v, a, g; vectors/removal, vectors/change [D];
    vectors/bonus [heads, size]; norm/scale, norm/bias [D].

    Source: Peng et al., "RWKV-7 'Goose' with expressive dynamic state evolution", 2025,
    arXiv:2503.14456.

    Args:
      features: D, the number of features.
      head_size: the number of features of a head, which divides D.
      rank: the rank of the four maps of low rank.
      first: True for the first block, whose values all others receive.
      parallel: True to compute S by an associative scan of matrices, in O(log T) parallel steps
        but T products of matrices; False for a loop, which needs less work.

    Returns:
      The layer, (x [..., T, D], value=None, carry=None) -> (y [..., T, D], value [..., T, D],
      carry). `value` is that of the first block, which the others need and return as it is. The
      carry (x [..., D], S [..., heads, size, size]) continues the sequence; None is zeros.

    Raises:
      ValueError: a size is not a positive integer, or `head_size` does not divide D; in `apply`, an
        input has another shape, or `value` is missing.
      TypeError: in `init` and `apply`, x is not an array of floats.
    """
    features = size_of("rwkv7_time_mix: features", features)
    size = size_of("rwkv7_time_mix: head_size", head_size)
    rank = size_of("rwkv7_time_mix: rank", rank)
    if features % size:
        raise ValueError(
            f"rwkv7_time_mix: head_size must divide the features, got {features=}, head_size={size}"
        )
    label, heads = f"rwkv7_time_mix({features})", features // size
    linear = functools.partial(dense, features, bias=False)

    def low_rank(act: Any = None, **options: Any) -> Layer:
        acts = {} if act is None else {"act": act}
        return chain(down=dense(rank, bias=False), **acts, up=dense(features, **options))

    children: dict[str, Any] = dict(
        receptance=linear(),
        keys=linear(),
        values=linear(),
        output=linear(),
        decay=low_rank(jnp.tanh),
        rate=low_rank(),
        gate=low_rank(jax.nn.sigmoid, bias=False),
        vectors=_vectors(
            label,
            mix=((6, features), 0.5),
            removal=((features,), 0.85),
            change=((features,), 1.0),
            bonus=((heads, size), 0.0),
        ),
        norm=_head_norm(features, 64e-5),
    )

    @wire(**children, **({} if first else {"blend": low_rank()}))
    def rwkv7_time_mix(f, x, value=None, carry=None):
        check_input(label, x, width=features, rank=2)
        old, state = _carry(label, x, carry, heads, size)
        vectors = f.vectors(x)
        r, w, k, v, a, g = _mixed(x, _before(x, old), vectors["mix"])
        w, a, g = -jax.nn.softplus(-f.decay(w)) - 0.5, jax.nn.sigmoid(f.rate(a)), f.gate(g)
        r, k, own = f.receptance(r), f.keys(k), f.values(v)
        if first:
            value = own
        else:
            check_carry(label, value, x.shape, x, "the value of the first block")
            own = own + (value - own) * jax.nn.sigmoid(f.blend(v))
        over_heads = lambda y: y.reshape(*y.shape[:-1], heads, size)  # noqa: E731
        removal = _unit(over_heads(k * _like(vectors["removal"], k)))
        k = k * (1 + (a - 1) * _like(vectors["change"], k))
        r, w, k, v, a = map(over_heads, (r, w, k, own, a))
        y, state = _recall(r, w, k, v, -removal, removal * a, state, parallel)
        bonus = (r * k * _like(vectors["bonus"], k)).sum(-1, keepdims=True) * v
        y = f.norm(y).reshape(x.shape) + bonus.reshape(x.shape)
        return f.output(y * g), value, (x[..., -1, :], state)

    return rwkv7_time_mix


@interned
def rwkv7_channel_mix(features: int, *, hidden: int | None = None) -> Layer:
    """Mix over channels, y = W_v relu(W_k (x_t + mix (x_{t-1} - x_t)))^2.

    Parameters: vectors/mix [D]; keys/kernel [D, hidden]; values/kernel [hidden, D].

    Source: Peng et al., 2025, arXiv:2503.14456.

    Args:
      features: D, the number of features.
      hidden: the width between the two products, 4 D by default.

    Returns:
      The layer, (x [..., T, D], carry=None) -> (y [..., T, D], carry [..., D]). The carry continues
      the sequence; None is zeros.

    Raises:
      ValueError: a size is not a positive integer; in `apply`, an input has another shape.
      TypeError: in `init` and `apply`, x is not an array of floats.
    """
    features = size_of("rwkv7_channel_mix: features", features)
    wide = size_of("rwkv7_channel_mix: hidden", 4 * features if hidden is None else hidden)
    label = f"rwkv7_channel_mix({features})"

    @wire(
        vectors=_vectors(label, mix=((features,), 0.5)),
        keys=dense(wide, bias=False),
        values=dense(features, bias=False),
    )
    def rwkv7_channel_mix(f, x, carry=None):
        check_input(label, x, width=features, rank=2)
        if carry is None:
            carry = zeros_beside(x, x.ndim - 2, (features,))
        check_carry(label, carry, (*x.shape[:-2], features), x, "the carry")
        k = f.keys(x + (_before(x, carry) - x) * _like(f.vectors(x)["mix"], x))
        return f.values(jnp.square(jax.nn.relu(k))), x[..., -1, :]

    return rwkv7_channel_mix


def _vectors(label: str, **shapes: tuple[tuple[int, ...], float]) -> Layer:
    """Parameters of these shapes and first values, in the dtype of the input: x -> params."""

    def init(key, x):
        check_input(label, x)
        return {
            name: value * initializers.ones(key, shape, x.dtype)
            for name, (shape, value) in shapes.items()
        }

    def fn(params, x):
        check_real(label, params)
        like = next(iter(params.values()))
        like = jax.ShapeDtypeStruct(like.shape, computed_dtype(params, like))
        check_input(label, x, like=like)
        return dict(params)

    return dataclasses.replace(layer(init, fn, label=label), wide=tuple(shapes))


def _head_norm(features: int, eps: float) -> Layer:
    """Normalize each head, y [..., heads, size], and scale each of the D features."""

    def init(key, y):
        ones, zeros = initializers.ones, initializers.zeros
        return {"scale": ones(key, (features,), y.dtype), "bias": zeros(key, (features,), y.dtype)}

    def fn(params, y):
        check_real("head_norm", params)
        d = widened(y)
        d = d - d.mean(-1, keepdims=True)
        d = d * jax.lax.rsqrt(jnp.square(d).mean(-1, keepdims=True) + eps)
        d = d.reshape(*y.shape[:-2], features)
        scale, bias = (
            jnp.broadcast_to(params[name].astype(d.dtype), d.shape) for name in ("scale", "bias")
        )
        return (d * scale + bias).astype(y.dtype)

    return dataclasses.replace(layer(init, fn, label="head_norm"), wide=("scale", "bias"))


def _carry(label: str, x: Any, carry: Any, heads: int, size: int) -> Any:
    lead = x.shape[:-2]
    old, state = (None, None) if carry is None else carry
    if old is None:
        old = zeros_beside(x, len(lead), (heads * size,))
    if state is None:
        state = zeros_beside(x, len(lead), (heads, size, size))
    check_carry(label, old, (*lead, heads * size), x, "x of the carry")
    check_carry(label, state, (*lead, heads, size, size), x, "S of the carry")
    return old, state


def _before(x, old):
    """The step before each, x_{t-1}; that of the first is `old`."""
    return jnp.concatenate([old[..., None, :], x[..., :-1, :]], -2)


def _mixed(x, before, mix):
    """x + m (before - x) for each row m of the mix."""
    change = before - x
    return [x + change * _like(m, x) for m in mix]


def _like(vector, y):
    """A parameter beside y, in its dtype; the gradient is summed in that of the parameter."""
    return jnp.broadcast_to(vector, y.shape).astype(y.dtype)


def _unit(k):
    """k / max(|k|, 1e-12) over the last axis, with the gradient 0 for k = 0."""
    wide = widened(k)
    size = jnp.square(wide).sum(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(size, 1e-24))).astype(k.dtype)


@functools.partial(jax.jit, static_argnums=7, inline=True)
def _recall(r, w, k, v, a, b, state, parallel):
    """y_t = S_t r_t with S_t = S_{t-1} (diag(exp(-exp(w))) + a b^T) + v k^T, and the last S.

    All inputs are [..., T, heads, size].
    """
    r, w, k, v, a, b = (jnp.moveaxis(widened(y), -3, 0) for y in (r, w, k, v, a, b))
    form = _in_parallel if parallel else _in_order
    wide, ys = form(r, jnp.exp(-jnp.exp(w)), k, v, a, b, widened(state))
    return jnp.moveaxis(ys, 0, -3).astype(state.dtype), wide.astype(state.dtype)


def _in_order(r, w, k, v, a, b, state):
    def step(state, now):
        r, w, k, v, a, b = now
        removed = jnp.einsum("...vk,...k->...v", state, a)[..., None] * b[..., None, :]
        state = state * w[..., None, :] + removed + v[..., None] * k[..., None, :]
        return state, jnp.einsum("...vk,...k->...v", state, r)

    return jax.lax.scan(step, state, (r, w, k, v, a, b))


def _in_parallel(r, w, k, v, a, b, state):
    def after(first, second):
        return first[0] @ second[0], first[1] @ second[0] + second[1]

    eye = jnp.broadcast_to(jnp.eye(w.shape[-1], dtype=w.dtype), (*w.shape, w.shape[-1]))
    change = eye * w[..., None, :] + a[..., None] * b[..., None, :]
    added = v[..., None] * k[..., None, :]
    products, states = jax.lax.associative_scan(after, (change, added))
    states = states + state @ products
    return states[-1], jnp.einsum("...vk,...k->...v", states, r)
