"""Pictures of a training. matplotlib is needed here only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

__all__ = ["plot_history"]


def plot_history(history: Sequence[Mapping[str, float]], path: str | os.PathLike, *, title: str = "") -> None:
    """Draw the learning curves of a `fit` as a picture: one panel for losses, one for all other metrics, over epochs.

    Metrics of the evaluation, which only some records have, are drawn with markers.

    Args: history: records as `fit` returns them; path: the file to write, its ending chooses the format (.png, .pdf, .svg).
    Raises: ValueError for an empty history, ImportError without matplotlib.
    """
    if not history:
        raise ValueError("plot_history: the history is empty")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    hidden = {"step", "epoch", "seconds", "samples_per_second"}
    names = list(dict.fromkeys(name for record in history for name in record if name not in hidden))
    panels = [group for group in ([n for n in names if "loss" in n], [n for n in names if "loss" not in n]) if group]
    epochs_a_step = max(record["epoch"] for record in history) / max(record["step"] for record in history)

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in group:
            points = [(record["step"] * epochs_a_step, record[name]) for record in history if name in record]
            sparse = len(points) < len(history) or name.startswith(("test", "validation"))
            axes.plot(
                *zip(*points, strict=True), label=name.replace("_", " "), marker="o" if sparse else "", markersize=4
            )
        axes.set_xlabel("epoch")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if "loss" in group[0]:
            axes.set_yscale("log")
    if title:
        figure.suptitle(title)
    figure.savefig(os.fspath(path), dpi=150)
