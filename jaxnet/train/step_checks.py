"""Checks of what a step returns."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxnet import tree

__all__ = ["check_metrics", "check_same", "spec_of"]


def check_same(old: Any, new: Any) -> None:
    """Raise TypeError unless a step gives back what it was given, in structure, shapes and
    dtypes.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        before, after = set(tree.paths(old)), set(tree.paths(new))
        raise TypeError(
            "the step changes the structure of the train state: it adds "
            f"{sorted(after - before)} and drops {sorted(before - after)} "
            f"({jax.tree.structure(old)} becomes {jax.tree.structure(new)})"
        )
    found = zip(tree.paths(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    spec = {path: (spec_of(a), spec_of(b)) for path, a, b in found}
    if changed := [f"'{path}' from {a} to {b}" for path, (a, b) in spec.items() if a != b]:
        raise TypeError(
            f"the step changes the type of the train state: {', '.join(changed[:5])}; cast what "
            "it returns with .astype, or start with the other type"
        )


def check_metrics(metrics: Any) -> None:
    """Raise unless the metrics of a step are a dict of scalars."""
    if not isinstance(metrics, dict):
        raise TypeError(
            "a step returns (train_state, metrics) with a dict of metrics, got "
            f"{type(metrics).__name__}"
        )
    for name, metric in metrics.items():
        if name in ("step", "epoch", "seconds", "samples_per_second"):
            raise ValueError(
                f"metric '{name}' has a name that every record has already; use another"
            )
        if getattr(metric, "shape", None) != ():
            raise ValueError(
                f"metric '{name}' must be a scalar, got "
                f"{spec_of(metric) if hasattr(metric, 'shape') else metric}; reduce it, or give "
                "its parts names of their own"
            )


def spec_of(leaf: Any) -> str:
    """The dtype and shape of a leaf, as in 'float32[3]'."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return f"{dtype}{list(jnp.shape(leaf))}"
