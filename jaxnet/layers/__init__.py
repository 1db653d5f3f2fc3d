"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.convolution import conv
from jaxnet.layers.embedding import embed
from jaxnet.layers.linear import dense
from jaxnet.layers.noise import dropout
from jaxnet.layers.norm import batch_norm, layer_norm
from jaxnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from jaxnet.layers.shape import flatten

__all__ = [
    "avg_pool",
    "batch_norm",
    "conv",
    "dense",
    "dropout",
    "embed",
    "flatten",
    "global_avg_pool",
    "global_max_pool",
    "layer_norm",
    "max_pool",
]
