"""Rules over the history of a run: which value is better, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Best", "best_of", "early_stopping", "time_budget"]


class Best(NamedTuple):
    """The best evaluation so far: its value and step, and the parameters and state that were
    evaluated.
    """

    value: float
    step: int
    params: Any
    state: Any


def best_of(rule: str) -> tuple[str, Callable[[float, float], bool]]:
    """The parts of a rule like 'min test_loss': (name, whether a first value is better than a
    second).

    NaN is never better than another value, and every number is better than NaN.
    """
    sense, _, name = rule.partition(" ") if isinstance(rule, str) else ("", "", "")
    if sense not in ("min", "max") or not name or " " in name:
        raise ValueError(
            f"'min' or 'max' and the name of a metric, as in 'max test_accuracy', got {rule!r}"
        )

    def better(a: float, b: float) -> bool:
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a < b if sense == "min" else a > b

    return name, better


def early_stopping(
    best_rule: str, patience: int
) -> Callable[[Sequence[Mapping[str, float]]], str | None]:
    """Make a condition for `fit(stop=...)`: the metric has not improved for `patience` values. NaN
    is not an improvement.

    Args:
      best_rule: 'min' or 'max' and the name of a metric, such as 'min test_loss' or 'max
        test_accuracy'.
      patience: the number of values without an improvement after which the run stops.

    Returns:
      The condition, a function of the history.

    Raises:
      ValueError: `best_rule` is malformed, or `patience` is below 1.

    Source: Prechelt, "Early Stopping - But When?", 1998.
    """
    name, better = best_of(best_rule)
    if patience < 1:
        raise ValueError(f"early_stopping: patience must be at least 1, got {patience}")

    def stop(history):
        values = [record[name] for record in history if name in record]
        best = 0
        for i, value in enumerate(values):
            if better(value, values[best]):
                best = i
        since = len(values) - 1 - best
        return f"{best_rule} has not improved for {since} values" if since >= patience else None

    # `fit` reads this attribute to check that there is such a metric.
    stop.metric = name  # pyright: ignore[reportFunctionMemberAccess]
    return stop


def time_budget(seconds: float) -> Callable[[Sequence[Mapping[str, float]]], str | None]:
    """Make a condition for `fit(stop=...)`: the training has taken this number of seconds.

    Args:
      seconds: the limit, without the time for compiling, evaluating and saving.

    Returns:
      The condition, a function of the history.

    Raises:
      ValueError: `seconds` is not a number of at least 0.
    """
    if isinstance(seconds, str) or not float(seconds) >= 0:
        raise ValueError(f"time_budget: seconds must be a number of at least 0, got {seconds!r}")
    return lambda history: (
        f"{seconds:g} s are over" if history and history[-1]["seconds"] >= seconds else None
    )
