"""Equal calls of a constructor return the same layer, so a network of many equal layers traces it only once."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["interned"]

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


def interned(constructor: Constructor) -> Constructor:
    """Decorate a constructor of layers to return the layer of an earlier, equal call if that layer still exists.

    This is correct because the functions of a layer depend only on the arguments. Arguments of different types are not
    equal. Calls with unhashable arguments always make a new layer. Layers are held by weak references.
    """
    living: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    @functools.wraps(constructor)
    def make(*args: Any, **named: Any) -> Any:
        values = (*args, *named.values())
        question = (args, tuple(named.items()), tuple(_types(value) for value in values))
        try:
            known = living.get(question)
        except TypeError:
            return constructor(*args, **named)
        if known is None:
            known = living[question] = constructor(*args, **named)
            known.made_by(make, args, named)
        return known

    return make  # pyright: ignore[reportReturnType]


def _types(value: Any) -> Any:
    """The types inside a value, which tell apart 1, 1.0 and True."""
    return tuple(map(_types, value)) if isinstance(value, tuple) else type(value)
