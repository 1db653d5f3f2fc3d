"""The arguments with which a user asks for leaves of a source, in `load` and in the functions of
`jaxnet.interop`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxnet.checkpoint.renaming import Rename

__all__ = ["Request", "checked_request"]


class Request(NamedTuple):
    """The arguments of a load: which leaves, under which names, into which tree.

    Attributes:
      like: the tree to fill; None to take the leaves as they are.
      patterns: patterns of the paths to read; None to read all leaves.
      rename: the new paths of leaves; None to keep the paths.
      strict: False if the source and `like` may differ in their leaves.
      cast: True if the source and `like` may differ in their dtypes.
    """

    like: Any
    patterns: list[str] | None
    rename: Rename | None
    strict: bool
    cast: bool


def checked_request(
    like: Any,
    pattern: str | Iterable[str] | None,
    rename: Rename | None,
    strict: bool,
    cast: bool,
    *,
    later: bool = False,
) -> Request:
    """Check the arguments of a user, before anything is read.

    Args:
      like: as in `load`.
      pattern: as in `load`.
      rename: as in `load`.
      strict: as in `load`.
      cast: as in `load`.
      later: True if `like` will be known only when the source has been opened.

    Returns:
      The request.

    Raises:
      ValueError: `strict` or `cast` need `like`, or there is no pattern in `pattern`.
    """
    if like is None and not later and (cast or not strict):
        raise ValueError(
            "cast=True and strict=False need a tree `like`: they say how it and the source may "
            "differ"
        )
    patterns = [pattern] if isinstance(pattern, str) else None if pattern is None else list(pattern)
    if patterns == []:
        raise ValueError("pattern must be a pattern of paths or several, got none")
    return Request(like, patterns, rename, strict, cast)
