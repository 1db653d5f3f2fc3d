"""Layers that also return their intermediate values, for `capture` and `summary`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxnet.core.contract import Carried, Layer, run

__all__ = ["tap", "untapped"]


def tap(layer: Layer, plain: Layer, take: Callable[..., Any], note: Callable[[bool], Any]) -> Layer:
    """Make a layer that also returns `take((inputs, named), outputs)` of each call, at its path.

    Args:
      layer: the layer to run; its children may be tapped.
      plain: the layer without taps, which runs inside raw JAX transforms.
      take: a function of the inputs and outputs, whose result is captured.
      note: called at each call with whether its value can be captured: True for `layer`, False for
        `plain`.

    Returns:
      The tapped layer.
    """

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        note(True)
        outputs, new, seen = run(layer, params, state, key, train, inputs, named)
        taken = take((inputs, named), outputs)
        return outputs, Carried(new, {"": (taken,)} | seen)

    def apply_plain(*args, **named):
        note(False)
        return plain.apply(*args, **named)

    noted = dataclasses.replace(plain, apply=apply_plain)
    changes: dict[str, Any] = dict(tapped=True, plain=noted, children=plain.children)
    return dataclasses.replace(layer, apply=apply, **changes)


def untapped(layer: Layer) -> Layer:
    """The layer to run inside a raw JAX transform, because captured values cannot leave it."""
    if not layer.tapped or layer.plain is not None:
        return layer.plain or layer
    return layer.rebuild({name: untapped(child) for name, child in layer.children.items()})  # pyright: ignore[reportOptionalCall]
