"""The processes of one save watch each other, so none waits long for a process that has failed.

Orbax waits for all processes at its barriers for minutes, because a slow disk is not an error. Such
a wait cannot be canceled. Therefore another thread waits, while the caller polls the status of all
processes in the key-value store of `jax.distributed`. The status is a growing number, "failed" or
"done".
"""

import atexit
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxnet.checkpoint.errors import CheckpointError

__all__ = ["Elsewhere", "Gone", "Watch"]

# Seconds without a new status after which a process counts as dead.
SILENCE = 40

# Threads in which Orbax still waits.
_left: list[threading.Thread] = []
# The keys of this process in the key-value store.
_said: list[str] = []


class Elsewhere(CheckpointError):
    """Other processes have failed."""


class Gone(Elsewhere):
    """Other processes are dead, so a collective would hang."""


class Watch:
    """Publish the status of this process during a save, and read the status of the others.

    Args:
      file: how errors name the file.
      number: the number of the save, which is the same in all processes.
    """

    def __init__(self, file: str, number: str):
        import jax

        self.file, self.place, self.me = file, f"jaxnet/{number}", jax.process_index()
        self.client = _client()
        # Seconds between two reads. Every process reads the status of all, so the load grows with
        # their number.
        self.pause = 1 + jax.process_count() / 100
        self.heard: dict[str, tuple[str, float]] = {}
        self.ended, self.turn = threading.Event(), threading.Lock()
        if self.client is not None:
            # All processes have begun this save, so they have ended the earlier ones.
            while _said:
                with contextlib.suppress(Exception):
                    self.client.key_value_delete(_said.pop())
            _said.append(f"{self.place}/{self.me}")
            self._say("0")
            threading.Thread(target=self._beat, name=f"watch {number}", daemon=True).start()

    def run(self, work: Callable[[], Any]) -> None:
        """Do the work in a thread, and raise its error.

        As soon as another process has failed, raise Elsewhere instead. The thread is then left
        behind until the program ends.
        """
        if self.client is None:
            work()
            return
        done, errors = threading.Event(), []

        def do() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
            done.set()

        thread = threading.Thread(target=do, name="save", daemon=True)
        thread.start()
        try:
            while not done.wait(self.pause):
                self._check()
        except BaseException:
            _left.append(thread)
            _end_at_exit()
            raise
        if errors:
            raise errors[0]

    def end(self, word: str = "done") -> None:
        """Publish the final status, "done" or "failed". Later calls do nothing."""
        if self.client is None:
            return
        # The lock keeps `_beat` from publishing a number afterwards.
        with self.turn:
            if not self.ended.is_set():
                self.ended.set()
                self._say(word)

    def _say(self, word: str) -> None:
        # The process that holds the key-value store may be dead.
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{self.place}/{self.me}", word, allow_overwrite=True)

    def _beat(self) -> None:
        count = 0
        while not self.ended.wait(self.pause):
            count += 1
            with self.turn:
                if not self.ended.is_set():
                    self._say(str(count))

    def _check(self) -> None:
        try:
            words = {
                key.rpartition("/")[2]: word
                for key, word in self.client.key_value_dir_get(self.place)
            }
        except Exception as e:
            raise Gone(self.file, None, f"the first process cannot be reached: {e}") from e
        if failed := sorted(int(process) for process, word in words.items() if word == "failed"):
            raise Elsewhere(
                self.file, None, f"processes {failed} failed to save; what they raise says why"
            )
        now, gone = time.monotonic(), []
        for process, word in words.items():
            if self.heard.get(process, ("",))[0] != word:
                self.heard[process] = word, now
            if word != "done" and now - self.heard[process][1] > max(SILENCE, 5 * self.pause):
                gone.append(int(process))
        if gone:
            text = (
                f"processes {sorted(gone)} have said nothing for {SILENCE} seconds: they are "
                "dead, or stopped"
            )
            raise Gone(self.file, None, text)


@functools.cache
def _end_at_exit() -> None:
    atexit.register(_end_left)


def _end_left() -> None:
    """End threads that wait for other processes.

    A thread that wakes during interpreter shutdown would abort the program.
    """
    import jax

    if any(thread.is_alive() for thread in _left):
        with contextlib.suppress(Exception):
            # This ends all barriers. JAX would call it at exit anyway.
            jax.distributed.shutdown()
        for thread in _left:
            thread.join(timeout=30)


def _client() -> Any:
    """The client of the key-value store; None if there is only one process."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax._src import distributed

    return distributed.global_state.client
