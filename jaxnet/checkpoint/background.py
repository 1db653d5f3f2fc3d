"""Work in a thread for which the program waits at its end."""

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable

__all__ = ["Background"]


class Background:
    """Does one piece of work at a time in a thread, and keeps its error for the next call.

    At exit, it prints errors that no call has raised.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._failures: list[BaseException] = []
        weakref.finalize(self, _report, self._failures)

    def start(self, work: Callable[[], None], name: str, *, pools: bool) -> None:
        """Do the work in a thread, or in this one if the system has no more threads.

        Args:
          work: the work.
          name: the name of the thread.
          pools: whether the work needs thread pools, which the interpreter closes before it waits
            for other threads.
        """
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=False)
        # An interrupt after the start must not hide the thread from `wait`.
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:
            # The system has no more threads.
            self._thread = None
            return work()
        if pools:
            _outlive(thread)

    def wait(self) -> None:
        """Wait for the work, and raise its error."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failures:
            raise self._failures.pop()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            self._failures.append(e)


def _report(failures: list[BaseException]) -> None:
    for error in failures:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"jaxnet: a checkpoint was not saved: {error!r}; {notes}", file=sys.stderr)


_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def _outlive(thread: threading.Thread) -> None:
    """Make the interpreter wait for a thread at exit, before it closes the thread pools."""
    _threads.add(thread)
    _join_at_exit()


@functools.cache
def _join_at_exit() -> None:
    def join() -> None:
        for thread in list(_threads):
            thread.join()

    # The function is not public (AttributeError), and it is too late while the program ends
    # (RuntimeError).
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(join)  # type: ignore
