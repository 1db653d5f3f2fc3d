"""The specs of a layer's parameters and outputs, by abstract evaluation."""

from __future__ import annotations

from typing import Any

import jax

from jaxnet.core.contract import Layer, run, start_state
from jaxnet.core.memo import memoized
from jaxnet.core.specs import abstractly, key_spec, specs_of

__all__ = ["output_specs", "param_specs"]


def param_specs(layer: Layer, inputs: Any, named: Any) -> Any:
    """The specs of the parameters that `init` of any layer makes for these inputs."""
    inputs, named = specs_of((inputs, named))

    def compute():
        return abstractly(layer.init)(key_spec(), *inputs, **named)

    return memoized(layer, "all params", compute, False, inputs, named)


def output_specs(layer: Layer, train: bool, /, *inputs: Any, **named: Any) -> Any:
    """Find the specs of a layer's outputs, without any computation; each result is stored.

    Args:
      layer: the layer.
      train: the mode.
      *inputs: the inputs, or their specs.
      **named: the inputs by name, or their specs.

    Returns:
      The outputs, with a `jax.ShapeDtypeStruct` for each array.
    """
    if layer.outputs is not None:
        return layer.outputs(train, *inputs, **named)
    inputs, named = specs_of((inputs, named))

    def evaluate(*inputs, **named):
        init_key, state_key, key = jax.random.split(jax.random.key(0), 3)
        params = layer.init(init_key, *inputs, **named)
        state = start_state(layer, state_key, inputs, named) if layer.init_state else None
        return run(layer, params, state, key, train, inputs, named)[0]

    compute = lambda: abstractly(evaluate)(*inputs, **named)  # noqa: E731
    return memoized(layer, "outputs", compute, train, inputs, named)
