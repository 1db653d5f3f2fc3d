"""A folder of checkpoints, one file per step, of which the newest and the best are kept."""

import errno
import functools
import operator
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, SupportsIndex

from jaxnet.best_rule import BestRule
from jaxnet.checkpoint import outside, places, processes
from jaxnet.checkpoint.background import Background
from jaxnet.checkpoint.errors import CheckpointError, Misfit
from jaxnet.checkpoint.ranking import Ranking, metrics_as_json, rank
from jaxnet.checkpoint.saving import writer_of
from jaxnet.checkpoint.steps import Checkpoint, load_step, path_of, steps_in, unfinished
from jaxnet.checkpoint.words import shown
from jaxnet.checks import size_of

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder with one file per step, `step_00000100.safetensors`.

    A loop that resumes::

        with Checkpoints("run", best_rule="min loss", asynchronous=True) as checkpoints:
            if found := checkpoints.latest(like=state):
                state, start = found.tree, found.step
            ...
            checkpoints.save(step, state, {"loss": loss})

    The newest and the best files are kept. Older files are deleted when the new file is safely on
    the disk. Damaged files do not count among those kept, so a good checkpoint stays until there is
    a newer good one. Only one writer per folder: a single process, or all processes that share a
    sharded tree. The latter save synchronously unless engine='orbax'.

    Args:
      folder: the first `save` creates it. Files with other names are left alone. With
        `engine="orbax"` also the URL of a folder in an object store, as in "gs://bucket/run".
      keep: how many of the newest steps are kept; None keeps all.
      best_rule: 'min' or 'max' and the name of a metric, as in 'min loss' or 'max accuracy', by
        which steps are ranked.
      keep_best: how many of the best steps by `best_rule` are kept in addition.
      asynchronous: True to write in a thread, one file at a time. `save` returns when it has copied
        the tree, whose arrays may then be donated or changed. The next call of any method raises an
        error of the thread; a program that ends before then waits for the thread and prints the
        error to stderr. Leaving a `with` block waits, too.
      engine: as in `jaxnet.checkpoint.save`.

    Attributes:
      folder: the absolute path of the folder, or its URL.
      keep: as the argument.
      best_rule: as the argument.
      keep_best: as the argument.
      asynchronous: as the argument.
      engine: as the argument.

    Raises:
      ValueError: the name of the folder is empty, or another argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        best_rule: str | None = None,
        keep_best: int = 1,
        asynchronous: bool = False,
        engine: Literal["orbax"] | None = None,
    ):
        if not os.fsdecode(folder):
            raise ValueError(
                "the name of the folder is empty: use '.' for the folder of the program"
            )
        if keep is not None and isinstance(keep, int) and keep < 1:
            raise ValueError(
                f"keep must be at least 1, got {keep}: the newest checkpoint is never deleted"
            )
        rule = best_rule
        self._rule = None if rule is None else BestRule.parse("Checkpoints: best_rule", rule)
        self.folder: str = places.absolute(os.fsdecode(folder))
        self.keep: int | None = None if keep is None else size_of("Checkpoints: keep", keep)
        self.keep_best: int = size_of("Checkpoints: keep_best", keep_best, 0)
        self.best_rule: str | None = best_rule
        self.asynchronous: bool = asynchronous
        self.engine: Literal["orbax"] | None = engine
        # Steps whose files are known to be damaged or incomplete.
        self._bad: set[int] = set()
        self._background = Background()
        self._closed = False

    def save(
        self,
        step: SupportsIndex,
        tree: Any,
        metrics: Mapping[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Save the tree of a step, and then delete the files that need not be kept.

        Args:
          step: a number greater than that of every good file in the folder.
          tree: as in `jaxnet.checkpoint.save`.
          metrics: numbers by name (floats, or NumPy or JAX arrays of shape []; NaN and infinities
            too), among them that of `best_rule`. Without metrics a step is never the best.
          metadata: as in `jaxnet.checkpoint.save`; 'step' and 'metrics' are taken.

        Raises:
          ValueError: the step is not newer, or a metric is missing or not a number.
          CheckpointError: as `jaxnet.checkpoint.save`, or the error of an earlier asynchronous save
            (this one has then not been tried). All earlier files are unchanged.
          OSError: as CheckpointError.
        """
        self.wait()
        places.check_engine(self.folder, self.engine)
        step, numbers = operator.index(step), metrics_as_json(metrics, self._rule)
        self._check_new(step)
        if taken := {"step", "metrics"} & (metadata or {}).keys():
            raise ValueError(
                f"metadata must not have entries called {sorted(taken)}: the store writes them "
                "itself"
            )
        about = {"step": step, "metrics": numbers, **(metadata or {})}
        beside = self._writes_beside(tree)
        path = path_of(self.folder, step)
        write = writer_of(path, tree, about, self.engine, snapshot=beside, follow=False)
        if not beside:
            return self._write(step, write)
        work, pools = functools.partial(self._write, step, write), self.engine == "orbax"
        self._background.start(work, f"save {step}", pools=pools)

    def latest(self, *, like: Any = None, **options: Any) -> Checkpoint | None:
        """Load the newest good step.

        A damaged file is skipped with a warning and listed in `skipped`. A file that cannot be
        opened (no permission, an object store out of reach) is not damaged and not skipped: a run
        resumed from an older step could not save until its steps are newer than that file.

        Args:
          like: as in `jaxnet.checkpoint.load`.
          **options: as in `jaxnet.checkpoint.load`.

        Returns:
          The checkpoint, or None if the folder has none.

        Raises:
          CheckpointError: no file is good, or the newest good one does not fit `like`.
          OSError: the newest file that is not damaged cannot be opened.
        """
        return self._first(self.steps()[::-1], {}, like, options)

    def best(self, *, like: Any = None, **options: Any) -> Checkpoint | None:
        """Load the best good step by `best_rule`; of equally good steps, the earliest.

        Args:
          like: as in `jaxnet.checkpoint.load`.
          **options: as in `jaxnet.checkpoint.load`.

        Returns:
          The checkpoint, or None if no step has that metric.

        Raises:
          ValueError: the store has no `best_rule`.
          CheckpointError: as `latest`.
          OSError: a file cannot be opened.
        """
        if self._rule is None:
            raise ValueError(
                "best() needs to know what is good: Checkpoints(folder, best_rule='min loss')"
            )
        ranking = self._ranked(self.steps())
        for error in ranking.closed.values():
            raise error
        return self._first(ranking.steps, ranking.damaged, like, options)

    def load(self, step: int, *, like: Any = None, **options: Any) -> Checkpoint:
        """Load one step.

        Args:
          step: the step.
          like: as in `jaxnet.checkpoint.load`.
          **options: as in `jaxnet.checkpoint.load`.

        Returns:
          The checkpoint.

        Raises:
          FileNotFoundError: there is no such step.
          CheckpointError: as `jaxnet.checkpoint.load`.
          OSError: as `jaxnet.checkpoint.load`.
        """
        if step not in (steps := self.steps()):
            text = f"no checkpoint of step {step}, only of {steps}"
            raise FileNotFoundError(errno.ENOENT, text, path_of(self.folder, step))
        return load_step(self.folder, step, like, options)

    def steps(self) -> list[int]:
        """List the steps that have a file, good or not.

        Returns:
          The steps in order.

        Raises:
          CheckpointError: the error of an earlier asynchronous save.
          OSError: the same, or the folder cannot be listed.
        """
        self.wait()
        return self._steps()

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
          CheckpointError: the error of that save.
          OSError: the error of that save.
        """
        self._background.wait()

    def close(self) -> None:
        """Wait for the last save, and refuse further saves.

        Raises:
          CheckpointError: as `wait`.
          OSError: as `wait`.
        """
        self._closed = True
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception as e:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint was not saved: {e!r}")

    def _steps(self) -> list[int]:
        return steps_in(self.folder)

    def _check_new(self, step: int) -> None:
        """Raise ValueError unless a step can be saved now."""
        if step >= 10**18:
            raise ValueError(f"step must have at most 18 digits, got {step}")
        if self._closed:
            text = "this store has been closed; save inside its `with` block"
            raise ValueError(f"{shown(self.folder, 5000)}: {text}")
        newest = max(set(self._steps()) - self._bad, default=-1)
        if step <= newest:
            text = f"step {step} is not newer than step {newest} in {shown(self.folder, 5000)}"
            raise ValueError(
                f"{text}: continue from latest(), which finds out if that file is good, or use a "
                "new folder"
            )

    def _writes_beside(self, tree: Any) -> bool:
        """Whether a thread writes a tree.

        After the end of the main thread, nobody would wait for another one. Of the engines for a
        tree that is spread over several processes, only Orbax can write in threads: the processes
        have to wait together.
        """
        if not self.asynchronous or not threading.main_thread().is_alive():
            return False
        return self.engine is not None or not processes.is_spread(tree)

    def _write(self, step: int, write: Callable[[], None]) -> None:
        # An interrupted save leaves the step marked as bad.
        self._bad.add(step)
        write()
        self._bad.remove(step)
        # Files behind links lie elsewhere, and the store neither counts nor deletes them.
        steps = steps_in(self.folder, links=False)
        # Clean up after saves that were killed.
        for other in unfinished(self.folder):
            if other < step and other not in steps:
                outside.sweep(path_of(self.folder, other))
        if self.keep is None:
            return
        good = [step for step in steps if step not in self._bad]
        old = [other for other in steps if other < min(good[-self.keep :], default=step)]
        best: set[int] = set()
        if old and self._rule:
            ranking = self._ranked(good)
            # A file that cannot be opened now may be among the best.
            best = {*ranking.steps[: self.keep_best], *ranking.closed}
        for other in set(old) - best:
            outside.remove(path_of(self.folder, other))

    def _ranked(self, steps: list[int]) -> Ranking:
        assert self._rule
        return rank(((step, path_of(self.folder, step)) for step in steps), self._rule)

    def _first(
        self, steps: list[int], skipped: dict[int, str], like: Any, options: dict[str, Any]
    ) -> Checkpoint | None:
        """The first of these steps whose file is good."""
        for step in steps:
            try:
                found = load_step(self.folder, step, like, options)._replace(skipped=skipped)
            except Misfit:
                # The request is wrong, and an older file would only hide that.
                raise
            except FileNotFoundError:
                # Another process has deleted the file meanwhile.
                continue
            except OSError as e:
                # The file may be readable later, and a run resumed from an older step could not
                # save.
                e.add_note(
                    f"step {step} is not damaged: make it readable, or move it away to go on "
                    "from an older step"
                )
                raise
            except CheckpointError as e:
                self._bad.add(step)
                skipped[step] = str(e)
            else:
                self._bad.discard(step)
                if skipped:
                    head = f"step {step} is loaded, since others cannot be read:"
                    warnings.warn("\n  ".join([head, *skipped.values()]), stacklevel=3)
                return found
        if skipped:
            lines = ["no checkpoint in it can be read:", *skipped.values()]
            raise CheckpointError(self.folder, None, "\n  ".join(lines))
        return None
