"""Draw ahead, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["Prefetch"]


class Prefetch:
    """Run an iterator in a thread, at most `depth` items ahead. What it raises is raised here, in its place.

    Args: abandoned: while an item is waited for, whether to wait no longer; then the iteration ends.
    """

    def __init__(self, items: Iterator, abandoned: Callable[[], Any] = lambda: False, depth: int = 2):
        self.queue: queue.Queue = queue.Queue(depth)
        self.abandoned, self.closed = abandoned, threading.Event()
        x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]: of this thread
        self.thread = threading.Thread(target=self._fill, args=(items, x64), daemon=True, name="jaxnet-prefetch")
        self.thread.start()

    def _fill(self, items, x64):
        # The switches for debugging act on the caller's thread; here they would meet JAX's own transfers.
        try:
            with jax.enable_x64(x64), jax.debug_nans(False), jax.disable_jit(False), jax.transfer_guard("allow"):
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

    def _put(self, item) -> bool:
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
        self.closed.set()
        self.thread.join(2)  # it may be waiting for its source
