"""Conditions that stop a run, as functions of its history."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxnet.best_rule import BestRule
from jaxnet.checks import size_of

__all__ = ["EarlyStopping", "early_stopping", "time_budget"]

Condition = Callable[[Sequence[Mapping[str, float]]], str | None]
"""A function from the history to the reason to stop; None to continue."""


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The condition that `early_stopping` returns.

    Attributes:
      rule: the metric, and which of its values are better. `fit` checks that records have it.
      patience: the number of values without an improvement after which the run stops.
    """

    rule: BestRule
    patience: int

    def __call__(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Return the reason to stop; None to continue."""
        name = self.rule.metric
        values = [record[name] for record in history if name in record]
        best = 0
        for i, value in enumerate(values):
            if self.rule.better(value, values[best]):
                best = i
        since = len(values) - 1 - best
        if since < self.patience:
            return None
        return f"{self.rule} has not improved for {since} values"


def early_stopping(best_rule: str, patience: int) -> EarlyStopping:
    """Make a condition for `fit(stop=...)`: the metric has not improved for `patience` values.

    NaN is not an improvement.

    Source: Prechelt, "Early Stopping - But When?", 1998.

    Args:
      best_rule: 'min' or 'max' and the name of a metric, such as 'min test_loss' or 'max
        test_accuracy'.
      patience: the number of values without an improvement after which the run stops.

    Returns:
      The condition, a function from the history to the reason to stop, or to None.

    Raises:
      ValueError: `best_rule` is malformed, or `patience` is not an int of at least 1.

    Example:
      >>> stop = early_stopping("min loss", 2)
      >>> stop([{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}])
      'min loss has not improved for 2 values'
    """
    rule = BestRule.parse("early_stopping: best_rule", best_rule)
    return EarlyStopping(rule, size_of("early_stopping: patience", patience))


def time_budget(seconds: float) -> Condition:
    """Make a condition for `fit(stop=...)`: the training has taken this number of seconds.

    Args:
      seconds: the limit, without the time for compiling, evaluating and saving.

    Returns:
      The condition, a function from the history to the reason to stop, or to None.

    Raises:
      ValueError: `seconds` is not a number of at least 0.

    Example:
      >>> stop = time_budget(60)
      >>> stop([{"seconds": 61.0}])
      '60 s are over'
    """
    if isinstance(seconds, str) or not float(seconds) >= 0:
        raise ValueError(f"time_budget: seconds must be a number of at least 0, got {seconds!r}")
    return lambda history: (
        f"{seconds:g} s are over" if history and history[-1]["seconds"] >= seconds else None
    )
