"""JAX's persistent compile cache."""

from __future__ import annotations

import os
import pathlib

import jax

__all__ = ["compile_cache"]


def compile_cache(folder: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a folder, from which the next process reads them.

    Call it before anything is compiled. The key of a program is its computation, the versions of
    JAX and XLA, and the device, so a stale program is never used. The folder may be deleted at any
    time. The function sets JAX's options `jax_compilation_cache_dir`,
    `jax_persistent_cache_min_compile_time_secs` (0: programs that compile fast, too) and
    `jax_persistent_cache_min_entry_size_bytes` (-1: programs of any size) for the whole process.

    Args:
      folder: the folder, which is created if it does not exist.

    Raises:
      OSError: the folder cannot be created.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
