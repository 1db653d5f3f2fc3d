"""A clock for the seconds of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Clock"]


class Clock:
    """A stopwatch that pauses during other work (compiling, evaluating, saving)."""

    def __init__(self):
        self._excluded = 0.0
        self._begin = self._lap = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the clock was created, without excluded time."""
        return time.perf_counter() - self._begin - self._excluded

    def lap(self) -> float:
        """Seconds since the last call of `lap`, without excluded time."""
        before, self._lap = self._lap, time.perf_counter() - self._excluded
        return self._lap - before

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - begin
