"""Ctrl-C and SIGTERM as a flag, so that a compiled call can end before the program does."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["AGAIN", "Interrupted", "handled", "interruptible"]


# Within this number of seconds after an interrupted run, another signal ends the whole program.
AGAIN = 10.0


class Interrupted:
    """The signal that has arrived.

    Attributes:
      name: 'SIGINT' or 'SIGTERM'; None if there was no signal.
    """

    name: str | None = None


# The time at which a signal ended the last run; None if no signal did, or if the program has read
# the result.
_ended: float | None = None


def handled() -> None:
    """Record that the program has read how its last run ended, and so decides itself how to
    continue.
    """
    global _ended
    _ended = None


@contextlib.contextmanager
def interruptible(tell: Callable[[str], None] = lambda name: None) -> Iterator[Interrupted]:
    """Set only a flag at the first SIGINT or SIGTERM within the block. A second one raises
    KeyboardInterrupt or SystemExit.

    If a signal has just ended another block and the program has not read how that block ended, the
    first signal counts as the second. Thus two presses of Ctrl-C end a sweep of many runs.

    The previous handlers are restored at the end. Off the main thread, where Python allows no
    handlers, the block runs without them. Signals that are ignored (`nohup`, a background job of a
    script) or not handled by Python stay unchanged.

    Args:
      tell: a function that is called with the name of the first signal when it arrives.
    """
    global _ended
    flag, before = Interrupted(), {}

    def note(number, frame):
        if flag.name is None and (_ended is None or time.monotonic() - _ended > AGAIN):
            flag.name = signal.Signals(number).name
            # A stream that the signal interrupted during a write refuses a second writer.
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
