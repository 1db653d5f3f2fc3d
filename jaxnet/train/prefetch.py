"""Iterators that run ahead of their consumer, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["Prefetch"]


class Prefetch:
    """Run an iterator in a thread, at most `depth` items ahead. The consumer receives its errors
    after the items before them.

    Args:
      items: the iterator.
      abandoned: a function that is called while the consumer waits; if it returns a true value, the
        iteration ends.
      depth: the most items to hold.
    """

    def __init__(
        self, items: Iterator, abandoned: Callable[[], Any] = lambda: False, depth: int = 2
    ):
        self.queue: queue.Queue = queue.Queue(depth)
        self.abandoned, self.closed = abandoned, threading.Event()
        # This setting belongs to a thread.
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        self.thread = threading.Thread(
            target=self._fill, args=(items, x64), daemon=True, name="jaxnet-prefetch"
        )
        self.thread.start()

    def _fill(self, items, x64):
        # JAX's debugging switches are for the caller's thread. Here they would affect transfers
        # that `fit` itself makes.
        try:
            with (
                jax.enable_x64(x64),
                jax.debug_nans(False),
                jax.disable_jit(False),
                jax.transfer_guard("allow"),
            ):
                try:
                    for item in items:
                        if not self._put((item, None)):
                            return
                finally:
                    if hasattr(items, "close"):
                        items.close()
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        """Add an item; return False if the consumer has closed the iterator."""
        while not self.closed.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            try:
                item, error = self.queue.get(timeout=0.1)
                break
            except queue.Empty:
                if self.abandoned():
                    raise StopIteration from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """End the thread."""
        self.closed.set()
        # The thread may be waiting for its source, so the wait is limited.
        self.thread.join(2)
