"""The core of attention: y = softmax(q k^T scale) v for each head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.core import Layer, check_input, describe, interned, layer, no_params, wire
from jaxnet.layers.masks import Mask, as_mask
from jaxnet.layers.noise import dropout as dropout_layer
from jaxnet.layers.softmaxes import masked_softmax

__all__ = ["dot_product_attention", "fused_attention"]


@interned
def dot_product_attention(
    *,
    scale: float | None = None,
    cap: Callable[..., Any] | None = None,
    softmax: Layer | Callable[..., Any] | None = None,
    dropout: float = 0.0,
    precision: Any = None,
) -> Layer:
    """Attend to keys: y[t, h] = sum over s of w[h, t, s] v[s, g], w = softmax(q k^T scale + bias).

    The h-th of H heads of queries uses the key/value head g = h // (H / G) of G: G = H is
    multi-head, 1 < G < H grouped-query, G = 1 multi-query attention. Scores and softmax are at
    least float32. A query that may attend to no key gives zeros.

    Children: `cap`, a function of the scaled scores; `softmax`, (scores, allowed) -> weights;
    `weights`, the identity of the weights [..., H, T, S], for `capture(net, "**/weights")`; `drop`,
    dropout of the weights.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Ainslie et al., "GQA", EMNLP
    2023.

    Twins: flax.linen.dot_product_attention, flax.nnx.dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention.

    Args:
      scale: the factor of the scores; 1 / sqrt(D) by default.
      cap: a function of the scaled scores, such as `soft_cap(50.0)`.
      softmax: `masked_softmax()` by default, or `sink_softmax()`.
      dropout: the rate at which weights are dropped in training.
      precision: the precision of the products, as in `jax.numpy.matmul`.

    Returns:
      The layer, (q [..., T, H, D], k [..., S, G, D], v [..., S, G, E], mask=None, bias=None,
      queries=None, keys=None) -> y [..., T, H, E]. `queries` and `keys` are positions, 0, 1, ... by
      default.

    Raises:
      ValueError: in `apply`, the shapes do not match, or G does not divide H.
      TypeError: in `apply`, q, k and v are not arrays of floats of one dtype.
    """
    label = "dot_product_attention"
    children = {
        "cap": identity if cap is None else cap,
        "softmax": masked_softmax() if softmax is None else softmax,
        "weights": identity,
    }
    if dropout:
        children["drop"] = dropout_layer(dropout)

    def attend(f, q, k, v, mask=None, bias=None, queries=None, keys=None):
        check_heads(label, q, k, v)
        mask = as_mask(mask)
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        scores = f.cap(_scores(q, k, factor, precision))
        for more in (bias, mask.bias):
            scores = scores if more is None else _plus(scores, more)
        weights = f.softmax(scores, pairs_of(mask, q, k, queries, keys)).astype(v.dtype)
        weights = f.weights(weights)
        return _mixed(f.drop(weights) if dropout else weights, v, precision)

    attend.__name__ = label
    return wire(**children)(attend)


def identity(x):
    return x


@interned
def fused_attention(implementation: str | None = None, *, scale: float | None = None) -> Layer:
    """Attend to keys by `jax.nn.dot_product_attention`, which has a cuDNN kernel for GPUs.

    It takes the place of `dot_product_attention`: `jaxnet.replace(net, "**/core",
    fused_attention("cudnn"))`. Causal masks, windows and lengths reach the kernel as such, other
    masks as arrays. The weights never exist as an array, so `capture` does not find them.

    Twins: flax.nnx.dot_product_attention, torch.nn.functional.scaled_dot_product_attention.

    Args:
      implementation: "cudnn", "xla" or None, as in `jax.nn.dot_product_attention`. cuDNN computes
        in float16 and bfloat16 only.
      scale: the factor of the scores; 1 / sqrt(D) by default.

    Returns:
      The layer, with the inputs of `dot_product_attention`, q [..., T, H, D] -> y [..., T, H, D].

    Raises:
      ValueError: `implementation` is another value; in `apply`, the shapes do not match.
      TypeError: in `apply`, q, k and v are not arrays of floats of one dtype.
    """
    label = "fused_attention"
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(
            f"{label}: implementation must be 'cudnn', 'xla' or None, got {implementation!r}"
        )

    def fn(params, q, k, v, mask=None, bias=None, queries=None, keys=None):
        check_heads(label, q, k, v)
        mask, lead = as_mask(mask), q.shape[:-3]
        structure: dict[str, Any] = {}
        rest = mask
        if queries is None and keys is None:
            rest = dataclasses.replace(mask, causal=False, before=None, after=None, lengths=None)
            structure["is_causal"] = mask.causal
            if mask.before is not None or mask.after is not None:
                ends = (mask.before, mask.after)
                sizes = tuple(k.shape[-3] + q.shape[-3] if n is None else n for n in ends)
                structure["local_window_size"] = sizes
            if mask.lengths is not None:
                lengths = jnp.broadcast_to(mask.lengths, lead).reshape(-1)
                structure["key_value_seq_lengths"] = lengths.astype(jnp.int32)
        allowed = pairs_of(rest, q, k, queries, keys)
        biases = [b for b in (bias, mask.bias) if b is not None]
        added = functools.reduce(_plus, biases) if biases else None
        shape = (q.shape[-2], q.shape[-3], k.shape[-3])
        y = jax.nn.dot_product_attention(
            *(_one_batch_axis(x, 3) for x in (q, k, v)),
            bias=None if added is None else _batched(added, lead, shape),
            mask=None if allowed is None else _batched(allowed, lead, shape),
            scale=scale,
            implementation=implementation,  # pyright: ignore[reportArgumentType]
            **structure,
        )
        return _without_empty_rows(y.reshape(*q.shape[:-1], v.shape[-1]), mask, q, k, queries, keys)

    name = f"{label}({implementation!r})" if implementation else label
    return layer(no_params, fn, label=name)


def _one_batch_axis(x, rank: int):
    return x.reshape(math.prod(x.shape[:-rank]), *x.shape[-rank:])


def _batched(pairs, lead, shape):
    """Pairs that broadcast to [*lead, heads, T, S] as [batch, heads or 1, T, S]."""
    heads = pairs.shape[-3] if pairs.ndim > 2 else 1
    full = (*lead, heads, *shape[1:])
    pairs = pairs.reshape((1,) * (len(full) - pairs.ndim) + pairs.shape)
    return _one_batch_axis(jnp.broadcast_to(pairs, full), 3)


def _without_empty_rows(y, mask: Mask, q, k, queries, keys):
    """y with zeros for the queries that may attend to no key. Other softmaxes give them a mean."""
    allowed = pairs_of(mask, q, k, queries, keys)
    never = queries is None and keys is None and mask.lengths is None and not mask.segments
    if allowed is None or (never and mask.allowed is None and q.shape[-3] <= k.shape[-3]):
        return y
    some = jnp.swapaxes(_with_heads(allowed).any(-1), -1, -2)[..., None]
    some = jnp.broadcast_to(some.reshape((1,) * (y.ndim - some.ndim) + some.shape), y.shape)
    return jnp.where(some, y, 0)


def _with_heads(pairs):
    return pairs if pairs.ndim > 2 else pairs[None]


def check_heads(label: str, q: Any, k: Any, v: Any) -> None:
    """Check the inputs of a core of attention.

    Args:
      label: the name of the layer in errors.
      q: queries, [..., T, H, D].
      k: keys, [..., S, G, D].
      v: values, [..., S, G, E].

    Raises:
      TypeError: one is not an array of floats, or they have several dtypes.
      ValueError: the shapes do not match.
    """
    check_input(label, q, rank=3)
    for x in (k, v):
        check_input(label, x, rank=3, like=q)
    same = q.shape[:-3] == k.shape[:-3] and k.shape[:-1] == v.shape[:-1]
    if not same or q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{label}: q [..., T, H, D], k [..., S, G, D] and v [..., S, G, E] must agree, and G "
            f"must divide H, got {describe(q)}, {describe(k)} and {describe(v)}"
        )


def pairs_of(mask: Mask, q: Any, k: Any, queries: Any, keys: Any) -> Any:
    """Compute which keys each query may attend to.

    Args:
      mask: the mask.
      q: queries, [..., T, H, D].
      k: keys, [..., S, G, D].
      queries: their positions, [T] or [..., T]; None for 0, 1, ...
      keys: their positions, [S] or [..., S]; None for 0, 1, ...

    Returns:
      Bools, which broadcast to [..., H, T, S]; None if all pairs are allowed.
    """
    queries = jax.lax.iota(jnp.int32, q.shape[-3]) if queries is None else queries
    keys = jax.lax.iota(jnp.int32, k.shape[-3]) if keys is None else keys
    return mask.pairs(queries, keys)


# The equations are jitted, so that JAX traces and differentiates each once for all layers of one
# shape. `inline` leaves no call in the program of a network.


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _scores(q, k, scale, precision):
    """Scores [..., H, T, S] in at least float32."""
    t, h, g = q.shape[-3], q.shape[-2], k.shape[-2]
    q = _joined_groups(jnp.moveaxis(q, -3, -2), g)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # A factor on the queries costs less than one on the scores. Narrow queries would round it.
    early = q.dtype == wide
    q = q * jnp.asarray(scale, q.dtype) if early else q
    k = jnp.moveaxis(k, -3, -1)
    scores = jnp.matmul(q, k, precision=precision, preferred_element_type=wide)
    scores = scores if early else scores * jnp.asarray(scale, wide)
    return _split_groups(scores, h, t)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _mixed(weights, v, precision):
    """Sums of values, [..., T, H, E]."""
    h, t, g = weights.shape[-3], weights.shape[-2], v.shape[-2]
    y = jnp.matmul(_joined_groups(weights, g), jnp.moveaxis(v, -3, -2), precision=precision)
    return jnp.moveaxis(_split_groups(y, h, t), -2, -3)


# The heads of a group are further rows of one product. If arrays are sharded, JAX can split an axis
# or merge two, but not both in one step.


def _joined_groups(x, groups: int):
    """[..., H, T, D] as [..., G, H / G * T, D]."""
    (heads, t, d), lead = x.shape[-3:], x.shape[:-3]
    if heads == groups:
        return x
    x = x.reshape(*lead, groups, heads // groups, t, d)
    return x.reshape(*lead, groups, heads // groups * t, d)


def _split_groups(x, heads: int, t):
    """The inverse of `_joined_groups`."""
    (groups, _, d), lead = x.shape[-3:], x.shape[:-3]
    if heads == groups:
        return x
    return x.reshape(*lead, groups, heads // groups, t, d).reshape(*lead, heads, t, d)


def _plus(scores, bias):
    rank = max(scores.ndim, bias.ndim)
    a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (scores, bias))
    return a + b.astype(jnp.promote_types(a.dtype, jnp.float32))
