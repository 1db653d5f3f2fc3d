"""One line about a running training, on stderr."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from jaxnet.train.records import RESERVED

__all__ = ["Progress"]

# Without a terminal, there is a line at least after this number of seconds.
QUIET = 30.0
# Without a terminal, a line reports other work than training after this number of seconds.
PATIENCE = 5.0
# Up to this number of evaluations, each has a line.
LINES = 1000


class Progress:
    """Show the progress of a run: a line rewritten in place on a terminal, plain lines elsewhere.

    One line per evaluation stays or, without evaluations, one per epoch. If there are more than 100
    epochs, or none, about 100 lines stay. The numbers of such a line are means over the epoch, or
    since the previous evaluation.

    Args:
      total: the last step, if it is known.
      epoch_steps: steps per epoch, if that is known.
      step: where the run begins.
      show: False to be silent.
      evaluations: how many evaluations are expected; 0 if that is unknown.
      metric: the metric that a narrow line drops last; None for the first one.

    Attributes:
      ending: whether the run is about to stop. Only the last record of a call is then shown.
    """

    def __init__(
        self,
        total: int | None,
        epoch_steps: int | None,
        *,
        step: int = 0,
        show: bool | None = None,
        evaluations: int = 0,
        metric: str | None = None,
    ):
        self.total, self.stream, self.epochs = total, sys.stderr, epoch_steps is not None
        self.show = show is not False and self.stream is not None
        self.terminal = False
        # The stream may be closed.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.terminal = self.show and self.stream.isatty()  # pyright: ignore[reportOptionalMemberAccess]
        self.metric, self.ending = metric, False
        self.width = 0
        self.every = epoch_steps or 1
        if total is not None:
            self.every *= max(1, -(-total // (100 * self.every)))
        # The last multiple of `every` whose line stays.
        self.shown = step // self.every
        self.each = evaluations <= LINES
        self.written = time.perf_counter()

    def __call__(
        self,
        record: Mapping[str, float],
        *,
        partial: bool = False,
        last: bool = True,
        evaluated: bool = False,
    ) -> None:
        """Show a record, or a preliminary one.

        Args:
          record: the record.
          partial: whether it covers only a part of an epoch. It then stays only if there was no
            line for a while.
          last: False if another record follows immediately and would overwrite it.
          evaluated: whether it has an evaluation.
        """
        count = int(record["step"]) // self.every
        crossed = count > self.shown and not (partial and self.epochs)
        stays = crossed or record["step"] == self.total or (evaluated and self.each)
        late = not self.terminal and time.perf_counter() - self.written > QUIET
        if stays:
            self.shown = count
        if self.ending and not last:
            return
        if self.show and (stays or late or (self.terminal and last)):
            self._write(self.line(record), newline=stays or late)

    def note(self, text: str) -> None:
        """Print a line about something else."""
        if self.show:
            lines = [text]
            if self.terminal:
                lines = textwrap.wrap(text, max(self._columns() - 1, 4), subsequent_indent="  ")
            for line in lines:
                self._write(line, newline=True)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Report other work than training: at once on a terminal, and elsewhere if it takes
        long.
        """
        timer = None
        if self.show and self.terminal:
            self._write(f"{what} ...", newline=False)
        elif self.show:
            timer = threading.Timer(PATIENCE, self.note, [f"{what} ..."])
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def line(self, record: Mapping[str, float]) -> str:
        """The line for a record, on a terminal without the parts that do not fit."""
        step, seconds = int(record["step"]), record["seconds"]
        if self.total is None or step >= self.total:
            left = f"{_clock(seconds)} in all"
        else:
            left = f"{_clock(seconds / max(step, 1) * (self.total - step))} left"
        of = "" if self.total is None else f"/{self.total:,}"
        epoch = f"epoch {int(record['epoch'])}" if record["epoch"] else ""
        texts = {name: f"{value:.4g}" for name, value in record.items() if name not in RESERVED}
        values = [_printable(f"{name} {text}", self.stream) for name, text in texts.items()]
        rate = f"{record['samples_per_second']:,.0f} samples/s"
        parts = [epoch, f"step {step:,}{of}", *values, rate, left]
        limit = self._columns() - 1 if self.terminal else None
        if limit is not None:
            kept = self.metric if self.metric in texts else next(iter(texts), "")
            at = list(texts).index(kept) if texts else 0
            # The first value, the loss, is the last of the others to be dropped.
            others = [*values[:at], *values[at + 1 :]]
            others = others[1:] + others[:1] if at else others
            parts = _fitting(parts, [rate, left, f"step {step:,}{of}", *others, epoch], limit)
            if parts and _width("  ".join(parts)) > limit:
                # A number without its last digits would be another number.
                parts = [text for text in [texts.get(kept, "")] if _width(text) <= limit]
        return "  ".join(part for part in parts if part)

    def close(self) -> None:
        """Leave the cursor on an empty line."""
        if self.show and self.terminal and self.width:
            self._write("", newline=True)

    def _columns(self) -> int:
        """The width of the terminal, as it is now."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            columns = os.get_terminal_size(self.stream.fileno()).columns  # pyright: ignore[reportOptionalMemberAccess]
            if columns > 0:
                return columns
        return shutil.get_terminal_size().columns

    def _write(self, text: str, *, newline: bool) -> None:
        try:
            self._put(text, newline)
        except (AttributeError, OSError, ValueError):
            # The output is closed. Training continues without it.
            self.show = False

    def _put(self, text: str, newline: bool) -> None:
        stream: Any = self.stream
        self.written = time.perf_counter()
        if not self.terminal:
            stream.write(_printable(text, stream) + "\n")
            stream.flush()
            return
        columns = self._columns()
        text = _cut(_printable(text, stream), columns - 1)
        # A terminal that has been made narrower shows the last line on several rows.
        rows = (self.width - 1) // columns if self.width else 0
        up, narrower = f"\x1b[{rows}A" if rows else "", self.width >= columns
        back = f"{up}\r\x1b[J" if narrower else "\r"
        pad = " " * (0 if narrower else max(0, self.width - _width(text)))
        stream.write(back + text + pad + ("\n" if newline else ""))
        stream.flush()
        # The padding wraps too, if the terminal is made narrower.
        self.width = 0 if newline else _width(text) + len(pad)


def _fitting(parts: list[str], order: list[str], limit: int) -> list[str]:
    """The parts of a line that fit. Parts are left out in the given order."""
    parts = [part for part in parts if part]
    for part in order:
        if _width("  ".join(parts)) <= limit:
            break
        if part in parts:
            parts.remove(part)
    return parts


def _width(text: str) -> int:
    """Columns that a text takes on a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _cut(text: str, limit: int) -> str:
    """The beginning of a text that fits into `limit` columns."""
    while text and _width(text) > max(limit, 1):
        text = text[:-1]
    return text


def _printable(text: str, stream: Any) -> str:
    """Escape control characters, which names may contain, and characters that the encoding of the
    stream lacks.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
