"""The history of a training: from the metrics of single steps to records, and records to arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["History", "New", "Record", "columns_of", "records_of"]

Record = dict[str, float]
"""What is known at one step: 'step', 'epoch', the mean of each metric since the record before, 'seconds' and more."""

FIXED = ("step", "epoch", "samples_per_second", "seconds")
"""The entries of every record that are no metrics."""


class New(NamedTuple):
    """A record that is complete now.

    Attributes:
      record: with the means since the record before.
      summary: if an epoch or an evaluation ends with it, a record with the means since the last one of these.
    """

    record: Record
    summary: Record | None


class History:
    """Gather metrics, step by step, and cut them into records.

    Args:
      next_cut: the first step after this one at which a record ends.
      epoch: the number of the epoch that a step is in.
      ends: (a step, a later one) -> whether an epoch or an evaluation ends between them, which makes a summary.

    Attributes:
      records: all complete records.
      evaluations: the summaries that were evaluated, with what the evaluation gave.
      pending: the metrics of the steps since the last record, by name [steps].
      sums: of the records since the last summary, by metric: [sum of value times weight, sum of weights].
    """

    def __init__(
        self,
        next_cut: Callable[[int], int],
        epoch: Callable[[int], int],
        ends: Callable[[int, int], bool] = lambda before, after: False,
    ):
        self.next_cut, self.epoch, self.ends = next_cut, epoch, ends
        self.records: list[Record] = []
        self.evaluations: list[Record] = []
        self.pending: dict[str, np.ndarray] = {}
        self.sums: dict[str, list[float]] = {}
        self.step, self.seconds, self.samples = 0, 0.0, 0.0
        # Where the last summary ended: its step, seconds, and the samples since then that are in records.
        self.since = {"step": 0, "seconds": 0.0, "samples": 0.0}

    def begin(self, step: int) -> None:
        """Start at this step."""
        self.step = self.since["step"] = step

    def add(
        self, n: int, metrics: Mapping[str, np.ndarray], seconds: float, samples: int, *, cut: bool = False
    ) -> list[New]:
        """Take in the metrics [n] of the next n steps; returns the records that are now complete.

        Args:
          n: the number of steps.
          metrics: by name, [n].
          seconds, samples: of all n steps together.
          cut: end a record, and a summary, after the last of them in any case.
        """
        # All at once, since records may be many.
        metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        first, new, start = self.step, [], 0
        while start < n:
            due = self.next_cut(self.step)
            end = min(due - first, n)
            for name, values in metrics.items():
                part = values[start:end]
                self.pending[name] = np.concatenate([self.pending[name], part]) if name in self.pending else part
            share = (end - start) / n
            self.step = first + end
            self.seconds += seconds * share
            self.samples += samples * share
            at_end = cut and end == n
            if self.step == due or at_end:
                new.append(self._complete(at_end))
            start = end
        return new

    def _complete(self, cut: bool) -> New:
        record, summary = self.preview(), None
        before = self.records[-1]["step"] if self.records else self.since["step"]
        if cut or self.ends(int(before), self.step):
            summary = self.summary()
        self.records.append(record)
        self._move_to_sums()
        if summary is not None:
            self.sums = {}
            self.since = {"step": self.step, "seconds": self.seconds, "samples": 0.0}
        return New(record, summary)

    def preview(self) -> Record:
        """What a record would say that ended now."""
        means = {name: total / weight if weight else math.nan for name, (total, weight) in self._totals().items()}
        before = self.records[-1]["seconds"] if self.records else 0.0
        return self._record(means, self.samples, self.seconds - before)

    def summary(self) -> Record:
        """The means since the last summary, over whole records and what is pending."""
        means = {}
        for name, (total, weight) in self._joined().items():
            means[name] = total / weight if weight else math.nan
        return self._record(means, self.since["samples"] + self.samples, self.seconds - self.since["seconds"])

    def _record(self, means: Mapping[str, float], samples: float, seconds: float) -> Record:
        record: Record = {"step": self.step, "epoch": self.epoch(self.step)}
        record |= dict(sorted(means.items(), key=lambda item: item[0] != "loss"))
        return record | {"samples_per_second": samples / max(seconds, 1e-9), "seconds": self.seconds}

    def _totals(self) -> dict[str, list[float]]:
        """Of what is pending, by metric: the sum of value times weight, and the sum of the weights."""
        values = self.pending.copy()
        skipped, weights = values.get("skipped"), values.pop("weight", None)
        if skipped is not None:
            weights = np.where(skipped > 0, 0.0, 1.0 if weights is None else weights)
        totals = {name: _total(x, weights) for name, x in values.items()}
        if skipped is not None:
            # Skipped steps are counted, and have no mean.
            totals["skipped"] = [float(skipped.sum()), 1.0]
        return totals

    def _joined(self) -> dict[str, list[float]]:
        joined = {name: list(pair) for name, pair in self.sums.items()}
        for name, (total, weight) in self._totals().items():
            before = joined.setdefault(name, [0.0, 0.0])
            before[0] += total if weight else 0.0
            before[1] = 1.0 if name == "skipped" else before[1] + weight
        return joined

    def _move_to_sums(self) -> None:
        self.sums = self._joined()
        self.since["samples"] += self.samples
        self.pending, self.samples = {}, 0.0

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All of it, to be saved: (plain numbers, lists and dicts; a tree of arrays, for what grows)."""
        numbers = {name: getattr(self, name) for name in ("step", "seconds", "samples", "sums", "since")}
        arrays = {
            "records": columns_of(self.records),
            "evaluations": columns_of(self.evaluations),
            "pending": {name: np.asarray(values, np.float64) for name, values in self.pending.items()},
        }
        return numbers, arrays

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, Any] | None) -> None:
        """Take over what `state` gave. Older files have the records among the numbers, and no arrays."""
        self.step, self.seconds, self.samples = numbers["step"], numbers["seconds"], numbers["samples"]
        if arrays is None:
            self.records, pending = list(numbers["records"]), numbers["pending"]
            # An evaluation's values stand behind the last entry that every record has.
            self.evaluations = [dict(record) for record in self.records if list(record)[-1] != "seconds"]
        else:
            self.records, self.evaluations = records_of(arrays["records"]), records_of(arrays["evaluations"])
            pending = arrays["pending"]
        self.pending = {name: np.asarray(values, np.float64) for name, values in pending.items()}
        self.sums = {name: list(pair) for name, pair in numbers.get("sums", {}).items()}
        self.since = dict(numbers.get("since", {"step": self.step, "seconds": self.seconds, "samples": 0.0}))


def _total(x: np.ndarray, weights: np.ndarray | None) -> list[float]:
    """[sum of value times weight, sum of weights]. A value without weight does not count, even if it is NaN."""
    if weights is None:
        return [float(np.add.reduce(x)), float(len(x))]
    return [float((np.where(weights > 0, x, 0.0) * weights).sum()), float(weights.sum())]


def columns_of(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Records as arrays, which a file holds far better than text: {'columns': {name: [n]}, 'has': {name: bool [n]}}.

    'has' tells which records have an entry; names that all records have are left out of it.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    columns, has = {}, {}
    for name in names:
        values = [record.get(name) for record in records]
        dtype = np.int64 if name in ("step", "epoch") else np.float64
        columns[name] = np.array([0 if value is None else value for value in values], dtype)
        if None in values:
            has[name] = np.array([value is not None for value in values])
    return {"columns": columns, "has": has}


def records_of(table: Mapping[str, Any]) -> list[Record]:
    """The records that `columns_of` was given."""
    columns = {name: np.asarray(column).tolist() for name, column in table["columns"].items()}
    has = {name: np.asarray(column).tolist() for name, column in table["has"].items()}
    rows = range(len(next(iter(columns.values()), ())))
    return [{name: column[i] for name, column in columns.items() if name not in has or has[name][i]} for i in rows]
