"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.dropout import dropout
from jaxnet.layers.embed import embed
from jaxnet.layers.linear import dense
from jaxnet.layers.norm import batch_norm, layer_norm
from jaxnet.layers.shape import flatten

__all__ = ["batch_norm", "dense", "dropout", "embed", "flatten", "layer_norm"]
