"""The contract: a network is a value made of pure functions over a plain nested dict of arrays.

Letters: `params` is a nested dict of float arrays (a lone array for `param`), `state` a nested dict of whatever is
carried from call to call without a gradient (running statistics), `key` a JAX PRNG key. Inputs are pytrees of arrays or
of `jax.ShapeDtypeStruct`; whatever else they hold (None, bools, strings) is static.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxnet.checks import size_of

__all__ = ["Layer", "layer", "param", "wire"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """A layer, or a whole network: a pair of pure functions, or a triple where it carries state.

    Attributes:
      init: (key, *inputs) -> params; reads only shapes and dtypes, so inputs may be `jax.ShapeDtypeStruct`.
      apply: (params, *inputs, key=None, train=False) -> outputs where `init_state` is None, else
        (params, *inputs, state, key=None, train=False) -> (outputs, new_state).
      init_state: (*inputs) -> state, or None: a layer is stateful or not by what it is, never by how it is called.
      label: how it prints, such as 'dense(8)'.
      children: the layers inside, by name; the name is the key in params and state. A child named '' shares the
        parameters, state and path of its parent (`repeat`, `remat`, `cast`, `residual`).
      rebuild: children -> the same layer with other children; None for a layer without children.
      repeats: how many copies of its child run one after the other (`repeat`), None in all other layers.
      random: False where `apply` never uses its key.
      outputs: (train, *inputs) -> specs of the outputs, where that is cheaper than tracing `apply`.
      wide: names of its own parameters that may be wider than its inputs: `cast` leaves them as they are, so that their
        gradients are summed in that dtype (`jaxnet.mixed`).
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    init_state: Any = None  # Callable[..., Any] | None: who calls it knows whether there is one
    label: str = "layer"
    children: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None
    repeats: int | None = None
    random: bool = True
    outputs: Callable[..., Any] | None = None
    wide: tuple[str, ...] = ()

    def __repr__(self) -> str:
        if "" in self.children:
            return f"{self.label}({self.children['']!r})"
        if not self.children:
            return self.label
        lines = [f"{name}: {child!r}" for name, child in self.children.items()]
        return f"{self.label}(\n" + "".join(f"  {line}\n" for line in "\n".join(lines).split("\n")) + ")"


def layer(
    init: Callable | None, fn: Callable, *, init_state: Callable | None = None, label: str | None = None
) -> Layer:
    """Make a Layer from a plain function `fn(params, *inputs)`.

    `fn` names `key`, `train` or `state` among its parameters only if it uses them, and is handed just those. With
    `init_state`, it takes `state` and returns (outputs, new_state).

    Args:
      init: (key, *inputs) -> params, or None where there is nothing to learn.
      fn: the layer as an equation.
      init_state: (*inputs) -> state for a stateful layer.
      label: how the layer prints and signs its errors; the name of `fn` by default.

    >>> double = layer(None, lambda params, x: 2 * x, label="double")
    >>> double.apply({}, 3.0)
    6.0
    """
    name = label or _name_of(fn)
    wanted = {"key", "train", "state"} & set(inspect.signature(fn).parameters)
    if ("state" in wanted) != (init_state is not None):
        raise TypeError(
            f"{name}: a stateful layer has both init_state and a parameter `state` of its function, or neither"
        )

    def initialise(key, *inputs, **named):
        check_key(name, key)
        inputs, named = specs_of((inputs, named))
        return init(key, *inputs, **named)  # pyright: ignore[reportOptionalCall]

    def initialise_state(*inputs, **named):
        inputs, named = specs_of((inputs, named))
        return init_state(*inputs, **named)  # pyright: ignore[reportOptionalCall]

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(name, state, stateful=init_state is not None)
        check_mode(name, key, train)
        inputs, named = as_jax((inputs, named))
        offered = {"key": key, "train": train, "state": as_jax(state)}
        try:
            return fn(as_jax(params), *inputs, **named, **{n: offered[n] for n in wanted})
        except (KeyError, TypeError, IndexError) as error:
            if init is not None:
                made = {"params": (initialise, params), "state": (initialise_state, state)}
                _explain_lookup(name, error, made, inputs, named)
            raise

    return Layer(
        initialise if init else no_params,
        apply,
        initialise_state if init_state else None,
        label=name,
        random="key" in wanted,
    )


def param(shape: tuple[int, ...], init: Callable, *, dtype: Any = None) -> Layer:
    """A raw array as a child: `f.table()` in the body of `wire` returns it.

    Args: shape: of the array; init: (key, shape, dtype) -> array, as in `jax.nn.initializers`;
      dtype: float32 by default (float64 under `jax_enable_x64`).
    """
    shape = tuple(size_of("param: each size of the shape", size, 0) for size in shape)
    label = f"param{shape}"

    def initialise(key):
        return init(key, shape, dtype or jnp.result_type(float))

    def fn(params):
        if not _is_array(params) or params.shape != shape:
            raise ValueError(f"{label}: the array must have shape {shape}, got {describe(params)}")
        return params

    return layer(initialise, fn, label=label)


def wire(**children: Any) -> Callable[[Callable], Layer]:
    """Compose layers by an ordinary function, written once: `wire(a=..., b=...)(body)`, also as a decorator.

    `body(f, *inputs)` calls a child as `f.a(x)`. A child called twice shares its weights, and draws fresh random
    numbers; a stateful child called twice carries its state from call to call. `f.train` says whether this is training;
    `f.key` is a key of the body's own; `f.a(x, key=..., train=...)` overrides what the child would be given. `f["a"]`
    is `f.a`.

    `init` traces the body once, abstractly, and records the shapes that each child is called with: the body may use
    `jax.lax.scan`, `jax.vmap` or `jax.checkpoint` around stateless children (the key is then the same in each
    iteration: pass `key=` to a random child). Stateful children belong under `repeat` and `remat`, which carry their
    state.

    Raises:
      AttributeError: the body calls a child that is not declared.
      ValueError: a declared child is never called, neither in training nor in evaluation.
      RuntimeError: a stateful child is called inside a raw JAX transform.

    >>> from jaxnet import dense
    >>> @wire(up=dense(16), down=dense(4))
    ... def block(f, x):
    ...     return x + f.down(jax.nn.gelu(f.up(x)))
    >>> jax.tree.map(jnp.shape, block.init(jax.random.key(0), jnp.ones((2, 4))))
    {'down': {'bias': (4,), 'kernel': (16, 4)}, 'up': {'bias': (16,), 'kernel': (4, 16)}}
    """

    def decorate(body: Callable) -> Layer:
        if not callable(body):
            raise TypeError(f"wire: the body must be a function of (f, *inputs), got {describe(body)}")
        name = _name_of(body)
        return compose("wire" if name == "<lambda>" else name, children, body, lambda new: wire(**new)(body))

    decorate.__name__ = "wire(...)"  # how it signs the error where the body was forgotten
    return decorate


# For the authors of layers and combinators


def compose(
    label: str, children: Mapping[str, Any], body: Callable, rebuild: Callable, *, random: bool = True
) -> Layer:
    """The one way in which a layer with named children is made: `wire`, `chain` and `parallel` call it."""
    children = {name: as_layer(child, f"{label}: child '{name}'") for name, child in children.items()}
    for name in children:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", name) or name in ("train", "key"):
            raise ValueError(
                f"{label}: a child's name is letters, digits and (not first) _, and not 'train' or 'key'; got '{name}'"
            )
    stateful = [name for name, child in children.items() if child.init_state is not None]

    def record(train, *inputs, **named):
        """What each child is called with, and what the body returns, for these specs."""
        calls = {}
        context = None

        def call_child(name, *inputs, key=None, train=train, **named):
            calls.setdefault(name, specs_of((inputs, named)))
            with scope(name):
                if _trace_state() != context:
                    _check_stateless(getattr(children[name], "plain", children[name]))
                outputs = output_specs(children[name], train, *inputs, **named)
            return jax.tree.map(_stand_in, outputs)

        def run(*inputs, **named):
            nonlocal context
            context = _trace_state()
            return body(Calls(label, children, call_child, train, jax.random.key(0)), *inputs, **named)

        return calls, abstractly(run)(*inputs, **named)

    def child_inputs(*inputs, **named):
        calls, _ = memoised(self, record, False, *inputs, **named)
        if set(calls) != set(children):  # a child may be for training only
            calls = memoised(self, record, True, *inputs, **named)[0] | calls
        for name in children:
            if name not in calls:
                raise ValueError(
                    f"{label}: child '{name}' is never called; call f.{name}(...) in the body, or remove it"
                )
        return calls

    def init(key, *inputs, **named):
        check_key(label, key)
        params = {}
        calls = child_inputs(*inputs, **named)
        keys = fold_all(key, [name for name in calls if children[name].init is not no_params])
        for name in keys:
            args, kwargs = calls[name]
            with scope(name):
                params[name] = children[name].init(keys[name], *args, **kwargs)
        return {name: params[name] for name in children if not _is_empty(params.get(name, {}))}

    def init_state(*inputs, **named):
        calls = child_inputs(*inputs, **named)
        state = {}
        for name in stateful:
            args, kwargs = calls[name]
            with scope(name):
                state[name] = children[name].init_state(*args, **kwargs)
        return state

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(label, state, stateful=bool(stateful))
        check_names(f"{label}: params", params, children)
        check_names(f"{label}: state", {} if state is None else state, stateful)
        check_mode(label, key, train)
        inputs, named = as_jax((inputs, named))
        new_state, counts = dict(state or {}), {}
        context = _trace_state()
        body_train, body_key = train, key

        def call_child(name, *inputs, key=None, train=body_train, **named):
            child = children[name]
            inside_transform = _trace_state() != context
            if inside_transform:
                child = getattr(child, "plain", child)  # what `capture` added cannot be brought out of a transform
            if key is None and body_key is not None and child.random:
                key, count = fold(body_key, name), counts.get(name, 0)
                key = jax.random.fold_in(key, count) if count else key
            counts[name] = counts.get(name, 0) + 1
            with scope(name):
                if inside_transform:
                    _check_stateless(child)
                outputs, updated = call(child, params.get(name, {}), new_state.get(name, {}), key, train, inputs, named)
            if child.init_state is not None:
                new_state[name] = updated
            return outputs

        outputs = body(Calls(label, children, call_child, train, key), *inputs, **named)
        return (outputs, new_state) if stateful else outputs

    self = Layer(
        init,
        apply,
        init_state if stateful else None,
        label=label,
        children=children,
        rebuild=rebuild,
        random=random or any(child.random for child in children.values()),
        outputs=lambda train, *inputs, **named: memoised(self, record, train, *inputs, **named)[1],
    )
    return self


def transparent(
    label: str, inner: Any, around: Callable, rebuild: Callable, *, init=None, init_state=None, repeats=None
) -> Layer:
    """A layer with the parameters, state and path of `inner`, whose call is `around(run)`.

    Args:
      around: run -> another function of the same form, run(params, state, key, *inputs, **named) -> (outputs, state).
      init, init_state: where they differ from those of `inner`.
    """
    inner = as_layer(inner, label)

    def apply(params, *inputs, state=None, key=None, train=False, **named):
        check_state(label, state, stateful=inner.init_state is not None)
        check_mode(label, key, train)
        inputs, named = as_jax((inputs, named))

        def run(params, state, key, *inputs, **named):
            return call(inner, params, state, key, train, inputs, named)

        outputs, new_state = around(run)(params, state, key, *inputs, **named)
        return outputs if inner.init_state is None else (outputs, new_state)

    return Layer(
        init or inner.init,
        apply,
        inner.init_state and (init_state or inner.init_state),
        label=label,
        children={"": inner},
        rebuild=lambda children: rebuild(children[""]),
        repeats=repeats,
        random=inner.random,
    )


def as_layer(thing: Any, where: str = "a layer") -> Layer:
    """A Layer as it is; any other callable as a layer without parameters."""
    if isinstance(thing, Layer):
        return thing
    if not callable(thing):
        raise TypeError(f"{where} must be a layer or a function of its inputs, got {thing!r}")
    name = _name_of(thing)
    remedy = f"pass the layer that it returns, {name}(...), not {name} itself"
    if _returns_layer(thing):
        raise TypeError(f"{where}: {name} is a function that makes a layer; {remedy}")

    def fn(params, *inputs, **named):
        outputs = thing(*inputs, **named)
        if isinstance(outputs, Layer):
            raise TypeError(f"{name} returned a layer when it was called with data; {remedy}")
        return outputs

    return layer(None, fn, label=name)


def call(layer: Layer, params, state, key, train, inputs=(), named: Mapping[str, Any] = {}):
    """Call a layer, stateful or not, in one form: -> (outputs, state)."""
    if layer.init_state is None:
        return layer.apply(params, *inputs, key=key, train=train, **named), state
    return layer.apply(params, *inputs, state=state, key=key, train=train, **named)


def no_params(key, *inputs, **named) -> dict:
    """`init` where there is nothing to learn."""
    return {}


def fold(key, name: str):
    """The key of the child called `name`: it depends on the name alone, so siblings may come and go."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def fold_all(key, names: list[str]) -> dict[str, Any]:
    """`fold` for each name; in a program that is being traced, as one operation, which compiles in a fraction of the time."""
    if not isinstance(key, jax.core.Tracer) or not is_threefry(key) or len(names) < 2:
        return {name: fold(key, name) for name in names}
    codes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    return dict(zip(names, jax.vmap(jax.random.fold_in, (None, 0))(key, codes), strict=True))


def is_threefry(key) -> bool:
    """Whether a key, typed or raw, belongs to JAX's default generator; others may draw and fold otherwise under vmap."""
    return str(jax.random.key_impl(key)) == "threefry2x32"


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Give profiler rows the name, and errors one line with the whole path, "in layer 'mlp/hidden'"."""
    try:
        with jax.named_scope(name):
            yield
    except Exception as error:
        notes, start = getattr(error, "__notes__", []), "in layer '"
        known = next((i for i, note in enumerate(notes) if note.startswith(start)), None)
        if known is None:
            error.add_note(f"{start}{name}'")
        else:
            notes[known] = f"{start}{name}/{notes[known].removeprefix(start)}"
        raise


def check_input(
    label: str, x: Any, *, width: int | None = None, rank: int = 1, kind: Any = jnp.floating, like: Any = None
):
    """Raise unless x is an array with at least `rank` axes, the last of `width`, in the dtype of `like`.

    Args: kind: of dtype, as in `jnp.issubdtype`; `object` for any.

    Raises: TypeError for what is not an array or has the wrong dtype, ValueError for a wrong shape.
    """
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{label}: the input must be an array or a jax.ShapeDtypeStruct, got {x!r}")
    if kind is not object and not jnp.issubdtype(x.dtype, kind):
        remedy = "x.astype(jnp.float32)" if kind is jnp.floating else "x.astype(jnp.int32)"
        raise TypeError(f"{label}: the input must be {kind.__name__}, got {describe(x)}; convert it, as in {remedy}")
    if len(x.shape) < rank:
        raise ValueError(f"{label}: the input must have at least {rank} axes, got {describe(x)}")
    if width is not None and x.shape[-1] != width:
        raise ValueError(f"{label}: last axis must be {width}, got {describe(x)}; the parameters were made for {width}")
    if like is not None and _dtype(x) != _dtype(like):
        raise TypeError(
            f"{label}: the input must have the dtype of the parameters, {like.dtype}, got {describe(x)}; "
            f"convert one of them, or compute in another dtype with jaxnet.cast"
        )


def check_key(label: str, key: Any) -> None:
    """Raise TypeError unless `key` is one JAX PRNG key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not typed and not (dtype == jnp.uint32 and shape and len(shape) == 1):
        got = describe(key) if dtype is not None else repr(key)
        raise TypeError(f"{label}: key must be one PRNG key such as jax.random.key(0), got {got}")


def check_mode(label: str, key: Any, train: Any) -> None:
    """Raise TypeError unless `key` is None or one PRNG key, and `train` a bool that is not traced."""
    if key is not None:
        check_key(label, key)
    if not isinstance(train, bool):
        got = describe(train) if _is_array(train) else repr(train)
        remedy = (
            "under jax.jit, jax.jit(net.apply, static_argnames='train') or functools.partial(net.apply, train=True)"
        )
        raise TypeError(f"{label}: train must be True or False, got {got}; {remedy}")


def check_state(label: str, state: Any, *, stateful: bool) -> None:
    """Raise unless state was passed just where the layer carries one."""
    if stateful and state is None:
        raise ValueError(
            f"{label}: this layer carries state: pass state=net.init_state(*inputs), or the state of the last call"
        )
    if not stateful and state is not None and not _is_empty(state):
        raise TypeError(f"{label}: this layer has no state (its init_state is None): call apply without state=")


def check_names(what: str, tree: Any, names) -> None:
    """Raise unless the top of a tree of parameters is a dict with no other names than these."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{what} must be a dict by the name of the child, got {describe(tree)}")
    for name in tree:
        if name not in names:
            raise ValueError(f"{what} must have no '{name}', which is no child of this layer{_closest(name, names)}")


def describe(tree: Any) -> str:
    """A value's shapes and dtypes in words: float32[4, 3], or {'a': int32[]}."""

    class Word(str):
        __repr__ = str.__str__

    def word(x):
        return Word(f"{x.dtype}{list(x.shape)}" if _is_array(x) else type(x).__name__)

    return repr(jax.tree.map(word, tree))


# Abstract evaluation: what flows between layers is known without running them


class Calls:
    """The children of a network as functions: the `f` in the body of `wire`."""

    __slots__ = ("_call", "_children", "_key", "_label", "train")

    def __init__(self, label, children, call_child, train, key):
        self._label, self._children, self._call, self.train, self._key = label, children, call_child, train, key

    @property
    def key(self):
        """A key for random numbers that the body itself draws; None where `apply` was given none."""
        return None if self._key is None else fold(self._key, "")

    def __getitem__(self, name: str) -> Callable:
        if name not in self._children:
            raise AttributeError(f"{self._label} has no child '{name}'{_closest(name, self._children)}")
        return functools.partial(self._call, name)

    __getattr__ = __getitem__


def output_specs(layer: Layer, train: bool, *inputs, **named):
    """The specs of a layer's outputs for these inputs, by abstract evaluation; memoised, without any computation."""
    if layer.outputs is not None:
        return layer.outputs(train, *inputs, **named)

    def evaluate(train, *inputs, **named):
        def run(*inputs, **named):
            init_key, key = jax.random.split(jax.random.key(0))
            params = layer.init(init_key, *inputs, **named)
            state = layer.init_state(*inputs, **named) if layer.init_state else None
            return call(layer, params, state, key, train, inputs, named)[0]

        return abstractly(run)(*inputs, **named)

    return memoised(layer, evaluate, train, *inputs, **named)


def abstractly(fn: Callable, trace: Callable = jax.eval_shape) -> Callable:
    """`fn` traced, not run: returns the specs of its outputs. Array inputs are abstract in `fn`, all others static.

    `trace(function, arrays)` may be another transformation that wants arrays only: one that returns the jaxpr, say.
    """

    def traced(*inputs, **named):
        leaves, tree = jax.tree.flatten((inputs, named))
        dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        def run(arrays):
            filled = list(leaves)
            for i, array in zip(dynamic, arrays, strict=True):
                filled[i] = array
            inputs, named = jax.tree.unflatten(tree, filled)
            return fn(*inputs, **named)

        return trace(run, [leaves[i] for i in dynamic])

    return traced


def memoised(layer: Layer, fn: Callable, train: bool, *inputs, **named):
    """`fn(train, *specs)`, remembered for this layer: a network nested d deep costs at most d traces a leaf."""
    inputs, named = specs_of((inputs, named))
    leaves, tree = jax.tree.flatten((inputs, named))
    results = _MEMO.setdefault(layer, {})
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    question = (fn.__qualname__, train, x64, tree, *leaves, *map(type, leaves))  # 1 == 1.0 == True
    try:
        known = question in results
    except TypeError as error:
        raise TypeError(f"{layer.label}: inputs must be arrays or hashable values, got {describe(inputs)}") from error
    if not known:
        results[question] = fn(train, *inputs, **named)
    return results[question]


def specs_of(tree: Any):
    """The tree with a `jax.ShapeDtypeStruct` for each array; other leaves stay as they are."""
    return jax.tree.map(lambda x: _spec(x) if _is_array(x) else x, tree)


def as_jax(tree: Any):
    """The tree with NumPy's arrays as JAX arrays, which also gives them a dtype that JAX has: as `jax.jit` does."""
    return jax.tree.map(lambda x: jnp.asarray(x, _dtype(x)) if isinstance(x, np.ndarray | np.generic) else x, tree)


def _spec(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, _dtype(x), weak_type=getattr(x, "weak_type", False))


def _stand_in(spec: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this spec; a weak type stays weak, so that it promotes as the real output will."""
    if spec.weak_type:
        weak = jnp.full(spec.shape, np.zeros((), spec.dtype).item())
        if weak.dtype == spec.dtype:
            return weak
    return jnp.zeros(spec.shape, spec.dtype)


def _trace_state():
    """What JAX transform the program is in, for comparison."""
    import jax.extend.core  # not above: it takes 16 ms

    return jax.extend.core.get_opaque_trace_state()


def _check_stateless(child: Layer) -> None:
    if child.init_state is not None:
        raise RuntimeError(
            f"{child.label}: a layer with state cannot be called inside a raw JAX transform (scan, vmap, jit, "
            "checkpoint, ...), its new state could not come out; use jaxnet.repeat or jaxnet.remat around it"
        )


def _dtype(x) -> Any:
    """The dtype that JAX gives an array: float32 for NumPy's float64 where x64 is off."""
    return x.dtype if jnp.issubdtype(x.dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(x.dtype)


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_empty(tree) -> bool:
    return isinstance(tree, Mapping) and not tree


def _name_of(fn) -> str:
    fn = getattr(fn, "func", fn)  # functools.partial
    return getattr(fn, "__name__", type(fn).__name__)


def _closest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean '{close[0]}'?" if close else "") + f" (children: {', '.join(names) or 'none'})"


def _returns_layer(fn) -> bool:
    """Whether a function says by its annotation that it makes a layer, as every constructor of a layer does."""
    returned = getattr(fn, "__annotations__", {}).get("return")
    return returned is Layer or (isinstance(returned, str) and returned.split(".")[-1] == "Layer")


def _explain_lookup(label: str, error: Exception, made: dict[str, tuple[Callable, Any]], inputs, named) -> None:
    """Raise what a failed look-up in params or state means; return where it was none.

    Args: made: by what it is called: the function that makes it, and what was given in its place.
    """
    remedy = "make them with init, or load those of this network"
    made = {what: (make, given) for what, (make, given) in made.items() if what == "params" or given is not None}
    for what, (make, given) in made.items():
        if not isinstance(given, Mapping):
            keys = (jax.random.key(0),) if what == "params" else ()
            try:
                expected = abstractly(make)(*keys, *inputs, **named)
            except Exception:
                return  # the inputs are wrong too: their error is the better one
            if isinstance(expected, Mapping):
                message = f"{label}: {what} must be a dict, {describe(expected)}, got {describe(given)}; {remedy}"
                raise TypeError(message) from error
            return
    held = {name: leaf for _, given in made.values() for name, leaf in given.items()}
    if isinstance(error, KeyError) and len(error.args) == 1 and error.args[0] not in held:
        have = ", ".join(f"{name} {describe(leaf)}" for name, leaf in held.items()) or "nothing"
        message = f"{label}: no '{error.args[0]}' in {' and '.join(made)} (they hold {have}); {remedy}"
        raise ValueError(message) from error


# Results of abstract evaluation by layer; a layer that is gone takes its results with it.
_MEMO: weakref.WeakKeyDictionary[Layer, dict] = weakref.WeakKeyDictionary()
