"""The errors of checkpoints."""

from jaxnet.checkpoint.words import bounded, shown

__all__ = ["RESTORE", "CheckpointError", "Misfit"]

RESTORE = "the file is damaged or was changed after it was written: restore it from a copy"


class CheckpointError(Exception):
    """A checkpoint is damaged, its tree cannot be stored, or it does not fit its template.

    The message is printable, whatever the names in the file are.

    Args:
      path: the file.
      leaf: the path of the leaf in the tree; None if the error concerns the whole file.
      reason: the expected and the received value and the remedy.

    Attributes:
      path: the file.
      leaf: the path of the leaf in the tree, such as 'blocks/0/kernel'; None if the error concerns
        the whole file.
      reason: the expected and the received value and the remedy, in at most a few hundred lines.
    """

    def __init__(self, path: str, leaf: str | None, reason: str):
        reason = bounded(reason)
        super().__init__(path, leaf, reason)
        self.path: str = path
        self.leaf: str | None = leaf
        self.reason: str = reason

    def __str__(self) -> str:
        leaf = "" if self.leaf is None else f"leaf '{shown(self.leaf)}': "
        return f"{shown(self.path, 5000)}: {leaf}{self.reason}"


class Misfit(CheckpointError):
    """The file is intact but does not match the request.

    The remedy is another request, not another copy of the file.
    """
