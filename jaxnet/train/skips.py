"""The steps in a row that a `guarded` optimizer has skipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxnet.train.guard import Guarded
from jaxnet.train.optimizers import find

__all__ = ["Skips"]


class Skips:
    """Count skipped steps.

    Args:
      opt: the state of the optimizer.

    Attributes:
      limit: the most skipped steps in a row; None if the optimizer is not `guarded`.
      in_a_row: the number of skipped steps until now.
    """

    def __init__(self, opt: Any):
        guard = find(opt, Guarded)
        self.limit, self.in_a_row = None if guard is None else int(guard.limit), 0

    def first_beyond(self, skipped: Iterable[float]) -> int | None:
        """Count the steps of a call.

        Args:
          skipped: the metric 'skipped' of each step, [n].

        Returns:
          The index of the first step beyond the limit; None if there is none.
        """
        if self.limit is None:
            return None
        for i, one in enumerate(skipped):
            self.in_a_row = self.in_a_row + 1 if one else 0
            if self.in_a_row > self.limit:
                return i
        return None
