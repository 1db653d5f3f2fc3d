"""Layers that also bring out what passes through them, for `capture` and `summary`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxnet.core.contract import Carried, Layer, run

__all__ = ["tap", "untapped"]


def tap(layer: Layer, plain: Layer, take: Callable[..., Any], note: Callable[[bool], Any]) -> Layer:
    """A layer that also brings out `take((inputs, named), outputs)` of each call, at its own path.

    Args:
      layer: the layer that runs, with tapped layers inside or not.
      plain: the layer without taps, which runs inside raw JAX transforms.
      take: what is brought out.
      note: called at each call with whether its value can be brought out, which that of `plain` cannot.
    """

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        note(True)
        outputs, new, seen = run(layer, params, state, key, train, inputs, named)
        taken = take((inputs, named), outputs)
        return outputs, Carried(new, {"": (taken,)} | {path: value for path, value in seen.items()})

    def apply_plain(*args, **named):
        note(False)
        return plain.apply(*args, **named)

    noted = dataclasses.replace(plain, apply=apply_plain)
    return dataclasses.replace(layer, apply=apply, tapped=True, plain=noted, children=plain.children)


def untapped(layer: Layer) -> Layer:
    """The layer that runs inside a raw JAX transform, which captured values cannot leave."""
    if not layer.tapped or layer.plain is not None:
        return layer.plain or layer
    return layer.rebuild({name: untapped(child) for name, child in layer.children.items()})  # pyright: ignore[reportOptionalCall]
