"""Which values of a metric are better, parsed from a text like 'min test_loss'."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

__all__ = ["BestRule"]


class BestRule(NamedTuple):
    """A metric, and whether small or large values of it are better.

    Attributes:
      sense: 'min' or 'max'.
      metric: the name of the metric.
    """

    sense: str
    metric: str

    @classmethod
    def parse(cls, what: str, rule: Any) -> BestRule:
        """Parse a rule.

        Args:
          what: how the error names the argument, such as "fit: best_rule".
          rule: 'min' or 'max', a space, and the name of a metric.

        Returns:
          The rule.

        Raises:
          ValueError: the rule has another form.

        Example:
          >>> BestRule.parse("fit: best_rule", "min loss")
          BestRule(sense='min', metric='loss')
        """
        found = re.fullmatch(r"(min|max) (\S.*)", rule) if isinstance(rule, str) else None
        if found is None:
            raise ValueError(
                f"{what} must be 'min' or 'max' and a name, as in 'min loss', got {rule!r}"
            )
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{self.sense} {self.metric}"

    def better(self, a: float, b: float) -> bool:
        """Tell whether the value `a` is better than `b`.

        NaN is never better than another value, and every number is better than NaN.

        Args:
          a: a value of the metric.
          b: another one.

        Returns:
          Whether `a` is better.
        """
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a < b if self.sense == "min" else a > b
