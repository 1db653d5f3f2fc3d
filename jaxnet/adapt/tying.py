"""One array for two parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxnet import tree
from jaxnet.core import Layer, abstractly, around, as_layer, describe, interned
from jaxnet.mixed import computed_dtype

__all__ = ["tie"]


@interned
def tie(
    net: Layer | Callable[..., Any],
    target: str,
    source: str,
    *,
    change: Callable[[Any], Any] | None = None,
) -> Layer:
    """Use one parameter of a network in place of another, params[target] = change(params[source]).

    Args:
      net: a network.
      target: the path of the parameter that is left out, such as "head/kernel".
      source: the path of the parameter that takes its place, such as "embed/embedding".
      change: a function of the array, such as `jax.numpy.transpose`; the identity by default.

    Returns:
      The network without the parameter at `target`. The gradient of the one at `source` is the sum
      of both.

    Raises:
      KeyError: in `init`, there is no parameter at a path.
      ValueError: the paths are equal; in `init`, the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxnet import chain, dense
      >>> net = tie(chain(a=dense(3, bias=False), b=dense(3, bias=False)), "b/kernel", "a/kernel")
      >>> tree.paths(net.init(jax.random.key(0), jnp.ones((1, 3))))
      ['a/kernel']
    """
    net = as_layer(net, "tie")
    if target == source:
        raise ValueError(f"tie: target and source must be two paths, got '{target}' twice")

    def found(params):
        value = tree.get(params, source)
        return value if change is None else change(value)

    def init(key, *inputs, **named):
        params = net.init(key, *inputs, **named)
        wanted, got = tree.get(params, target), abstractly(found)(params)
        if not hasattr(got, "shape") or wanted.shape != got.shape:
            raise ValueError(
                f"tie: '{target}' must be {describe(wanted)}, got {describe(got)} from '{source}'; "
                "pass change=, such as jax.numpy.transpose"
            )
        return tree.split(params, target)[1]

    def call(run, params, state, key, /, *inputs, **named):
        above = tree.get(params, source.rpartition("/")[0]) if "/" in source else params
        value = found(params)
        return run(
            _put(params, target.split("/"), value.astype(computed_dtype(above, value))),
            state,
            key,
            *inputs,
            **named,
        )

    rebuild = lambda new: tie(new, target, source, change=change)  # noqa: E731
    return around(net, call, label=f"tie[{target}]", rebuild=rebuild, init=init)


def _put(node: Any, names: list[str], value: Any) -> Any:
    """The tree with a leaf added. A node without other leaves may be missing."""
    name, *rest = names
    new = dict(node or {})
    new[name] = _put(new.get(name), rest, value) if rest else value
    return type(node)(new, node.dtype) if hasattr(node, "dtype") else new
