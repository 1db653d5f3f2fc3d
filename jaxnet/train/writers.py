"""Callbacks that write records to files, and never overwrite files with other contents."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["write_csv", "write_jsonl"]

# The bytes of an existing file that are checked when the callback is made.
HEAD = 1 << 16


def write_jsonl(path: str | os.PathLike) -> Callable[[Mapping[str, float]], None]:
    """Make a callback that appends each record to a file, one JSON object per line.

    A resumed run continues the same file, after deleting the lines of steps that it repeats.

    Args:
      path: the file. Values that are not finite become null in it.

    Returns:
      The callback, a function of a record.

    Raises:
      ValueError: the file exists and holds something other than records.
      OSError: the file cannot be written.
    """
    name, begun = _checked("write_jsonl", path, _step_of_json), False

    def write(record):
        nonlocal begun
        if not begun:
            _replace(name, "".join(_earlier("write_jsonl", name, _step_of_json, record["step"])))
            begun = True
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with open(name, "a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    return write


def write_csv(path: str | os.PathLike) -> Callable[[Mapping[str, float]], None]:
    """Make a callback that writes each record as a row of a table. It resumes like `write_jsonl`.

    Args:
      path: the file. A new metric adds a column to it.

    Returns:
      The callback, a function of a record.

    Raises:
      ValueError: the file exists and is not a table of records, whose first column is 'step'.
      OSError: the file cannot be written.
    """
    name, rows, columns = _checked("write_csv", path, _step_of_row), None, []

    def write(record):
        nonlocal rows
        begin = rows is None
        if rows is None:
            rows = list(csv.DictReader(_earlier("write_csv", name, _step_of_row, record["step"])))
            columns.extend(rows[0] if rows else [])
        rows.append({key: str(value) for key, value in record.items()})
        new = [key for key in record if key not in columns]
        if begin or new:
            columns.extend(new)
            _replace(name, _table([{key: key for key in columns}, *rows], columns))
        else:
            with open(name, "a") as file:
                file.write(_table(rows[-1:], columns))

    return write


def _table(rows: Sequence[Mapping[str, str]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _step_of_json(number: int, line: str) -> float:
    record = json.loads(line)
    if not isinstance(record, dict) or next(iter(record), None) != "step":
        raise ValueError("no record")
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
    """The path as a str. Raises ValueError or OSError unless a file of records can be written there."""
    name = os.fsdecode(path)
    if not name:
        raise ValueError(f"{what}: the path must be the name of a file, got ''")
    if os.path.isdir(name):
        raise IsADirectoryError(errno.EISDIR, f"{what}: this is a folder, and records go to a file", name)
    try:
        # Names that are too long raise OSError here.
        size = os.stat(name).st_size
    except FileNotFoundError:
        folder = os.path.dirname(os.path.abspath(name))
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, f"{what}: this is no folder", folder) from None
        if os.path.isdir(folder) and not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, f"{what}: nothing can be written in this folder", folder) from None
        return name
    if not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, f"{what}: this file cannot be written", name)
    _lines(what, name, step_of, HEAD if size > HEAD else None)
    return name


def _earlier(what: str, path: str, step_of: Callable[[int, str], float], step: float) -> list[str]:
    """The lines of an existing file of records that belong to steps before this one."""
    if not os.path.exists(path):
        return []
    return [line for number, line in _lines(what, path, step_of) if number < step]


def _lines(
    what: str, path: str, step_of: Callable[[int, str], float], limit: int | None = None
) -> list[tuple[float, str]]:
    """The complete lines of a file of records, each with its step. The last line may have been cut off by a kill."""
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
            f"{what}: {path!r:.200} exists and holds something other than records; it is left as it is: name another file"
        ) from None
    return found


def _replace(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)
