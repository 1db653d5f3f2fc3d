"""A short description of files that `jaxnet.train.fit` wrote."""

import json
import math
from typing import Any

from jaxnet.checkpoint.inspection import Info

__all__ = ["about_run"]


def about_run(info: Info) -> str | None:
    """Describe the run of a checkpoint that `fit` wrote: records, step, best evaluation, data.

    Args:
      info: the result of `inspect`.

    Returns:
      One line of text, or None if `fit` did not write the file.
    """
    try:
        text = json.loads(info.metadata["fit"])
        step, facts, total = int(text["history"]["step"]), text["facts"], text.get("total")
        parts = [
            f"{_records(info, text):,} records",
            f"step {step:,}" + (f" of {int(total):,}" if total else ""),
        ]
        if text["passes"]:
            parts.append(f"{text['passes']} passes over the data")
        if "best/value" in info.scalars:
            rule, value = text.get("best"), info.scalars["best/value"]
            parts.append(
                f"best {rule + ' ' if rule else ''}{value:.6g} at step "
                f"{info.scalars['best/step']:,}"
            )
        parts.append(_duration(float(text["history"]["seconds"])))
        if facts.get("examples"):
            parts.append(f"{facts['examples']:,} examples, batch size {facts['batch_size']}")
        return f"a run of fit: {', '.join(parts)}"
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        # Another program may have written the header.
        return None


def _records(info: Info, text: dict[str, Any]) -> int:
    if "records" in text["history"]:
        return len(text["history"]["records"])
    shapes = {leaf.path: leaf.shape for leaf in info.leaves}
    return shapes.get("history/records/columns/step", (0,))[0]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        raise ValueError("no time")
    return f"{seconds:.1f} s of training"
