"""Calls of the library Orbax, which writes a tree of arrays into a folder."""

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxnet.checkpoint.errors import CheckpointError

__all__ = ["TIMEOUT", "begin", "check_installed", "finish", "meet", "writing"]

# Seconds for which processes wait for each other in Orbax.
TIMEOUT = 1200

# Two Orbax saves that begin at the same time in two threads receive each other's signals.
_one_at_a_time = threading.Lock()


def check_installed() -> None:
    """Raise ImportError with the remedy if Orbax is missing."""
    try:
        import orbax.checkpoint  # noqa: F401
    except ImportError as e:
        raise ImportError("engine='orbax' needs Orbax: pip install 'jaxnet[orbax]'") from e


def begin(
    number: str, folder: str, arrays: dict[str, Any], run: Callable[[Callable[[], None]], None]
) -> Any:
    """Begin to write a folder.

    Args:
      number: the number of the save.
      folder: the folder to write.
      arrays: nested dicts of arrays. Orbax writes no folder if there are none.
      run: does the work of Orbax, for which processes wait for each other.

    Returns:
      The checkpointer for `finish`.

    Raises:
      OSError: Orbax cannot write.
    """
    import orbax.checkpoint as ocp

    with writing(folder), _one_at_a_time:
        checkpointer = _checkpointer(number)

        def save() -> None:
            try:
                checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))
            except BaseException:
                checkpointer.close()
                raise

        # Orbax refuses a tree without arrays.
        if arrays:
            run(save)
    return checkpointer


def finish(checkpointer: Any) -> None:
    """Wait until the folder is written."""
    with contextlib.closing(checkpointer):
        checkpointer.wait_until_finished()


def meet(name: str) -> None:
    """Wait until all processes are here, in any thread."""
    import jax
    import orbax.checkpoint as ocp

    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes(name, processes=everyone, timeout=TIMEOUT)


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Turn the various errors that Orbax and TensorStore raise, for instance for a full disk, into
    OSError.
    """
    try:
        yield
    except (OSError, CheckpointError):
        raise
    except Exception as e:
        raise OSError(errno.EIO, f"Orbax could not write: {type(e).__name__}: {e}", folder) from e


def _checkpointer(number: str) -> Any:
    """Orbax's checkpointer.

    Its barriers have a timeout and unique names, so a failed save does not disturb later ones.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(
        active_processes=everyone, barrier_sync_key_prefix=number
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        # The blocks are those of one replica.
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, multiprocessing_options=options, type_handler_registry=registry
    )
    waits = ocp.AsyncOptions(timeout_secs=TIMEOUT)
    return ocp.AsyncCheckpointer(handler, async_options=waits, multiprocessing_options=options)
