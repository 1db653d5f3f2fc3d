"""The processes of one save watch each other, so that none waits long for one that has failed or is gone.

Orbax waits for all processes at its barriers, for minutes, since a slow disk is no fault. Nothing can be called back from
there; so another thread goes there, and the caller looks meanwhile at what the others say of themselves in the key-value
store of `jax.distributed`: a number that grows, "failed" or "done".
"""

import atexit
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxnet.checkpoint.format import CheckpointError

SILENCE = 40  # seconds after which a process that says nothing is taken for dead


_left: list[threading.Thread] = []  # threads in which Orbax still waits
_said: list[str] = []  # the keys of this process in the key-value store


class Elsewhere(CheckpointError):
    """Other processes have failed."""


class Gone(Elsewhere):
    """Other processes are dead, so that nothing may be done that waits for all."""


class Watch:
    """What this process says of itself while a save lasts, and what it hears from the others.

    Args:
      file: how errors name the file.
      number: the number of the save, the same in all processes.
    """

    def __init__(self, file: str, number: str):
        import jax

        self.file, self.place, self.me = file, f"jaxnet/{number}", jax.process_index()
        self.client = _client()
        self.pause = 1 + jax.process_count() / 100  # seconds: all ask for what all say
        self.heard: dict[str, tuple[str, float]] = {}
        self.ended, self.turn = threading.Event(), threading.Lock()
        if self.client is not None:
            while _said:  # of saves that all processes have ended, since all have begun this one
                with contextlib.suppress(Exception):
                    self.client.key_value_delete(_said.pop())
            _said.append(f"{self.place}/{self.me}")
            self._say("0")
            threading.Thread(target=self._beat, name=f"watch {number}", daemon=True).start()

    def run(self, work: Callable[[], Any]) -> None:
        """Do the work in a thread; raise what it raises, or Elsewhere as soon as other processes have failed.

        In the latter case the thread is left behind, until the program ends.
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
        """Say the last word: "done" or "failed"; all later ones are not said."""
        if self.client is None:
            return
        with self.turn:  # so that no number comes after it
            if not self.ended.is_set():
                self.ended.set()
                self._say(word)

    def _say(self, word: str) -> None:
        with contextlib.suppress(Exception):  # the process that keeps the words may be gone
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
            words = {key.rpartition("/")[2]: word for key, word in self.client.key_value_dir_get(self.place)}
        except Exception as e:
            raise Gone(self.file, None, f"the first process cannot be reached: {e}") from e
        if failed := sorted(int(process) for process, word in words.items() if word == "failed"):
            raise Elsewhere(self.file, None, f"processes {failed} failed to save; what they raise says why")
        now, gone = time.monotonic(), []
        for process, word in words.items():
            if self.heard.get(process, ("",))[0] != word:
                self.heard[process] = word, now
            if word != "done" and now - self.heard[process][1] > max(SILENCE, 5 * self.pause):
                gone.append(int(process))
        if gone:
            text = f"processes {sorted(gone)} have said nothing for {SILENCE} seconds: they are dead, or stopped"
            raise Gone(self.file, None, text)


@functools.cache
def _end_at_exit() -> None:
    atexit.register(_end_left)


def _end_left() -> None:
    """End the threads that wait for other processes: one that woke up while the interpreter goes would abort the program."""
    import jax

    if any(thread.is_alive() for thread in _left):
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # which ends all barriers, and at this time would be called anyway
        for thread in _left:
            thread.join(timeout=30)


def _client() -> Any:
    """What speaks to the key-value store; None for a process alone."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax._src import distributed

    return distributed.global_state.client
