"""Composition by an ordinary function: `wire`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias, overload

from jaxnet.core.calls import Children
from jaxnet.core.composing import compose
from jaxnet.core.contract import Layer
from jaxnet.core.functions import name_of
from jaxnet.core.specs import describe

__all__ = ["wire"]

# Any function is a body. The first forms tell type checkers what `f` and `x` are in a lambda.
Body: TypeAlias = (
    Callable[[Children, Any], Any] | Callable[[Children, Any, Any], Any] | Callable[..., Any]
)


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
    initializes the children that it calls.

    Args:
      *unnamed: none. Each child needs a name, by which the body calls it.
      **children: layers or plain functions by name.

    Returns:
      A function of bodies. For one body it returns a Layer, for several a tuple of Layers.

    Raises:
      TypeError: a child has no name, or a body is not a function.
      AttributeError: the body calls a child that is not declared.
      ValueError: a declared child is never called, neither in training nor in evaluation, by the
        only body; or two calls of a child need parameters of different shapes.
      RuntimeError: a stateful child, or a random one without a key, is called inside a raw JAX
        transform.

    Example:
      >>> import jax
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
    return Wiring(children)


class Wiring:
    """The result of `wire(...)`: declared children without a body. It is not yet a layer."""

    def __init__(self, children: Mapping[str, Any]):
        self._children = children
        # The error for a forgotten body shows this name.
        self.__name__ = "wire(...)"

    @overload
    def __call__(self, body: Body, /) -> Layer: ...

    @overload
    def __call__(self, body: Body, /, *bodies: Body) -> tuple[Layer, ...]: ...

    def __call__(self, *bodies: Body) -> Layer | tuple[Layer, ...]:
        """Make one layer per body."""
        made = tuple(_network(body, self._children, every=len(bodies) == 1) for body in bodies)
        return made[0] if len(made) == 1 else made

    def init(self, *_: Any, **__: Any) -> NoReturn:
        """Raise TypeError, because the body is missing."""
        raise TypeError(
            "wire(...) is not a layer before it has a body: wire(a=..., b=...)(lambda f, x: "
            "f.b(f.a(x)))"
        )

    apply = init


def _network(body: Callable[..., Any], children: Mapping[str, Any], *, every: bool) -> Layer:
    """The layer of one body. `every` says whether the body must call all children."""
    if not callable(body) or isinstance(body, Layer):
        got = repr(body) if isinstance(body, Layer) else describe(body)
        raise TypeError(f"wire: the body must be a function of (f, *inputs), got {got}")
    name = name_of(body)

    def rebuild(new):
        return compose("wire" if name == "<lambda>" else name, new, body, rebuild, every=every)

    return rebuild(children)
