"""The length of calls: how many seconds each took, and how many steps the next one may have."""

from __future__ import annotations

import numpy as np

__all__ = ["CALL", "Pace"]

# Seconds that a compiled call should take at most, because Ctrl-C waits for its end.
CALL = 0.3
# Below this number of seconds, the host waits for a call before it sends the next one, because it
# could not tell their ends apart.
QUICK = 0.02


class Pace:
    """Measure calls, and adapt their length.

    Attributes:
      steps: the most steps of the next call.
      quick: whether calls are too short for the next one to be sent ahead.
    """

    def __init__(self):
        self.steps, self.quick = 1, True
        # Steps and seconds of the first call of a program, until the next call tells how much of it
        # was training.
        self._first: tuple[int, float] | None = None
        # Seconds that belong to the next call, and have passed already.
        self._credit = 0.0

    def seconds_of(self, n: int, lap: float, n_next: int | None) -> float:
        """Return the seconds that a call took.

        Args:
          n: the number of its steps.
          lap: seconds since the previous call was received.
          n_next: the number of steps of the next call, if that has finished as well. The end of the
            first one is then unknown, and the time is split in proportion to the steps.
        """
        seconds, self._credit = lap + self._credit, 0.0
        if n_next is not None:
            self._credit = seconds * n_next / (n + n_next)
            seconds -= self._credit
        # A short call may be mostly overhead, so growth is limited.
        self.steps = int(np.clip(CALL * n / max(seconds, 1e-9), 1, 8 * n))
        self.quick = seconds < QUICK
        return seconds

    def loading(self, n: int, seconds: float, fresh: bool) -> float:
        """Return how many seconds of the previous call were not training.

        The first execution of a program loads it. The next call tells how long its steps take.

        Args:
          n: the number of steps of this call.
          seconds: its seconds.
          fresh: whether it is the first call of a program.
        """
        if self._first is None or fresh:
            return 0.0
        n_first, seconds_first = self._first
        return max(0.0, seconds_first - n_first * seconds / n)

    def received(self, n: int, seconds: float, fresh: bool, recorded: bool) -> None:
        """Note the first call of a program, unless a complete record contains it: a record that
        callbacks have received does not change any more.
        """
        self._first = (n, seconds) if fresh and not recorded else None
