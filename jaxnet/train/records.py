"""Records: what is known about a run at one step, and lists of them as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["RESERVED", "Record", "columns_of", "records_of"]

Record = dict[str, float]
"""What is known at one step: 'step', 'epoch', the mean of each metric since the previous record,
'seconds' and more.
"""

RESERVED = ("step", "epoch", "samples_per_second", "seconds")
"""The entries of every record that are not metrics. No metric may have one of these names."""


def columns_of(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Convert records to arrays, which need far less space in a file.

    Args:
      records: the records, n of them.

    Returns:
      {'columns': {name: [n]}, 'has': {name: bool [n]}}. 'has' tells which records have an entry; it
      leaves out the names that all records have.
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
    """Convert arrays to records, the inverse of `columns_of`."""
    columns = {name: np.asarray(column).tolist() for name, column in table["columns"].items()}
    has = {name: np.asarray(column).tolist() for name, column in table["has"].items()}
    rows = range(len(next(iter(columns.values()), ())))
    return [
        {name: column[i] for name, column in columns.items() if name not in has or has[name][i]}
        for i in rows
    ]
