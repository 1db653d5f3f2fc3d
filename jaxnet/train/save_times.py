"""The times at which a run is saved while it goes on."""

from __future__ import annotations

import time

from jaxnet.train.keeper import Keeper

__all__ = ["SaveTimes"]

# Seconds of training after which the state is saved for the first time, if no epoch has ended
# before.
SOON = 5.0


class SaveTimes:
    """Tell when to save: early for the first time, and then every so many seconds.

    Args:
      keeper: the place to save to. If it is nothing, no save is ever due.
      every: seconds between two saves.
      step: the step at which the run begins.
      epoch_steps: steps per epoch; None if it is unknown.
    """

    def __init__(self, keeper: Keeper, every: float, step: int, epoch_steps: int | None):
        self.keeper, self.every, self.last = keeper, every, time.perf_counter()
        self.first_epoch = None if epoch_steps is None else (step // epoch_steps + 1) * epoch_steps
        self.never_saved = True

    def due(self, step: int, looking: bool, evaluating: bool) -> bool:
        """Whether to save now.

        Args:
          step: the number of steps done.
          looking: whether the host needs the state at this step.
          evaluating: whether it evaluates the state.
        """
        if not self.keeper:
            return False
        seconds = time.perf_counter() - self.last
        over = self.first_epoch is not None and step >= self.first_epoch
        first = self.never_saved and (seconds > SOON or evaluating or over)
        return first or seconds > self.every or (looking and self.keeper.metric is not None)

    def room(self, step: int) -> int:
        """The most steps of the next call, so that the first epoch ends with a call."""
        if not self.keeper or not self.never_saved or self.first_epoch is None:
            return 1 << 30
        return max(self.first_epoch - step, 1)

    def done(self) -> None:
        """Note that the run has been saved now."""
        self.never_saved, self.last = False, time.perf_counter()
