"""Ctrl-C and SIGTERM as a flag, so that compiled work can end before the program does."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["AGAIN", "Interrupted", "handled", "interruptible"]


AGAIN = 10.0  # seconds after an interrupted run in which another signal is meant for the whole program


class Interrupted:
    """What has come in: `name` is None, 'SIGINT' or 'SIGTERM'."""

    name: str | None = None


# When a signal ended the last run, by the clock; None if none did, or if the program knows about it.
_ended: float | None = None


def handled() -> None:
    """Take note that the program knows how its last run ended: it decides itself what happens next."""
    global _ended
    _ended = None


@contextlib.contextmanager
def interruptible(tell: Callable[[str], None] = lambda name: None) -> Iterator[Interrupted]:
    """Within the block the first SIGINT or SIGTERM only sets a flag; a second one raises, KeyboardInterrupt or SystemExit.

    If a signal has just ended another block, and the program has not asked how it ended, then the first signal counts as
    the second: a sweep of many runs ends with two presses of Ctrl-C.

    The handlers that were there before come back at the end. The block runs without handlers off the main thread, where
    Python allows none. A signal that is ignored (`nohup`, a background job of a script), or that something other than
    Python handles, is left as it is.

    Args:
      tell: called with the name of the first signal when it arrives.
    """
    global _ended
    flag, before = Interrupted(), {}

    def note(number, frame):
        if flag.name is None and (_ended is None or time.monotonic() - _ended > AGAIN):
            flag.name = signal.Signals(number).name
            # A stream that was just being written to refuses a second writer.
            with contextlib.suppress(Exception):
                tell(flag.name)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, note)
    try:
        yield flag
    finally:
        if before:
            _ended = None if flag.name is None else time.monotonic()
        for number, handler in before.items():
            signal.signal(number, handler)
