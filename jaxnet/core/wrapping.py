"""Combinators of one child: a layer whose call is made of calls of another."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxnet.core.checks import check_mode, check_state
from jaxnet.core.contract import Carried, Layer, run
from jaxnet.core.definition import Definition
from jaxnet.core.functions import as_layer
from jaxnet.core.keys import SharedKey
from jaxnet.core.signature import show_inputs
from jaxnet.core.specs import as_jax

__all__ = ["around"]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The inner layer as a function, as the `call` of `around` sees it.

    Attributes:
      inner: the layer.
      train: the mode of the call.
      shared: a stand-in for the key inside a raw JAX transform, or None.
    """

    inner: Layer
    train: bool
    shared: SharedKey | None

    def __call__(
        self, params: Any, state: Any, key: Any, /, *inputs: Any, **named: Any
    ) -> tuple[Any, Any, Mapping[str, Any]]:
        """Call the layer: (outputs, state, seen)."""
        return run(self.inner, params, state, self.shared or key, self.train, inputs, named)


def around(
    inner: Layer | Callable[..., Any],
    call: Callable[..., Any],
    *,
    label: str,
    rebuild: Callable[[Layer], Layer],
    init: Callable[..., Any] | None = None,
    init_state: Callable[..., Any] | None = None,
    outputs: Callable[..., Any] | None = None,
    random: bool = False,
    checked: bool = True,
    stateful: bool = False,
    stacked: bool = False,
    repeats: int | None = None,
) -> Layer:
    """Make a layer with the parameters, state and path of `inner`, which `call` evaluates.

    `repeat`, `scan`, `vmap`, `remat`, `cast` and `residual` are built with `around`. It also serves
    for weight normalization, an equilibrium model or a `shard_map` around a layer. `call` receives
    `run`, which calls `inner`. Keys, state and captured outputs are ordinary values there, so
    `call` may use any JAX transform.

    Args:
      inner: a layer or a plain function.
      call: (run, params, state, key, *inputs, **named) -> (outputs, state, seen). `run` has the
        same form without `run` itself, and calls `inner`; `run.train` is the mode. `state` is None
        for a stateless layer, and `key` is None if there is no key to draw from. `seen` is a dict
        of the outputs that `capture` collects inside `inner`, empty without `capture`. Return it
        unchanged, or stacked, as a `jax.lax.scan` returns it. A `call` that cannot return it from a
        transform returns {}.
      label: the name of the layer in `repr` and in errors.
      rebuild: inner -> the same layer around another one, for `replace` and `capture`.
      init: (key, *inputs) -> params, if it differs from that of `inner`.
      init_state: (*inputs, key) -> state, if it differs from that of `inner`.
      outputs: (train, *inputs) -> specs of the outputs, if that is cheaper than tracing `call`.
      random: True if `call` itself draws from its key, for instance noise on weights.
      checked: False if params and state need no comparison with those that `init` and `init_state`
        make.
      stateful: True if the combinator adds state, which `init_state` makes, to a stateless layer.
        `call` then returns that state also around a stateless layer.
      stacked: True if params and state are those of copies of `inner`, stacked along the first
        axis.
      repeats: the number of copies that run one after the other; `capture` then collects the output
        of each.

    Returns:
      The layer.

    Raises:
      TypeError: `inner` is neither a layer nor a function.

    Example:
      >>> import jax.numpy as jnp
      >>> def scaled(inner, factor):
      ...     def call(run, params, state, key, x):
      ...         y, state, seen = run(params, state, key, x)
      ...         return factor * y, state, seen
      ...     rebuild = lambda new: scaled(new, factor)
      ...     return around(inner, call, label=f"scaled[{factor}]", rebuild=rebuild)
      >>> scaled(jnp.negative, 3.0)
      scaled[3.0](negative)
    """
    inner = as_layer(inner, label)
    carries = stateful or inner.init_state is not None

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(label, state, stateful=carries)
        check_mode(label, key, train)
        inputs, named = as_jax((inputs, named))
        if problem := definition.problem(params, state, inputs, named):
            raise problem
        # A stand-in for a key cannot enter a transform, so `Run` holds it. A call that draws
        # receives the stand-in, which raises.
        shared = key if isinstance(key, SharedKey) and not random else None
        offered = key if shared is None and (random or inner.random) else None
        result = call(Run(inner, train, shared), params, state, offered, *inputs, **named)
        if not isinstance(result, tuple) or len(result) != 3:
            raise TypeError(f"{label}: the function of `around` returns (outputs, state, seen)")
        outputs, new_state, seen = result
        if inner.tapped:
            return outputs, Carried(new_state, seen)
        return (outputs, new_state) if carries else outputs

    def start(key, *inputs, **named):
        return init_state(*inputs, key=key, **named)  # pyright: ignore[reportOptionalCall]

    makes_state = init_state is not None and carries
    definition = Definition(
        label, init if checked else None, start if checked and makes_state else None
    )
    # A `call` without `*inputs` may take other inputs than `inner`.
    passed_on = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(call).parameters.values())
    show_inputs(apply, *((inner.apply, 1) if passed_on else (call, 4)))
    return Layer(
        init or inner.init,
        apply,
        (init_state or inner.init_state) if carries else None,
        label=label,
        children={"": inner},
        rebuild=lambda children: rebuild(children[""]),
        repeats=repeats,
        stacked=stacked,
        random=random or inner.random,
        outputs=outputs,
        tapped=inner.tapped,
    )
