"""Checkpoints: one file for a tree, written whole or not at all, and checked byte by byte when it
is read.

    save("run/state.safetensors", {"params": params, "step": 100}, metadata={"accuracy": 0.98})
    state = load("run/state.safetensors", like=state)

`lazy` opens a file for single leaves, `Checkpoints` is a folder with one file per step;
docs/checkpoints.md is the guide. Several processes save one tree in parts. `from_torch` and the
other functions of `jaxnet.interop` are also available here. The files are plain safetensors;
docs/checkpoint_format.md describes them. Linux and macOS (it takes `flock`).
"""

from typing import TYPE_CHECKING

from jaxnet.checkpoint.errors import CheckpointError
from jaxnet.checkpoint.inspection import Info, Leaf, inspect, verify
from jaxnet.checkpoint.loading import load
from jaxnet.checkpoint.opening import lazy
from jaxnet.checkpoint.saving import save
from jaxnet.checkpoint.store import Checkpoint, Checkpoints
from jaxnet.first_use import resolver

if TYPE_CHECKING:
    from jaxnet.interop import from_equinox, from_flax, from_haiku, from_keras, from_torch, to_torch

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Info",
    "Leaf",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_torch",
    "inspect",
    "lazy",
    "load",
    "save",
    "to_torch",
    "verify",
]


# Name -> module. The other names above are imported at once: they need only the standard library.
_HOMES = {
    "from_equinox": "jaxnet.interop",
    "from_flax": "jaxnet.interop",
    "from_haiku": "jaxnet.interop",
    "from_keras": "jaxnet.interop",
    "from_torch": "jaxnet.interop",
    "to_torch": "jaxnet.interop",
}

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
