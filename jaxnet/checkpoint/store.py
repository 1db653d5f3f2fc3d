"""A folder of checkpoints, one file per step: save in the foreground or in a thread, and find the
newest and the best.
"""

import errno
import operator
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self, SupportsIndex

from jaxnet.checkpoint import outside, parts, places
from jaxnet.checkpoint.file import load_with_info, prepare
from jaxnet.checkpoint.format import CheckpointError, Misfit
from jaxnet.checkpoint.ranking import metrics_of, numbers_of, ranked
from jaxnet.checkpoint.threads import outlive
from jaxnet.checkpoint.words import shown
from jaxnet.checks import size_of


class Checkpoint(NamedTuple):
    """The content of a step's file. `skipped` gives, by step, why newer or better files could not
    be read.
    """

    step: int
    tree: Any
    metrics: dict[str, float]
    metadata: dict[str, Any]
    path: str
    skipped: dict[int, str]


class Checkpoints:
    """A folder with one file per step, `step_00000100.safetensors`, of which the newest and the
    best are kept.

        with Checkpoints("run", best_rule="min loss", asynchronous=True) as checkpoints:
            if found := checkpoints.latest(like=state):
                state, start = found.tree, found.step
            ...
            checkpoints.save(step, state, {"loss": loss})

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

    Older files are deleted when the new file is safely on the disk. Damaged files do not count
    among those kept, so a good checkpoint stays until there is a newer good one. Only one writer
    per folder: a single process, or all processes that share a sharded tree. The latter save
    synchronously unless engine='orbax'.
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
        self.keep: int | None = None if keep is None else size_of("Checkpoints: keep", keep)
        self.keep_best: int = size_of("Checkpoints: keep_best", keep_best, 0)
        if best_rule is not None and not re.fullmatch(r"(min|max) \S.*", str(best_rule)):
            raise ValueError(
                f"best_rule must be 'min' or 'max' and a name, as in 'min loss', got {best_rule!r}"
            )
        self.folder: str = places.absolute(os.fsdecode(folder))
        self.best_rule: str | None = best_rule
        self.asynchronous: bool = asynchronous
        self.engine: Literal["orbax"] | None = engine
        # Steps whose files are known to be damaged or incomplete.
        self._bad: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failures: list[BaseException] = []
        # At exit, report errors that no call has raised.
        weakref.finalize(self, _report, self._failures)

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
          metrics: numbers by name (floats, scalars of NumPy or JAX; NaN and infinities too), among
            them that of `best_rule`. Without metrics a step is never the best.
          metadata: as in `jaxnet.checkpoint.save`; 'step' and 'metrics' are taken.

        Raises:
          ValueError: the step is not newer, or a metric is missing or not a number.
          CheckpointError, OSError: as `jaxnet.checkpoint.save`, or the error of an earlier
            asynchronous save (this one has then not been tried). All earlier files are unchanged.
        """
        self.wait()
        places.check_engine(self.folder, self.engine)
        step, numbers = operator.index(step), numbers_of(metrics, self.best_rule)
        if step >= 10**18:
            raise ValueError(f"step must have at most 18 digits, got {step}")
        if self._closed:
            raise ValueError(
                f"{shown(self.folder, 5000)}: this store has been closed; save inside its `with` "
                "block"
            )
        newest = max(set(self._steps()) - self._bad, default=-1)
        if step <= newest:
            text = f"step {step} is not newer than step {newest} in {shown(self.folder, 5000)}"
            raise ValueError(
                f"{text}: continue from latest(), which finds out if that file is good, or use a "
                "new folder"
            )
        if taken := {"step", "metrics"} & (metadata or {}).keys():
            raise ValueError(
                f"metadata must not have entries called {sorted(taken)}: the store writes them "
                "itself"
            )
        about = {"step": step, "metrics": numbers, **(metadata or {})}
        # After the main thread's end nobody would wait for another one. A tree that is spread over
        # several processes is written in the foreground, since these have to wait together, which
        # Orbax can do in threads.
        beside = self.asynchronous and threading.main_thread().is_alive()
        beside = beside and (self.engine is not None or not parts.is_spread(tree))
        write = prepare(self._path(step), tree, about, self.engine, snapshot=beside, follow=False)
        if not beside:
            return self._write(step, write)
        self._thread = threading.Thread(
            target=self._write_beside, args=(step, write), name=f"save {step}", daemon=False
        )
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no more threads
            self._thread = None
            return self._write(step, write)
        if self.engine == "orbax":
            outlive(self._thread)

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
          CheckpointError, OSError: as `latest`.
        """
        if self.best_rule is None:
            raise ValueError(
                "best() needs to know what is good: Checkpoints(folder, best_rule='min loss')"
            )
        ranked, skipped, closed = self._ranked(self.steps())
        for error in closed.values():
            raise error
        return self._first(ranked, skipped, like, options)

    def load(self, step: int, *, like: Any = None, **options: Any) -> Checkpoint:
        """Load one step. Raises FileNotFoundError if there is no such step, otherwise as
        `jaxnet.checkpoint.load`.
        """
        if step not in (steps := self.steps()):
            raise FileNotFoundError(
                errno.ENOENT, f"no checkpoint of step {step}, only of {steps}", self._path(step)
            )
        return self._load(step, like, options)

    def steps(self) -> list[int]:
        """The steps that have a file, good or not, in order."""
        self.wait()
        return self._steps()

    def wait(self) -> None:
        """Wait until the last save is on the disk, and raise its error if it failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failures:
            raise self._failures.pop()

    def close(self) -> None:
        """Wait for the last save, and refuse further saves."""
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

    def _path(self, step: int) -> str:
        return os.path.join(self.folder, f"step_{step:08d}.safetensors")

    def _steps(self, *, links: bool = True) -> list[int]:
        found = places.entries(self.folder, links=links)
        return self._steps_of(name for name, is_file in found.items() if is_file)

    def _steps_of(self, names: Iterable[str]) -> list[int]:
        """The steps whose files have, or would have, these names."""
        found = [(name, re.fullmatch(r"step_(\d{8,18})\.safetensors", name)) for name in names]
        numbers = {name: int(match[1]) for name, match in found if match}
        return sorted(
            step for name, step in numbers.items() if name == os.path.basename(self._path(step))
        )

    def _write(self, step: int, write: Any) -> None:
        # An interrupted save leaves the step marked as bad.
        self._bad.add(step)
        write()
        self._bad.remove(step)
        # Files behind links lie elsewhere, and the store neither counts nor deletes them.
        steps = self._steps(links=False)
        for other in self._steps_of(outside.owners(self.folder)):
            # Clean up after saves that were killed.
            if other < step and other not in steps:
                outside.sweep(self._path(other))
        if self.keep is None:
            return
        good = [step for step in steps if step not in self._bad]
        old = [other for other in steps if other < min(good[-self.keep :], default=step)]
        best: set[int] = set()
        if old and self.best_rule:
            ranked, _, closed = self._ranked(good)
            # A file that cannot be opened now may be among the best.
            best = {*ranked[: self.keep_best], *closed}
        for other in set(old) - best:
            outside.remove(self._path(other))

    def _write_beside(self, step: int, write: Any) -> None:
        try:
            self._write(step, write)
        except BaseException as e:
            self._failures.append(e)

    def _first(
        self, steps: list[int], skipped: dict[int, str], like: Any, options: dict[str, Any]
    ) -> Checkpoint | None:
        """The first of these steps whose file is good."""
        for step in steps:
            try:
                found = self._load(step, like, options)._replace(skipped=skipped)
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
                    text = "\n  ".join(
                        [f"step {step} is loaded, since others cannot be read:", *skipped.values()]
                    )
                    warnings.warn(text, stacklevel=3)
                return found
        if skipped:
            raise CheckpointError(
                self.folder,
                None,
                "\n  ".join(["no checkpoint in it can be read:", *skipped.values()]),
            )
        return None

    def _load(self, step: int, like: Any, options: dict[str, Any]) -> Checkpoint:
        path = self._path(step)
        tree, info = load_with_info(path, like=like, **options)
        metadata = {key: x for key, x in info.metadata.items() if key not in ("step", "metrics")}
        written = info.metadata.get("step", step)
        if info.version is not None and written != step:
            raise CheckpointError(path, None, f"it was saved as step {written}: rename it back")
        return Checkpoint(step, tree, metrics_of(info), metadata, path, {})

    def _ranked(self, steps: Iterable[int]) -> tuple[list[int], dict[int, str], dict[int, OSError]]:
        assert self.best_rule
        return ranked({step: self._path(step) for step in steps}, self.best_rule)


def _report(failures: list[BaseException]) -> None:
    for error in failures:
        notes = "; ".join(getattr(error, "__notes__", []))
        print(f"jaxnet: a checkpoint was not saved: {error!r}; {notes}", file=sys.stderr)
