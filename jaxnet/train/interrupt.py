"""Ctrl-C and SIGTERM as a flag, so that compiled work can end before the program does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["Interrupted", "interruptible"]


class Interrupted:
    """What has come in.

    Attributes:
      name: None, 'SIGINT' or 'SIGTERM'.
      idle: True until the run has made a step.
    """

    def __init__(self):
        self.name: str | None = None
        self.idle = True


# The run before was ended by a signal. A second signal that finds its successor before the first step is meant for the
# whole program: a sweep of many runs then ends with two presses of Ctrl-C.
_ended_by_signal = False


@contextlib.contextmanager
def interruptible(tell: Callable[[str], None] = lambda name: None) -> Iterator[Interrupted]:
    """Within the block the first SIGINT or SIGTERM only sets a flag; a second one raises, KeyboardInterrupt or SystemExit.

    If a signal ended the block before this one, the first signal raises too, until `idle` is False. The handlers that
    were there before come back at the end. The block runs without handlers off the main thread, where Python allows none.
    A signal that is ignored (`nohup`, a background job of a script), or that something other than Python handles, is
    left as it is.

    Args:
      tell: called with the name of the first signal when it arrives.
    """
    global _ended_by_signal
    flag, before = Interrupted(), {}
    follows, _ended_by_signal = _ended_by_signal, False

    def note(number, frame):
        if flag.name is None and not (follows and flag.idle):
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
        _ended_by_signal = flag.name is not None
        for number, handler in before.items():
            signal.signal(number, handler)
