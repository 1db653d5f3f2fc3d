"""Epochs whose last batch is shorter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnet import tree
from jaxnet.train.sharding import first_rows
from jaxnet.train.state import TrainState
from jaxnet.train.words import spec_of

__all__ = ["Uneven", "on_uneven"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uneven:
    """A batch, or its rows, in epochs whose last batch is shorter.

    Attributes:
      batch: leaves [B, ...], or [steps, B, ...] for several steps.
      last: whether only the first `rest` examples count, bool [] or [steps].
      rest: the length of the last batch.
    """

    batch: Any
    last: Any
    rest: int = dataclasses.field(metadata={"static": True})

    def short(self) -> Any:
        """The last batch of an epoch, leaves [rest, ...]."""
        return jax.tree.map(lambda leaf: first_rows(leaf, self.rest), self.batch)

    def true(self) -> Any:
        """The batch with its true length. `last` must not be traced."""
        return self.short() if self.last else self.batch


def on_uneven(step: Callable[..., Any]) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """Make a step that also takes `Uneven` batches, each with its true size."""
    # With `jit`, JAX traces the step once per size, although both the shapes and the branch need a
    # trace.
    traced = jax.jit(step, inline=True)

    def run(train_state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        if not isinstance(batch, Uneven):
            return step(train_state, batch)

        def of(examples_of, train_state):
            examples = examples_of()
            new, metrics = traced(train_state, examples)
            if not isinstance(metrics, dict):
                return new, metrics
            size = len(jax.tree.leaves(examples)[0])
            return new, {"weight": jnp.float32(size), **metrics}

        whole = functools.partial(of, lambda: batch.batch)
        short = functools.partial(of, batch.short)
        try:
            shapes = [jax.eval_shape(f, train_state)[1] for f in (whole, short)]
        except Exception as error:
            error.add_note(
                f"with drop_last=False an epoch ends with a batch of {batch.rest} examples"
            )
            raise
        if jax.tree.map(spec_of, shapes[0]) != jax.tree.map(spec_of, shapes[1]):
            raise ValueError(
                f"drop_last=False: the metrics {_changed(*shapes)} have another shape in the last "
                f"batch, of {batch.rest} examples; reduce them to scalars"
            )
        return jax.lax.cond(batch.last, short, whole, train_state)

    return run


def _changed(metrics: Any, others: Any) -> list[str]:
    """The paths of the metrics whose specs differ, or that the others lack."""
    there = {path: spec_of(leaf) for path, leaf in tree.flatten(others).items()}
    here = tree.flatten(metrics).items()
    return [path for path, leaf in here if there.get(path) != spec_of(leaf)]
