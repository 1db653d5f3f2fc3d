"""Low-rank adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.adapt.folding import at_layers, folded_where
from jaxnet.adapt.kernels import KernelChange, with_kernel
from jaxnet.checks import size_of
from jaxnet.core import Layer, as_layer, interned
from jaxnet.mixed import widened

__all__ = ["lora", "merge_lora"]


def lora(
    net: Layer,
    patterns: str | Sequence[str],
    rank: int,
    *,
    alpha: float | None = None,
    name: str = "kernel",
) -> Layer:
    """Add a product of two small matrices to the kernels of some layers, w = k + alpha / rank A B.

    The parameters `kernel_a` (A, [..., in, rank], normal with deviation 1 / sqrt(fan-in)) and
    `kernel_b` (B, [rank, out], zeros) are beside the kernel. So the outputs are those of `net` at
    the start. `jaxnet.tree.split(params, "**/kernel_[ab]")` gives the parameters to train.

    The sum is computed in each call, for kernels of any rank. It costs rank / (number of examples)
    of the layer itself, and the gradients of A and B pass through that of the kernel.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    Args:
      net: a network.
      patterns: a path with wildcards as in `jaxnet.tree`, or several, of layers with a kernel, such
        as "**/query".
      rank: the rank of the product.
      alpha: the factor of the product is alpha / rank; `rank` by default, so the factor is 1.
      name: the name of the kernel in the parameters of these layers.

    Returns:
      The network. Its other parameters are those of `net`.

    Raises:
      ValueError: `rank` is not a positive integer; in `init` and `apply`, a layer has no kernel.
      KeyError: no layer with parameters matches.
    """
    rank = size_of("lora: rank", rank)
    factor = float(rank if alpha is None else alpha)
    wrap = lambda layer: _low_rank(layer, rank, factor, name)  # noqa: E731
    return at_layers("lora", as_layer(net), patterns, wrap)[0]


def merge_lora(net: Layer, params: Any) -> Any:
    """Add the products of `lora` to the kernels.

    Args:
      net: the network that `lora` returned.
      params: its parameters.

    Returns:
      The parameters of the network before `lora`, with the same outputs, to rounding.

    Raises:
      ValueError: the network has no layer of `lora`.
    """
    found = []

    def chosen(layer):
        is_low_rank = layer.label.startswith("lora[")
        found.extend([layer] if is_low_rank else [])
        return is_low_rank

    merged, _ = folded_where(as_layer(net), params, None, chosen)
    if not found:
        raise ValueError("merge_lora: the network must come from lora, got one without its layers")
    return merged


@interned
def _low_rank(layer: Layer, rank: int, alpha: float, name: str) -> Layer:
    down, up, draw = f"{name}_a", f"{name}_b", jax.nn.initializers.lecun_normal()

    def compute(own, kernel, train, dtype):
        added = jnp.matmul(widened(own[down]), widened(own[up]), precision="highest")
        return (widened(kernel) + alpha / rank * added).astype(kernel.dtype), {}

    def params(key, kernel):
        *rest, features = kernel.shape
        return {
            down: draw(key, (*rest, rank), kernel.dtype),
            up: jnp.zeros((rank, features), kernel.dtype),
        }

    change = KernelChange(f"lora[{rank}]", name, compute, params, names=(down, up))
    return with_kernel(layer, change, lambda new: _low_rank(new, rank, alpha, name))
