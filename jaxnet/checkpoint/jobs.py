"""Check a tree, and make the job that an engine writes."""

import functools
import os
from typing import Any

from jaxnet.checkpoint import atomic, encoding, manifests, places, pytrees, structure
from jaxnet.checkpoint.metadata import exact_json
from jaxnet.checkpoint.protocol import Job
from jaxnet.checkpoint.tensors import layout

__all__ = ["job_of"]


def job_of(
    path: str | os.PathLike[str], tree: Any, metadata: dict[str, Any], *, follow: bool
) -> Job:
    """Check a tree and the path that it is to be written to.

    Args:
      path: as in `save`.
      tree: as in `save`.
      metadata: as in `save`.
      follow: whether a symbolic link at `path` stays and the file behind it is replaced. If False,
        the link is replaced.

    Returns:
      The job.

    Raises:
      CheckpointError: the tree or the metadata cannot be stored.
      OSError: the path cannot be replaced.
    """
    from jaxnet.checkpoint import arrays

    file = os.fsdecode(path)
    target = places.real(file, follow=follow)
    if not places.is_url(target):
        atomic.check_target(file, target)
    node, leaves = pytrees.encode(file, tree, functools.partial(arrays.describe, file))
    nodes = structure.leaves(node)
    described = []
    for name, x in leaves.items():
        shape = arrays.shape_in_file(nodes[name], x)
        described.append((name, *structure.stored_as(nodes[name], shape)))
    manifest = {
        "version": manifests.VERSION,
        "metadata": exact_json(file, metadata),
        "tree": encoding.to_json(node),
    }
    return Job(file, target, layout(described), manifest, nodes, leaves)
