"""jaxnet: functional neural networks on JAX.

A network is a value made of pure functions over a plain nested dict of arrays; everything else is a
function over that dict.
"""

import importlib
from typing import TYPE_CHECKING

from jaxnet import tree
from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual, scan, vmap
from jaxnet.core import Layer, around, call, layer, param, wire
from jaxnet.layers import (
    avg_pool,
    batch_norm,
    conv,
    dense,
    dropout,
    embed,
    flatten,
    global_avg_pool,
    global_max_pool,
    layer_norm,
    max_pool,
)
from jaxnet.transform import capture, replace, summary, walk

if TYPE_CHECKING:
    from jaxnet import checkpoint, data, interop, train
    from jaxnet.checkpoint import load, save
    from jaxnet.train import sgd

__version__ = "0.1.0"

__all__ = [
    "Layer",
    "around",
    "avg_pool",
    "batch_norm",
    "call",
    "capture",
    "cast",
    "chain",
    "checkpoint",
    "conv",
    "data",
    "dense",
    "dropout",
    "embed",
    "flatten",
    "global_avg_pool",
    "global_max_pool",
    "interop",
    "layer",
    "layer_norm",
    "load",
    "max_pool",
    "parallel",
    "param",
    "remat",
    "repeat",
    "replace",
    "residual",
    "save",
    "scan",
    "sgd",
    "summary",
    "train",
    "tree",
    "vmap",
    "walk",
    "wire",
]


def __getattr__(name: str):
    """What not every program needs is imported when it is asked for."""
    if name in ("checkpoint", "data", "interop", "train"):
        return importlib.import_module(f"jaxnet.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxnet' has no attribute '{name}'")


_LAZY = {"load": "jaxnet.checkpoint", "save": "jaxnet.checkpoint", "sgd": "jaxnet.train"}


def __dir__() -> list[str]:
    return sorted(__all__)
