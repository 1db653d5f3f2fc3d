"""The history of a run: combine the metrics of single steps into records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxnet.train.records import Record, columns_of, records_of

__all__ = ["History", "New"]


class New(NamedTuple):
    """A new complete record.

    Attributes:
      record: the means since the previous record.
      summary: the means since the previous summary, if an epoch or an evaluation ends with this
        record.
    """

    record: Record
    summary: Record | None


class History:
    """Gather metrics, step by step, and cut them into records.

    Args:
      next_cut: a function from a step to the first later step at which a record ends.
      epoch: a function from a step to the number of its epoch.
      ends: a function (a step, a later one) -> whether an epoch or an evaluation ends between them.
        The record then has a summary.

    Attributes:
      records: all complete records.
      evaluations: the summaries at evaluations, with the values of the evaluation.
      pending: the metrics of the steps since the last record, by name [steps].
      sums: the sum of value times weight since the last summary, by metric.
      weight: the sum of weights since the last summary.
      step: the number of steps done.
      seconds: the seconds of training.
      samples: the examples since the last record.
      since: the end of the last summary: its 'step' and 'seconds', and the 'samples' in records
        since then.
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
        self.sums: dict[str, float] = {}
        self.weight = 0.0
        self.step, self.seconds, self.samples = 0, 0.0, 0.0
        self.since = {"step": 0, "seconds": 0.0, "samples": 0.0}

    def begin(self, step: int) -> None:
        """Start at this step."""
        self.step = self.since["step"] = step

    def add(
        self,
        n: int,
        metrics: Mapping[str, np.ndarray],
        seconds: float,
        samples: int,
        *,
        cut: bool = False,
    ) -> list[New]:
        """Add the metrics of the next n steps; return the records that are now complete.

        Args:
          n: the number of steps.
          metrics: the metrics by name, [n].
          seconds: the seconds of all n steps together.
          samples: the examples of all n steps together.
          cut: whether a record, and a summary, end after the last step in any case.
        """
        # Convert all steps at once, because there may be many records.
        metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        first, new, start = self.step, [], 0
        while start < n:
            due = self.next_cut(self.step)
            end = min(due - first, n)
            for name, values in metrics.items():
                parts = [self.pending[name]] if name in self.pending else []
                self.pending[name] = np.concatenate([*parts, values[start:end]])
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
        """End a record with the pending steps."""
        before = self.records[-1] if self.records else self.since
        sums, weight = self._pending_sums()
        record = self._record(sums, weight, self.samples, self.seconds - before["seconds"])
        self._join(sums, weight)
        summary = None
        if cut or self.ends(int(before["step"]), self.step):
            seconds = self.seconds - self.since["seconds"]
            summary = self._record(self.sums, self.weight, self.since["samples"], seconds)
            self.sums, self.weight = {}, 0.0
            self.since = {"step": self.step, "seconds": self.seconds, "samples": 0.0}
        self.records.append(record)
        return New(record, summary)

    def summary(self) -> Record:
        """The means since the last summary, over complete records and pending steps."""
        sums, weight = self._pending_sums()
        sums = sums or dict.fromkeys(self.sums, 0.0)
        sums = {name: self.sums.get(name, 0.0) + x for name, x in sums.items()}
        samples = self.since["samples"] + self.samples
        seconds = self.seconds - self.since["seconds"]
        return self._record(sums, self.weight + weight, samples, seconds)

    def _pending_sums(self) -> tuple[dict[str, float], float]:
        """The sums of value times weight over the pending steps, by metric, and the sum of their
        weights.

        A value with weight 0 does not count, even if it is NaN. Skipped steps have weight 0 and are
        counted separately.
        """
        values, n = self.pending, float(next(map(len, self.pending.values()), 0))
        if "weight" not in values and "skipped" not in values:
            return {name: float(np.add.reduce(x)) for name, x in values.items()}, n
        values = values.copy()
        weights = values.pop("weight", np.ones(int(n)))
        skipped = values.get("skipped", np.zeros(int(n)))
        weights = np.where(skipped > 0, 0.0, weights)
        counted = {name: np.where(weights > 0, x, 0.0) for name, x in values.items()}
        sums = {name: float((x * weights).sum()) for name, x in counted.items()}
        if "skipped" in values:
            sums["skipped"] = float(skipped.sum())
        return sums, float(weights.sum())

    def _join(self, sums: Mapping[str, float], weight: float) -> None:
        """Add the pending steps to the sums."""
        for name, x in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + x
        self.weight += weight
        self.since["samples"] += self.samples
        self.pending, self.samples = {}, 0.0

    def _record(
        self, sums: Mapping[str, float], weight: float, samples: float, seconds: float
    ) -> Record:
        """A record of the means sums / weight."""
        record: Record = {"step": self.step, "epoch": self.epoch(self.step)}
        # Without any weight there is no mean. The loss of a skipped step was not finite.
        if weight or sums.get("skipped"):
            if "loss" in sums:
                record["loss"] = math.nan
            for name, x in sums.items():
                record[name] = x / weight if weight else math.nan
        if "skipped" in sums:
            record["skipped"] = sums["skipped"]
        record["samples_per_second"] = samples / max(seconds, 1e-9)
        record["seconds"] = self.seconds
        return record

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state to save: plain numbers and dicts, and a tree of arrays for the parts
        that grow.
        """
        numbers = {
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
            "sums": self.sums,
            "weight": self.weight,
            "since": self.since,
        }
        arrays = {
            "records": columns_of(self.records),
            "evaluations": columns_of(self.evaluations),
            "pending": dict(self.pending),
        }
        return numbers, arrays

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, Any] | None) -> None:
        """Restore a result of `state`. Older files have the records among the numbers, and no
        arrays.
        """
        self.step, self.seconds = numbers["step"], numbers["seconds"]
        self.samples = numbers["samples"]
        if arrays is None:
            pending, self.records = numbers["pending"], list(numbers["records"])
            # The values of an evaluation follow 'seconds', the last entry that every record has.
            evaluated = [record for record in self.records if list(record)[-1] != "seconds"]
            self.evaluations = [dict(record) for record in evaluated]
        else:
            pending, self.records = arrays["pending"], records_of(arrays["records"])
            self.evaluations = records_of(arrays["evaluations"])
        self.pending = {name: np.asarray(values, np.float64) for name, values in pending.items()}
        self.sums, self.weight = dict(numbers.get("sums", {})), numbers.get("weight", 0.0)
        since = {"step": self.step, "seconds": self.seconds, "samples": 0.0}
        self.since = dict(numbers.get("since", since))
