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
        adapt,
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
        conv_transpose,
        dense,
        dropout,
        embed,
        flatten,
        gated_mlp,
        global_avg_pool,
        global_max_pool,
        group_norm,
        gru,
        layer_norm,
        lstm,
        max_pool,
        mlp,
        moe,
        multi_head_attention,
        rms_norm,
        rotary,
    )
    from jaxnet.train import sgd
    from jaxnet.transform import capture, replace, summary, walk

__version__ = "0.1.0"

__all__ = [
    "Children",
    "Layer",
    "adapt",
    "around",
    "avg_pool",
    "batch_norm",
    "call",
    "capture",
    "cast",
    "chain",
    "checkpoint",
    "conv",
    "conv_transpose",
    "data",
    "dense",
    "dropout",
    "embed",
    "flatten",
    "gated_mlp",
    "global_avg_pool",
    "global_max_pool",
    "group_norm",
    "gru",
    "interop",
    "layer",
    "layer_norm",
    "layers",
    "load",
    "lstm",
    "max_pool",
    "mlp",
    "moe",
    "multi_head_attention",
    "parallel",
    "param",
    "remat",
    "repeat",
    "replace",
    "residual",
    "rms_norm",
    "rotary",
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

# Module -> names. A test holds this table, the imports for type checkers and `__all__` together.
_NAMES = {
    "jaxnet.checkpoint": "load save",
    "jaxnet.combinators": "cast chain parallel remat repeat residual scan vmap",
    "jaxnet.core": "Children Layer around call layer param wire",
    "jaxnet.layers": (
        "avg_pool batch_norm conv conv_transpose dense dropout embed flatten gated_mlp "
        "global_avg_pool global_max_pool group_norm gru layer_norm lstm max_pool mlp moe "
        "multi_head_attention rms_norm rotary"
    ),
    "jaxnet.train": "sgd",
    "jaxnet.transform": "capture replace summary walk",
}
# The packages that are not in `__all__` are for authors of layers. They are here so that
# `jaxnet.core` is found when only `jaxnet` has been imported.
_PACKAGES = "adapt checkpoint combinators core data interop layers mixed ops train transform tree"

_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
_HOMES |= {name: f"jaxnet.{name}" for name in _PACKAGES.split()}
_HOMES = dict(sorted(_HOMES.items()))

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
