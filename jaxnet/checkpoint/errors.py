"""What goes wrong with checkpoints."""

from jaxnet.checkpoint.words import bounded, shown

RESTORE = "the file is damaged or was changed after it was written: restore it from a copy"


class CheckpointError(Exception):
    """What is wrong with a checkpoint, its tree or its template.

    `path` is the file, `leaf` the path of the leaf inside the tree ('blocks/0/kernel'; None where the whole file is
    meant), `reason` says what was expected, what was received and what to do, in at most some hundred lines. The text of the
    error is printable, whatever the names in the file are.
    """

    def __init__(self, path: str, leaf: str | None, reason: str):
        reason = bounded(reason)
        super().__init__(path, leaf, reason)
        self.path, self.leaf, self.reason = path, leaf, reason

    def __str__(self):
        return (
            f"{shown(self.path, 5000)}: "
            + (f"leaf '{shown(self.leaf)}': " if self.leaf is not None else "")
            + self.reason
        )


class Misfit(CheckpointError):
    """A sound file that is not what was asked for: another request helps, another copy of the file does not."""
