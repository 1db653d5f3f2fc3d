"""The memory of abstract evaluation: each result is computed once per layer and inputs."""

from __future__ import annotations

import contextlib
import contextvars
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxnet.core.intern import Same
from jaxnet.core.specs import describe, dtype_of, is_array

__all__ = [
    "Remembered",
    "memoized",
    "remember",
    "shared",
    "shared_traces",
    "twin_of",
]


class Remembered:
    """A static input that is remembered by its field `memo` instead of by itself."""

    memo: tuple[Any, ...]


def memoized(
    layer: Any, subject: str, compute: Callable[[], Any], train: bool, inputs: Any, named: Any
) -> Any:
    """Compute a result once per layer, subject, mode and specs of the inputs.

    With this cache, a network that is nested d deep costs at most d traces per leaf.

    Args:
      layer: the layer, or another object with a `label`. Its results are dropped with it.
      subject: the name of the result, such as "outputs".
      compute: () -> result, called if the result is not known.
      train: the mode.
      inputs: the inputs, or their specs.
      named: the inputs by name, or their specs.

    Returns:
      The result.

    Raises:
      TypeError: an input is neither an array nor hashable.
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
    layer: Any,
    subject: str,
    compute: Callable[[], Any],
    train: bool,
    inputs: Any,
    named: Any,
) -> Any:
    """`memoized`, which inside `shared_traces` also reuses the results of other layers with an
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

    return memoized(layer, subject, look_up, train, inputs, named)


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
    """A value of a function, for comparison: plain ones with their types, all others by
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
    """Store a result that `memoized` would otherwise compute."""
    _store(_MEMO.setdefault(layer, {}), _question(layer, subject, False, inputs, named), result)


def _store(results: dict[Any, Any], question: Any, result: Any) -> None:
    """Keep a result. Static inputs that change from call to call must not fill the memory: the
    oldest result is dropped.
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
    if isinstance(leaf, Remembered):
        return leaf.memo
    if not is_array(leaf):
        return type(leaf), leaf
    return leaf.shape, dtype_of(leaf), getattr(leaf, "weak_type", False)


# The most results per layer.
_REMEMBERED = 256

# Results of abstract evaluation by layer, which are dropped with the layer.
_MEMO: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
