"""Vector quantization with a codebook of moving averages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer, no_params
from jaxnet.layers.normalizing import epsilon
from jaxnet.mixed import widened

__all__ = ["vector_quantize"]


@interned
def vector_quantize(codes: int, *, decay: float = 0.99, eps: float = 1e-5) -> Layer:
    """Replace each vector by the nearest of `codes` vectors, y = e_k, k = argmin |x - e_k|.

    The gradient of y is passed to x unchanged (straight through). Training moves each code to the
    mean of its vectors by moving averages: N_k <- decay N_k + (1 - decay) n_k, m_k <- decay m_k +
    (1 - decay) (sum of its x), e_k = m_k / N_k, with N_k smoothed by `eps` as in the authors' code.
    The commitment loss of the paper is mean (x - stop_gradient(y))^2, which the caller adds.

    State: codes [codes, D] (normal numbers at first), counts [codes], sums [codes, D].

    Source: van den Oord, Vinyals & Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS
    2017, appendix A.1.

    Args:
      codes: the number of vectors in the codebook.
      decay: the share of the old averages, in [0, 1).
      eps: the smoothing of the counts.

    Returns:
      The layer, x [..., D] -> (y [..., D], ids [...]).

    Raises:
      ValueError: an option is out of range; in `init_state`, the key is missing; in `apply`, D
        differs from that of the state.
      TypeError: in `init_state` and `apply`, x is not an array of floats.
    """
    codes = size_of("vector_quantize: codes", codes)
    eps = epsilon("vector_quantize", eps)
    if isinstance(decay, bool) or not 0 <= decay < 1:
        raise ValueError(f"vector_quantize: decay must be in [0, 1), got {decay}")
    label = f"vector_quantize({codes})"

    def init_state(x, key):
        check_input(label, x)
        start = jax.random.normal(key, (codes, x.shape[-1]), jnp.promote_types(x.dtype, "float32"))
        return {"codes": start, "counts": jnp.ones((codes,), start.dtype), "sums": start}

    def fn(params, x, state, train):
        check_input(label, x, width=state["codes"].shape[-1])
        y, ids, moved = _nearest(x, state, decay, eps)
        return (y, ids), moved if train else state

    def outputs(x):
        return x, jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32)

    return layer(no_params, fn, init_state=init_state, outputs=outputs, label=label)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _nearest(x, state: dict[str, Any], decay, eps):
    wide = jax.lax.stop_gradient(widened(x))
    flat, table = wide.reshape(-1, x.shape[-1]), state["codes"].astype(wide.dtype)
    # |x - e|^2 without |x|^2, which is the same for all codes.
    products = jnp.matmul(flat, table.T, precision="highest")
    squares = jnp.square(table).sum(-1)
    ids = jnp.argmin(jnp.broadcast_to(squares, products.shape) - 2 * products, -1)
    ids = ids.astype(jnp.int32)
    chosen = jax.nn.one_hot(ids, table.shape[0], dtype=wide.dtype)
    # The transpose of this product sums over the batch, which a mesh may divide. A product cannot
    # sum over a divided axis there.
    gather = lambda table: jnp.matmul(chosen, table, precision="highest")  # noqa: E731
    nearest, transposed = jax.vjp(gather, table)
    nearest = nearest.reshape(x.shape).astype(x.dtype)
    y = x + jax.lax.stop_gradient(nearest - x)
    counts = decay * state["counts"] + (1 - decay) * chosen.sum(0)
    sums = decay * state["sums"] + (1 - decay) * transposed(flat)[0]
    total = counts.sum()
    smooth = (counts + eps) / (total + table.shape[0] * eps) * total
    moved = {"codes": sums / smooth[:, None], "counts": counts, "sums": sums}
    moved = {name: new.astype(state[name].dtype) for name, new in moved.items()}
    return y, ids.reshape(x.shape[:-1]), moved
