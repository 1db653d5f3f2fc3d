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
      next_cut: the first step after this one at which a record ends.
      epoch: the number of the epoch of a step.
      ends: (a step, a later one) -> whether an epoch or an evaluation ends between them, which
        makes a summary.

    Attributes:
      records: all complete records.
      evaluations: the summaries at evaluations, with the values of the evaluation.
      pending: the metrics of the steps since the last record, by name [steps].
      sums, weight: of the records since the last summary: the sum of value times weight by metric,
        and the sum of weights.
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
        # The end of the last summary: its step and seconds, and the samples in records since then.
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
        """Take in the metrics [n] of the next n steps; returns the records that are now complete.

        Args:
          n: the number of steps.
          metrics: by name, [n].
          seconds, samples: of all n steps together.
          cut: end a record, and a summary, after the last of them in any case.
        """
        # Convert all steps at once, because there may be many records.
        metrics = {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        first, new, start = self.step, [], 0
        while start < n:
            due = self.next_cut(self.step)
            end = min(due - first, n)
            for name, values in metrics.items():
                part = values[start:end]
                self.pending[name] = (
                    np.concatenate([self.pending[name], part]) if name in self.pending else part
                )
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
        before = self.records[-1] if self.records else self.since
        sums, weight = self._pending_sums()
        record, summary = (
            self._record(sums, weight, self.samples, self.seconds - before["seconds"]),
            None,
        )
        self._join(sums, weight)
        if cut or self.ends(int(before["step"]), self.step):
            summary = self._record(
                self.sums, self.weight, self.since["samples"], self.seconds - self.since["seconds"]
            )
            self.sums, self.weight = {}, 0.0
            self.since = {"step": self.step, "seconds": self.seconds, "samples": 0.0}
        self.records.append(record)
        return New(record, summary)

    def summary(self) -> Record:
        """The means since the last summary, over complete records and pending steps."""
        sums, weight = self._pending_sums()
        sums = {
            name: self.sums.get(name, 0.0) + x
            for name, x in (sums or dict.fromkeys(self.sums, 0.0)).items()
        }
        samples, seconds = (
            self.since["samples"] + self.samples,
            self.seconds - self.since["seconds"],
        )
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
        sums = {
            name: float((np.where(weights > 0, x, 0.0) * weights).sum())
            for name, x in values.items()
        }
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
        record: Record = {"step": self.step, "epoch": self.epoch(self.step)}
        # Without any weight there is no mean. Steps that were skipped had one that is not finite.
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
        """The state to save: (plain numbers, lists and dicts; a tree of arrays for the parts that
        grow).
        """
        numbers = {
            name: getattr(self, name)
            for name in ("step", "seconds", "samples", "sums", "weight", "since")
        }
        arrays = {
            "records": columns_of(self.records),
            "evaluations": columns_of(self.evaluations),
            "pending": {
                name: np.asarray(values, np.float64) for name, values in self.pending.items()
            },
        }
        return numbers, arrays

    def restore(self, numbers: Mapping[str, Any], arrays: Mapping[str, Any] | None) -> None:
        """Restore a result of `state`. Older files have the records among the numbers, and no
        arrays.
        """
        self.step, self.seconds, self.samples = (
            numbers["step"],
            numbers["seconds"],
            numbers["samples"],
        )
        if arrays is None:
            self.records, pending = list(numbers["records"]), numbers["pending"]
            # The values of an evaluation follow 'seconds', the last entry that every record has.
            self.evaluations = [
                dict(record) for record in self.records if list(record)[-1] != "seconds"
            ]
        else:
            self.records, self.evaluations = (
                records_of(arrays["records"]),
                records_of(arrays["evaluations"]),
            )
            pending = arrays["pending"]
        self.pending = {name: np.asarray(values, np.float64) for name, values in pending.items()}
        self.sums, self.weight = dict(numbers.get("sums", {})), numbers.get("weight", 0.0)
        self.since = dict(
            numbers.get("since", {"step": self.step, "seconds": self.seconds, "samples": 0.0})
        )
