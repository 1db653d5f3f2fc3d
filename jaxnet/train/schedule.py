"""The steps at which records, evaluations and the end of a run are due."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Schedule", "default_record_every", "schedule_of"]


class Schedule(NamedTuple):
    """The steps at which the host acts.

    Attributes:
      total: the last step; None if it depends on the data.
      epoch_steps: steps per epoch; None if it depends on the data.
      record_every: steps per record.
      evaluate_every: steps per evaluation; None without evaluations, or if they are due at the end
        of each pass.
      cut_epochs: whether a record ends with each epoch.
      asked: whether a stop condition is called after each record.
    """

    total: int | None
    epoch_steps: int | None
    record_every: int
    evaluate_every: int | None
    cut_epochs: bool
    asked: bool

    def next_record(self, step: int) -> int:
        """The first step after this one at which a record ends."""
        ends = [_after(step, self.record_every), self.next_look(step)]
        if self.cut_epochs and self.epoch_steps:
            ends.append(_after(step, self.epoch_steps))
        return min(ends)

    def next_look(self, step: int) -> int:
        """The first step after this one at which the host needs the state."""
        ends = [step + (1 << 30) if self.total is None else max(self.total, step + 1)]
        if self.evaluate_every:
            ends.append(_after(step, self.evaluate_every))
        if self.asked:
            # The condition is called at fixed steps, wherever calls would otherwise end.
            ends.append(_after(step, self.record_every))
        return min(ends)

    def ends_between(self, before: int, after: int) -> bool:
        """Whether an evaluation or, without evaluations, an epoch ends after step `before` and not
        after step `after`.
        """
        every = self.evaluate_every or self.epoch_steps
        return every is not None and after // every > before // every

    @property
    def evaluations(self) -> int:
        """The number of evaluations in the run, or 0 if it is unknown."""
        return self.total // self.evaluate_every if self.total and self.evaluate_every else 0


def schedule_of(
    total: int | None,
    epoch_steps: int | None,
    *,
    record_every: int | None,
    evaluate_every: int | None,
    evaluates: bool,
    asked: bool,
) -> Schedule:
    """Make the schedule of a run.

    Args:
      total: the last step, or None.
      epoch_steps: steps per epoch, or None.
      record_every: as in `fit`.
      evaluate_every: as in `fit`.
      evaluates: whether there are evaluations.
      asked: whether there is a stop condition.
    """
    every = record_every or default_record_every(epoch_steps, total)
    cut_epochs = record_every is None and (epoch_steps or 0) >= every
    evaluate_every = (evaluate_every or epoch_steps) if evaluates else None
    return Schedule(total, epoch_steps, every, evaluate_every, cut_epochs, asked)


def default_record_every(epoch_steps: int | None, total: int | None) -> int:
    """About 100 steps per record, if possible a divisor of the epoch up to 1,000, and at most 1,000
    records in total.
    """
    every = 100
    if epoch_steps is not None:
        candidates = range(min(50, epoch_steps), min(1000, epoch_steps) + 1)
        divisors = [d for d in candidates if epoch_steps % d == 0]
        every = min(divisors, key=lambda d: abs(d - 100), default=every)
    return every * max(1, -(-(total or 0) // (1000 * every)))


def _after(step: int, every: int) -> int:
    """The first multiple of `every` after a step."""
    return (step // every + 1) * every
