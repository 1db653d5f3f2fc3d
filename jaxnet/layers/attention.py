"""Multi-head attention: projections, positions, mask, cache and core, each a child."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, wire
from jaxnet.layers import initializers
from jaxnet.layers.attention_core import dot_product_attention
from jaxnet.layers.cache import kv_cache
from jaxnet.layers.linear import dense
from jaxnet.layers.masks import Mask, as_mask
from jaxnet.layers.positions import positions_of

__all__ = ["multi_head_attention"]


@interned
def multi_head_attention(
    features: int,
    heads: int,
    *,
    groups: int | None = None,
    size: int | None = None,
    bias: bool = True,
    out_bias: bool | None = None,
    norm: Layer | Callable[..., Any] | None = None,
    positions: Layer | Callable[..., Any] | None = None,
    position_bias: Layer | Callable[..., Any] | None = None,
    mask: Mask | Callable[..., Any] | None = None,
    core: Layer | Callable[..., Any] | None = None,
    cached: bool = False,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
) -> Layer:
    """Attend with several heads: y = W_o [head_1, ..., head_H] + b_o.

    head_h = softmax(q_h k_g^T / sqrt(D)) v_g, where q = W_q x, k = W_k c, v = W_v c, and c is x or
    the context of cross-attention. Groups of H / G query heads share a key/value head g.

    Children, each of which `replace` exchanges by path: `query`, `keys`, `values` and `out`, dense
    layers; `query_norm` and `keys_norm`, of the features of a head; `positions`, (q or k, at) ->
    rotated; `position_bias`, (positions of queries, of keys) -> bias of the scores; `mask`, a Mask;
    `core`, `dot_product_attention()` by default; `cache`, `kv_cache()`, only with `cached`.

    Parameters: query/kernel [C, H D], keys/kernel and values/kernel [C, G D], out/kernel [H D,
    features], and their biases.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Ainslie et al., "GQA", EMNLP
    2023.

    Twins: flax.linen.MultiHeadDotProductAttention, equinox.nn.MultiheadAttention,
    keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention,
    torch.nn.MultiheadAttention, haiku.MultiHeadAttention.

    Args:
      features: the number of features of the output.
      heads: H, the number of query heads.
      groups: G, the number of key/value heads; H by default. 1 is multi-query attention.
      size: D, the number of features of a head; features / heads by default.
      bias: False leaves out the biases of query, keys and values.
      out_bias: the same for the output; `bias` by default.
      norm: a layer that normalizes the features of each head of q and k, with its own parameters
        for q and for k. For a norm over all heads, replace `query` by a chain of dense and norm.
      positions: a layer such as `rotary()`, of q or k [..., T, heads, D] and their positions.
      position_bias: a layer such as `alibi(heads)` or `relative_bias(heads)`.
      mask: a mask such as `causal() & window(127)`, for all calls.
      core: the core of the attention.
      cached: whether the layer takes `cache=` and returns (y, cache). Its parameters are the same.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, (x [..., T, C], context=None [..., S, C'], at=None, mask=None) -> y [..., T,
      features]. `at` is the position of the first token, a scalar, or of all, [T] or [..., T].
      `mask` is combined with that of the layer.

    Raises:
      ValueError: a size is not a positive integer, or does not divide as it must; in `apply`, a
        shape does not match.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> net = multi_head_attention(8, 4, groups=2, bias=False)
      >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0), jnp.ones((2, 5, 8))))["keys"]
      {'kernel': (8, 4)}
    """
    label = f"multi_head_attention({features}, {heads})"
    features = size_of(f"{label}: features", features)
    heads = size_of(f"{label}: heads", heads)
    groups = heads if groups is None else size_of(f"{label}: groups", groups)
    if heads % groups:
        raise ValueError(f"{label}: groups must divide heads, got {groups=}")
    if size is None and features % heads:
        raise ValueError(f"{label}: heads must divide features, or pass size=, got {features=}")
    size = features // heads if size is None else size_of(f"{label}: size", size)

    def project(count, with_bias):
        return dense(count, bias=with_bias, kernel_init=kernel_init)

    children = {
        "query": project(heads * size, bias),
        "keys": project(groups * size, bias),
        "values": project(groups * size, bias),
        "query_norm": identity if norm is None else norm,
        "keys_norm": identity if norm is None else norm,
        "positions": no_positions if positions is None else positions,
        "position_bias": no_bias if position_bias is None else position_bias,
        "mask": _NOTHING if mask is None else mask,
        **({"cache": kv_cache()} if cached else {}),
        "core": dot_product_attention() if core is None else core,
        "out": project(features, bias if out_bias is None else out_bias),
    }

    # The number of heads of queries, keys and values.
    counts = (heads, groups, groups)

    def attend(f, x, context=None, *, at=None, mask=None, cache=None):
        source = x if context is None else context
        check_input(label, x, rank=2)
        check_input(label, source, rank=2)
        projected = zip((f.query(x), f.keys(source), f.values(source)), counts, strict=True)
        q, k, v = (y.reshape(*y.shape[:-1], count, size) for y, count in projected)
        queries = positions_of(label, at, x.shape[-2], x.ndim - 1)
        keys = queries if context is None else positions_of(label, None, k.shape[-3], 1)
        q = f.positions(f.query_norm(q), queries)
        k = f.positions(f.keys_norm(k), keys)
        hidden = f.mask() & as_mask(mask)
        plain = at is None and not cached
        if cached:
            k, v, keys, new = f.cache(k, v, keys, cache)
            hidden = hidden if cache is None else hidden & _FILLED
        elif cache is not None:
            raise TypeError(f"{label}: only a layer with cached=True takes cache=")
        bias = f.position_bias(queries, keys)
        told = {} if plain else {"queries": queries, "keys": keys}
        y = f.core(q, k, v, hidden, bias, **told)
        y = f.out(y.reshape(*y.shape[:-2], heads * size))
        return (y, new) if cached else y

    attend.__name__ = label
    return wire(**children)(attend)


_NOTHING, _FILLED = Mask(), Mask(filled=True)


def identity(x):
    return x


def no_positions(x, at):
    return x


def no_bias(queries, keys):
    return None
