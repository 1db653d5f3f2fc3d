"""Layers that training does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxnet.core import Layer, around, as_layer, interned
from jaxnet.transform.walking import replace

__all__ = ["frozen"]


def frozen(net: Layer, patterns: str | Sequence[str]) -> Layer:
    """Compute some layers in evaluation mode also in training, without gradients of parameters.

    `batch_norm` there uses its running averages and leaves them as they are, and `dropout` does
    nothing. The gradients of the parameters are zero; gradients of inputs pass. An optimizer with
    weight decay still moves the parameters: `jaxnet.train.freeze` leaves them out.

    Args:
      net: a network.
      patterns: a path with wildcards as in `jaxnet.tree`, or several. Everything inside a matching
        layer is frozen.

    Returns:
      The network, with the same parameters and state.

    Raises:
      KeyError: no layer matches.

    Example:
      >>> from jaxnet import chain, dense
      >>> frozen(chain(body=dense(8), head=dense(2)), "body")
      chain(
        body: frozen(dense(8))
        head: dense(2)
      )
    """
    return replace(as_layer(net), patterns, lambda path, layer: _still(layer))


@interned
def _still(layer: Layer) -> Layer:
    def call(run, params, state, key, /, *inputs, **named):
        still = dataclasses.replace(run, train=False)
        return still(jax.lax.stop_gradient(params), state, key, *inputs, **named)

    return around(layer, call, label="frozen", rebuild=_still)
