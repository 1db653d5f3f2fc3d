"""Walks over a network together with its parameters and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxnet.core import Layer, as_layer, no_params
from jaxnet.transform.walking import join_names, replace

__all__ = ["at_layers", "converted", "fold_weights", "folded_where"]


def fold_weights(net: Layer, params: Any, state: Any = None) -> tuple[Any, Any]:
    """Compute the plain parameters of a network whose kernels are computed in each call.

    They are the parameters of the network without `lora`, `weight_norm`, `weight_standardization`,
    `spectral_norm`, `quantize_int8` and `prune`, with the same outputs in evaluation, to rounding.

    Args:
      net: the network.
      params: its parameters.
      state: its state; None for a stateless network.

    Returns:
      (params, state) of the plain network; state is None if it has none.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxnet import dense
      >>> from jaxnet.adapt import weight_norm
      >>> net = weight_norm(dense(3))
      >>> plain, _ = fold_weights(net, net.init(jax.random.key(0), jnp.ones((1, 2))))
      >>> sorted(plain)
      ['bias', 'kernel']
    """
    params, state = folded_where(as_layer(net), params, state, lambda layer: True)
    return params, state or None


def folded_where(layer: Layer, params: Any, state: Any, chosen: Callable[[Layer], bool]):
    """(params, state) with those of each chosen layer replaced by those of its child."""

    def visit(path, layer, params, state):
        if layer.folded is None or not chosen(layer):
            return None
        params, state = layer.folded(params, state)
        return _walk(path, layer.children[""], params, state, visit)

    return _walk("", layer, params, state, visit)


def converted(net: Layer, params: Any, state: Any, made: Mapping[str, Layer], numbers: Any):
    """(params, state) with those of each layer in `made`, by path, replaced by numbers(params,
    state).
    """

    def visit(path, layer, params, state):
        return numbers(params, state) if layer is made.get(path) else None

    return _walk("", net, params, state, visit)


def at_layers(
    label: str, net: Layer, patterns: str | Sequence[str], wrap: Callable[[Layer], Layer]
) -> tuple[Layer, dict[str, Layer]]:
    """The network with wrap(layer) for each selected layer that has parameters and no named
    children, and the new layers by path.
    """
    made: dict[str, Layer] = {}

    def new(path, layer):
        if layer.children or layer.init is no_params:
            return layer
        made[path] = wrap(layer)
        return made[path]

    try:
        changed = replace(net, patterns, new)
    except KeyError as error:
        raise KeyError(f"{label}: {error.args[0]}") from None
    if not made:
        raise KeyError(
            f"{label}: {patterns!r} matches no layer with parameters of its own; name the layers "
            "inside, as in 'blocks/attn/*'"
        )
    return changed, made


def _walk(path: str, layer: Layer, params: Any, state: Any, visit: Callable[..., Any]):
    """(params, state) with those of each layer replaced by visit(path, layer, params, state), if
    that is not None.
    """
    found = visit(path, layer, params, state)
    if found is not None:
        return found
    if "" in layer.children:
        below = lambda p, s: _walk(path, layer.children[""], p, s, visit)  # noqa: E731
        return jax.vmap(below)(params, state) if _is_stack(layer, params) else below(params, state)
    if not layer.children or not isinstance(params, Mapping):
        return params, state
    new_params, new_state = dict(params), dict(state or {})
    for name, child in layer.children.items():
        below, its_state = params.get(name, {}), (state or {}).get(name)
        found = _walk(join_names(path, name), child, below, its_state, visit)
        for tree, part in zip((new_params, new_state), found, strict=True):
            tree.pop(name, None)
            if part:
                tree[name] = part
    order = [*layer.children]
    return _ordered(new_params, order), _ordered(new_state, order) or None


def _is_stack(layer: Layer, params: Any) -> bool:
    return layer.stacked and bool(jax.tree.leaves(params)) and layer.repeats != 0


def _ordered(tree: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: tree[name] for name in names if name in tree}
