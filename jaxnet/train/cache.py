"""JAX's persistent compile cache, by one switch."""

from __future__ import annotations

import os
import pathlib

import jax

__all__ = ["compile_cache"]


def compile_cache(folder: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a folder: the next process that compiles the same program reads it
    from there.

    Call it before anything is compiled. Programs are found by what they compute, the versions of
    JAX and XLA, and the device, so a stale one is never used; the folder may be deleted at any
    time. It sets JAX's options `jax_compilation_cache_dir`,
    `jax_persistent_cache_min_compile_time_secs` (0: also what compiles fast) and
    `jax_persistent_cache_min_entry_size_bytes` (-1: whatever the size) for the whole process.

    Raises: OSError if the folder cannot be made.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
