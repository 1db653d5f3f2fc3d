"""The layers. Each is a function that returns a `jaxnet.core.Layer`."""

from jaxnet.layers.batch_norms import batch_norm
from jaxnet.layers.codebook import vector_quantize
from jaxnet.layers.convolution import conv
from jaxnet.layers.embedding import embed
from jaxnet.layers.feature_norms import layer_norm, rms_norm
from jaxnet.layers.group_norms import group_norm, instance_norm
from jaxnet.layers.linear import dense
from jaxnet.layers.local_norm import local_response_norm
from jaxnet.layers.noise import (
    alpha_dropout,
    drop_path,
    dropout,
    gaussian_dropout,
    gaussian_noise,
    spatial_dropout,
)
from jaxnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from jaxnet.layers.random_features import fourier_features
from jaxnet.layers.shape import flatten

__all__ = [
    "alpha_dropout",
    "avg_pool",
    "batch_norm",
    "conv",
    "dense",
    "drop_path",
    "dropout",
    "embed",
    "flatten",
    "fourier_features",
    "gaussian_dropout",
    "gaussian_noise",
    "global_avg_pool",
    "global_max_pool",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "max_pool",
    "rms_norm",
    "spatial_dropout",
    "vector_quantize",
]
