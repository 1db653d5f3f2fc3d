"""Layers made of layers: each takes layers or plain functions and returns a layer."""

from jaxnet.combinators.in_series import repeat
from jaxnet.combinators.over_time import scan
from jaxnet.combinators.side_by_side import vmap
from jaxnet.combinators.simple import cast, chain, parallel, remat, residual

__all__ = ["cast", "chain", "parallel", "remat", "repeat", "residual", "scan", "vmap"]
