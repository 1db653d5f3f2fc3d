"""Pictures of a training, by matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxnet.train.records import RESERVED

__all__ = ["plot_history"]

# The axis is logarithmic if the largest loss is at least this multiple of the smallest.
DECADE = 10.0


def plot_history(
    history: Sequence[Mapping[str, float]], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw the learning curves of a run: one panel for losses, one for all other metrics.

    The horizontal axis shows epochs, or steps if there are fewer than two epochs. Metrics of the
    evaluation, which only some records have, are drawn with markers. The axis of the losses is
    logarithmic if all of them are positive and span at least a decade; else it is linear.

    Args:
      history: records as `fit` returns them.
      path: the file to write; its ending chooses the format (.png, .pdf, .svg).
      title: the text above the picture.

    Raises:
      ValueError: the history is empty, or no record has a metric.
      ImportError: matplotlib is missing.
    """
    if not history:
        raise ValueError("plot_history: the history is empty; pass the `history` of a result")
    found = dict.fromkeys(name for record in history for name in record)
    names = [name for name in found if name not in RESERVED]
    if not names:
        raise ValueError(
            "plot_history: no record of the history has a metric; return some from the step, or "
            "pass `evaluate` to fit"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses = [name for name in names if "loss" in name]
    others = [name for name in names if "loss" not in name]
    panels = [group for group in (losses, others) if group]
    scale, label = _axis(history)
    end = max(max(record["step"] for record in history) * scale, 1)
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        seen: list[float] = []
        for name in group:
            having = [record for record in history if name in record]
            x, y = [record["step"] * scale for record in having], [r[name] for r in having]
            seen += [value for value in y if math.isfinite(value)]
            # A line of one point is invisible without a marker.
            sparse = len(y) == 1 or len(y) < len(history)
            marker = "o" if sparse or name.startswith(("test", "validation")) else ""
            axes.plot(x, y, label=name.replace("_", " "), marker=marker, markersize=4)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        axes.set_xlim(0, end * 1.02)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _set_values(axes, seen, logarithmic="loss" in group[0])
    if title:
        figure.suptitle(title)
    figure.savefig(os.fspath(path), dpi=150)


def _axis(history: Sequence[Mapping[str, float]]) -> tuple[float, str]:
    """The factor from steps to the unit of the axis, and the unit: epochs, or steps if there are
    fewer than two epochs.
    """
    steps, epochs = (max(record.get(name, 0) for record in history) for name in ("step", "epoch"))
    if epochs < 2:
        return 1.0, "step"
    return epochs / max(steps, 1), "epoch"


def _set_values(axes: Any, values: Sequence[float], *, logarithmic: bool) -> None:
    """Set the scale and the ticks of the vertical axis, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, ScalarFormatter

    if logarithmic and values and min(values) > 0 and max(values) >= DECADE * min(values):
        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _plain(x)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    plain = ScalarFormatter(useOffset=False)
    plain.set_scientific(bool(values) and not 1e-4 <= max(map(abs, values), default=1) < 1e6)
    axes.yaxis.set_major_formatter(plain)


def _plain(x: float) -> str:
    """A number without a power of ten, unless it is very small or very large."""
    return f"{x:.6f}".rstrip("0").rstrip(".") if 1e-6 <= abs(x) < 1e6 else f"{x:g}"
