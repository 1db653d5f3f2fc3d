"""One line about a running training, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping

__all__ = ["Progress"]

_HIDDEN = ("step", "epoch", "seconds", "samples_per_second")


class Progress:
    """Show records as they come: rewritten in place on a terminal, one plain line an epoch elsewhere, nothing if `show=False`."""

    def __init__(self, total: int, *, compile_seconds: float, show: bool | None = None):
        self.total, self.stream = total, sys.stderr
        self.terminal = self.stream.isatty() if hasattr(self.stream, "isatty") else False
        self.show = show is not False
        self.compile_seconds = compile_seconds
        self.width = 0
        self.first = True

    def __call__(self, record: Mapping[str, float], *, newline: bool = False) -> None:
        if not self.show or not (self.terminal or newline):
            return
        if self.first:
            self._write(f"compiled in {self.compile_seconds:.1f} s", newline=True)
            self.first = False
        self._write(self.line(record), newline=newline)

    def line(self, record: Mapping[str, float]) -> str:
        step = int(record["step"])
        left = record["seconds"] / step * (self.total - step)
        values = [f"{name} {value:.4g}" for name, value in record.items() if name not in _HIDDEN]
        return "  ".join(
            [
                f"epoch {int(record['epoch'])}",
                f"step {step:,}/{self.total:,}",
                *values,
                f"{record['samples_per_second']:,.0f} samples/s",
                f"{_clock(left)} left" if step < self.total else f"{_clock(record['seconds'])} in all",
            ]
        )

    def close(self) -> None:
        """Leave the cursor on a line of its own, whatever happened."""
        if self.show and self.terminal and self.width:
            self._write("", newline=True)

    def _write(self, text: str, *, newline: bool) -> None:
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
