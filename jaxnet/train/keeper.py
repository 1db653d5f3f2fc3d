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
        if self.place == "":
            raise ValueError("fit: checkpoint must be the name of a file, as in 'run.safetensors', got ''")

    def __bool__(self):
        return self.place is not None

    def __str__(self):
        return str(self.place)

    @property
    def metric(self) -> str | None:
        """The metric by which a store keeps the best steps."""
        return None if self.store is None or self.store.metric is None else self.store.metric.partition(" ")[2]

    def check(self) -> None:
        """Raise OSError if the place is not writable."""
        from jaxnet.checkpoint import places

        if self.place is None:
            return
        places.check_engine(self.place, getattr(self.store, "engine", None))
        if self.store is None:
            _check_name(self.place)
        places.check_writable(self.place if self.store is not None else os.path.dirname(os.path.abspath(self.place)))

    def has_some(self) -> bool:
        """Whether there is a checkpoint, good or not."""
        return bool(self.store.steps()) if self.store is not None else os.path.exists(str(self.place))

    def newest(self, template: Callable[[Info], Any]) -> Found | None:
        """Load the newest good checkpoint, reading it once.

        Args:
          template: a function from the header of a file to the expected tree. It raises if the file is of another run.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          OSError: a newer file is not damaged but cannot be opened. A run resumed from an older file could not save.
        """
        from jaxnet.checkpoint.file import load_with_info

        if self.store is not None:
            found = self.store.latest(template=template)
            if found is None:
                return None
            return Found(found.tree, found.metadata, found.path)
        if self.place is None or not os.path.exists(self.place):
            return None
        tree, info = load_with_info(self.place, template=template)
        return Found(tree, info.metadata, self.place)

    def save(self, step: int, tree: Any, record: dict[str, float] | None, metadata: dict[str, Any]) -> None:
        from jaxnet import checkpoint

        if self.store is None:
            checkpoint.save(str(self.place), tree, metadata=metadata)
        elif step != self.saved:
            known = self.metric is None or self.metric in (record or {})
            self.store.save(step, tree, record if known else None, metadata)
        self.saved = step

    def wait(self) -> None:
        if self.store is not None:
            self.store.wait()


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
        raise OSError(error.errno, text, path if len(path) < 200 else f"{path[:80]}...{path[-20:]}") from None
    if stat.S_ISDIR(mode):
        text = "fit: a checkpoint is a file, this is a folder: add a file name, or give Checkpoints(folder)"
        raise IsADirectoryError(errno.EISDIR, text, path)
