"""Noise in training. Evaluation is the identity and needs no key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, describe, interned, layer, no_params
from jaxnet.mixed import widened

__all__ = [
    "alpha_dropout",
    "drop_path",
    "dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "spatial_dropout",
]


@interned
def dropout(rate: float, *, shared: int | Sequence[int] = ()) -> Layer:
    """Zero each element with probability `rate` in training.

    y = x m / (1 - rate), m ~ Bernoulli(1 - rate), so the mean of y is x. Evaluation is the identity
    and needs no key.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014. There, evaluation is scaled instead of
    training.

    Twins: flax.linen.Dropout, equinox.nn.Dropout, keras.layers.Dropout, torch.nn.Dropout.

    Args:
      rate: the probability to zero an element, in [0, 1).
      shared: axes of x, from the end as in -2, along which one coin decides for all elements. (-2,)
        zeros a feature in all steps of a sequence. Flax calls them `broadcast_dims`.

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: the rate is not in [0, 1); in `apply`, training has no key, or x lacks a shared
        axis.
      TypeError: an axis is not an integer.
    """
    rate, axes = _rate("dropout", rate), _axes("dropout", shared)
    label = f"dropout({rate})"

    def change(key, x):
        keep = jax.random.bernoulli(key, 1 - rate, _coins(label, x, axes))
        return jnp.where(_spread(keep, x), x / (1 - rate), 0)

    return _noise(label, change, rate == 0)


@interned
def spatial_dropout(rate: float, *, rank: int = 2) -> Layer:
    """Zero whole features of an example with probability `rate` in training.

    y = x m / (1 - rate), m ~ Bernoulli(1 - rate), with one m per example and feature for all
    positions. It is `dropout` with shared spatial axes.

    Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR 2015.

    Twins: keras.layers.SpatialDropout2D, torch.nn.Dropout2d.

    Args:
      rate: the probability to zero a feature, in [0, 1).
      rank: the number of spatial axes: 1 for sequences, 2 for images, 3 for volumes.

    Returns:
      The layer, x [..., *spatial, C] -> y [..., *spatial, C].

    Raises:
      ValueError: the rate is not in [0, 1), or `rank` is not a positive integer; in `apply`,
        training has no key, or x lacks an axis.
    """
    rate, rank = _rate("spatial_dropout", rate), size_of("spatial_dropout: rank", rank)
    label = f"spatial_dropout({rate})"
    axes = tuple(range(-1 - rank, -1))

    def change(key, x):
        keep = jax.random.bernoulli(key, 1 - rate, _coins(label, x, axes))
        return jnp.where(_spread(keep, x), x / (1 - rate), 0)

    return _noise(label, change, rate == 0, rank + 1)


# The limit of SELU for large negative numbers, -scale * alpha (Klambauer et al. 2017).
_SELU_LIMIT = -1.0507009873554805 * 1.6732632423543772


@interned
def alpha_dropout(rate: float) -> Layer:
    """Set elements to the limit of SELU in training, and keep mean and variance.

    y = a (x m + l (1 - m)) + b with m ~ Bernoulli(1 - rate), l = -1.758..., a = ((1 - rate) (1 +
    rate l^2))^(-1/2) and b = -a rate l. If x has mean 0 and variance 1, so has y.

    Source: Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017.

    Twins: keras.layers.AlphaDropout, torch.nn.AlphaDropout.

    Args:
      rate: the probability to drop an element, in [0, 1).

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: the rate is not in [0, 1); in `apply`, training has no key.
    """
    rate = _rate("alpha_dropout", rate)
    a = ((1 - rate) * (1 + rate * _SELU_LIMIT**2)) ** -0.5
    b = -a * rate * _SELU_LIMIT

    def change(key, x):
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, a * x + b, a * _SELU_LIMIT + b)

    return _noise(f"alpha_dropout({rate})", change, rate == 0)


@interned
def gaussian_noise(deviation: float) -> Layer:
    """Add normal noise in training, y = x + deviation * e with e ~ N(0, 1).

    Source: Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", Neural
    Computation 7, 1995.

    Twins: keras.layers.GaussianNoise.

    Args:
      deviation: the standard deviation of the noise.

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: `deviation` is not a number of at least 0; in `apply`, training has no key.
    """
    deviation = _deviation("gaussian_noise", deviation)

    def change(key, x):
        return x + deviation * jax.random.normal(key, x.shape, widened(x).dtype).astype(x.dtype)

    return _noise(f"gaussian_noise({deviation})", change, deviation == 0)


@interned
def gaussian_dropout(rate: float) -> Layer:
    """Multiply by normal noise in training, y = x (1 + e sqrt(rate / (1 - rate))), e ~ N(0, 1).

    Mean and variance of y are those of `dropout` with this rate.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014, section 10.

    Twins: keras.layers.GaussianDropout.

    Args:
      rate: the rate of the dropout with the same variance, in [0, 1).

    Returns:
      The layer, x [...] -> y [...].

    Raises:
      ValueError: the rate is not in [0, 1); in `apply`, training has no key.
    """
    rate = _rate("gaussian_dropout", rate)
    deviation = math.sqrt(rate / (1 - rate))

    def change(key, x):
        e = jax.random.normal(key, x.shape, widened(x).dtype).astype(x.dtype)
        return x * (1 + deviation * e)

    return _noise(f"gaussian_dropout({rate})", change, rate == 0)


@interned
def drop_path(rate: float | None = None) -> Layer:
    """Zero whole examples with probability `rate` in training: stochastic depth.

    y = x m / (1 - rate), m ~ Bernoulli(1 - rate), with one m per element of the first axis. Around
    the branch of a residual block, x + drop_path(f(x)), an example skips the block. Without `rate`,
    the rate is the second input, a scalar in [0, 1). So `repeat(block, n, each="rate")` gives each
    copy its own.

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Twins: torchvision.ops.StochasticDepth.

    Args:
      rate: the probability to drop an example, in [0, 1); None if it is an input.

    Returns:
      The layer, x [B, ...] -> y [B, ...], or (x, rate []) -> y [B, ...].

    Raises:
      ValueError: the rate is not in [0, 1); in `apply`, training has no key, or the rate is not a
        scalar.
    """
    if rate is not None:
        fixed = _rate("drop_path", rate)
        return _noise(f"drop_path({fixed})", lambda key, x: _drop(key, x, fixed), fixed == 0)

    def fn(params, x, rate, *, key, train):
        check_input("drop_path", x)
        if np.shape(rate) != ():
            raise ValueError(
                f"drop_path: the rate must be a scalar, got {describe(rate)}; with repeat, name it "
                "in each="
            )
        if not train:
            return x
        return _drop(_key("drop_path", key), x, jnp.asarray(rate, widened(x).dtype))

    return layer(no_params, fn, label="drop_path")


def _drop(key, x, rate):
    coins = jax.random.bernoulli(key, 1 - rate, (*x.shape[:1], *(1,) * (x.ndim - 1)))
    return jnp.where(_spread(coins, x), (widened(x) / (1 - rate)).astype(x.dtype), 0)


def _noise(label: str, change: Callable[..., Any], is_identity: bool, rank: int = 0) -> Layer:
    """The layer that computes change(key, x) in training."""

    def fn(params, x, key, train):
        check_input(label, x, rank=rank)
        return x if not train or is_identity else change(_key(label, key), x)

    return layer(no_params, fn, label=label)


def _key(label: str, key):
    if key is None:
        raise ValueError(f"{label}: training draws random numbers: pass key= to apply")
    return key


def _coins(label: str, x, axes: tuple[int, ...]) -> tuple[Any, ...]:
    """The shape of the coins: that of x, with size 1 along the shared axes."""
    if any(-axis > x.ndim for axis in axes):
        raise ValueError(f"{label}: x must have the shared axes {axes}, got {describe(x)}")
    return tuple(1 if i - x.ndim in axes else size for i, size in enumerate(x.shape))


def _spread(coins, x):
    return coins if coins.shape == x.shape else jnp.broadcast_to(coins, x.shape)


def _rate(name: str, rate: Any) -> float:
    if isinstance(rate, bool) or not 0 <= rate < 1:
        raise ValueError(f"{name}: rate is the probability to drop, in [0, 1), got {rate}")
    return rate


def _deviation(name: str, deviation: Any) -> float:
    if isinstance(deviation, bool) or not 0 <= deviation < math.inf:
        raise ValueError(f"{name}: the deviation must be a number of at least 0, got {deviation}")
    return deviation


def _axes(name: str, axes: int | Sequence[int]) -> tuple[int, ...]:
    found = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    for axis in found:
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"{name}: shared axes must be integers such as -2, got {axis!r}")
        if axis >= 0:
            raise ValueError(
                f"{name}: shared axes are counted from the end, as in -2, because leading axes are "
                f"batch axes; got {axis}"
            )
    return tuple(int(axis) for axis in found)
