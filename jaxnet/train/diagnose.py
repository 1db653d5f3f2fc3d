"""Find out where numbers ceased to be finite: which step, which parameters, which operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.records import Record
from jaxnet.train.state import TrainState
from jaxnet.train.step import Step
from jaxnet.train.uneven import Uneven

__all__ = ["NonFiniteError", "explain"]


class NonFiniteError(FloatingPointError):
    """A loss, a gradient, a parameter or the state is NaN or infinite.

    Args:
      text: the message.
      step: the number of steps done before the one that failed.
      paths: the parameters whose gradients are not finite. If the gradients are unknown, because
        the step is a user's function, those whose new values are not finite.
      train_state: the last good state, before that step.
      history: the records until then.

    Attributes:
      step: as the argument.
      paths: as the argument.
      train_state: as the argument.
      history: as the argument.
    """

    def __init__(
        self,
        text: str,
        step: int,
        paths: tuple[str, ...],
        train_state: TrainState,
        history: list[Record],
    ):
        super().__init__(text)
        self.step: int = step
        self.paths: tuple[str, ...] = paths
        self.train_state: TrainState = train_state
        self.history: list[Record] = history


def explain(
    step: Callable[..., Any],
    train_state: TrainState,
    batches: Iterable[Callable[[TrainState], Any]],
    history: list[Record],
    data: Any = None,
) -> NonFiniteError:
    """Take steps one at a time until one is not finite, and say where that began.

    Args:
      step: (train_state, batch) -> (train_state, metrics).
      train_state: the last good state.
      batches: one function (train_state) -> batch per step after this state.
      history: the records up to this state.
      data: the arrays that the batches are drawn from, in which the error names a wrong row.

    Returns:
      The error to raise.
    """
    one, first = jax.jit(step), int(train_state.step)
    for batch_of in batches:
        batch = batch_of(train_state)
        batch = batch.true() if isinstance(batch, Uneven) else batch
        new, metrics = one(train_state, batch)
        loss = metrics.get("loss", jnp.float32(0))
        good = bool(np.isfinite(loss) or metrics.get("skipped", 0))
        if not good or _lost(_values(new), _values(train_state)):
            text, paths = _told(step, train_state, batch, loss, new.params, data)
            number = int(train_state.step)
            return NonFiniteError(f"fit: {text}", number, paths, train_state, history)
        train_state = new
    text = (
        f"fit: the loss, parameters or state cease to be finite between steps {first} and "
        f"{int(train_state.step)}, in the compiled loop only: step by step they do not"
    )
    return NonFiniteError(text, first, (), train_state, history)


def _told(
    step: Callable[..., Any],
    train_state: TrainState,
    batch: Any,
    loss: Any,
    new_params: Any,
    data: Any,
) -> tuple[str, tuple[str, ...]]:
    """The fault of a step with its remedy, and the parameters that it concerns."""
    number = int(train_state.step)
    what = "the loss is finite, the update is not"
    if not np.isfinite(loss):
        what = f"the loss is {float(loss)}"
    gradients = step.gradients if isinstance(step, Step) else None
    if gradients is None:
        paths = _paths(new_params, _is_lost)
        what += f"; parameters that are no longer finite: {_brief(paths)}" if paths else ""
    else:
        paths = _paths(jax.jit(gradients)(train_state, batch), _is_lost)
        listed = f"; gradients that are not finite: {_brief(paths)}"
        what += listed if paths else "; all gradients are finite"
    if held := _paths({"params": train_state.params, "state": train_state.state}, _has_nan):
        before = "the first step" if number == 0 else f"step {number}"
        return (
            f"{_brief(held)}: NaN before {before}; start with finite numbers, as net.init makes "
            "them"
        ), paths
    cause = _cause(step, train_state, batch)
    if cause:
        what += f"; it begins with: {cause}"
    return f"at step {number} {what}. {_remedy(cause, wrong_input(batch, data))}", paths


def _remedy(cause: str | None, wrong: str | None) -> str:
    if wrong:
        return f"The cause is in the data: {wrong}; mend or leave out these rows"
    if cause and "out-of-bounds" in cause:
        return (
            "An index in the data is out of range: jaxnet.data.check_labels(labels, classes) finds "
            "labels outside 0 .. classes - 1"
        )
    return (
        "A smaller learning rate or clipped gradients may help; labels outside 0 .. classes - 1 "
        "also give nan (jaxnet.data.check_labels finds them)"
    )


def wrong_input(batch: Any, data: Any = None) -> str | None:
    """Find the first invalid input: NaN, infinity or a negative weight.

    Args:
      batch: the batch that failed.
      data: the arrays that the batch was drawn from. If they are in memory, the text names their
        rows.

    Returns:
      The leaf, the value and the row as text, or None if all inputs are valid.
    """
    for path, leaf in tree.flatten(batch).items():
        if (found := _wrong_row(path, leaf)) is None:
            continue
        what, row, count = found
        name, place = f"'{path}'" if path else "it", "of the batch"
        arrays = isinstance(data, dict | list | tuple) or hasattr(data, "shape")
        whole = tree.flatten(data).get(path) if arrays else None
        if isinstance(whole, np.ndarray | jax.Array) and (of_data := _wrong_row(path, whole)):
            (what, row, count), place = of_data, "of the data"
        more = f" and {count - 1} more" if count > 1 else ""
        return f"{name} holds {what} in row {row}{more} {place}"
    return None


def _wrong_row(path: str, leaf: Any) -> tuple[str, int, int] | None:
    """(what is wrong, the first row, the number of such rows); None if nothing is wrong."""
    if not _is_float(leaf) or not np.ndim(leaf):
        return None
    values = np.asarray(leaf).astype(np.float64).reshape(len(leaf), -1)
    bad = ~np.isfinite(values)
    if path.rpartition("/")[2] == "weights":
        bad |= values < 0
    rows = np.flatnonzero(bad.any(axis=1))
    if not rows.size:
        return None
    value = values[rows[0]][bad[rows[0]]][0]
    return "NaN" if np.isnan(value) else f"{value:g}", int(rows[0]), len(rows)


def _cause(step: Callable[..., Any], train_state: TrainState, batch: Any) -> str | None:
    """The first operation that makes a NaN or reads out of bounds, by JAX's `checkify`; None if it
    finds none or fails.
    """
    from jax.experimental import checkify

    # Not every gradient can be checked for indices.
    forward = (step.value if isinstance(step, Step) else None) or step
    for errors, run in ((checkify.index_checks, forward), (checkify.float_checks, step)):
        try:
            error, _ = jax.jit(checkify.checkify(run, errors=errors))(train_state, batch)
            if text := error.get():
                return text.strip().splitlines()[0].rstrip(".")
        except Exception:
            continue
    return None


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _paths(values: Any, holds: Callable[[Any], bool]) -> tuple[str, ...]:
    """The paths of the leaves for which `holds` is true."""
    return tuple(path for path, leaf in tree.flatten(values).items() if holds(leaf))


def _is_lost(leaf: Any) -> bool:
    return _is_float(leaf) and not bool(jnp.isfinite(leaf).all())


def _has_nan(leaf: Any) -> bool:
    return _is_float(leaf) and bool(jnp.isnan(leaf).any())


def _values(train_state: TrainState) -> Any:
    return train_state.params, train_state.state, train_state.opt


def _lost(new: Any, old: Any) -> bool:
    """Whether some leaf has fewer finite numbers than before."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return any(
        bool(jnp.isfinite(a).sum() < jnp.isfinite(b).sum()) for a, b in pairs if _is_float(a)
    )


def _brief(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(f"'{path}'" for path in paths[:5]) + more
