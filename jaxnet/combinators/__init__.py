"""Layers made of layers: each takes layers or plain functions and returns a layer."""

from jaxnet.combinators.iterate import repeat, scan, vmap
from jaxnet.combinators.simple import cast, chain, parallel, remat, residual

__all__ = ["cast", "chain", "parallel", "remat", "repeat", "residual", "scan", "vmap"]
