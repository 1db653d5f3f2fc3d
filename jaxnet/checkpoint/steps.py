"""The files of a store: one per step, `step_00000100.safetensors`."""

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxnet.checkpoint import outside, places
from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.loading import load_with_info
from jaxnet.checkpoint.ranking import metrics_of

__all__ = ["Checkpoint", "load_step", "path_of", "steps_in", "unfinished"]


class Checkpoint(NamedTuple):
    """The content of the file of a step.

    Attributes:
      step: the step.
      tree: the tree, as `load` returns it.
      metrics: the metrics by name.
      metadata: the metadata of the user.
      path: the file.
      skipped: why newer or better files could not be read, by step.
    """

    step: int
    tree: Any
    metrics: dict[str, float]
    metadata: dict[str, Any]
    path: str
    skipped: dict[int, str]


def path_of(folder: str, step: int) -> str:
    """The path of the file of a step."""
    return os.path.join(folder, f"step_{step:08d}.safetensors")


def steps_in(folder: str, *, links: bool = True) -> list[int]:
    """The steps that have a file in a folder, in order.

    With `links`, symbolic links to files count as files.
    """
    found = places.entries(folder, links=links)
    return _steps_of(name for name, is_file in found.items() if is_file)


def unfinished(folder: str) -> list[int]:
    """The steps whose save is running or was killed, in order. They need not have a file."""
    return _steps_of(outside.owners(folder))


def _steps_of(names: Iterable[str]) -> list[int]:
    """The steps whose files have, or would have, these names."""
    steps = []
    for name in names:
        found = re.fullmatch(r"step_(\d{8,18})\.safetensors", name)
        # A step has one name only, without more zeros than needed.
        if found and name == os.path.basename(path_of("", int(found[1]))):
            steps.append(int(found[1]))
    return sorted(steps)


def load_step(folder: str, step: int, like: Any, options: dict[str, Any]) -> Checkpoint:
    """Load a step. Raises as `load`, also if the file was saved as another step."""
    path = path_of(folder, step)
    tree, info = load_with_info(path, like=like, **options)
    metadata = {key: x for key, x in info.metadata.items() if key not in ("step", "metrics")}
    written = info.metadata.get("step", step)
    if info.version is not None and written != step:
        raise CheckpointError(path, None, f"it was saved as step {written}: rename it back")
    return Checkpoint(step, tree, metrics_of(info), metadata, path, {})
