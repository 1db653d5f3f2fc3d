"""Printing that survives closed pipes and streams, full disks, and names with control
characters.
"""

import json
import math
import os
import sys
from typing import Any

__all__ = ["complain", "exact", "is_damage", "open_streams", "printable", "say", "to_json"]


def open_streams() -> None:
    """Replace closed streams (`>&-`) with the empty device. Otherwise, output would go to the next
    file that is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # `open` takes the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def say(text: str | None = None) -> None:
    """Print a text and flush. A reader that closes the pipe early (`head`) is not an error."""
    try:
        if text is not None:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _mute(sys.stdout)
    except OSError:
        # The disk is full. Python would try to flush once more at exit.
        _mute(sys.stdout)
        raise


def complain(command: str, error: Exception | str) -> None:
    """Print an error to stderr. If nobody reads stderr, the exit code still tells the result."""
    try:
        print(f"jaxnet {command}: {printable(str(error))}", file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)


def is_damage(error: Exception) -> bool:
    """Whether the file is at fault, rather than the command or the access to the file."""
    from jaxnet.checkpoint.errors import CheckpointError, Misfit

    return isinstance(error, CheckpointError) and not isinstance(error, Misfit)


def printable(text: str, keep: str = "\n") -> str:
    """Escape control characters, which names in files may contain, and characters that the
    terminal's encoding lacks.
    """
    from jaxnet.checkpoint import words

    text, encoding = words.printable(text, keep), sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def to_json(value: Any) -> str:
    """The value as indented JSON, with NaN and infinities as strings."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def exact(x: float | None) -> float | str | None:
    """A number that JSON can hold: NaN and infinities become strings, as Python writes them."""
    return x if x is None or math.isfinite(x) else repr(x)


def _finite(value: Any) -> Any:
    """`exact` for every number in a value. Even JSON may hold 1e999, which Python reads as
    infinity.
    """
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return exact(value) if isinstance(value, float) else value


def _mute(stream: Any) -> None:
    """Redirect a stream to the empty device, so that Python's flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
