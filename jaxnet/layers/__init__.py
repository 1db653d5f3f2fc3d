"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.attention import multi_head_attention
from jaxnet.layers.attention_core import dot_product_attention, fused_attention
from jaxnet.layers.cache import empty_cache, kv_cache
from jaxnet.layers.convolution import conv
from jaxnet.layers.embedding import embed
from jaxnet.layers.experts import moe
from jaxnet.layers.feed_forward import gated_mlp, mlp, squeeze_excite
from jaxnet.layers.linear import dense
from jaxnet.layers.masks import Mask, causal, padding, segments, window
from jaxnet.layers.noise import dropout
from jaxnet.layers.norm import batch_norm, layer_norm
from jaxnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from jaxnet.layers.position_bias import alibi, relative_bias
from jaxnet.layers.positions import learned_positions, rotary, sinusoidal
from jaxnet.layers.shape import flatten
from jaxnet.layers.softmaxes import masked_softmax, sink_softmax, soft_cap

__all__ = [
    "Mask",
    "alibi",
    "avg_pool",
    "batch_norm",
    "causal",
    "conv",
    "dense",
    "dot_product_attention",
    "dropout",
    "embed",
    "empty_cache",
    "flatten",
    "fused_attention",
    "gated_mlp",
    "global_avg_pool",
    "global_max_pool",
    "kv_cache",
    "layer_norm",
    "learned_positions",
    "masked_softmax",
    "max_pool",
    "mlp",
    "moe",
    "multi_head_attention",
    "padding",
    "relative_bias",
    "rotary",
    "segments",
    "sink_softmax",
    "sinusoidal",
    "soft_cap",
    "squeeze_excite",
    "window",
]
