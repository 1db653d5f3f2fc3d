"""Collectives of the processes that save one tree together."""

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

from jaxnet.checkpoint import outside
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.watch import Gone

__all__ = ["gather", "is_spread", "new_number", "together"]


def is_spread(tree: Any) -> bool:
    """Whether some array of a tree lies on devices of several processes."""
    import jax
    from jax.core import Tracer

    leaves = jax.tree.leaves(tree)
    arrays = [x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    # The first two tests are quick, and the third is not needed in one process.
    if not arrays or jax.process_count() == 1:
        return False
    return not all(x.is_fully_addressable for x in arrays)


def new_number() -> str:
    """The number of a save, the same in all processes: 16 random hexadecimal digits."""
    import numpy as np
    from jax.experimental import multihost_utils

    number = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint8))
    return np.asarray(number).tobytes().hex()


def gather(value: Any) -> list[Any]:
    """Gather one value per process. JSON must be able to hold it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    raw = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    pairs = zip(np.asarray(rows), sizes, strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in pairs]


@contextlib.contextmanager
def together(file: str, target: str, held: contextlib.ExitStack) -> Iterator[None]:
    """A block that all processes execute.

    If it fails in any of them, all processes raise and unfinished files are deleted.

    Args:
      file: how errors name the file.
      target: the path of the file, beside which unfinished files lie.
      held: the locks that are released before the files are deleted.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except Gone:
        # Other processes are dead, so a collective would hang.
        held.close()
        outside.sweep(target)
        raise
    except Exception as e:
        # Other processes wait for this one, so they must learn of the error before it is raised.
        error = e
    well = np.array([error is None])
    if jax.process_count() > 1:
        well = multihost_utils.process_allgather(well).ravel()
    if not well.all():
        held.close()
        outside.sweep(target)
    if error:
        raise error
    if not well.all():
        failed = np.flatnonzero(~well).tolist()
        text = f"processes {failed} failed to save; what they raise says why"
        raise CheckpointError(file, None, text)
