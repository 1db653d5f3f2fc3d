"""Callbacks that write records to files. They never overwrite files with other contents."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Writer", "begin_all", "write_csv", "write_jsonl"]

# The bytes of an existing file that are checked when the callback is made.
HEAD = 1 << 16


class Writer:
    """A callback that writes records to a file. It removes earlier lines only if a run resumes.

    Args:
      what: the name of the function that made it, for its errors.
      path: the file.
      step_of: a function (number of a line, its text) -> the step of a line of the file. It raises
        ValueError for other lines.
      open_with: a function (path, lines that stay) that begins the file.
      add: a function (path, record) that adds a record.
    """

    def __init__(
        self,
        what: str,
        path: Any,
        step_of: Callable[[int, str], float],
        open_with: Callable[[str, list[str]], None],
        add: Callable[[str, Mapping[str, float]], None],
    ):
        self.what, self.step_of, self.open_with, self.add = what, step_of, open_with, add
        self.name = _checked(what, path, step_of)
        # The step up to which lines stay if a run resumes; None if it does not.
        self.resumed: int | None = None
        self.begun = False

    def begin(self, step: int, resumed: bool) -> None:
        """Note that a run begins.

        Args:
          step: the number of steps done.
          resumed: whether the run resumes from a checkpoint.

        Raises:
          ValueError: the run does not resume, and the file holds later records, which are of
            another run.
        """
        self.begun, self.resumed = False, step if resumed else None
        if not resumed:
            self._refuse_later(step)

    def __call__(self, record: Mapping[str, float]) -> None:
        if not self.begun:
            if self.resumed is None:
                self._refuse_later(record["step"] - 1)
            keep = record["step"] if self.resumed is None else self.resumed + 1
            self.open_with(self.name, [line for number, line in self._lines() if number < keep])
            self.begun = True
        self.add(self.name, record)

    def _lines(self) -> list[tuple[float, str]]:
        return _lines(self.what, self.name, self.step_of) if os.path.exists(self.name) else []

    def _refuse_later(self, step: float) -> None:
        last = max((number for number, _ in self._lines()), default=-1.0)
        if last > step:
            raise ValueError(
                f"{self.what}: {self.name} holds records up to step {last:,.0f} of another run: "
                "name another file or delete it"
            )


def begin_all(callbacks: Iterable[Any], step: int, *, resumed: bool) -> bool:
    """Tell each `Writer` among the callbacks where a run begins, and whether it resumes.

    Args:
      callbacks: the callbacks of `fit`.
      step: the number of steps done.
      resumed: whether the run resumes from a checkpoint.

    Returns:
      Whether there is a `Writer`.
    """
    writers = [callback for callback in callbacks if isinstance(callback, Writer)]
    for writer in writers:
        writer.begin(step, resumed)
    return bool(writers)


def write_jsonl(path: str | os.PathLike[str]) -> Writer:
    """Make a callback that appends each record to a file, one JSON object per line.

    Values that are not finite become null. If `fit` resumes from a checkpoint, the callback
    continues the same file, and first removes the lines of steps that are done again. A fresh run
    does not touch the records of another run. Pass the callback itself to `fit`: inside another
    function it does not learn that a run resumes.

    Args:
      path: the file.

    Returns:
      The callback, a function of a record.

    Raises:
      ValueError: the file exists and holds something other than records; when a fresh run begins,
        the file holds records of later steps.
      OSError: the file cannot be written.
    """

    def open_with(name, lines):
        _replace(name, "".join(lines))

    def add(name, record):
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with open(name, "a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    return Writer("write_jsonl", path, _step_of_json, open_with, add)


def write_csv(path: str | os.PathLike[str]) -> Writer:
    """Make a callback that writes each record as a row of a table. A new metric adds a column.

    Resumed runs and the records of other runs are treated as by `write_jsonl`.

    Args:
      path: the file.

    Returns:
      The callback, a function of a record.

    Raises:
      ValueError: the file exists and is not a table of records, whose first column is 'step'; when
        a fresh run begins, the file holds records of later steps.
      OSError: the file cannot be written.
    """
    rows: list[Mapping[str, str]] = []
    columns: list[str] = []

    def whole_table():
        return _table([{name: name for name in columns}, *rows], columns) if columns else ""

    def open_with(name, lines):
        rows[:] = csv.DictReader(lines)
        columns[:] = rows[0] if rows else []
        # Even a table without a new column is written once, without the removed lines.
        _replace(name, whole_table())

    def add(name, record):
        rows.append({key: str(value) for key, value in record.items()})
        if new := [key for key in record if key not in columns]:
            columns.extend(new)
            _replace(name, whole_table())
        else:
            with open(name, "a") as file:
                file.write(_table(rows[-1:], columns))

    return Writer("write_csv", path, _step_of_row, open_with, add)


def _table(rows: Sequence[Mapping[str, str]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _step_of_json(number: int, line: str) -> float:
    record = json.loads(line)
    if not isinstance(record, dict) or next(iter(record), None) != "step":
        raise ValueError("not a record")
    return float(record["step"])


def _step_of_row(number: int, line: str) -> float:
    first = line.partition(",")[0].strip()
    if number == 0:
        if first != "step":
            raise ValueError("no header of records")
        # A negative step keeps the header.
        return -1.0
    return float(first)


def _checked(what: str, path: Any, step_of: Callable[[int, str], float]) -> str:
    """The path as a str. Raises ValueError or OSError unless a file of records can be written
    there.
    """
    name = os.fsdecode(path)
    if not name:
        raise ValueError(f"{what}: the path must be the name of a file, got ''")
    if os.path.isdir(name):
        raise IsADirectoryError(
            errno.EISDIR, f"{what}: this is a folder, and records go to a file", name
        )
    try:
        # Names that are too long raise OSError here.
        size = os.stat(name).st_size
    except FileNotFoundError:
        folder = os.path.dirname(os.path.abspath(name))
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(
                errno.ENOTDIR, f"{what}: this is not a folder", folder
            ) from None
        if os.path.isdir(folder) and not os.access(folder, os.W_OK):
            raise PermissionError(
                errno.EACCES, f"{what}: nothing can be written in this folder", folder
            ) from None
        return name
    if not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, f"{what}: this file cannot be written", name)
    _lines(what, name, step_of, HEAD if size > HEAD else None)
    return name


def _lines(
    what: str, path: str, step_of: Callable[[int, str], float], limit: int | None = None
) -> list[tuple[float, str]]:
    """The complete lines of a file of records, each with its step. The last line may be incomplete,
    because a process was killed.
    """
    with open(path, "rb") as file:
        content = file.read() if limit is None else file.read(limit)
    lines, rest = content.split(b"\n")[:-1], content.rpartition(b"\n")[2]
    try:
        found = []
        for number, line in enumerate(lines):
            text = line.decode()
            found.append((step_of(number, text), text + "\n"))
        if content and not lines and not rest.startswith((b'{"step"', b"step")):
            raise ValueError("no line of a record")
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{what}: {path!r:.200} exists and holds something other than records; it is left as "
            "it is: name another file"
        ) from None
    return found


def _replace(path: str, text: str) -> None:
    """Replace a file of records, or leave it as it is if writing fails."""
    from jaxnet.checkpoint.atomic import replacing, write

    with replacing(path, os.path.abspath(path)) as fd:
        write(fd, memoryview(text.encode()))
