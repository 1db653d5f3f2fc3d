"""When a run is to be saved."""

from __future__ import annotations

import time

from jaxnet.train.keeper import Keeper

__all__ = ["Saves"]

# Seconds of training after which the state is saved for the first time, if no epoch has ended
# before.
SOON = 5.0


class Saves:
    """When a run is to be saved while it goes on: as soon as there is something to lose, and then
    every so many seconds.
    """

    def __init__(self, keeper: Keeper, every: float, step: int, epoch_steps: int | None):
        self.keeper, self.every, self.at = keeper, every, time.perf_counter()
        self.first_epoch = None if epoch_steps is None else (step // epoch_steps + 1) * epoch_steps
        self.none = True

    def due(self, step: int, looking: bool, evaluating: bool) -> bool:
        if not self.keeper:
            return False
        seconds = time.perf_counter() - self.at
        over = self.first_epoch is not None and step >= self.first_epoch
        first = self.none and (seconds > SOON or evaluating or over)
        return first or seconds > self.every or (looking and self.keeper.metric is not None)

    def room(self, step: int) -> int:
        """How many steps the next call may have, so that the first epoch ends with a call."""
        if not self.keeper or not self.none or self.first_epoch is None:
            return 1 << 30
        return max(self.first_epoch - step, 1)

    def done(self) -> None:
        self.none, self.at = False, time.perf_counter()
