"""Where numbers ceased to be finite: which step, which parameters, which operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import tree
from jaxnet.train.batch import Uneven
from jaxnet.train.history import Record
from jaxnet.train.step import TrainState

__all__ = ["NonFiniteError", "explain"]


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite.

    Attributes:
      step: the number of steps done before the one that failed.
      paths: the parameters whose gradients (or, with a step of one's own, new values) are not
        finite.
      train_state: the last good one, before that step.
      history: the records until then.
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
    batches: Iterable[Callable[..., Any]],
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
        lost = _lost(
            (new.params, new.state, new.opt),
            (train_state.params, train_state.state, train_state.opt),
        )
        if (np.isfinite(loss) or metrics.get("skipped", 0)) and not lost:
            train_state = new
            continue
        number = int(train_state.step)
        paths = tuple(tree.paths(_only_lost(new.params)))
        what = (
            f"the loss is {float(loss)}"
            if not np.isfinite(loss)
            else "the loss is finite, the update is not"
        )
        if gradients := getattr(step, "parts", {}).get("gradients"):
            paths = tuple(tree.paths(_only_lost(jax.jit(gradients)(train_state, batch))))
            what += (
                f"; gradients that are not finite: {_brief(paths)}"
                if paths
                else "; all gradients are finite"
            )
        elif paths:
            what += f"; parameters that are no longer finite: {_brief(paths)}"
        if held := tuple(
            tree.paths(_only_nan({"params": train_state.params, "state": train_state.state}))
        ):
            before = "the first step" if number == 0 else f"step {number}"
            text = (
                f"fit: {_brief(held)}: NaN before {before}; start with finite numbers, as "
                "net.init makes them"
            )
            return NonFiniteError(text, number, paths, train_state, history)
        if cause := _cause(step, train_state, batch):
            what += f"; it begins with: {cause}"
        if wrong := wrong_input(batch, data):
            return NonFiniteError(
                (
                    f"fit: at step {number} {what}. The cause is in the data: {wrong}; mend or "
                    "leave out these rows"
                ),
                number,
                paths,
                train_state,
                history,
            )
        if cause and "out-of-bounds" in cause:
            return NonFiniteError(
                f"fit: at step {number} {what}. An index in the data is out of range: "
                "jaxnet.data.check_labels(labels, classes) finds labels outside 0 .. classes - 1",
                number,
                paths,
                train_state,
                history,
            )
        return NonFiniteError(
            f"fit: at step {number} {what}. A smaller learning rate or clipped gradients may "
            "help; labels outside 0 .. classes - 1 also give nan (jaxnet.data.check_labels finds "
            "them)",
            number,
            paths,
            train_state,
            history,
        )
    return NonFiniteError(
        f"fit: the loss, parameters or state cease to be finite between steps {first} and "
        f"{int(train_state.step)}, in the compiled loop only: step by step they do not",
        first,
        (),
        train_state,
        history,
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
        whole = (
            tree.flatten(data).get(path)
            if isinstance(data, dict | list | tuple) or hasattr(data, "shape")
            else None
        )
        if (
            isinstance(whole, np.ndarray | jax.Array)
            and (of_data := _wrong_row(path, whole)) is not None
        ):
            (what, row, count), place = of_data, "of the data"
        more = f" and {count - 1} more" if count > 1 else ""
        return f"{name} holds {what} in row {row}{more} {place}"
    return None


def _wrong_row(path: str, leaf: Any) -> tuple[str, int, int] | None:
    """(what is wrong, the first row, the number of such rows)."""
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
    """The first operation that makes a NaN or reads out of bounds, by JAX's `checkify`; None where
    it finds none or fails.
    """
    from jax.experimental import checkify

    # Not every gradient can be checked for indices.
    forward = getattr(step, "parts", {}).get("value", step)
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


def _only_lost(values: Any) -> Any:
    """The leaves that are not all finite; None in place of the others."""
    return jax.tree.map(
        lambda x: x if _is_float(x) and not bool(jnp.isfinite(x).all()) else None, values
    )


def _only_nan(values: Any) -> Any:
    """The tree with only its leaves that have NaN."""
    return jax.tree.map(lambda x: x if _is_float(x) and bool(jnp.isnan(x).any()) else None, values)


def _lost(new: Any, old: Any) -> bool:
    """Whether some leaf has fewer finite numbers than before."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return any(
        bool(jnp.isfinite(a).sum() < jnp.isfinite(b).sum()) for a, b in pairs if _is_float(a)
    )


def _brief(paths: tuple[str, ...]) -> str:
    return ", ".join(f"'{path}'" for path in paths[:5]) + (
        f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    )
