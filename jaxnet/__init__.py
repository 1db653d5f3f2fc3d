"""jaxnet: functional neural networks on JAX.

A network is a value made of pure functions over a plain nested dict of arrays; everything else is a
function over that dict.
"""

from jaxnet.first_use import resolver

# Type checkers take this name as true. Importing it from `typing` would take longer than the rest
# of this file.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from jaxnet import (
        checkpoint,
        combinators,
        core,
        data,
        interop,
        layers,
        mixed,
        ops,
        train,
        transform,
        tree,
    )
    from jaxnet.checkpoint import load, save
    from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual, scan, vmap
    from jaxnet.core import Children, Layer, around, call, layer, param, wire
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
    from jaxnet.train import sgd
    from jaxnet.transform import capture, replace, summary, walk

__version__ = "0.1.0"

__all__ = [
    "Children",
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

# Name -> module. A test holds this table, the imports for type checkers and `__all__` together. The
# packages that are not in `__all__` are for authors of layers. They are here so that `jaxnet.core`
# is found when only `jaxnet` has been imported.
_HOMES = {
    "Children": "jaxnet.core",
    "Layer": "jaxnet.core",
    "around": "jaxnet.core",
    "avg_pool": "jaxnet.layers",
    "batch_norm": "jaxnet.layers",
    "call": "jaxnet.core",
    "capture": "jaxnet.transform",
    "cast": "jaxnet.combinators",
    "chain": "jaxnet.combinators",
    "checkpoint": "jaxnet.checkpoint",
    "combinators": "jaxnet.combinators",
    "conv": "jaxnet.layers",
    "core": "jaxnet.core",
    "data": "jaxnet.data",
    "dense": "jaxnet.layers",
    "dropout": "jaxnet.layers",
    "embed": "jaxnet.layers",
    "flatten": "jaxnet.layers",
    "global_avg_pool": "jaxnet.layers",
    "global_max_pool": "jaxnet.layers",
    "interop": "jaxnet.interop",
    "layer": "jaxnet.core",
    "layer_norm": "jaxnet.layers",
    "layers": "jaxnet.layers",
    "load": "jaxnet.checkpoint",
    "max_pool": "jaxnet.layers",
    "mixed": "jaxnet.mixed",
    "ops": "jaxnet.ops",
    "parallel": "jaxnet.combinators",
    "param": "jaxnet.core",
    "remat": "jaxnet.combinators",
    "repeat": "jaxnet.combinators",
    "replace": "jaxnet.transform",
    "residual": "jaxnet.combinators",
    "save": "jaxnet.checkpoint",
    "scan": "jaxnet.combinators",
    "sgd": "jaxnet.train",
    "summary": "jaxnet.transform",
    "train": "jaxnet.train",
    "transform": "jaxnet.transform",
    "tree": "jaxnet.tree",
    "vmap": "jaxnet.combinators",
    "walk": "jaxnet.transform",
    "wire": "jaxnet.core",
}

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
