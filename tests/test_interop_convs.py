"""Parameters of transposed, depthwise and other convolutions, and of linear maps, of other
libraries: the outputs of the library are the expectation.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_peers import torch

from jaxnet.checkpoint import from_equinox, from_flax, from_haiku, from_keras, from_torch, to_torch
from jaxnet.core import wire
from jaxnet.layers import bilinear, conv_transpose, depthwise_conv, separable_conv

X = np.random.default_rng(0).normal(size=(2, 5, 4, 4)).astype(np.float32)
FIRST = np.moveaxis(X, -1, 1).copy()


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="these numbers are compared with its own")


def template(net, *inputs):
    return {"params": jax.eval_shape(net.init, jax.random.key(0), *inputs)}


def check(net, variables, expected, *inputs):
    inputs = inputs or (X,)
    y = net.apply(variables["params"], *inputs)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions_of_torch(groups):
    """The matrix of features is square, so its shape cannot tell the layout."""
    t = torch()
    model = t.nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=groups)
    net = conv_transpose(4, 3, strides=2, padding=1, output_padding=1, groups=groups)
    expected = model(t.from_numpy(FIRST)).detach().movedim(1, -1).numpy()
    variables = from_torch(model.state_dict(), like=template(net, X))
    check(net, variables, expected)
    back = to_torch(variables)
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(back[name], x.numpy())


def test_depthwise_convolutions_of_torch():
    t = torch()
    model = t.nn.Conv2d(4, 8, 3, padding=1, groups=4)
    net = depthwise_conv(3, multiplier=2, padding=1)
    expected = model(t.from_numpy(FIRST)).detach().movedim(1, -1).numpy()
    check(net, from_torch(model.state_dict(), like=template(net, X)), expected)


def test_bilinear_maps_of_torch():
    t = torch()
    model, net = t.nn.Bilinear(4, 4, 3), bilinear(3)
    x, z = X[0, 0], X[1, 1]
    expected = model(t.from_numpy(x), t.from_numpy(z)).detach().numpy()
    check(net, from_torch(model.state_dict(), like=template(net, x, z)), expected, x, z)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("flips", [False, True])
def test_transposed_convolutions_of_linen(padding, flips):
    linen = library("flax.linen")
    twin = linen.ConvTranspose(4, (3, 3), (2, 2), padding, transpose_kernel=flips)
    variables = twin.init(jax.random.key(0), X)
    net = wire(up=conv_transpose(4, 3, strides=2, padding=padding))(lambda f, x: f.up(x))
    got = from_flax(
        {"params": {"up": variables["params"]}},
        like=template(net, X),
        transposed=() if flips else "up",
    )
    check(net, got, twin.apply(variables, X))


def test_transposed_convolutions_of_haiku():
    haiku = library("haiku")
    twin = haiku.transform(lambda x: haiku.Conv2DTranspose(4, 3, stride=2, name="up")(x))
    params = twin.init(jax.random.key(0), jnp.asarray(X))
    net = wire(up=conv_transpose(4, 3, strides=2))(lambda f, x: f.up(x))
    got = from_haiku(params, like=template(net, X), transposed="up")
    check(net, got, twin.apply(params, None, jnp.asarray(X)))


def test_depthwise_convolutions_of_linen_and_haiku():
    linen, net = library("flax.linen"), depthwise_conv(3, multiplier=2)
    twin = linen.Conv(8, (3, 3), feature_group_count=4)
    variables = twin.init(jax.random.key(0), X)
    got = from_flax(variables, like=template(net, X))
    check(net, got, twin.apply(variables, X))
    haiku = library("haiku")
    twin = haiku.transform(lambda x: haiku.DepthwiseConv2D(2, 3, name="deep")(x))
    params = twin.init(jax.random.key(0), jnp.asarray(X))
    net = wire(deep=net)(lambda f, x: f.deep(x))
    got = from_haiku(params, like=template(net, X))
    check(net, got, twin.apply(params, None, jnp.asarray(X)))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_of_equinox(groups):
    equinox = library("equinox")
    twin = equinox.nn.ConvTranspose2d(
        4, 4, 3, stride=2, padding=1, output_padding=1, groups=groups, key=jax.random.key(0)
    )
    net = conv_transpose(4, 3, strides=2, padding=1, output_padding=1, groups=groups)
    expected = np.moveaxis(np.asarray(jax.vmap(twin)(jnp.asarray(FIRST))), 1, -1)
    check(net, from_equinox(twin, like=template(net, X)), expected)


def test_convolutions_of_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = library("keras")
    pairs = {
        "up": (
            keras.layers.Conv2DTranspose(4, 3, strides=2, padding="same", name="up"),
            conv_transpose(4, 3, strides=2),
        ),
        "wide": (
            keras.layers.Conv2DTranspose(4, 2, strides=3, padding="valid", name="wide"),
            conv_transpose(4, 2, strides=3, padding="VALID"),
        ),
        "deep": (
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="deep"),
            depthwise_conv(3, multiplier=2),
        ),
        "apart": (
            keras.layers.SeparableConv2D(5, 3, strides=2, padding="same", name="apart"),
            separable_conv(5, 3, strides=2),
        ),
    }
    inputs = keras.Input((5, 4, 4))
    model = keras.Model(inputs, [layer(inputs) for layer, _ in pairs.values()])
    net = wire(**{name: layer for name, (_, layer) in pairs.items()})(
        lambda f, x: [f[name](x) for name in pairs]
    )
    variables = from_keras(model, like=template(net, X))
    with jax.numpy_rank_promotion("allow"):
        expected = model(X)
    for y, z in zip(net.apply(variables["params"], X), expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_matches_no_kernel_is_refused():
    variables = {"params": {"up": {"kernel": np.ones((3, 2, 2)), "bias": np.ones(2)}}}
    with pytest.raises(ValueError, match="'down' matches no module with a kernel, such as up"):
        from_flax(variables, transposed="down")
