"""Checks of what a step returns."""

from __future__ import annotations

from typing import Any

import jax

from jaxnet import tree
from jaxnet.train.records import RESERVED
from jaxnet.train.words import spec_of

__all__ = ["check_metrics", "check_outputs", "check_same"]


def check_outputs(outputs: Any) -> None:
    """Raise TypeError unless a step returns two values."""
    if isinstance(outputs, tuple) and len(outputs) == 2:
        return
    several = isinstance(outputs, tuple)
    got = f"{len(outputs)} parts" if several else f"a {type(outputs).__name__}"
    raise TypeError(
        f"a step returns (train_state, metrics), got {got}; train_step(loss, optimizer) makes a "
        "step of a loss"
    )


def check_same(old: Any, new: Any) -> None:
    """Raise TypeError unless a step keeps the structure, shapes and dtypes of the train state."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        before, after = set(tree.paths(old)), set(tree.paths(new))
        raise TypeError(
            "the step changes the structure of the train state: it adds "
            f"{sorted(after - before)} and drops {sorted(before - after)} "
            f"({jax.tree.structure(old)} becomes {jax.tree.structure(new)}); return all that it "
            "received"
        )
    found = zip(tree.paths(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    spec = {path: (spec_of(a), spec_of(b)) for path, a, b in found}
    if changed := [f"'{path}' from {a} to {b}" for path, (a, b) in spec.items() if a != b]:
        raise TypeError(
            f"the step changes the type of the train state: {', '.join(changed[:5])}; cast the "
            "new values with .astype, or start with the other type"
        )


def check_metrics(metrics: Any) -> None:
    """Raise unless the metrics of a step are a dict of scalars."""
    if not isinstance(metrics, dict):
        raise TypeError(
            "a step returns (train_state, metrics) with a dict of metrics, got "
            f"{type(metrics).__name__}"
        )
    for name, metric in metrics.items():
        if name in RESERVED:
            raise ValueError(
                f"metric '{name}' has a name that every record has already; use another"
            )
        if getattr(metric, "shape", None) != ():
            got = spec_of(metric) if hasattr(metric, "shape") else metric
            raise ValueError(
                f"metric '{name}' must be a scalar, got {got}; reduce it, or name each of its parts"
            )
