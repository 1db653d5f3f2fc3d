"""Composition: layers with named children, which the body of `wire` calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeAlias, overload

import jax

from jaxnet.core.calls import Child, Children
from jaxnet.core.checks import check_key, check_mode, check_names, check_state, is_empty, scope
from jaxnet.core.child_checks import check_no_params, check_parameters_fit, check_stateless
from jaxnet.core.contract import (
    Carried,
    Layer,
    as_layer,
    name_of,
    no_params,
    run,
    start_state,
)
from jaxnet.core.definition import explain_call
from jaxnet.core.keys import SharedKey, fold, fold_all
from jaxnet.core.signature import show_inputs
from jaxnet.core.specs import (
    abstractly,
    as_jax,
    describe,
    memoised,
    shared,
    shared_traces,
    specs_of,
    stand_in,
    trace_state,
    twin_of,
)
from jaxnet.core.taps import untapped

__all__ = ["compose", "output_specs", "wire"]

RESERVED = ("train", "key", "state", "params")


# Any function is a body. The first forms tell type checkers what `f` and `x` are in a lambda.
Body: TypeAlias = (
    Callable[[Children, Any], Any] | Callable[[Children, Any, Any], Any] | Callable[..., Any]
)


class Wiring(Protocol):
    """The type of the result of `wire(...)`: one body makes a Layer, several bodies make a tuple of
    Layers.
    """

    @overload
    def __call__(self, body: Body, /) -> Layer: ...

    @overload
    def __call__(self, body: Body, /, *bodies: Body) -> tuple[Layer, ...]: ...


def wire(*unnamed: Any, **children: Layer | Callable[..., Any]) -> Wiring:
    """Compose layers by an ordinary function, written once: `wire(a=..., b=...)(body)`, also as a
    decorator.

    `body(f, *inputs)` calls a child as `f.a(x)`; `f["a"]` is `f.a`, and the type of `f` is
    `jaxnet.Children`. If a child is called twice, the calls share its weights and draw different
    random numbers; a stateful child passes its state from the first call to the second. `f.train`
    is True in training. `f.key` is a key for random numbers that the body itself draws. `f.a(x,
    key=..., train=...)` overrides the key and the mode of the child.

    `init` traces the body once, abstractly, and records the shapes of the inputs of each child. The
    body may use `jax.lax.scan`, `jax.vmap` and other raw JAX transforms around children that
    neither carry state nor draw random numbers. For the others, `jaxnet.scan`, `vmap`, `repeat` and
    `remat` return the state and give each iteration a key; or pass a random child an explicit key,
    `f.a(x, key=...)`.

    Several bodies over the same children make several networks with the same parameters, such as
    `encode, decode, net = wire(encoder=..., decoder=...)(encode_body, decode_body, net_body)`. Each
    initialises the children that it calls.

    Args:
      **children: layers or plain functions by name.

    Returns:
      A function. Called with one body, it returns a Layer; called with several, it returns a tuple
      of Layers.

    Raises:
      AttributeError: the body calls a child that is not declared.
      ValueError: a declared child is never called, neither in training nor in evaluation, by the
        only body; or two calls of a child need parameters of different shapes.
      RuntimeError: a stateful child, or a random one without a key, is called inside a raw JAX
        transform.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnet import dense
      >>> @wire(up=dense(16), down=dense(4))
      ... def block(f, x):
      ...     return x + f.down(jax.nn.gelu(f.up(x)))
      >>> jax.tree.map(jnp.shape, block.init(jax.random.key(0), jnp.ones((2, 4))))
      {'down': {'bias': (4,), 'kernel': (16, 4)}, 'up': {'bias': (16,), 'kernel': (4, 16)}}
    """

    if unnamed:
        raise TypeError(
            "wire: give each child a name, wire(a=..., b=...)(body), by which the body calls it"
        )

    def network(body: Callable[..., Any], every: bool) -> Layer:
        if not callable(body) or isinstance(body, Layer):
            got = repr(body) if isinstance(body, Layer) else describe(body)
            raise TypeError(f"wire: the body must be a function of (f, *inputs), got {got}")
        name = name_of(body)

        def rebuild(new):
            return compose("wire" if name == "<lambda>" else name, new, body, rebuild, every=every)

        return rebuild(children)

    def decorate(*bodies: Callable[..., Any]) -> Layer | tuple[Layer, ...]:
        made = tuple(network(body, every=len(bodies) == 1) for body in bodies)
        return made[0] if len(made) == 1 else made

    def bodiless(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "wire(...) is no layer before it has a body: wire(a=..., b=...)(lambda f, x: "
            "f.b(f.a(x)))"
        )

    # The error for a forgotten body shows this name.
    decorate.__name__ = "wire(...)"
    decorate.init = decorate.apply = bodiless
    return decorate  # pyright: ignore[reportReturnType]


def compose(
    label: str,
    children: Mapping[str, Any],
    body: Callable[..., Any],
    rebuild: Callable[[Mapping[str, Layer]], Layer],
    *,
    random: bool = True,
    every: bool = True,
    computes: bool = True,
) -> Layer:
    """Make a layer with named children. `wire`, `chain` and `parallel` are built with it.

    Args:
      label: the name of the layer in `repr` and in errors.
      children: layers or plain functions by name.
      body: (f, *inputs) -> outputs.
      rebuild: children -> the same layer with other children.
      random: False if the body itself never uses `f.key`.
      every: whether a child that the body never calls is an error in `init`.
      computes: False if the body only passes values from child to child. Then it runs on specs and
        needs no trace.

    Returns:
      The layer.

    Raises:
      ValueError: a child has a reserved or malformed name.
      TypeError: a child is neither a layer nor a function.
    """
    children = {
        name: as_layer(child, f"{label}: child '{name}'") for name, child in children.items()
    }
    for name in children:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name) or name in RESERVED:
            raise ValueError(
                f"{label}: a child's name is letters, digits and (not first) _, and none of "
                f"{', '.join(RESERVED)}; got '{name}'"
            )
    stateful = [name for name, child in children.items() if child.init_state is not None]
    tapped = any(child.tapped for child in children.values())

    def record(train, *inputs, **named):
        """The inputs of each child and the outputs of the body, for these specs."""
        calls = {}
        context = None

        def call_child(name, /, *inputs, key=None, train=train, **named):
            with scope(name):
                check_parameters_fit(
                    children[name],
                    calls.setdefault(name, specs_of((inputs, named))),
                    (inputs, named),
                )
                if trace_state() != context:
                    check_stateless(children[name])
                outputs = output_specs(children[name], train, *inputs, **named)
            return jax.tree.map(stand_in, outputs) if computes else outputs

        def run_body(*inputs, **named):
            nonlocal context
            context = trace_state()
            return call_body(
                Children(label, children, call_child, train, jax.random.key(0)), inputs, named
            )

        return calls, abstractly(run_body)(*inputs, **named) if computes else run_body(
            *inputs, **named
        )

    def recorded(train, inputs, named):
        inputs, named = specs_of((inputs, named))
        twin = twin_of(body) if computes else None
        twin = None if twin is None else (twin, label, tuple(children.items()))
        return shared(
            twin, self, "record", lambda: record(train, *inputs, **named), train, inputs, named
        )

    def call_body(f, inputs, named):
        try:
            return body(f, *inputs, **named)
        except jax.errors.ConcretizationTypeError as error:
            error.add_note(
                f"{label}: `init` and `jax.jit` trace the body, in which `if`, `int` and the "
                "like see no values"
            )
            raise
        except TypeError as error:
            if f"{Child.__module__}.{Child.__name__}'" in str(error):
                raise TypeError(
                    f"{label}: a child is a layer and no array: call it, f.name(...)"
                ) from error
            explain_call(f"{label}: the body", error, body, (f, *inputs), named)
            raise

    def child_inputs(inputs, named):
        calls, _ = recorded(False, inputs, named)
        # Some children may be called in training only.
        if set(calls) != set(children):
            calls = recorded(True, inputs, named)[0] | calls
        for name in children:
            if name not in calls and every:
                raise ValueError(
                    f"{label}: child '{name}' is never called; call f.{name}(...) in the body, "
                    "or remove it; for several bodies over the same children, as for an encoder "
                    "and a decoder, pass all to one wire(...)(body, ...)"
                )
        return calls

    def init(key, *inputs, **named):
        check_key(label, key)
        params = {}
        with shared_traces():
            try:
                calls = child_inputs(inputs, named)
            except TypeError as error:
                if not inputs and not named:
                    error.add_note(
                        f"{label}: init takes inputs as examples, arrays or "
                        "jax.ShapeDtypeStruct: net.init(key, x)"
                    )
                raise
            keys = fold_all(key, [name for name in calls if children[name].init is not no_params])
            for name in keys:
                args, kwargs = calls[name]
                with scope(name):
                    params[name] = children[name].init(keys[name], *args, **kwargs)
        return {name: params[name] for name in children if not is_empty(params.get(name, {}))}

    def init_state(*inputs, key=None, **named):
        calls = child_inputs(inputs, named)
        state = {}
        for name in stateful:
            if name in calls:
                args, kwargs = calls[name]
                with scope(name):
                    state[name] = start_state(
                        children[name], None if key is None else fold(key, name), args, kwargs
                    )
        return state

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(label, state, stateful=bool(stateful))
        check_names(f"{label}: params", params, children)
        check_names(f"{label}: state", {} if state is None else state, stateful)
        check_no_params(label, params, children)
        check_mode(label, key, train)
        inputs, named = as_jax((inputs, named))
        new_state, counts, seen = dict(state or {}), {}, {}
        context = trace_state()
        body_train, body_key = train, key

        def call_child(name, /, *inputs, key=None, train=body_train, **named):
            child = children[name]
            inside_transform = trace_state() != context
            if inside_transform:
                child = untapped(child)
            if key is None and body_key is not None and child.random:
                key = body_key
                if inside_transform and not isinstance(key, SharedKey):
                    key = SharedKey(child.label, name)
                if not isinstance(key, SharedKey):
                    key, count = fold(key, name), counts.get(name, 0)
                    key = jax.random.fold_in(key, count) if count else key
            counts[name] = counts.get(name, 0) + 1
            with scope(name):
                if inside_transform:
                    check_stateless(child)
                own = params.get(name, {}), new_state.get(name, {})
                outputs, updated, below = run(child, *own, key, train, inputs, named)
            if child.init_state is not None:
                new_state[name] = updated
            for path, taken in below.items():
                path = f"{name}/{path}" if path else name
                seen[path] = (*seen.get(path, ()), *taken)
            return outputs

        outputs = call_body(Children(label, children, call_child, train, key), inputs, named)
        if tapped:
            return outputs, Carried(new_state if stateful else None, seen)
        return (outputs, new_state) if stateful else outputs

    self = Layer(
        init,
        apply,
        init_state if stateful else None,
        label=label,
        children=children,
        rebuild=rebuild,
        random=random or any(child.random for child in children.values()),
        outputs=lambda train, *inputs, **named: recorded(train, inputs, named)[1],
        tapped=tapped,
    )
    # A decorated body stays recognizable in notebooks and in `help`.
    self.__dict__["__name__"] = label
    self.__dict__["__doc__"] = getattr(body, "__doc__", None) or Layer.__doc__
    show_inputs(apply, body, body=True)
    return self


def output_specs(layer: Layer, train: bool, /, *inputs: Any, **named: Any) -> Any:
    """The specs of a layer's outputs for these inputs, by abstract evaluation; memoised, without
    any computation.
    """
    if layer.outputs is not None:
        return layer.outputs(train, *inputs, **named)
    inputs, named = specs_of((inputs, named))

    def evaluate(*inputs, **named):
        init_key, state_key, key = jax.random.split(jax.random.key(0), 3)
        params = layer.init(init_key, *inputs, **named)
        state = start_state(layer, state_key, inputs, named) if layer.init_state else None
        return run(layer, params, state, key, train, inputs, named)[0]

    return memoised(
        layer, "outputs", lambda: abstractly(evaluate)(*inputs, **named), train, inputs, named
    )
