"""The results of `fit`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxnet.train.interrupt import handled
from jaxnet.train.records import Record
from jaxnet.train.state import TrainState

__all__ = ["Best", "Result"]


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
      value: the value of the metric.
      step: the number of steps done before the evaluation.
      params: the parameters that were evaluated.
      state: the state of the network that was evaluated.
    """

    value: float
    step: int
    params: Any
    state: Any


class _Result(NamedTuple):
    train_state: TrainState
    history: list[Record]
    best: Best | None = None
    stopped: str | None = None
    compiled: tuple[str, ...] = ()
    evaluations: Sequence[Record] = ()


class Result(_Result):
    """The outcome of `fit`.

    Attributes:
      train_state: the train state after the last step.
      history: a list of records, dicts of plain numbers, about one per 100 steps.
      best: the best evaluation; None unless `best_rule` was given.
      stopped: why the run ended before the last step: 'SIGINT', 'SIGTERM', the reason from the
        condition, or 'the data ended'; None if the run was completed.
      compiled: one line per compilation, with its reason; more than one line means that shapes or
        dtypes of batches changed.
      evaluations: a list of records, one per evaluation: the values that `evaluate` returned, and
        the means of the training metrics since the previous evaluation.
    """

    __slots__ = ()

    @property
    def stopped(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Why the run ended before the last step; None if it was completed."""
        # A program that reads this decides itself whether a signal ends more than this run.
        handled()
        return self[3]

    def __repr__(self) -> str:
        # The arrays of a train state would fill screens.
        best = None if self.best is None else f"{self.best.value:.6g} at step {self.best.step}"
        return (
            f"Result(step={int(self.train_state.step)}, records={len(self.history)}, "
            f"best={best}, stopped={self[3]!r})"
        )

    @property
    def exit_code(self) -> int:
        """The argument for `sys.exit`: 128 + the number of the signal that ended the run (130 or
        143), and 0 without a signal.
        """
        return 128 + getattr(signal, self.stopped) if self.stopped in ("SIGINT", "SIGTERM") else 0
