"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from typing import TYPE_CHECKING

from jaxnet.first_use import resolver

if TYPE_CHECKING:
    from jaxnet.layers.adaptive import adaptive_avg_pool, adaptive_max_pool
    from jaxnet.layers.attention import multi_head_attention
    from jaxnet.layers.attention_core import dot_product_attention, fused_attention
    from jaxnet.layers.batch_norms import batch_norm
    from jaxnet.layers.cache import empty_cache, kv_cache
    from jaxnet.layers.cells import gru_cell, mgu_cell, rnn_cell
    from jaxnet.layers.codebook import vector_quantize
    from jaxnet.layers.convolution import conv
    from jaxnet.layers.depthwise import depthwise_conv, separable_conv
    from jaxnet.layers.einsum import einsum_dense
    from jaxnet.layers.embedding import embed
    from jaxnet.layers.experts import moe
    from jaxnet.layers.feature_norms import layer_norm, rms_norm
    from jaxnet.layers.feed_forward import gated_mlp, mlp, squeeze_excite
    from jaxnet.layers.global_pool import global_avg_pool, global_lp_pool, global_max_pool
    from jaxnet.layers.group_norms import group_norm, instance_norm
    from jaxnet.layers.linear import bilinear, dense
    from jaxnet.layers.linear_recurrence import lru, lru_cell, min_gru, min_gru_cell
    from jaxnet.layers.local import locally_connected
    from jaxnet.layers.local_norm import local_response_norm
    from jaxnet.layers.long_memory import conv_lstm_cell, lstm_cell
    from jaxnet.layers.masks import Mask, causal, padding, segments, window
    from jaxnet.layers.noise import (
        alpha_dropout,
        drop_path,
        dropout,
        gaussian_dropout,
        gaussian_noise,
        spatial_dropout,
    )
    from jaxnet.layers.pool import avg_pool, lp_pool, max_pool, min_pool
    from jaxnet.layers.position_bias import alibi, relative_bias
    from jaxnet.layers.positions import learned_positions, rotary, sinusoidal
    from jaxnet.layers.random_features import fourier_features
    from jaxnet.layers.resizing import resize, upsample
    from jaxnet.layers.rwkv import rwkv7_channel_mix, rwkv7_time_mix
    from jaxnet.layers.selective import selective_ssm, selective_ssm_cell
    from jaxnet.layers.sequences import bidirectional, gru, lstm, recurrent, simple_rnn, stacked
    from jaxnet.layers.shape import flatten, pixel_shuffle, pixel_unshuffle
    from jaxnet.layers.softmaxes import masked_softmax, sink_softmax, soft_cap
    from jaxnet.layers.transposed import conv_transpose
    from jaxnet.layers.unpool import max_pool_with_indices, max_unpool

__all__ = [
    "Mask",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "alibi",
    "alpha_dropout",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "bilinear",
    "causal",
    "conv",
    "conv_lstm_cell",
    "conv_transpose",
    "dense",
    "depthwise_conv",
    "dot_product_attention",
    "drop_path",
    "dropout",
    "einsum_dense",
    "embed",
    "empty_cache",
    "flatten",
    "fourier_features",
    "fused_attention",
    "gated_mlp",
    "gaussian_dropout",
    "gaussian_noise",
    "global_avg_pool",
    "global_lp_pool",
    "global_max_pool",
    "group_norm",
    "gru",
    "gru_cell",
    "instance_norm",
    "kv_cache",
    "layer_norm",
    "learned_positions",
    "local_response_norm",
    "locally_connected",
    "lp_pool",
    "lru",
    "lru_cell",
    "lstm",
    "lstm_cell",
    "masked_softmax",
    "max_pool",
    "max_pool_with_indices",
    "max_unpool",
    "mgu_cell",
    "min_gru",
    "min_gru_cell",
    "min_pool",
    "mlp",
    "moe",
    "multi_head_attention",
    "padding",
    "pixel_shuffle",
    "pixel_unshuffle",
    "recurrent",
    "relative_bias",
    "resize",
    "rms_norm",
    "rnn_cell",
    "rotary",
    "rwkv7_channel_mix",
    "rwkv7_time_mix",
    "segments",
    "selective_ssm",
    "selective_ssm_cell",
    "separable_conv",
    "simple_rnn",
    "sink_softmax",
    "sinusoidal",
    "soft_cap",
    "spatial_dropout",
    "squeeze_excite",
    "stacked",
    "upsample",
    "vector_quantize",
    "window",
]

# Module -> names. A module is imported when one of its names is first used.
_NAMES = {
    "adaptive": "adaptive_avg_pool adaptive_max_pool",
    "attention": "multi_head_attention",
    "attention_core": "dot_product_attention fused_attention",
    "batch_norms": "batch_norm",
    "cache": "empty_cache kv_cache",
    "cells": "gru_cell mgu_cell rnn_cell",
    "codebook": "vector_quantize",
    "convolution": "conv",
    "depthwise": "depthwise_conv separable_conv",
    "einsum": "einsum_dense",
    "embedding": "embed",
    "experts": "moe",
    "feature_norms": "layer_norm rms_norm",
    "feed_forward": "gated_mlp mlp squeeze_excite",
    "global_pool": "global_avg_pool global_lp_pool global_max_pool",
    "group_norms": "group_norm instance_norm",
    "linear": "bilinear dense",
    "linear_recurrence": "lru lru_cell min_gru min_gru_cell",
    "local": "locally_connected",
    "local_norm": "local_response_norm",
    "long_memory": "conv_lstm_cell lstm_cell",
    "masks": "Mask causal padding segments window",
    "noise": "alpha_dropout drop_path dropout gaussian_dropout gaussian_noise spatial_dropout",
    "pool": "avg_pool lp_pool max_pool min_pool",
    "position_bias": "alibi relative_bias",
    "positions": "learned_positions rotary sinusoidal",
    "random_features": "fourier_features",
    "resizing": "resize upsample",
    "rwkv": "rwkv7_channel_mix rwkv7_time_mix",
    "selective": "selective_ssm selective_ssm_cell",
    "sequences": "bidirectional gru lstm recurrent simple_rnn stacked",
    "shape": "flatten pixel_shuffle pixel_unshuffle",
    "softmaxes": "masked_softmax sink_softmax soft_cap",
    "transposed": "conv_transpose",
    "unpool": "max_pool_with_indices max_unpool",
}
_HOMES = {
    name: f"jaxnet.layers.{module}" for module, names in _NAMES.items() for name in names.split()
}
_HOMES = dict(sorted(_HOMES.items()))

# Type checkers do not see this function, so they still report names that do not exist.
if not TYPE_CHECKING:
    __getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
