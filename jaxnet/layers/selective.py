"""Selective state space: a linear recurrence whose coefficients depend on the input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, fold, interned
from jaxnet.layers import initializers
from jaxnet.layers.gates import product
from jaxnet.layers.linear_scan import Recurrence, over_time, step_by_step
from jaxnet.mixed import widened

__all__ = ["selective_ssm", "selective_ssm_cell"]


def decay_rates(key, shape: tuple[int, int], dtype):
    """log 1, ..., log N for each feature: the start of S4D-Real."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


@interned
def selective_ssm(
    state_size: int = 16,
    *,
    rank: int | None = None,
    decay_init: Callable[..., Any] = decay_rates,
    return_carry: bool = False,
) -> Layer:
    """Selective state space over sequences (S6, the core of Mamba).

    h_t = exp(s_t A) h_{t-1} + s_t x_t B_t, y_t = h_t C_t + d x_t for each feature x_t, with
    A = -exp(decay). The step s_t = softplus(u_t W + w), B_t and C_t follow from the input by
    [u_t, B_t, C_t] = x_t K. All steps are computed in parallel, by an associative scan;
    `selective_ssm_cell` is the same step by step. A block of Mamba adds products, a gate and a
    causal convolution around it, by `wire`.

    Parameters: kernel K [D, R + 2 N]; delta_kernel W [R, D], delta_bias w [D]; decay [D, N]; skip d
    [D].

    Source: Gu & Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023,
    arXiv:2312.00752.

    Args:
      state_size: N, the numbers of the carry for each feature.
      rank: R, the rank of the steps; a sixteenth of the features by default.
      decay_init: (key, shape, dtype) -> array, for `decay`; log 1, ..., log N by default.
      return_carry: True to return (carry, y), as the cell does.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, D]. Lengths,
      mask and carry are as in `recurrent`; the carry is [..., D, N].

    Raises:
      ValueError: a size is not a positive integer; in `apply`, D differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    return over_time(_selective("selective_ssm", state_size, rank, decay_init), return_carry)


@interned
def selective_ssm_cell(
    state_size: int = 16,
    *,
    rank: int | None = None,
    decay_init: Callable[..., Any] = decay_rates,
) -> Layer:
    """One step of `selective_ssm`, with the same parameters.

    Source: Gu & Dao, 2023, as for `selective_ssm`.

    Args:
      state_size: N, the numbers of the carry for each feature.
      rank: as in `selective_ssm`.
      decay_init: as in `selective_ssm`.

    Returns:
      The layer, (carry [..., D, N], x [..., D]) -> (carry, y [..., D]). A carry None is zeros.

    Raises:
      ValueError: as in `selective_ssm`.
    """
    return step_by_step(_selective("selective_ssm_cell", state_size, rank, decay_init))


def _selective(name: str, state_size: Any, rank: Any, decay_init: Callable[..., Any]) -> Recurrence:
    n = size_of(f"{name}: state_size", state_size)
    rank = None if rank is None else size_of(f"{name}: rank", rank)
    label = f"{name}({n})"

    def init(key, x):
        check_input(label, x)
        width, dtype = x.shape[-1], x.dtype
        r = rank or -(-width // 16)
        even = functools.partial(jax.random.uniform, dtype=dtype)
        # The steps begin between 0.001 and 0.1, evenly on a logarithmic scale.
        low, high = math.log(1e-3), math.log(1e-1)
        step = jnp.exp(even(fold(key, "delta_bias"), (width,)) * (high - low) + low)
        return {
            "kernel": initializers.lecun_normal(key, (width, r + 2 * n), dtype),
            "delta_kernel": (2 * even(fold(key, "delta_kernel"), (r, width)) - 1) / r**0.5,
            "delta_bias": jnp.log(jnp.expm1(step)),
            "decay": decay_init(fold(key, "decay"), (width, n), dtype),
            "skip": initializers.ones(key, (width,), dtype),
        }

    def inputs(params, x):
        """(u, B, C)."""
        parts = product(x, params["kernel"])
        r = params["delta_kernel"].shape[0]
        return jnp.split(parts, [r, r + n], -1)

    @functools.partial(jax.jit, inline=True)
    def coefficients(params, x):
        u, b, _ = inputs(params, x)
        step = widened(product(u, params["delta_kernel"], params["delta_bias"]))
        step = jax.nn.softplus(step)[..., None]
        a = -jnp.exp(widened(params["decay"]))
        factor = jnp.exp(step * jnp.broadcast_to(a, (*x.shape, n)))
        return factor, step * widened(x)[..., None] * widened(b)[..., None, :]

    @functools.partial(jax.jit, inline=True)
    def readout(params, h, x):
        c = widened(inputs(params, x)[2])
        skip = jnp.broadcast_to(widened(params["skip"]), x.shape)
        return (jnp.einsum("...dn,...n->...d", h, c) + skip * widened(x)).astype(x.dtype)

    return Recurrence(
        label,
        init,
        width=lambda params: (params["kernel"].shape[0], params["kernel"]),
        shape=lambda params: (params["kernel"].shape[0], n),
        coefficients=coefficients,
        readout=readout,
        wide=("delta_bias", "decay", "skip"),
    )
