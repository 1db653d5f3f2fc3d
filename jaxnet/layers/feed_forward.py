"""Feed-forward blocks: two or three dense layers with an activation, and channel gates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core import Layer, check_input, interned, wire
from jaxnet.layers import initializers
from jaxnet.layers.linear import dense
from jaxnet.layers.noise import dropout as dropout_layer
from jaxnet.mixed import widened

__all__ = ["gated_mlp", "mlp", "squeeze_excite"]


@interned
def mlp(
    hidden: int,
    features: int,
    *,
    activation: Callable[..., Any] = jax.nn.gelu,
    bias: bool = True,
    dropout: float = 0.0,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
) -> Layer:
    """Expand, activate and project: y = W_down act(W_up x + b_up) + b_down.

    Children: `up`, `act`, `down`, and `drop` if there is dropout. The backward pass computes the
    activation again, which costs less than to store its parts.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.

    Twins: equinox.nn.MLP, haiku.nets.MLP.

    Args:
      hidden: the number of features between the layers.
      features: the number of features of the output.
      activation: a function or a layer.
      bias: False leaves out the biases.
      dropout: the rate at which activated features are dropped in training.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, x [..., C] -> y [..., features].

    Raises:
      ValueError: a size is not a positive integer; in `apply`, C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    hidden, features = size_of("mlp: hidden", hidden), size_of("mlp: features", features)
    project = functools.partial(dense, bias=bias, kernel_init=kernel_init)

    def feed(f, x):
        y = f.act(f.up(x))
        return f.down(f.drop(y) if dropout else y)

    feed.__name__ = f"mlp({hidden}, {features})"
    drop = {"drop": dropout_layer(dropout)} if dropout else {}
    children = {"up": project(hidden), "act": _recomputed(activation), **drop}
    return wire(**children, down=project(features))(feed)


@interned
def gated_mlp(
    hidden: int,
    features: int,
    *,
    activation: Callable[..., Any] = jax.nn.silu,
    bias: bool = False,
    kernel_init: Callable[..., Any] = initializers.lecun_normal,
) -> Layer:
    """Gate, expand and project: y = W_down (act(W_gate x) * W_up x).

    It is SwiGLU with `jax.nn.silu`, GEGLU with `jax.nn.gelu`, and the gated linear unit with
    `jax.nn.sigmoid`. Children: `gate`, `up`, `act`, `down`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.

    Twins: torchtune.modules.FeedForward.

    Args:
      hidden: the number of features between the layers.
      features: the number of features of the output.
      activation: a function or a layer.
      bias: True adds biases to the three layers.
      kernel_init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.

    Returns:
      The layer, x [..., C] -> y [..., features].

    Raises:
      ValueError: a size is not a positive integer; in `apply`, C differs from that at `init`.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    hidden = size_of("gated_mlp: hidden", hidden)
    features = size_of("gated_mlp: features", features)
    project = functools.partial(dense, bias=bias, kernel_init=kernel_init)

    def feed(f, x):
        return f.down(f.act(f.gate(x)) * f.up(x))

    feed.__name__ = f"gated_mlp({hidden}, {features})"
    children = {"gate": project(hidden), "up": project(hidden), "act": _recomputed(activation)}
    return wire(**children, down=project(features))(feed)


@interned
def squeeze_excite(
    features: int,
    ratio: int = 16,
    *,
    activation: Callable[..., Any] = jax.nn.relu,
    gate: Callable[..., Any] = jax.nn.sigmoid,
) -> Layer:
    """Scale each channel of images by a function of the means of all channels.

    y = x * gate(W_up act(W_down mean(x) + b) + b), with the mean over H and W. Children: `down`,
    `act`, `up`, `gate`.

    Source: Hu, Shen & Sun, "Squeeze-and-Excitation Networks", CVPR 2018.

    Twins: torchvision.ops.SqueezeExcitation.

    Args:
      features: C, the number of channels.
      ratio: C over the number of features between the layers, which is rounded down and at least 1.
      activation: a function or a layer between the two dense layers.
      gate: a function or a layer of the result.

    Returns:
      The layer, x [..., H, W, C] -> y [..., H, W, C].

    Raises:
      ValueError: a size is not a positive integer; in `apply`, x has not C channels.
      TypeError: in `init` and `apply`, x is not an array of floats, or not in the dtype of the
        parameters.
    """
    label = f"squeeze_excite({features})"
    features, ratio = size_of(f"{label}: features", features), size_of(f"{label}: ratio", ratio)

    def excite(f, x):
        check_input(label, x, rank=3, width=features)
        means = widened(x).mean((-3, -2)).astype(x.dtype)
        scale = f.gate(f.up(f.act(f.down(means))))
        return x * jnp.broadcast_to(jnp.expand_dims(scale, (-3, -2)), x.shape)

    excite.__name__ = label
    down, up = dense(max(1, features // ratio)), dense(features)
    return wire(down=down, act=activation, up=up, gate=gate)(excite)


def _recomputed(activation):
    """A function whose backward pass keeps its input only. A layer stays as it is."""
    if isinstance(activation, Layer):
        return activation
    # Within a compiled loop, XLA cannot merge the two computations; elsewhere it may, at no loss.
    made = jax.checkpoint(activation, prevent_cse=False)
    return functools.wraps(activation)(made) if hasattr(activation, "__name__") else made
