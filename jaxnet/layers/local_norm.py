"""Normalization by the squares of neighboring features."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, layer, no_params
from jaxnet.layers.normalizing import epsilon
from jaxnet.mixed import widened

__all__ = ["local_response_norm"]


@interned
def local_response_norm(
    size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Layer:
    """Divide each feature by a power of its neighbors' squares.

    y_c = x_c / (k + alpha / size * sum over d of x_d^2)^beta. The sum is over the `size` features d
    from c - size // 2 on; features outside of 0 .. C - 1 count as zero. PyTorch and ONNX agree for
    odd sizes; for even ones the window of ONNX begins one feature later. The paper does not divide
    alpha by the size: its alpha of 1e-4 with 5 features is 5e-4 here.

    Source: Krizhevsky, Sutskever & Hinton, "ImageNet Classification with Deep Convolutional Neural
    Networks", NeurIPS 2012.

    Twins: torch.nn.LocalResponseNorm.

    Args:
      size: the number of features in a window.
      alpha: the factor of the mean square.
      beta: the exponent.
      k: a positive number that is added.

    Returns:
      The layer, x [..., C] -> y [..., C].

    Raises:
      ValueError: an option is out of range.
      TypeError: in `apply`, x is not an array of floats.
    """
    name = "local_response_norm"
    size = size_of(f"{name}: size", size)
    alpha, beta, k = (
        epsilon(name, value, what, such)
        for value, what, such in ((alpha, "alpha", "1e-4"), (beta, "beta", "0.75"), (k, "k", "1.0"))
    )
    if k == 0:
        raise ValueError(f"{name}: k must be positive, got 0; with 0, a zero would be divided by 0")
    label = f"{name}({size})"

    def fn(params, x):
        check_input(label, x)
        return _by_neighbors(x, size, alpha, beta, k)

    return layer(no_params, fn, label=label)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _by_neighbors(x, size, alpha, beta, k):
    wide = widened(x)
    # A product with a band of ones is one matrix product in every pass.
    c = np.arange(x.shape[-1])
    first = c[None, :] - size // 2
    band = (c[:, None] >= first) & (c[:, None] < first + size)
    squares = jnp.square(wide).reshape(-1, x.shape[-1]) if x.ndim != 2 else jnp.square(wide)
    sums = jnp.matmul(squares, jnp.asarray(band, wide.dtype), precision="highest")
    # XLA computes exp and log of many numbers at once on a CPU, but not their powers.
    factor = jnp.exp(-beta * jnp.log(k + alpha / size * sums))
    return (wide * factor.reshape(x.shape)).astype(x.dtype)
