"""The network 784-256-128-10 in every framework, for `loops.py`: `relu` between the layers,
cross-entropy, SGD or Adam.

All start from the same weights; the biases of its three layers, which need no transposing, are what
is checked.
"""

from __future__ import annotations

import os

import jax
import numpy as np
import optax
import peers

# pyright: reportMissingImports=false

WIDTHS = (784, 256, 128, 10)
LAYERS = tuple(f"layer{i}" for i in range(3))
RATES = {"sgd": 0.02, "adam": 1e-3}


def images(n):
    """Rows [n, 784] in 0 .. 1 and labels [n] of ten classes, which a network learns with a rest of
    error.
    """
    random = np.random.default_rng(0)
    y = random.integers(0, 10, n).astype(np.int32)
    x = random.random((n, WIDTHS[0]), np.float32)
    return 0.8 * x + 0.2 * random.random((10, WIDTHS[0]), np.float32)[y], y


def start():
    random = np.random.default_rng(1)
    shapes = zip(LAYERS, WIDTHS, WIDTHS[1:], strict=False)
    return {
        name: {
            "kernel": (random.standard_normal((d, n)) * np.sqrt(2 / d)).astype(np.float32),
            "bias": np.zeros(n, np.float32),
        }
        for name, d, n in shapes
    }


def optimizer(name):
    return {"sgd": optax.sgd, "adam": optax.adam}[name](RATES[name])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def biases(params):
    return [params[name]["bias"] for name in LAYERS]


def hand_loss(params, batch):
    x, y = batch
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return cross_entropy(x @ params[LAYERS[-1]]["kernel"] + params[LAYERS[-1]]["bias"], y)


def jaxnet_loss():
    """(params, batch) -> mean cross-entropy."""
    from jaxnet import chain, dense

    net = chain(
        layer0=dense(256), relu0=jax.nn.relu, layer1=dense(128), relu1=jax.nn.relu, layer2=dense(10)
    )

    def loss(params, batch):
        x, y = batch
        return cross_entropy(net.apply(params, x), y)

    return loss


def equinox(feed, rule):
    import equinox as eqx

    class Net(eqx.Module):
        layers: list

        def __init__(self, key):
            keys = jax.random.split(key, len(LAYERS))
            shapes = zip(WIDTHS, WIDTHS[1:], keys, strict=False)
            self.layers = [eqx.nn.Linear(d, n, key=key) for d, n, key in shapes]

        def __call__(self, x):
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    def arrays(net):
        return [array for layer in net.layers for array in (layer.weight, layer.bias)]

    values = [
        jax.numpy.asarray(v)
        for layer in start().values()
        for v in (layer["kernel"].T, layer["bias"])
    ]
    net = eqx.tree_at(arrays, Net(jax.random.key(0)), values)
    result = lambda net: [layer.bias for layer in net.layers]  # noqa: E731
    return peers.equinox(net, cross_entropy, optimizer(rule), feed, result)


def linen(feed, rule):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(256, name="layer0")(x))
            x = nn.relu(nn.Dense(128, name="layer1")(x))
            return nn.Dense(10, name="layer2")(x)

    return peers.linen(Net(), start(), cross_entropy, optimizer(rule), feed, biases)


def nnx(form, feed, rule):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer0 = nnx.Linear(784, 256, rngs=rngs)
            self.layer1 = nnx.Linear(256, 128, rngs=rngs)
            self.layer2 = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x):
            return self.layer2(nnx.relu(self.layer1(nnx.relu(self.layer0(x)))))

    net = Net(nnx.Rngs(0))
    for name, layer in start().items():
        getattr(net, name).kernel[...] = jax.numpy.asarray(layer["kernel"])
    result = lambda net: [getattr(net, name).bias[...] for name in LAYERS]  # noqa: E731
    return peers.nnx(net, cross_entropy, optimizer(rule), feed, result, form=form)


def haiku(feed, rule):
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.Linear(256, name="layer0")(x))
        x = jax.nn.relu(hk.Linear(128, name="layer1")(x))
        return hk.Linear(10, name="layer2")(x)

    params = {name: {"w": layer["kernel"], "b": layer["bias"]} for name, layer in start().items()}
    result = lambda params: [params[name]["b"] for name in LAYERS]  # noqa: E731
    return peers.haiku(forward, params, cross_entropy, optimizer(rule), feed, result)


def keras(feed, rule):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras import layers

    hidden = [layers.Dense(n, activation="relu") for n in WIDTHS[1:-1]]
    net = keras.Sequential([keras.Input((WIDTHS[0],)), *hidden, layers.Dense(WIDTHS[-1])])
    net.set_weights([w for layer in start().values() for w in (layer["kernel"], layer["bias"])])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    kind = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[rule]
    return peers.keras(net, loss, kind(RATES[rule]), feed, list)


def torch(feed, rule, *, loader=False):
    import torch
    from torch import nn

    net = nn.Sequential(
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    values = [v for layer in start().values() for v in (layer["kernel"].T, layer["bias"])]
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule]
    feed = feed._replace(x=torch.tensor(feed.x), y=torch.tensor(feed.y, dtype=torch.long))
    return peers.torch(
        net,
        nn.functional.cross_entropy,
        kind(net.parameters(), RATES[rule]),
        feed,
        list,
        loader=loader,
    )
