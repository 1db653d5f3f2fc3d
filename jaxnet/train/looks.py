"""The work of the host between calls: evaluate, keep the best parameters, decide when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxnet.best_rule import BestRule
from jaxnet.train import look_checks
from jaxnet.train.records import Record
from jaxnet.train.results import Best
from jaxnet.train.state import TrainState, copied

__all__ = ["Looks"]


class Looks:
    """The functions of `fit` that look at the run.

    Args:
      evaluate: as in `fit`.
      best_rule: as in `fit`.
      stop: as in `fit`.
      callbacks: as in `fit`.

    Attributes:
      best: the best evaluation so far; None if there is none.
    """

    def __init__(
        self,
        evaluate: Callable[[TrainState], Mapping[str, Any]] | None,
        best_rule: str | None,
        stop: Callable[[Sequence[Record]], Any] | None,
        callbacks: Sequence[Callable[[Record], Any]],
    ):
        self.evaluate, self.stop, self.callbacks = evaluate, stop, callbacks
        rule = best_rule
        self.best_rule = None if rule is None else BestRule.parse("fit: best_rule", rule)
        self.best: Best | None = None

    def check(
        self, train_state: TrainState, metrics: Sequence[str], stored: str | None, *, fresh: bool
    ) -> None:
        """Check the functions before the first step.

        Args:
          train_state: the start.
          metrics: the metrics that the step returns.
          stored: the metric by which a store of checkpoints keeps the best steps.
          fresh: whether the run has no records yet. The stop condition is then called once.
        """
        values: tuple[str, ...] | None = ()
        if self.evaluate is not None:
            values = look_checks.evaluated_names(self.evaluate, train_state, self.best_rule)
        if values is None:
            return
        look_checks.check_names(metrics, values, self.stop, stored)
        if self.stop is not None and fresh:
            look_checks.check_stop(self.stop, {*metrics, *values} - {"weight"})

    def evaluation(
        self, train_state: TrainState, record: Record, metrics: Sequence[str]
    ) -> dict[str, float]:
        """Evaluate, and keep the parameters if they are the best.

        Args:
          train_state: the state to evaluate.
          record: the record at this step, to which the values are added.
          metrics: the metrics that the step returns.

        Returns:
          The values by name.
        """
        assert self.evaluate is not None
        evaluated = look_checks.check_evaluation(self.evaluate(train_state), self.best_rule)
        values = {name: float(value) for name, value in evaluated.items()}
        look_checks.check_names(record, values, None, None)
        record.update(values)
        look_checks.check_stop_metric(self.stop, {*record, *metrics}, sorted(record))
        if self.best_rule is not None:
            self._keep_best(self.best_rule, values, int(record["step"]), train_state)
        return values

    def _keep_best(
        self, rule: BestRule, values: Mapping[str, float], step: int, train_state: TrainState
    ) -> None:
        value = values[rule.metric]
        before = math.nan if self.best is None else self.best.value
        if rule.better(value, before):
            params, state = jax.tree.map(copied, (train_state.params, train_state.state))
            self.best = Best(value, step, params, state)

    def reason_to_stop(self, records: Sequence[Record]) -> str | None:
        """Ask the stop condition; None to go on."""
        if self.stop is None or not records:
            return None
        return look_checks.reason_of(self.stop(records))
