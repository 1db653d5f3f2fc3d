"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.cells import gru_cell, mgu_cell, rnn_cell
from jaxnet.layers.convolution import conv
from jaxnet.layers.embedding import embed
from jaxnet.layers.linear import dense
from jaxnet.layers.linear_recurrence import lru, lru_cell, min_gru, min_gru_cell
from jaxnet.layers.long_memory import conv_lstm_cell, lstm_cell
from jaxnet.layers.noise import dropout
from jaxnet.layers.norm import batch_norm, layer_norm
from jaxnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from jaxnet.layers.rwkv import rwkv7_channel_mix, rwkv7_time_mix
from jaxnet.layers.selective import selective_ssm, selective_ssm_cell
from jaxnet.layers.sequences import (
    bidirectional,
    gru,
    lstm,
    recurrent,
    simple_rnn,
    stacked,
)
from jaxnet.layers.shape import flatten

__all__ = [
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "conv",
    "conv_lstm_cell",
    "dense",
    "dropout",
    "embed",
    "flatten",
    "global_avg_pool",
    "global_max_pool",
    "gru",
    "gru_cell",
    "layer_norm",
    "lru",
    "lru_cell",
    "lstm",
    "lstm_cell",
    "max_pool",
    "mgu_cell",
    "min_gru",
    "min_gru_cell",
    "recurrent",
    "rnn_cell",
    "rwkv7_channel_mix",
    "rwkv7_time_mix",
    "selective_ssm",
    "selective_ssm_cell",
    "simple_rnn",
    "stacked",
]
