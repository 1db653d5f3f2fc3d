"""Optimizers for groups of parameters, which path patterns select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxnet import tree
from jaxnet.train.optimizers import as_optax

if TYPE_CHECKING:
    import optax

    from jaxnet.train.optimizers import Optimizer

__all__ = ["by_path", "freeze"]


def by_path(groups: Mapping[str, Optimizer | None]) -> optax.GradientTransformation:
    """Give groups of parameters separate optimizers. The first pattern that matches a path decides.

        decayed = optax.adamw(1e-3, weight_decay=0.1)
        by_path({"embed": None, "**/bias": optax.adam(1e-3), "**": decayed})

    Args:
      groups: path pattern (see `jaxnet.tree`) -> an optax transformation, a learning rate or
        schedule for plain SGD, or None for parameters that do not move. Under `jax.jit`, their
        gradients are not even computed.

    Returns:
      An optax transformation.

    Raises:
      TypeError: a value is not an optimizer.
      KeyError: at `init`, no pattern matches a parameter, or a pattern is never the first match.
    """
    import optax

    groups = dict(groups)
    transforms: dict[Any, Any] = {
        pattern: optax.set_to_zero() if optimizer is None else as_optax(optimizer)
        for pattern, optimizer in groups.items()
    }

    def labels(params):
        paths = tree.paths(params)
        chosen = {path: next((p for p in groups if tree.matches(path, p)), None) for path in paths}
        if left := [path for path, pattern in chosen.items() if pattern is None]:
            raise KeyError(
                f"by_path: no pattern matches {left[:5]}; the last may be '**', for all others"
            )
        if idle := [pattern for pattern in groups if pattern not in chosen.values()]:
            raise KeyError(
                f"by_path: nothing is left for {idle}; remove them, or put them before a wider "
                f"pattern. The parameters are {paths[:20]}"
            )
        return tree.map_with_path(lambda path, _: chosen[path], params)

    return optax.partition(transforms, labels)


def freeze(optimizer: Optimizer, *patterns: str) -> optax.GradientTransformation:
    """Keep the parameters whose path matches one of the patterns as they are.

    Args:
      optimizer: the optimizer of all other parameters: an optax transformation, a learning rate, or
        a schedule.
      *patterns: path patterns (see `jaxnet.tree`).

    Returns:
      An optax transformation.

    Raises:
      TypeError: `optimizer` is not an optimizer.
      KeyError: at `init`, a pattern matches no parameter, or is never the first match.
    """
    return by_path({pattern: None for pattern in patterns} | {"**": optimizer})
