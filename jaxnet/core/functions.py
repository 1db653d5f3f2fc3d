"""Layers from plain functions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet.checks import size_of
from jaxnet.core.checks import check_key, check_mode, check_state, explain_call
from jaxnet.core.contract import Layer, no_params
from jaxnet.core.definition import Definition
from jaxnet.core.intern import Same, interned
from jaxnet.core.keys import fold
from jaxnet.core.memo import shared
from jaxnet.core.signature import show_inputs
from jaxnet.core.specs import abstractly, as_jax, describe, is_array, specs_of

__all__ = ["as_layer", "layer", "name_of", "param"]


def layer(
    init: Callable[..., Any] | None,
    fn: Callable[..., Any],
    *,
    init_state: Callable[..., Any] | None = None,
    outputs: Callable[..., Any] | None = None,
    label: str | None = None,
) -> Layer:
    """Make a Layer from a plain function `fn(params, *inputs)`.

    `fn` receives `key`, `train` and `state` only if its signature has parameters with these names.
    `init` and `init_state` receive the named inputs that their signatures have. A call refuses
    params and state whose names or shapes differ from those that `init` and `init_state` make for
    its inputs. Dtypes may differ.

    Args:
      init: (key, *inputs) -> params, or None if the layer has no parameters. It must also run under
        `jax.eval_shape`.
      fn: the layer as an equation: (params, *inputs) -> outputs, or with `state` -> (outputs,
        new_state).
      init_state: (*inputs) -> state for a stateful layer. It names `key` if the state begins with
        random numbers, such as a codebook. State holds statistics, caches and constants that no
        gradient should change.
      outputs: (*inputs) -> arrays or `jax.ShapeDtypeStruct` with the shapes and dtypes of the
        outputs. Without it, `init` of a network traces `fn`. Pass it if that is slow, or if `fn`
        has a collective such as `jax.lax.psum`. It may have a parameter `train`.
      label: the name of the layer in `repr` and in errors; the name of `fn` by default.

    Returns:
      The layer.

    Raises:
      TypeError: only one of `init_state` and a parameter `state` of `fn` is given.

    Example:
      >>> double = layer(None, lambda params, x: 2 * x, label="double")
      >>> double.apply({}, 3.0)
      6.0
    """
    name = label or name_of(fn)
    wanted = {"key", "train", "state"} & set(inspect.signature(fn).parameters)
    if ("state" in wanted) != (init_state is not None):
        raise TypeError(
            f"{name}: a stateful layer has both init_state and a parameter `state` of its "
            "function, or neither"
        )
    named_of_init, named_of_state = _named_by(init), _named_by(init_state)
    draws = init_state is not None and "key" in inspect.signature(init_state).parameters

    def initialize(key, *inputs, **named):
        check_key(name, key)
        return definition.make("params", key, inputs, named)

    def initialize_state(*inputs, key=None, **named):
        if draws and key is None:
            raise ValueError(
                f"{name}: the state begins with random numbers: pass key= to init_state"
            )
        return definition.make("state", key, inputs, named)

    def make_params(key, *inputs, **named):
        try:
            return init(key, *inputs, **named_of_init(named))  # pyright: ignore[reportOptionalCall]
        except TypeError as error:
            explain_call(f"{name}: init", error, init, (key, *inputs), named_of_init(named))
            raise

    def make_state(key, *inputs, **named):
        # The salt makes the draws differ from those of `init`, so one key may serve both.
        drawn = {"key": fold(key, "/state")} if draws else {}
        return init_state(*inputs, **drawn, **named_of_state(named))  # pyright: ignore[reportOptionalCall]

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(name, state, stateful=init_state is not None)
        check_mode(name, key, train)
        inputs, named = as_jax((inputs, named))
        problem = definition.problem(params, state, inputs, named)
        offered = {"key": key, "train": train, "state": as_jax(state)}
        try:
            result = fn(as_jax(params), *inputs, **named, **{n: offered[n] for n in wanted})
        except Exception as error:
            # An error that the layer itself raises is more specific than the comparison of shapes.
            if problem is not None and not str(error).startswith(f"{name}:"):
                asked = error.args[0] if isinstance(error, KeyError) and error.args else None
                raise definition.problem(params, state, inputs, named, asked) or problem from error
            if init is not None and is_array(params) and inputs and isinstance(inputs[0], Mapping):
                raise TypeError(
                    f"{name}: apply takes (params, *inputs), got params {describe(params)} and "
                    f"inputs {describe(inputs)}: the parameters come first"
                ) from error
            received = named | {n: offered[n] for n in wanted}
            explain_call(f"{name}: apply", error, fn, (params, *inputs), received)
            raise
        if problem is not None:
            raise problem
        if init_state is not None:
            _check_new_state(name, result, state)
        return result

    def specs_of_outputs(train, *inputs, **named):
        told = {"train": train} if "train" in inspect.signature(outputs).parameters else {}  # pyright: ignore[reportArgumentType]
        return specs_of(outputs(*inputs, **named, **told))  # pyright: ignore[reportOptionalCall]

    definition = Definition(name, make_params if init else None, make_state if init_state else None)
    show_inputs(apply, fn)
    return Layer(
        no_params if init in (None, no_params) else initialize,
        apply,
        initialize_state if init_state else None,
        label=name,
        random="key" in wanted,
        outputs=specs_of_outputs if outputs else None,
    )


@interned
def param(shape: tuple[int, ...], init: Callable[..., Any], *, dtype: Any = None) -> Layer:
    """Make a layer that is a single array: as a child of `wire`, `f.table()` returns it.

    Args:
      shape: the shape of the array.
      init: (key, shape, dtype) -> array, as in `jax.nn.initializers`.
      dtype: float32 by default (float64 under `jax_enable_x64`).

    Returns:
      The layer. Its params are the array itself.

    Raises:
      TypeError: `shape` is not a tuple of sizes.
      ValueError: a size in `shape` is not an int of at least 0; in `apply`, the array has another
        shape.
    """
    if not isinstance(shape, Iterable):
        raise TypeError(
            f"param: the shape must be a tuple of sizes, such as ({shape},), got {shape!r}"
        )
    shape = tuple(size_of("param: each size of the shape", size, 0) for size in shape)
    label = f"param{shape}"

    def initialize(key):
        return init(key, shape, dtype or jnp.result_type(float))

    def fn(params):
        if not is_array(params) or params.shape != shape:
            raise ValueError(f"{label}: the array must have shape {shape}, got {describe(params)}")
        return params

    return layer(initialize, fn, label=label)


def as_layer(thing: Any, where: str = "a layer") -> Layer:
    """Return a Layer unchanged, and wrap any other callable as a layer without parameters.

    Args:
      thing: a layer or a function of inputs.
      where: how the error names the argument.

    Returns:
      The layer.

    Raises:
      TypeError: `thing` is not callable, or it is a function that returns a layer.
    """
    if isinstance(thing, Layer):
        return thing
    if not callable(thing):
        several = "; unpack it, as in chain(*layers)" if isinstance(thing, list | tuple) else ""
        raise TypeError(
            f"{where} must be a layer or a function of its inputs, got {thing!r}{several}"
        )
    name = name_of(thing)
    remedy = f"pass the layer that it returns, {name}(...), not {name} itself"
    if _returns_layer(thing):
        raise TypeError(f"{where}: {name} is a function that makes a layer; {remedy}")

    return _plain(thing, name, remedy)


@interned
def _plain(function: Callable[..., Any], name: str, remedy: str) -> Layer:
    def outputs(train, *inputs, **named):
        inputs, named = specs_of((inputs, named))
        compute = lambda: abstractly(self.apply)({}, *inputs, **named)  # noqa: E731
        return shared(Same(function), self, "outputs", compute, train, inputs, named)

    def fn(params, *inputs, **named):
        outputs = function(*inputs, **named)
        if isinstance(outputs, Layer):
            raise TypeError(f"{name} returned a layer when it was called with data; {remedy}")
        return outputs

    self = dataclasses.replace(layer(no_params, fn, label=name), outputs=outputs)
    show_inputs(self.apply, function, after=0, body=True)
    return self


def name_of(fn: Any) -> str:
    """The name of a callable in `repr` and in errors."""
    # A functools.partial has the name of its function.
    fn = getattr(fn, "func", fn)
    return getattr(fn, "__name__", type(fn).__name__)


def _named_by(fn: Callable[..., Any] | None) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that selects the named inputs that `fn` accepts. For instance, `init` rarely needs
    a mask.
    """
    parameters = inspect.signature(fn).parameters if fn else {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict
    return lambda named: {name: value for name, value in named.items() if name in parameters}


def _check_new_state(name: str, result: Any, state: Any) -> None:
    """Raise ValueError unless the result is (outputs, new_state) with the structure of the old
    state.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(
            f"{name}: a stateful layer returns (outputs, new_state), got {describe(result)}"
        )

    def facts(tree):
        return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

    if facts(result[1]) != facts(state):
        raise ValueError(
            f"{name}: the new state must have the names and shapes of the old one, "
            f"{describe(state)}, got {describe(result[1])}; a stateful layer returns (outputs, "
            "new_state)"
        )


def _returns_layer(fn: Any) -> bool:
    """Whether a function, or the call of an object, is annotated to return a layer, as every
    constructor of layers is.
    """
    annotations = [getattr(f, "__annotations__", {}) for f in (fn, type(fn).__call__)]
    returned = next((a["return"] for a in annotations if "return" in a), None)
    if isinstance(returned, str):
        return returned.split(" |")[0].split(".")[-1] == "Layer"
    return returned is Layer
