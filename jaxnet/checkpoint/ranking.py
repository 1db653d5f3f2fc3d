"""The metrics of a step: as JSON and back, and the order of steps by one of them."""

import math
from collections.abc import Mapping
from typing import Any

from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.inspection import Info, inspect
from jaxnet.checkpoint.words import shown

__all__ = ["metrics_of", "numbers_of", "ranked"]


def numbers_of(metrics: Mapping[str, Any] | None, best_rule: str | None) -> dict[str, float | str]:
    """Metrics as JSON can hold them."""
    name = best_rule and best_rule[4:]
    if metrics and name and name not in metrics:
        raise ValueError(
            f"metrics must have '{name}', by which the best step is chosen; they have "
            f"{list(metrics)}"
        )
    numbers = {}
    for key, x in (metrics or {}).items():
        try:
            # float() would accept text.
            if isinstance(x, str | bytes):
                raise TypeError
            numbers[key] = float(x) if math.isfinite(float(x)) else str(float(x))
        except (TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"metric '{shown(key)}' must be a number, got {shown(repr(x))}") from e
    return numbers


def ranked(
    paths: Mapping[int, str], best_rule: str
) -> tuple[list[int], dict[int, str], dict[int, OSError]]:
    """Rank steps by the metric, best first; also return the damaged files and those that cannot
    be opened, by step.
    """
    sign, name = {"min": 1, "max": -1}[best_rule[:3]], best_rule[4:]
    values, skipped, closed = [], {}, {}
    for step, path in paths.items():
        try:
            value = metrics_of(inspect(path)).get(name, math.nan)
        except FileNotFoundError:
            continue
        except OSError as e:
            closed[step] = e
        except CheckpointError as e:
            skipped[step] = str(e)
        else:
            if not math.isnan(value):
                values.append((sign * value, step))
    return [step for _, step in sorted(values)], skipped, closed


def metrics_of(info: Info) -> dict[str, float]:
    """The metrics that were saved with a file."""
    stored = info.metadata.get("metrics")
    stored = stored if isinstance(stored, dict) else {}
    numbers = {
        name: x
        for name, x in stored.items()
        if isinstance(x, int | float) or x in ("nan", "inf", "-inf")
    }
    return {name: float(x) for name, x in numbers.items()}
