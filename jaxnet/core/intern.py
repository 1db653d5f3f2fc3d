"""Equal calls of a constructor return one layer, so that a network of many equal layers is traced once for all of them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["interned"]

Constructor = TypeVar("Constructor", bound=Callable[..., Any])


def interned(constructor: Constructor) -> Constructor:
    """The constructor of a layer that returns the living layer of an earlier, equal call if there is one.

    A layer is a value: its functions follow from the arguments alone. Arguments of different types are not equal, and
    calls with arguments that cannot be hashed always make a new layer. A layer that nothing else refers to is gone.
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
    """The types inside a value: 1 == 1.0 == True."""
    return tuple(map(_types, value)) if isinstance(value, tuple) else type(value)
