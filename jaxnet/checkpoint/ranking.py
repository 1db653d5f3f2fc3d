"""Rank the steps of a store by a metric, which each file holds in its metadata."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxnet.best_rule import BestRule
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.inspection import Info, inspect
from jaxnet.checkpoint.words import shown

__all__ = ["Ranking", "metrics_as_json", "metrics_of", "rank"]


class Ranking(NamedTuple):
    """Steps by quality.

    Attributes:
      steps: the steps that have the metric, the best first; of equally good steps, the earliest
        first.
      damaged: why files are damaged, by step.
      closed: why files cannot be opened, by step.
    """

    steps: list[int]
    damaged: dict[int, str]
    closed: dict[int, OSError]


def rank(files: Iterable[tuple[int, str]], rule: BestRule) -> Ranking:
    """Rank steps.

    Args:
      files: each step with the path of its file. Missing files are left out.
      rule: which steps are better.

    Returns:
      The ranking.
    """
    values, damaged, closed = [], {}, {}
    for step, path in files:
        try:
            value = metrics_of(inspect(path)).get(rule.metric, math.nan)
        except FileNotFoundError:
            continue
        except OSError as e:
            closed[step] = e
        except CheckpointError as e:
            damaged[step] = str(e)
        else:
            if not math.isnan(value):
                values.append((value if rule.sense == "min" else -value, step))
    return Ranking([step for _, step in sorted(values)], damaged, closed)


def metrics_of(info: Info) -> dict[str, float]:
    """The metrics in the metadata of a file."""
    stored = info.metadata.get("metrics")
    stored = stored if isinstance(stored, dict) else {}
    words = ("nan", "inf", "-inf")
    return {
        name: float(x) for name, x in stored.items() if isinstance(x, int | float) or x in words
    }


def metrics_as_json(metrics: Mapping[str, Any] | None, rule: BestRule | None) -> dict[str, Any]:
    """Metrics as JSON can hold them: NaN and infinities become strings.

    Raises ValueError if a metric is not a number, or if that of the rule is missing.
    """
    if metrics and rule and rule.metric not in metrics:
        raise ValueError(
            f"metrics must have '{rule.metric}', by which the best step is chosen; they have "
            f"{list(metrics)}"
        )
    numbers: dict[str, Any] = {}
    for key, x in (metrics or {}).items():
        try:
            # float() would accept text.
            if isinstance(x, str | bytes):
                raise TypeError
            numbers[key] = float(x) if math.isfinite(float(x)) else str(float(x))
        except (TypeError, ValueError, OverflowError) as e:
            text = f"metric '{shown(key)}' must be a number, got {shown(repr(x))}"
            raise ValueError(text) from e
    return numbers
