"""Read the tensors of a PyTorch state dict from a file, without trusting the file."""

from __future__ import annotations

import os
import re
from typing import Any

from jaxnet.checkpoint.container import opened
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.opening import lazy
from jaxnet.checkpoint.words import shown
from jaxnet.interop.collect import Refused, collect
from jaxnet.interop.kinds import check_archive, kind_of_file, refused_kind

__all__ = ["read_state_dict"]

# Expanded and tied tensors repeat their bytes. All tensors may take at most this multiple of the
# file's size.
REPEATED = 64


def read_state_dict(path: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """Read all arrays of a state dict in a file.

    Args:
      path: the file; `from_torch` lists the kinds.

    Returns:
      The arrays by name, in the order of the file.

    Raises:
      CheckpointError: as `from_torch`.
      ImportError: as `from_torch`.
      OSError: as `from_torch`.
    """
    with opened(os.fsdecode(path)) as (file, fd, size):
        kind = kind_of_file(file, fd)
        if kind == "torch":
            return _collected(file, _loaded(file, fd, size), size)
        if kind == "keras":
            raise CheckpointError(file, None, refused_kind(kind))
    with lazy(file) as leaves:
        return {name: leaves[name] for name in leaves if hasattr(leaves[name], "dtype")}


def _loaded(file: str, fd: int, size: int) -> Any:
    """The content of a file that torch reads with `weights_only=True`."""
    torch = _torch(file)
    with os.fdopen(os.dup(fd), "rb") as source:
        if os.pread(fd, 2, 0) == b"PK":
            check_archive(file, "torch", source, size)
        source.seek(0)
        try:
            return torch.load(source, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as e:
            # Damage causes errors of many types.
            raise CheckpointError(file, None, _refusal(e)) from e


def _torch(file: str) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        text = (
            "needs torch to be opened: pip install 'jaxnet[torch]', or save it as safetensors on a "
            "machine that has torch"
        )
        raise ImportError(f"{shown(file, 5000)}: {text}") from e
    # CVE-2025-32434: before 2.6, files could run code despite weights_only=True.
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(
            f"{shown(file, 5000)}: torch {torch.__version__} does not open files safely; from "
            "2.6 on it does: upgrade"
        )
    return torch


def _refusal(error: Exception) -> str:
    text = "torch cannot read it as tensors alone (weights_only=True)"
    if other := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        text += (
            f": it holds an object of {other[1]}; save model.state_dict() alone, best as "
            "safetensors, or, if you trust"
        )
        return (
            f"{text} the file, read it inside `with torch.serialization.safe_globals([{other[1]}])`"
        )
    text += (
        ": it is damaged, or holds objects of other classes; save model.state_dict() alone, best "
        "as safetensors."
    )
    return f"{text} {type(error).__name__}: {shown((str(error).splitlines() or [''])[0], 3000)}"


def _collected(file: str, content: Any, size: int) -> dict[str, Any]:
    """The tensors of a file.

    Raises CheckpointError if they need far more memory than the size of the file.
    """
    tensors = collect(file, content)
    sizes = {name: x.nbytes for name, x in tensors.items() if not isinstance(x, Refused)}
    if (total := sum(sizes.values())) > (limit := REPEATED * size + (64 << 20)):
        name = max(sizes, key=lambda name: sizes[name])
        text = (
            f"the tensors take {total:,} bytes, of which this one takes {sizes[name]:,}; at most "
            f"{limit:,} are read from"
        )
        raise CheckpointError(
            file, name, f"{text} a file of {size:,} bytes: save expanded tensors as they are needed"
        )
    return tensors
