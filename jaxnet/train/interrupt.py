"""Ctrl-C and SIGTERM as a flag, so that compiled work can end before the program does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["Interrupted", "interruptible"]


class Interrupted:
    """What has come in: `name` is None, 'SIGINT' or 'SIGTERM'."""

    name: str | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Within the block the first SIGINT or SIGTERM only sets a flag; a second one raises, KeyboardInterrupt or SystemExit.

    The handlers that were there before come back at the end. Off the main thread, where Python allows no handlers, and for
    a signal that something other than Python handles, the block runs without.
    """
    flag, before = Interrupted(), {}

    def note(number, frame):
        if flag.name is None:
            flag.name = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:
                before[number] = signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
