"""The layers of a network by path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxnet import tree
from jaxnet.core import Layer, as_layer

__all__ = ["as_patterns", "join_names", "matches_own", "rebuild_with", "replace", "walk"]


def walk(net: Layer) -> Iterator[tuple[str, Layer]]:
    """Walk through all layers of a network, parents first.

    A layer that shares the path of its parent (inside `repeat`, `remat`, `cast`, `residual`,
    `scan`, `vmap`) follows it with the same path.

    Args:
      net: a layer.

    Yields:
      (path, layer). The path of the network itself is ''.

    Example:
      >>> from jaxnet import chain, dense
      >>> [path for path, layer in walk(chain(hidden=dense(8), out=dense(2)))]
      ['', 'hidden', 'out']
    """
    yield "", net
    for name, child in net.children.items():
        for path, layer in walk(child):
            yield join_names(name, path), layer


def replace(net: Layer, pattern: str | Sequence[str], new: Layer | Callable[..., Any]) -> Layer:
    """Exchange every layer whose path matches, parents before children.

    Args:
      net: a layer.
      pattern: a path with wildcards as in `jaxnet.tree`, or several. It is matched against the
        layer's own path: `**/norm` is every layer called norm.
      new: a Layer, or a function (path, layer) -> layer. Parameters keep their paths, so a new
        layer that needs the same parameters can use trained ones. If the function returns a layer
        unchanged, the search goes on inside that layer.

    Returns:
      The new network. `net` is unchanged.

    Raises:
      KeyError: no layer matches a pattern.
      TypeError: `new` is neither a layer nor a function, or it returns something else than a layer.

    Example:
      >>> from jaxnet import chain, dense
      >>> replace(chain(hidden=dense(8), out=dense(2)), "out", dense(5))
      chain(
        hidden: dense(8)
        out: dense(5)
      )
    """
    net = as_layer(net)
    patterns = as_patterns(net, pattern)
    if not callable(new):
        raise TypeError(
            f"replace: new must be a Layer or a function (path, layer) -> layer, got {new!r}"
        )

    if not isinstance(new, Layer) and not _takes_path_and_layer(new):
        name = getattr(new, "__name__", repr(new))
        raise TypeError(
            f"replace: new is called as new(path, layer), but {name} does not take these two "
            f"arguments; for {name} as the new layer, pass chain({name}) or "
            f"lambda path, layer: {name}"
        )

    def visit(path: str, layer: Layer) -> Layer:
        if any(matches_own(path, p) for p in patterns):
            made = new if isinstance(new, Layer) else new(path, layer)
            made = as_layer(made, f"replace: the new layer at '{path}'")
            if made is not layer:
                return made
        return rebuild_with(layer, lambda name, child: visit(join_names(path, name), child))

    return visit("", net)


def _takes_path_and_layer(new: Callable[..., Any]) -> bool:
    """Whether a function can be called as new(path, layer).

    An optional second argument, as that of `jax.nn.gelu`, is not meant for a layer.
    """
    try:
        signature = inspect.signature(new)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind("path", "layer")
    except TypeError:
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in signature.parameters.values() if p.kind in kinds]
    return len(places) < 2 or places[1].default is inspect.Parameter.empty


def rebuild_with(layer: Layer, visit: Callable[[str, Layer], Layer]) -> Layer:
    """The layer with visit(name, child) for each child; the same object if no child changes."""
    if layer.rebuild is None:
        return layer
    children = {name: visit(name, child) for name, child in layer.children.items()}
    same = all(children[name] is child for name, child in layer.children.items())
    return layer if same else layer.rebuild(children)


def as_patterns(net: Layer, pattern: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns as a tuple. Raises KeyError if one of them matches no layer."""
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)
    known = list(dict.fromkeys(path for path, _ in walk(net)))
    for p in patterns or ("no pattern",):
        if not any(matches_own(path, p) for path in known):
            names = ", ".join(known[1:13]) or "not named"
            more = " ..." if len(known) > 13 else ""
            raise KeyError(f"no layer matches '{p}'; the layers are {names}{more}")
    return patterns


def matches_own(path: str, pattern: str) -> bool:
    """Whether the pattern matches this path itself, not only a path above it."""
    return tree.matches(path, pattern, below=False)


def join_names(path: str, name: str) -> str:
    """The path of a child; a child named '' has the path of its parent."""
    return f"{path}/{name}" if path and name else path or name
