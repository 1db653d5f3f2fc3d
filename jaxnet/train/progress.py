"""One line about a running training, on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

__all__ = ["Progress"]

_HIDDEN = ("step", "epoch", "seconds", "samples_per_second")


class Progress:
    """Show how a run goes: a line rewritten in place on a terminal, one plain line an epoch elsewhere, nothing if `show=False`.

    Where there are more than 100 epochs, or none, about 100 lines stay.
    """

    def __init__(self, total: int | None, epoch_steps: int | None, *, step: int = 0, show: bool | None = None):
        self.total, self.stream = total, sys.stderr
        self.show = show is not False and self.stream is not None
        self.terminal = False
        with contextlib.suppress(AttributeError, OSError, ValueError):  # a closed stream
            self.terminal = self.show and self.stream.isatty()  # pyright: ignore[reportOptionalMemberAccess]
        self.width = 0
        self.every = epoch_steps or 1
        if total is not None:
            self.every *= max(1, -(-total // (100 * self.every)))
        self.shown = step // self.every  # the multiple of `every` that has a line of its own

    def __call__(self, record: Mapping[str, float], *, partial: bool = False, last: bool = True) -> None:
        """Show a record, or what will become one; it stays on a line of its own where a multiple of `every` is reached.

        Where it is not the last of those that have come at once, the next would be written over it: it is left out.
        """
        count = int(record["step"]) // self.every
        stays = not partial and (count > self.shown or record["step"] == self.total)
        if stays:
            self.shown = count
        if self.show and (stays or (self.terminal and last)):
            self._write(self.line(record), newline=stays)

    def note(self, text: str) -> None:
        """A line about something else."""
        if self.show:
            self._write(text, newline=True)

    def line(self, record: Mapping[str, float]) -> str:
        step, seconds = int(record["step"]), record["seconds"]
        values = [f"{name} {value:.4g}" for name, value in record.items() if name not in _HIDDEN]
        if self.total is None or step >= self.total:
            time = f"{_clock(seconds)} in all"
        else:
            time = f"{_clock(seconds / step * (self.total - step))} left"
        of = "" if self.total is None else f"/{self.total:,}"
        epoch = [f"epoch {int(record['epoch'])}"] if record["epoch"] else []
        return "  ".join(
            [*epoch, f"step {step:,}{of}", *values, f"{record['samples_per_second']:,.0f} samples/s", time]
        )

    def close(self) -> None:
        """Leave the cursor on a line of its own, whatever happened."""
        if self.show and self.terminal and self.width:
            self._write("", newline=True)

    def _write(self, text: str, *, newline: bool) -> None:
        try:
            self._put(text, newline)
        except (AttributeError, OSError, ValueError):  # nobody can read it any more: training goes on
            self.show = False

    def _put(self, text: str, newline: bool) -> None:
        if self.terminal:
            self.stream.write("\r" + text.ljust(self.width) + ("\n" if newline else ""))
            self.width = 0 if newline else len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
