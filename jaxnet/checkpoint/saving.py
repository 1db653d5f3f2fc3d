"""Save a tree."""

import os
from collections.abc import Callable
from typing import Any, Literal

from jaxnet.checkpoint import places
from jaxnet.checkpoint.engines import engine_for
from jaxnet.checkpoint.jobs import job_of

__all__ = ["save", "writer_of"]


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: dict[str, Any] | None = None,
    engine: Literal["orbax"] | None = None,
) -> None:
    """Write a tree to a file, durably.

    After any failure, the file holds either the whole old tree or the whole new one. Saving makes
    no second copy of the tree in memory: leaves are copied to the host one at a time.

    If an array lies on devices of several processes, all of them must call `save` with the same
    tree and a path that they share. Each process writes a part, the file at `path` lists the parts,
    and all processes raise if one fails. Values that are not spread over processes are saved from
    process 0. With Orbax, all processes must always call `save`, and the host holds a second copy
    of the tree.

    Args:
      path: the file, by custom called `*.safetensors`; missing folders are made, an existing file
        is replaced. With `engine="orbax"` also a URL of an object store, as in
        "gs://bucket/run/state.safetensors".
      tree: any pytree. Its leaves may be JAX and NumPy arrays of any shape, typed random keys,
        bool, int, float, complex, str, bytes and None. Nothing in it is changed.
      metadata: a dict that JSON can hold exactly (str keys; no tuples, no NaN); `inspect` returns
        it.
      engine: "orbax" to let Orbax (`pip install 'jaxnet[orbax]'`) write the arrays into a folder
        beside the file, for pods and for object stores. The file then holds everything else, and
        the checksums; `load`, `inspect` and `verify` find the folder.

    Raises:
      CheckpointError: the tree holds something that cannot be stored; nothing has been written.
      ValueError: another engine, or a URL without `engine="orbax"`.
      OSError: from the operating system (no space, no permission). The old file is unchanged and
        the temporary file is removed, with one exception: if only the last step fails (fsync of the
        folder), the new file is in place but might not survive a power cut.

    Example:
      >>> save("run/state.safetensors", {"params": params})  # doctest: +SKIP
    """
    writer_of(path, tree, metadata, engine)()


def writer_of(
    path: str | os.PathLike[str],
    tree: Any,
    metadata: dict[str, Any] | None,
    engine: str | None = None,
    *,
    snapshot: bool = False,
    follow: bool = True,
) -> Callable[[], None]:
    """Check a tree and return a function that writes it, which may be called once.

    Args:
      path: as in `save`.
      tree: as in `save`.
      metadata: as in `save`.
      engine: as in `save`.
      snapshot: True to write a copy on the host. The arrays of the tree may then be donated,
        deleted or changed. Only Orbax can copy a tree that is spread over several processes.
      follow: whether a symbolic link at `path` stays and the file behind it is replaced. If False,
        the link is replaced.

    Returns:
      The function that writes.

    Raises:
      CheckpointError: as `save`.
      ValueError: as `save`.
      OSError: as `save`.
    """
    if isinstance(tree, str | os.PathLike) and not isinstance(path, str | bytes | os.PathLike):
        raise TypeError("save takes the path first: save(path, tree)")
    places.check_engine(os.fsdecode(path), engine)
    job = job_of(path, tree, metadata or {}, follow=follow)
    return engine_for(engine, job.leaves).writer(job, snapshot=snapshot)
