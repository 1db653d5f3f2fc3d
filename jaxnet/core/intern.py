"""Equal calls of a constructor return the same layer, so a network of many equal layers traces it
only once.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from jaxnet.core.contract import Layer

__all__ = ["Same", "interned"]

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


def interned(constructor: Constructor) -> Constructor:
    """Decorate a constructor of layers to return the layer of an earlier, equal call if that layer
    still exists.

    This is correct because the functions of a layer depend only on the arguments. It does not hold
    for functions of the user, which may read global variables: calls with such functions, and calls
    with unhashable arguments, always make a new layer. Numbers, strings and tuples are compared
    with their types, all other values by identity. Layers are held by weak references.

    Args:
      constructor: a function that returns a Layer.

    Returns:
      A function with the same arguments. Its layers can be pickled if the arguments can.
    """
    living: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    @functools.wraps(constructor)
    def make(*args: Any, **named: Any) -> Any:
        values = (*args, *named.values())
        try:
            question = len(args), tuple(named), tuple(_argument(value) for value in values)
            known = living.get(question)
        except TypeError:
            known = constructor(*args, **named)
            known.made_by(make, args, named)
            return known
        if known is None:
            known = living[question] = constructor(*args, **named)
            known.made_by(make, args, named)
        return known

    return make  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """A value that equals only itself."""

    value: Any

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _argument(value: Any) -> Any:
    """An argument in a form that may be compared. Raises TypeError if the layer may not be
    shared.
    """
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    if isinstance(value, functools.partial):
        options = [part for item in sorted(value.keywords.items()) for part in item]
        return "partial", *map(_argument, (value.func, *value.args, *options))
    hash(value)
    if callable(value) and not isinstance(value, Layer) and not _is_of_jax(value):
        raise TypeError("a function of the user")
    return Same(value)


def _is_of_jax(function: Any) -> bool:
    """Whether a function comes from JAX or this library, so that no variable of the user changes
    what it computes.
    """
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("jax", "jaxlib", "jaxnet")
