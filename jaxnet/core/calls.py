"""The children of a network as functions, as the body of `wire` sees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jaxnet.core.checks import closest
from jaxnet.core.contract import Layer
from jaxnet.core.keys import SharedKey, fold
from jaxnet.core.memo import Remembered

__all__ = ["Child", "Children"]


class Children:
    """The children of a network as functions: the type of `f` in the body of `wire`.

    Args:
      label: the name of the network in errors.
      children: the layers by name.
      call_child: (name, *inputs, **named) -> outputs.
      train: True in training.
      key: PRNG key for the random numbers of the body, or None.

    Example:
      >>> import jax
      >>> from jaxnet import Children, dense, wire
      >>> @wire(up=dense(64), down=dense(16))
      ... def block(f: Children, x: jax.Array) -> jax.Array:
      ...     return x + f.down(jax.nn.gelu(f.up(x)))
    """

    __slots__ = ("_call", "_children", "_key", "_label", "train")

    train: bool

    def __init__(
        self,
        label: str,
        children: Mapping[str, Layer],
        call_child: Callable[..., Any],
        train: bool,
        key: Any,
    ):
        self._label, self._children, self._call = label, children, call_child
        self.train, self._key = train, key

    @property
    def key(self) -> Any:
        """A key for random numbers that the body itself draws; None in evaluation if `apply`
        received no key.
        """
        if self._key is None and self.train:
            raise ValueError(f"{self._label}: training draws random numbers: pass key= to apply")
        if self._key is None or isinstance(self._key, SharedKey):
            return self._key
        return fold(self._key, "")

    def __getitem__(self, name: str) -> Child:
        if name not in self._children:
            raise AttributeError(
                f"{self._label} has no child '{name}'{closest(name, self._children)}"
            )
        return Child(self._call, name, self._children[name])

    __getattr__ = __getitem__

    def __dir__(self) -> list[str]:
        return [*self._children, "key", "train"]

    def __repr__(self) -> str:
        return f"the children of {self._label}: {', '.join(self._children) or 'none'}"


class Child(Remembered):
    """A child as a function of its inputs, `f.a`."""

    def __init__(self, call: Callable[..., Any], name: str, layer: Layer):
        self._call, self._name, self._layer = call, name, layer
        self.__name__ = name
        # As an input, a child stands for its layer, not for the parameters of this call.
        self.memo = ("child", weakref.ref(layer))

    def __call__(self, /, *inputs: Any, **named: Any) -> Any:
        return self._call(self._name, *inputs, **named)

    def __repr__(self) -> str:
        return f"f.{self._name}: {self._layer!r}"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(f"f.{self._name} is a layer, not an array: call it, f.{self._name}(...)")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse
    __pow__ = __rpow__ = __neg__ = __getitem__ = __iter__ = _refuse
