"""Layers with named children, which a body calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxnet.core.calls import Child, Children
from jaxnet.core.checks import (
    check_key,
    check_mode,
    check_names,
    check_state,
    explain_call,
    is_empty,
    scope,
)
from jaxnet.core.child_checks import check_no_params, check_parameters_fit, check_stateless
from jaxnet.core.contract import Carried, Layer, no_params, run, start_state
from jaxnet.core.functions import as_layer
from jaxnet.core.keys import SharedKey, fold, fold_all
from jaxnet.core.layer_specs import output_specs
from jaxnet.core.memo import shared, shared_traces, twin_of
from jaxnet.core.signature import show_inputs
from jaxnet.core.specs import abstractly, as_jax, specs_of, stand_in, trace_state
from jaxnet.core.taps import untapped

__all__ = ["compose"]

RESERVED = ("train", "key", "state", "params")


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
            child = children[name]
            with scope(name):
                first_call = calls.setdefault(name, specs_of((inputs, named)))
                check_parameters_fit(child, first_call, (inputs, named))
                if trace_state() != context:
                    check_stateless(child)
                outputs = output_specs(child, train, *inputs, **named)
            return jax.tree.map(stand_in, outputs) if computes else outputs

        def run_body(*inputs, **named):
            nonlocal context
            context = trace_state()
            f = Children(label, children, call_child, train, jax.random.key(0))
            return call_body(f, inputs, named)

        run_abstractly = abstractly(run_body) if computes else run_body
        return calls, run_abstractly(*inputs, **named)

    def recorded(train, inputs, named):
        inputs, named = specs_of((inputs, named))
        twin = twin_of(body) if computes else None
        twin = None if twin is None else (twin, label, tuple(children.items()))
        compute = lambda: record(train, *inputs, **named)  # noqa: E731
        return shared(twin, self, "record", compute, train, inputs, named)

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
                    f"{label}: a child is a layer, not an array: call it, f.name(...)"
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
                    own_key = None if key is None else fold(key, name)
                    state[name] = start_state(children[name], own_key, args, kwargs)
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
