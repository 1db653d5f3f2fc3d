"""Checkpoints: one file for a tree, written whole or not at all, and checked byte by byte when it is read.

    save("run/state.safetensors", {"params": params, "opt": opt_state, "step": 100}, metadata={"accuracy": 0.98})
    state = load("run/state.safetensors", like=state)

`lazy` opens a file for single leaves, `Checkpoints` is a folder with one file a step; `from_torch`, `to_torch` and
others exchange parameters with other libraries; docs/checkpoints.md is the guide. Several processes save one tree in parts.
The files are plain safetensors; docs/checkpoint_format.md describes them. Linux and macOS (it takes `flock`).
"""

from jaxnet.checkpoint.file import Info, Leaf, inspect, load, save, verify
from jaxnet.checkpoint.format import CheckpointError
from jaxnet.checkpoint.interop import from_equinox, from_flax, from_haiku, from_torch, to_torch
from jaxnet.checkpoint.lazy import lazy
from jaxnet.checkpoint.store import Checkpoint, Checkpoints

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Info",
    "Leaf",
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_torch",
    "inspect",
    "lazy",
    "load",
    "save",
    "to_torch",
    "verify",
]
