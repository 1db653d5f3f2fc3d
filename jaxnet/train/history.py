"""The history of a training: from the metrics of single steps to records, and records to files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["early_stopping", "time_budget", "write_csv", "write_jsonl"]

Record = dict[str, float]
"""What is known at one step: 'step', 'epoch', the mean of each metric since the record before, 'seconds' and more."""


class History:
    """Gather metrics, step by step, and cut them into records.

    Args: next_cut: the first step after this one at which a record ends; epoch: the number of the epoch that a step is in.
    Attributes: records; pending: the metrics of the steps since the last record, by name [steps].
    """

    def __init__(self, next_cut: Callable[[int], int], epoch: Callable[[int], int]):
        self.next_cut, self.epoch = next_cut, epoch
        self.records: list[Record] = []
        self.pending: dict[str, np.ndarray] = {}
        self.step, self.seconds, self.samples = 0, 0.0, 0.0

    def add(
        self, n: int, metrics: Mapping[str, np.ndarray], seconds: float, samples: int, *, cut: bool = False
    ) -> list[Record]:
        """Take in the metrics [n] of the next n steps; returns the records that are now complete.

        Args: seconds, samples: of all n steps together; cut: end a record after the last of them in any case.
        """
        metrics = {
            name: np.asarray(values, np.float64) for name, values in metrics.items()
        }  # at once: records are many
        first, new, start = self.step, [], 0
        while start < n:
            due = self.next_cut(self.step)
            end = min(due - first, n)
            for name, values in metrics.items():
                part = values[start:end]
                self.pending[name] = np.concatenate([self.pending[name], part]) if name in self.pending else part
            share = (end - start) / n
            self.step, self.seconds, self.samples = (
                first + end,
                self.seconds + seconds * share,
                self.samples + samples * share,
            )
            if self.step == due or (cut and end == n):
                new.append(self.preview())
                self.records.append(new[-1])
                self.pending, self.samples = {}, 0.0
            start = end
        return new

    def preview(self) -> Record:
        """What a record would say that ended now."""
        values = self.pending.copy()
        skipped, weights = values.get("skipped"), values.pop("weight", None)
        if skipped is not None:
            weights = np.where(skipped > 0, 0.0, 1.0 if weights is None else weights)
        record: Record = {"step": self.step, "epoch": self.epoch(self.step)}
        for name, x in sorted(values.items(), key=lambda item: item[0] != "loss"):
            record[name] = _mean(x, weights) if name != "skipped" else float(x.sum())
        before = self.records[-1]["seconds"] if self.records else 0.0
        record["samples_per_second"] = self.samples / max(self.seconds - before, 1e-9)
        return record | {"seconds": self.seconds}

    def state(self) -> dict[str, Any]:
        """All of it as plain numbers, lists and dicts."""
        pending = {name: [float(x) for x in values] for name, values in self.pending.items()}
        names = ("records", "step", "seconds", "samples")
        return {name: getattr(self, name) for name in names} | {"pending": pending}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in ("records", "step", "seconds", "samples"):
            setattr(self, name, state[name])
        self.pending = {name: np.asarray(values, np.float64) for name, values in state["pending"].items()}


def _mean(x: np.ndarray, weights: np.ndarray | None) -> float:
    """The mean; what has no weight does not count even if it is NaN. NaN where nothing counts."""
    if weights is None:
        return float(np.add.reduce(x)) / len(x)
    return float((np.where(weights > 0, x, 0.0) * weights).sum() / weights.sum()) if weights.any() else math.nan


def best_of(rule: str) -> tuple[str, Callable[[float, float], bool]]:
    """What 'min test_loss' or 'max test_accuracy' means: (name, whether a first value is better than a second)."""
    sense, _, name = rule.partition(" ")
    if sense not in ("min", "max") or not name or " " in name:
        raise ValueError(f"'min' or 'max' and the name of a metric, as in 'max test_accuracy', got {rule!r}")
    return name, (lambda a, b: a < b) if sense == "min" else (lambda a, b: a > b)


def early_stopping(rule: str, patience: int) -> Callable[[Sequence[Record]], str | None]:
    """A condition for `fit(stop=...)`: the metric has not improved for `patience` values.

    Args: rule: 'min test_loss', 'max test_accuracy' or the like.
    Source: Prechelt, "Early Stopping - But When?", 1998.
    """
    name, better = best_of(rule)
    if patience < 1:
        raise ValueError(f"early_stopping: patience must be at least 1, got {patience}")

    def stop(history):
        values = [record[name] for record in history if name in record]
        best = 0
        for i, value in enumerate(values):
            if better(value, values[best]) or math.isnan(values[best]):
                best = i
        since = len(values) - 1 - best
        return f"{rule} has not improved for {since} values" if since >= patience else None

    stop.metric = name  # pyright: ignore[reportFunctionMemberAccess]: `fit` checks that there is one
    return stop


def time_budget(seconds: float) -> Callable[[Sequence[Record]], str | None]:
    """A condition for `fit(stop=...)`: so many seconds of training are over (compiling and evaluating not counted)."""
    return lambda history: f"{seconds:g} s are over" if history and history[-1]["seconds"] >= seconds else None


def write_jsonl(path: str | os.PathLike) -> Callable[[Record], None]:
    """A callback that appends each record to a file, one JSON object a line. What is not finite is written as null.

    A run that is resumed goes on in the same file: lines of steps that are done again are taken out first.
    """
    path, begun = os.fspath(path), False

    def write(record):
        nonlocal begun
        if not begun:
            _replace(path, "".join(line for line in _lines(path) if json.loads(line)["step"] < record["step"]))
            begun = True
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with open(path, "a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    return write


def write_csv(path: str | os.PathLike) -> Callable[[Record], None]:
    """A callback that writes each record as a row of a table, and resumes as `write_jsonl`; a new metric adds a column."""
    path, rows, columns = os.fspath(path), None, []

    def write(record):
        nonlocal rows
        begin = rows is None
        if rows is None:
            rows = [row for row in csv.DictReader(_lines(path)) if float(row["step"]) < record["step"]]
            columns.extend(rows[0] if rows else [])
        rows.append({name: str(value) for name, value in record.items()})
        new = [name for name in record if name not in columns]
        if begin or new:
            columns.extend(new)
            _replace(path, _table([{name: name for name in columns}, *rows], columns))
        else:
            with open(path, "a") as file:
                file.write(_table(rows[-1:], columns))

    return write


def _table(rows: Sequence[Mapping[str, str]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _lines(path: str) -> list[str]:
    """The complete lines of a file, none if there is no file; the last may have been cut off."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [line for line in file if line.endswith("\n")]


def _replace(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)
