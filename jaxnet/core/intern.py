"""Equal calls of a constructor return one layer, so that a network of many equal layers is traced once for all of them."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Same", "interned"]

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


def interned(constructor: Constructor) -> Constructor:
    """The constructor of a layer that returns the living layer of an earlier, equal call if there is one.

    A layer is a value: its functions follow from the arguments alone. That does not hold for functions of the user, which
    may read global variables: calls with such functions, and with arguments that cannot be hashed, always make a new
    layer. Numbers, strings and tuples are compared with their types, everything else by identity.
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
    """An argument in a form that may be compared. Raises TypeError if the layer may not be shared."""
    if isinstance(value, tuple):
        return tuple(map(_argument, value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    if isinstance(value, functools.partial):
        items = sorted(value.keywords.items())
        return "partial", *map(_argument, (value.func, *value.args, *(part for item in items for part in item)))
    hash(value)
    if callable(value) and not hasattr(value, "made_by") and not _is_of_jax(value):
        raise TypeError("a function of the user")
    return Same(value)


def _is_of_jax(function: Any) -> bool:
    """Whether a function comes from JAX or this library, so that no variable of the user changes what it computes."""
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("jax", "jaxlib", "jaxnet")
