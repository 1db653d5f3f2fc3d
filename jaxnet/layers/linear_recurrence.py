"""Linear recurrences with diagonal transitions: complex and constant, or real and gated."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, fold, interned
from jaxnet.layers import initializers
from jaxnet.layers.gates import product
from jaxnet.layers.linear_scan import Recurrence, over_time, step_by_step
from jaxnet.mixed import widened

__all__ = ["lru", "lru_cell", "min_gru", "min_gru_cell"]


@interned
def lru(
    features: int,
    *,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
    return_carry: bool = False,
) -> Layer:
    """Linear recurrent unit over sequences, h_t = l h_{t-1} + g (B x_t), y_t = Re(C h_t) + d x_t.

    h has N complex numbers, and l = exp(-exp(nu) + i exp(theta)), so |l| < 1. All steps are
    computed in parallel, by an associative scan; `recurrent(lru_cell(N))` is the same step by step,
    which takes less time on a CPU. Nothing is nonlinear over time, so a network has layers such as
    `gelu` and `dense` between.

    Parameters: nu, theta [N]; gamma [N], the logarithm of g; kernel [D, 2 N], Re B and Im B;
    output [2 N, D], Re C above -Im C; skip d [D].

    Source: Orvieto et al., "Resurrecting recurrent neural networks for long sequences", ICML 2023.

    Args:
      features: N, the number of complex numbers of the carry.
      r_min: the least |l| at the start.
      r_max: the largest |l| at the start.
      max_phase: the largest phase of l at the start.
      return_carry: True to return (carry, y), as the cell does.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, D]. Lengths,
      mask and carry are as in `recurrent`; the carry is [..., 2 N], real parts first.

    Raises:
      ValueError: `features` is not a positive integer, or a bound is out of range; in `apply`, D
        differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    return over_time(_lru("lru", features, r_min, r_max, max_phase), return_carry)


@interned
def lru_cell(
    features: int,
    *,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
) -> Layer:
    """One step of `lru`, with the same parameters.

    Source: Orvieto et al., 2023, as for `lru`.

    Args:
      features: N, the number of complex numbers of the carry.
      r_min: as in `lru`.
      r_max: as in `lru`.
      max_phase: as in `lru`.

    Returns:
      The layer, (carry [..., 2 N], x [..., D]) -> (carry, y [..., D]). A carry None is zeros.

    Raises:
      ValueError: as in `lru`.
    """
    return step_by_step(_lru("lru_cell", features, r_min, r_max, max_phase))


@interned
def min_gru(features: int, *, return_carry: bool = False) -> Layer:
    """Minimal GRU over sequences, h_t = (1 - z_t) h_{t-1} + z_t n_t, y_t = h_t.

    z = sigmoid(x_t K_z + b_z) and n = x_t K_n + b_n do not see h, so all steps are computed in
    parallel, by an associative scan; `min_gru_cell` is the same step by step.

    Parameters: kernel K [D, 2 H] and bias b [2 H], with the columns z, n.

    Source: Feng et al., "Were RNNs all we needed?", 2024, arXiv:2410.01201.

    Args:
      features: H, the number of features of the carry and of the output.
      return_carry: True to return (carry, y), as the cell does.

    Returns:
      The layer, (x [..., T, D], lengths=None, mask=None, carry=None) -> y [..., T, H]. Lengths,
      mask and carry are as in `recurrent`; the carry is [..., H].

    Raises:
      ValueError: `features` is not a positive integer; in `apply`, D differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    return over_time(_min_gru("min_gru", features), return_carry)


@interned
def min_gru_cell(features: int) -> Layer:
    """One step of `min_gru`, with the same parameters.

    Source: Feng et al., 2024, as for `min_gru`.

    Args:
      features: H, the number of features of the carry and of the output.

    Returns:
      The layer, (carry [..., H], x [..., D]) -> (carry, y [..., H]). A carry None is zeros.

    Raises:
      ValueError: as in `min_gru`.
    """
    return step_by_step(_min_gru("min_gru_cell", features))


def _lru(name: str, features: Any, r_min: float, r_max: float, max_phase: float) -> Recurrence:
    n = size_of(f"{name}: features", features)
    if not (0 <= r_min < r_max <= 1 and max_phase > 0):
        raise ValueError(
            f"{name}: expected 0 <= r_min < r_max <= 1 and max_phase > 0, got {r_min=}, {r_max=}, "
            f"{max_phase=}"
        )
    label = f"{name}({n})"

    def init(key, x):
        check_input(label, x)
        uniform = functools.partial(jax.random.uniform, shape=(n,), dtype=x.dtype, minval=1e-3)
        size = r_min**2 + uniform(fold(key, "nu")) * (r_max**2 - r_min**2)
        # The radius itself rounds to 1 in narrow dtypes.
        nu = jnp.log(jnp.maximum(-0.5 * jnp.log(size), 1e-4))
        draw, width = initializers.lecun_normal, x.shape[-1]
        return {
            "nu": nu.astype(x.dtype),
            "theta": jnp.log(max_phase * uniform(fold(key, "theta"))),
            "gamma": (0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu)))).astype(x.dtype),
            "kernel": draw(key, (width, 2 * n), x.dtype) / 2**0.5,
            "output": draw(fold(key, "output"), (2 * n, width), x.dtype) * 2**0.5,
            "skip": jax.random.normal(fold(key, "skip"), (width,), x.dtype),
        }

    return Recurrence(
        label,
        init,
        width=lambda params: (params["kernel"].shape[0], params["kernel"]),
        shape=lambda params: (2 * n,),
        coefficients=_lru_coefficients,
        readout=_lru_readout,
        wide=("nu", "theta", "gamma", "skip"),
        pack=_packed,
        unpack=_unpacked,
    )


@functools.partial(jax.jit, inline=True)
def _lru_coefficients(params, x):
    nu, theta, gamma = (widened(params[name]) for name in ("nu", "theta", "gamma"))
    size, phase = jnp.exp(-jnp.exp(nu)), jnp.exp(theta)
    factor = jax.lax.complex(size * jnp.cos(phase), size * jnp.sin(phase))
    real, imag = jnp.split(widened(product(x, params["kernel"])), 2, -1)
    gain = jnp.broadcast_to(jnp.exp(gamma), real.shape)
    return factor.reshape(*(1,) * (x.ndim - 1), -1), jax.lax.complex(gain * real, gain * imag)


@functools.partial(jax.jit, inline=True)
def _lru_readout(params, h, x):
    y = widened(product(_packed(h).astype(x.dtype), params["output"]))
    skip = jnp.broadcast_to(widened(params["skip"]), x.shape)
    return (y + skip * widened(x)).astype(x.dtype)


def _packed(h):
    return jnp.concatenate([h.real, h.imag], -1)


def _unpacked(carry):
    return jax.lax.complex(*jnp.split(carry, 2, -1))


def _min_gru(name: str, features: Any) -> Recurrence:
    n = size_of(f"{name}: features", features)
    label = f"{name}({n})"

    def init(key, x):
        check_input(label, x)
        kernel = initializers.lecun_normal(key, (x.shape[-1], 2 * n), x.dtype)
        return {"kernel": kernel, "bias": initializers.zeros(key, (2 * n,), x.dtype)}

    return Recurrence(
        label,
        init,
        width=lambda params: (params["kernel"].shape[0], params["kernel"]),
        shape=lambda params: (n,),
        coefficients=_min_gru_coefficients,
        readout=lambda params, h, x: h.astype(x.dtype),
        wide=("bias",),
    )


@functools.partial(jax.jit, inline=True)
def _min_gru_coefficients(params, x):
    z, n = jnp.split(widened(product(x, params["kernel"], params["bias"])), 2, -1)
    return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * n
