"""The contract of layers: a network is a value made of pure functions over a plain nested dict of
arrays.

`params` is a nested dict of float arrays (a single array for `param`). `state` is a nested dict of
arrays that are carried from call to call without a gradient (statistics, caches, constants). `key`
is a JAX PRNG key. Inputs are pytrees of arrays or of `jax.ShapeDtypeStruct`; all other leaves
(None, bools, strings) are static.
"""

from __future__ import annotations

import copyreg
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxnet.core.checks import is_empty
from jaxnet.core.specs import describe

__all__ = ["Carried", "Layer", "call", "no_params", "run", "start_state"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """A layer, or a whole network: a pair of pure functions, or a triple if it carries state.

    Attributes:
      init: (key, *inputs) -> params. It reads only shapes and dtypes, so inputs may be
        `jax.ShapeDtypeStruct`.
      apply: (params, *inputs, key=None, train=False) -> outputs if `init_state` is None, else
        (params, *inputs, state, key=None, train=False) -> (outputs, new_state).
      init_state: (*inputs, key=None) -> state, or None for a stateless layer. No argument of a call
        makes a layer stateful. State that begins with random numbers needs the key.
      label: the name of the layer in `repr` and in errors, such as 'dense(8)'.
      children: the layers inside, by name. The name is the key in params and state. A child named
        '' shares the parameters, state and path of its parent (`repeat`, `remat`, `cast`,
        `residual`, `scan`, `vmap`).
      rebuild: children -> the same layer with other children; None for a layer without children.
      repeats: the number of copies of its child that run one after the other (`repeat`); None for
        all other layers.
      stacked: True if the leaves of params and state have a first axis of copies (`repeat`,
        `vmap`).
      folded: for a layer that computes the parameters of its child '' from its own: (params, state)
        -> (params, state) of the child in evaluation; None for all other layers.
      random: False if `apply` never uses its key.
      outputs: (train, *inputs) -> specs of the outputs, if that is cheaper than tracing `apply`.
      tapped: True for layers that `capture` makes. Their `apply` returns (outputs, Carried(state,
        seen)).
      plain: for a tapped layer, the layer to run inside raw JAX transforms, because captured values
        cannot leave them.
      wide: names of the parameters, not those of children, that may be wider than the inputs.
        `cast` does not change them, so their gradients are summed and kept in their own dtype
        (`jaxnet.mixed`).
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    # The type is `Callable[..., Any] | None`. Any spares callers a check for None.
    init_state: Any = None
    label: str = "layer"
    children: Mapping[str, Layer] = dataclasses.field(default_factory=dict)
    rebuild: Callable[[Mapping[str, Layer]], Layer] | None = None
    repeats: int | None = None
    stacked: bool = False
    folded: Callable[[Any, Any], tuple[Any, Any]] | None = None
    random: bool = True
    outputs: Callable[..., Any] | None = None
    tapped: bool = False
    plain: Layer | None = None
    wide: tuple[str, ...] = ()
    # The call that makes this layer: (constructor, args, named). A copy with other fields, as
    # `dataclasses.replace` makes it, has none.
    _made: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = dataclasses.field(
        default=None, init=False
    )

    def __repr__(self) -> str:
        if "" in self.children:
            return f"{self.label}({self.children['']!r})"
        if not self.children:
            return self.label
        inside = "\n".join(f"{name}: {child!r}" for name, child in self.children.items())
        indented = "".join(f"  {line}\n" for line in inside.split("\n"))
        return f"{self.label}(\n{indented})"

    def made_by(
        self, constructor: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        """Record the call that makes this layer; `pickle` repeats it.

        Args:
          constructor: the function that returns the layer.
          args: its arguments by position.
          named: its arguments by name.
        """
        object.__setattr__(self, "_made", (constructor, args, dict(named)))

    def __reduce__(self) -> Any:
        if self._made is not None:
            return _make, self._made
        return copyreg.__newobj__, (type(self),), dict(self.__dict__)  # pyright: ignore[reportAttributeAccessIssue]

    def __copy__(self) -> Layer:
        return self

    def __deepcopy__(self, memo: Any) -> Layer:
        return self

    def __call__(self, *inputs: Any, **named: Any) -> NoReturn:
        """Raise TypeError, because a layer holds no parameters."""
        name = self.label.partition("(")[0]
        raise TypeError(
            f"{name}: a layer holds no parameters, so it cannot be called; make them with params "
            "= net.init(key, x) and call net.apply(params, x), or call it by its name in the "
            "body of wire, f.name(x)"
        )


def _make(
    constructor: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]
) -> Layer:
    return constructor(*args, **named)


class Carried(NamedTuple):
    """The second result of `apply` of a tapped layer, after the outputs.

    Attributes:
      state: the new state of the layer, None for a stateless layer.
      seen: the outputs of the calls of each captured layer, in order, by path below this layer:
        {path: (outputs, ...)}.
    """

    state: Any
    seen: dict[str, tuple[Any, ...]]


def call(
    net: Layer,
    params: Any,
    /,
    *inputs: Any,
    state: Any = None,
    key: Any = None,
    train: bool = False,
    **named: Any,
) -> tuple[Any, Any]:
    """Call a network, stateful or stateless, in one form.

    Args:
      net: the network, or any layer.
      params: its parameters.
      *inputs: its inputs.
      state: the state of a stateful network. A stateless network returns it unchanged.
      key: PRNG key for the random numbers of the call.
      train: True for training.
      **named: inputs by name.

    Returns:
      (outputs, state).

    Raises:
      ValueError: a stateful network gets no state, or a random one gets no key in training.
        `net.apply` may raise other errors.

    Example:
      >>> from jaxnet import layer
      >>> double = layer(None, lambda params, x: 2 * x)
      >>> call(double, {}, 3.0)
      (6.0, None)
    """
    return run(net, params, state, key, train, inputs, named)[:2]


def run(
    layer: Layer,
    params: Any,
    state: Any,
    key: Any,
    train: bool,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> tuple[Any, Any, dict[str, tuple[Any, ...]]]:
    """Call a layer, stateful or not, tapped or not, in one form.

    Args:
      layer: the layer.
      params: its parameters.
      state: its state. A stateless layer returns it unchanged.
      key: PRNG key for the random numbers of the call, or None.
      train: True for training.
      inputs: its inputs by position.
      named: its inputs by name.

    Returns:
      (outputs, state, seen), with the outputs that `capture` collects, by path.

    Raises:
      ValueError: a layer without parameters gets some.
    """
    if layer.init is no_params and not (params is None or is_empty(params)):
        raise ValueError(
            f"{layer.label}: params must be empty, got {describe(params)}; this layer has no "
            "parameters"
        )
    carried = {} if layer.init_state is None else {"state": state}
    result = layer.apply(params, *inputs, key=key, train=train, **carried, **named)
    if layer.tapped:
        outputs, (new, seen) = result
        return outputs, state if layer.init_state is None else new, seen
    outputs, new = (result, state) if layer.init_state is None else result
    return outputs, new, {}


def start_state(layer: Layer, key: Any, inputs: Any, named: Mapping[str, Any]) -> Any:
    """Make the first state of a stateful layer. A layer whose `init_state` takes no key is called
    without one.

    Args:
      layer: a stateful layer.
      key: PRNG key for state that begins with random numbers, or None.
      inputs: its inputs by position, or their specs.
      named: its inputs by name, or their specs.

    Returns:
      The state.
    """
    parameters = inspect.signature(layer.init_state).parameters
    takes_key = "key" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keys = {"key": key} if takes_key and key is not None else {}
    return layer.init_state(*inputs, **keys, **named)


def no_params(key: Any, *inputs: Any, **named: Any) -> dict[str, Any]:
    """Serve as `init` of a layer without parameters.

    Args:
      key: not used.
      *inputs: not used.
      **named: not used.

    Returns:
      An empty dict.
    """
    return {}
