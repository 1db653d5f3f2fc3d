"""Checks of the calls that a body makes of its children."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxnet.core.checks import is_empty
from jaxnet.core.contract import Layer, no_params
from jaxnet.core.layer_specs import param_specs
from jaxnet.core.specs import describe, specs_of

__all__ = ["check_no_params", "check_parameters_fit", "check_stateless"]


def check_parameters_fit(child: Layer, first: tuple[Any, Any], now: tuple[Any, Any]) -> None:
    """Raise ValueError if a call of a child needs parameters of other shapes than its first
    call.
    """
    now = specs_of(now)
    if child.init is no_params or jax.tree.flatten(first) == jax.tree.flatten(now):
        return
    specs = [
        jax.tree.map(lambda leaf: leaf.shape, param_specs(child, *inputs))
        for inputs in (first, now)
    ]
    if specs[0] != specs[1]:
        calls = [
            describe(inputs if not named else (inputs, named)) for inputs, named in (first, now)
        ]
        raise ValueError(
            f"{child.label}: it is called with {calls[0]} and with {calls[1]}, for which its "
            f"parameters have the shapes {specs[0]} and {specs[1]}; one set of parameters cannot "
            "serve both: use two children"
        )


def check_no_params(label: str, params: Mapping[str, Any], children: Mapping[str, Layer]) -> None:
    """Raise ValueError if a child without parameters has an entry in params."""
    for name, given in params.items():
        if children[name].init is no_params and not is_empty(given):
            raise ValueError(
                f"{label}: params must have no '{name}', got {describe(given)}; "
                f"{children[name].label} has no parameters"
            )


def check_stateless(child: Layer) -> None:
    """Raise RuntimeError if a stateful child is called inside a raw JAX transform."""
    if child.init_state is not None:
        raise RuntimeError(
            f"{child.label}: a layer with state cannot be called inside a raw JAX transform "
            "(scan, vmap, jit, checkpoint, ...), because its new state could not leave it; use "
            "jaxnet.scan, vmap, repeat or remat around it"
        )
