"""The place where the state of a run is saved, and from which a run resumes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxnet.checkpoint import Checkpoints, Info

__all__ = ["Found", "Keeper"]


class Found(NamedTuple):
    """The content of a run's checkpoint."""

    tree: Any
    metadata: dict[str, Any]
    path: str


class Keeper:
    """A file, a folder with one file per step, or nothing, in which case the keeper is false.

    Args:
      checkpoint: the path of a file, a `Checkpoints`, or None.
    """

    def __init__(self, checkpoint: str | os.PathLike | Checkpoints | None):
        place: Any = None if checkpoint is None else getattr(checkpoint, "folder", checkpoint)
        self.place = None if place is None else os.fsdecode(place)
        self.store: Any = checkpoint if hasattr(checkpoint, "folder") else None
        self.saved = -1
        # Which file this run has read or written last, and whether another program has put its own
        # in that place.
        self.known: tuple[int, int, int] | None = None
        self.text: str | None = None
        self.taken = False
        if self.place == "":
            raise ValueError(
                "fit: checkpoint must be the name of a file, as in 'run.safetensors', got ''"
            )

    def __bool__(self):
        return self.place is not None

    def __str__(self):
        return str(self.place)

    @property
    def metric(self) -> str | None:
        """The metric by which a store keeps the best steps."""
        return (
            None
            if self.store is None or self.store.best_rule is None
            else self.store.best_rule.partition(" ")[2]
        )

    def check(self) -> None:
        """Raise OSError if the place is not writable."""
        from jaxnet.checkpoint import places

        if self.place is None:
            return
        places.check_engine(self.place, getattr(self.store, "engine", None))
        if self.store is None:
            _check_name(self.place)
        folder = (
            self.place if self.store is not None else os.path.dirname(os.path.abspath(self.place))
        )
        try:
            places.check_writable(folder)
        except OSError as error:
            text = f"fit: checkpoint={self.place!r} cannot be written: {error.strerror or error}"
            raise type(error)(error.errno, text, folder) from None

    def has_some(self) -> bool:
        """Whether there is a checkpoint, good or not."""
        return (
            bool(self.store.steps()) if self.store is not None else os.path.exists(str(self.place))
        )

    def newest(self, template: Callable[[Info], Any]) -> Found | None:
        """Load the newest good checkpoint, reading it once.

        Args:
          template: a function from the header of a file to the expected tree. It raises if the file
            is of another run.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          OSError: a newer file is not damaged but cannot be opened. A run resumed from an older
            file could not save.
        """
        from jaxnet.checkpoint.loading import load_with_info

        if self.store is not None:
            found = self.store.latest(template=template)
            if found is None:
                return None
            return Found(found.tree, found.metadata, found.path)
        if self.place is None or not os.path.exists(self.place):
            return None
        self.known = _identity(self.place)
        tree, info = load_with_info(self.place, template=template)
        self.text = info.metadata["fit"]
        return Found(tree, info.metadata, self.place)

    def save(
        self, step: int, tree: Any, record: dict[str, float] | None, metadata: dict[str, Any]
    ) -> None:
        from jaxnet import checkpoint

        if self.store is None:
            self._check_own()
            checkpoint.save(str(self.place), tree, metadata=metadata)
            self.known, self.text = _identity(str(self.place)), metadata["fit"]
        elif step != self.saved:
            known = self.metric is None or self.metric in (record or {})
            self.store.save(step, tree, record if known else None, metadata)
        self.saved = step

    def _check_own(self) -> None:
        """Raise CheckpointError if the file is not the one that this run has read or written last.

        A file that was deleted is written again. One that was only touched or copied back holds the
        same run at the same second, and is this run's own.
        """
        from jaxnet.checkpoint.errors import CheckpointError

        place = str(self.place)
        found = _identity(place)
        if (
            found is None
            or found == self.known
            or (self.text is not None and _text(place) == self.text)
        ):
            return
        self.taken = True
        raise CheckpointError(
            place,
            None,
            "another program writes this checkpoint, too, so this run does not replace it: give "
            "each run a file of its own. The state of this run is the `train_state` of this error",
        )

    def wait(self) -> None:
        if self.store is not None:
            self.store.wait()


def _identity(path: str) -> tuple[int, int, int] | None:
    """What a file is known by without reading it; None if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _text(path: str) -> str | None:
    """What `fit` says of its run in a file; None if the file says nothing or cannot be read."""
    from jaxnet.checkpoint.errors import CheckpointError
    from jaxnet.checkpoint.inspection import inspect

    try:
        return inspect(path).metadata.get("fit")
    except (CheckpointError, OSError):
        return None


def _check_name(path: str) -> None:
    """Raise OSError if no file can have this name: it is too long, or that of a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.endswith(os.sep):
            text = "fit: a checkpoint is a file, this names a folder: add a file name"
            raise IsADirectoryError(errno.EISDIR, text, path) from None
        return
    except NotADirectoryError:
        # `check_writable` reports which part is not a folder.
        return
    except OSError as error:
        text = f"fit: checkpoint: {error.strerror}"
        raise OSError(
            error.errno, text, path if len(path) < 200 else f"{path[:80]}...{path[-20:]}"
        ) from None
    if stat.S_ISDIR(mode):
        text = (
            "fit: a checkpoint is a file, this is a folder: add a file name, or give "
            "Checkpoints(folder)"
        )
        raise IsADirectoryError(errno.EISDIR, text, path)
