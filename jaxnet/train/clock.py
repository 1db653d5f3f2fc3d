"""The seconds of a training: measured time without what is not training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Clock"]


class Clock:
    """A stopwatch that stands still while something other than training runs (compiling, evaluating, saving)."""

    def __init__(self):
        self._excluded = 0.0
        self._begin = self._lap = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the clock was made, without the excluded ones."""
        return time.perf_counter() - self._begin - self._excluded

    def lap(self) -> float:
        """Seconds since the last call of `lap`, without the excluded ones."""
        before, self._lap = self._lap, time.perf_counter() - self._excluded
        return self._lap - before

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Do not count the time that the block takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - begin
