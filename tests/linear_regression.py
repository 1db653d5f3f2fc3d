"""A small problem for tests of training: one dense layer, and data that it can fit exactly."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxnet import dense


def key0():
    return jax.random.key(0)  # a fresh one each time: a key is used once


def regression(n=12, width=3):
    x = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)
    return x, x @ np.array([[1.0], [-2.0], [0.5]], np.float32)[:width]


NET = dense(1)


def mean_square(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(NET.apply(params, x) - y))


def params_of():
    return NET.init(jax.random.key(1), regression()[0])
