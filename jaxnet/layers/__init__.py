"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.adaptive import adaptive_avg_pool, adaptive_max_pool
from jaxnet.layers.cells import gru_cell, mgu_cell, rnn_cell
from jaxnet.layers.convolution import conv
from jaxnet.layers.depthwise import depthwise_conv, separable_conv
from jaxnet.layers.einsum import einsum_dense
from jaxnet.layers.embedding import embed
from jaxnet.layers.global_pool import global_avg_pool, global_lp_pool, global_max_pool
from jaxnet.layers.linear import bilinear, dense
from jaxnet.layers.linear_recurrence import lru, lru_cell, min_gru, min_gru_cell
from jaxnet.layers.local import locally_connected
from jaxnet.layers.long_memory import conv_lstm_cell, lstm_cell
from jaxnet.layers.noise import dropout
from jaxnet.layers.norm import batch_norm, layer_norm
from jaxnet.layers.pool import (
    avg_pool,
    global_avg_pool,
    global_max_pool,
    lp_pool,
    max_pool,
    min_pool,
)
from jaxnet.layers.recurrent import (
    bidirectional,
    gru,
    lstm,
    recurrent,
    simple_rnn,
    stacked,
)
from jaxnet.layers.resizing import resize, upsample
from jaxnet.layers.rwkv import rwkv7_channel_mix, rwkv7_time_mix
from jaxnet.layers.selective import selective_ssm, selective_ssm_cell
from jaxnet.layers.shape import flatten, pixel_shuffle, pixel_unshuffle
from jaxnet.layers.transposed import conv_transpose
from jaxnet.layers.unpool import max_pool_with_indices, max_unpool

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "bilinear",
    "conv",
    "conv_lstm_cell",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "dropout",
    "einsum_dense",
    "embed",
    "flatten",
    "global_avg_pool",
    "global_lp_pool",
    "global_max_pool",
    "gru",
    "gru_cell",
    "layer_norm",
    "locally_connected",
    "lp_pool",
    "lru",
    "lru_cell",
    "lstm",
    "lstm_cell",
    "max_pool",
    "max_pool_with_indices",
    "max_unpool",
    "mgu_cell",
    "min_gru",
    "min_gru_cell",
    "min_pool",
    "pixel_shuffle",
    "pixel_unshuffle",
    "recurrent",
    "resize",
    "rnn_cell",
    "rwkv7_channel_mix",
    "rwkv7_time_mix",
    "selective_ssm",
    "selective_ssm_cell",
    "separable_conv",
    "simple_rnn",
    "stacked",
    "upsample",
]
