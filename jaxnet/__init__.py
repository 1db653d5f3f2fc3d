"""jaxnet: functional neural networks on JAX.

A network is a value made of pure functions over a plain nested dict of arrays; everything else is a function over that dict.
"""

from jaxnet import tree
from jaxnet.combinators import cast, chain, parallel, remat, repeat, residual
from jaxnet.core import Layer, layer, param, wire
from jaxnet.layers import batch_norm, dense, dropout, embed, flatten, layer_norm
from jaxnet.transform import capture, replace, summary, walk

__version__ = "0.1.0"
