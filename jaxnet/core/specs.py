"""Abstract evaluation: find the shapes and dtypes between layers without running them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.core.intern import Same

if TYPE_CHECKING:
    from jaxnet.core.contract import Layer

__all__ = [
    "abstractly",
    "as_jax",
    "describe",
    "dtype_of",
    "is_array",
    "key_spec",
    "memoised",
    "remember",
    "shared",
    "shared_traces",
    "specs_of",
    "stand_in",
    "trace_state",
    "twin_of",
]


def abstractly(
    fn: Callable[..., Any], trace: Callable[..., Any] = jax.eval_shape
) -> Callable[..., Any]:
    """A function that traces `fn` and returns the specs of its outputs. Array inputs are abstract,
    all others static.

    `trace(function, arrays)` may be another transformation that accepts only arrays, such as one
    that returns the jaxpr.
    """

    def traced(*inputs, **named):
        leaves, tree = jax.tree.flatten((inputs, named))
        dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def run(arrays):
            filled = list(leaves)
            for i, array in zip(dynamic, arrays, strict=True):
                filled[i] = array
            inputs, named = jax.tree.unflatten(tree, filled)
            return fn(*inputs, **named)

        return trace(run, [leaves[i] for i in dynamic])

    return traced


def memoised(
    layer: Any, subject: str, compute: Callable[[], Any], train: bool, inputs: Any, named: Any
) -> Any:
    """`compute()`, cached by layer, subject, mode and the specs of the inputs.

    With the cache, a network that is nested d deep costs at most d traces per leaf.
    """
    question = _question(layer, subject, train, inputs, named)
    results = _MEMO.setdefault(layer, {})
    if question not in results:
        _store(results, question, compute())
    return results[question]


@contextlib.contextmanager
def shared_traces() -> Iterator[None]:
    """Share traces among equal functions inside the block: 24 blocks that one function makes need
    one trace.

    The outermost call of `init` opens it. The shared traces are dropped afterwards, because
    functions may also depend on global variables, which may change before the next call.
    """
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared(
    twin: Any,
    layer: Layer,
    subject: str,
    compute: Callable[[], Any],
    train: bool,
    inputs: Any,
    named: Any,
) -> Any:
    """`memoised`, which inside `shared_traces` also reuses the results of other layers with an
    equal `twin`.
    """

    def look_up():
        known = _SHARED.get()
        if known is None or twin is None:
            return compute()
        question = twin, _question(layer, subject, train, inputs, named)
        if question not in known:
            known[question] = compute()
        return known[question]

    return memoised(layer, subject, look_up, train, inputs, named)


def twin_of(fn: Any) -> Any:
    """A value that is equal for equal functions: the same code with equal values in closures and
    defaults.

    None if there is no such value, because a closure or a default cannot be hashed.
    """
    if not isinstance(fn, types.FunctionType) or fn.__dict__:
        return None
    try:
        values = (*(cell.cell_contents for cell in fn.__closure__ or ()), *(fn.__defaults__ or ()))
        values += tuple(part for item in (fn.__kwdefaults__ or {}).items() for part in item)
        twin = fn.__code__, id(fn.__globals__), tuple(_value(value) for value in values)
        hash(twin)
    except (TypeError, ValueError):
        # TypeError: a value cannot be hashed. ValueError: a variable of the closure has no value
        # yet.
        return None
    return twin


def _value(value: Any) -> Any:
    """A value around a function, for comparison: plain ones with their types, all others by
    identity.
    """
    if isinstance(value, tuple):
        return tuple(map(_value, value))
    hash(value)
    plain = value is None or isinstance(value, bool | int | float | complex | str | bytes)
    return (type(value), value) if plain else Same(value)


_SHARED: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
    "shared traces", default=None
)


def remember(layer: Any, subject: str, result: Any, inputs: Any, named: Any) -> None:
    """Store a result that `memoised` would otherwise compute."""
    _store(_MEMO.setdefault(layer, {}), _question(layer, subject, False, inputs, named), result)


def _store(results: dict[Any, Any], question: Any, result: Any) -> None:
    """Keep a result. Static inputs that change from call to call must not fill the memory: the
    oldest result goes.
    """
    while len(results) >= _REMEMBERED:
        results.pop(next(iter(results)), None)
    results[question] = result


def _question(layer: Any, subject: str, train: bool, inputs: Any, named: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten((inputs, named))
    facts = [_facts(leaf) for leaf in leaves]
    x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    question = (subject, train, x64, tree, *facts)
    try:
        hash(question)
    except TypeError as error:
        text = describe((inputs, named) if named else inputs)
        raise TypeError(
            f"{layer.label}: inputs must be arrays or hashable values, got {text}"
        ) from error
    return question


def _facts(leaf: Any) -> tuple[Any, ...]:
    """The facts about a leaf that a trace may depend on. The type of a static value tells apart 1,
    1.0 and True.
    """
    # A child as an input stands for its layer, never for the parameters that it holds.
    if hasattr(leaf, "memo"):
        return leaf.memo
    if not is_array(leaf):
        return type(leaf), leaf
    return leaf.shape, dtype_of(leaf), getattr(leaf, "weak_type", False)


@functools.cache
def _key_spec(impl: str) -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl))


def key_spec() -> Any:
    """The spec of a key of the default generator. A real key would become part of the traced
    program.
    """
    return _key_spec(jax.config.jax_default_prng_impl)  # pyright: ignore[reportAttributeAccessIssue]


def specs_of(tree: Any) -> Any:
    """The tree with a `jax.ShapeDtypeStruct` for each array. Other leaves stay as they are."""
    return jax.tree.map(lambda x: _spec(x) if is_array(x) else x, tree)


def as_jax(tree: Any) -> Any:
    """Convert NumPy arrays in a tree to JAX arrays, in a dtype that JAX has, as `jax.jit` does."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype_of(x)) if isinstance(x, np.ndarray | np.generic) else x, tree
    )


def stand_in(spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of this spec. A weak type stays weak, so the zeros promote as the real output does."""
    if spec.weak_type:
        weak = jnp.full(spec.shape, np.zeros((), spec.dtype).item())
        if weak.dtype == spec.dtype:
            return weak
    return jnp.zeros(spec.shape, spec.dtype)


def describe(tree: Any) -> str:
    """The shapes and dtypes of a value as text: float32[4, 3], or {'a': int32[]}."""

    class Word(str):
        __repr__ = str.__str__

    def word(x):
        return Word(
            f"{x.dtype}[{', '.join(map(str, x.shape))}]" if is_array(x) else type(x).__name__
        )

    return repr(jax.tree.map(word, tree))


def trace_state() -> Any:
    """The current JAX transform, as a value to compare."""
    # This import takes 16 ms, so it is not at the top of the module.
    import jax.extend.core

    return jax.extend.core.get_opaque_trace_state()


def dtype_of(x: Any) -> Any:
    """The dtype that JAX gives an array: float32 for NumPy's float64 if x64 is off."""
    try:
        return (
            x.dtype
            if jnp.issubdtype(x.dtype, jax.dtypes.extended)
            else jax.dtypes.canonicalize_dtype(x.dtype)
        )
    except TypeError as error:
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise TypeError(
            f"inputs must be arrays of JAX or NumPy, got a {kind}; convert it, as in np.asarray(x)"
        ) from error


def is_array(x: Any) -> bool:
    """Whether x has a shape and a dtype: an array of any library, a tracer, a
    `jax.ShapeDtypeStruct`.
    """
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x), weak_type=getattr(x, "weak_type", False))


# The most results per layer.
_REMEMBERED = 256

# Results of abstract evaluation by layer, which are dropped with the layer.
_MEMO: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
