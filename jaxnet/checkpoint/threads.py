"""Threads for which the interpreter waits at exit."""

import contextlib
import functools
import threading
import weakref

__all__ = ["outlive"]

_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def outlive(thread: threading.Thread) -> None:
    """Make the interpreter wait for a thread at exit, before it closes the thread pools that Orbax
    needs.
    """
    _threads.add(thread)
    _join_at_the_end()


@functools.cache
def _join_at_the_end() -> None:
    def join():
        for thread in list(_threads):
            thread.join()

    # The function is not public (AttributeError), and it is too late while the program ends
    # (RuntimeError).
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(join)  # type: ignore
