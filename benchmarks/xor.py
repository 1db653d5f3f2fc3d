"""XOR: a 2-2-1 sigmoid network without biases, learning rate 0.1, 10,000 full-batch epochs.

    python benchmarks/xor.py

L = 1/2 sum (y - f(x))^2 over the four rows of the table. There is next to nothing to compute, so
the time is what a framework adds to each step. All start from the same weights; the trained weights
are checked against NumPy's in float64. Who needs more than microseconds for an epoch does fewer of
them in a call; times are always those of one epoch.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import peers
from measure import Work, carried
from peers import Feed

from jaxnet import chain, dense
from jaxnet.train import TrainState, sgd, train_step, train_steps

# pyright: reportMissingImports=false

X = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
Y = np.array([[0], [1], [1], [0]], np.float32)
RATE = 0.1
START = [
    np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32) for shape in [(2, 2), (2, 1)]
]
EPOCHS = 10_000  # in one compiled call
FEW = 200  # where every epoch is a call
FEED = Feed(X, Y, len(X), FEW)


def main(argv=None):
    options = measure.arguments(__doc__, argv=argv)
    table = measure.compare(
        "XOR, 2-2-1 sigmoid without biases, full batch, plain gradient descent",
        COMPETITORS,
        per="epoch",
        unit="us",
        reference="JAX, one loop: fori_loop",
        expected=weights_after,
        options=options,
    )
    measure.publish(options, table)


@functools.cache
def weights_after(epochs):
    return numpy_descent([w.astype(np.float64) for w in START], epochs)


# NumPy and JAX by hand


def numpy_descent(weights, epochs):
    w1, w2 = weights
    x, y = X.astype(w1.dtype), Y.astype(w1.dtype)
    for _ in range(epochs):
        h = 1 / (1 + np.exp(-x @ w1))
        f = 1 / (1 + np.exp(-h @ w2))
        df = (f - y) * f * (1 - f)
        dh = (df @ w2.T) * h * (1 - h)
        w1, w2 = w1 - RATE * (x.T @ dh), w2 - RATE * (h.T @ df)
    return [w1, w2]


def numpy_loop():
    weights = START

    def run():
        nonlocal weights
        weights = numpy_descent(weights, FEW)
        return weights

    return Work(run, FEW)


def half_square(prediction, y):
    return jnp.sum(jnp.square(y - prediction)) / 2


def hand_loss(weights, batch):
    (w1, w2), (x, y) = weights, batch
    return half_square(jax.nn.sigmoid(jax.nn.sigmoid(x @ w1) @ w2), y)


def hand_step(weights):
    return [
        w - RATE * g for w, g in zip(weights, jax.grad(hand_loss)(weights, (X, Y)), strict=True)
    ]


def jitted_step():
    return carried(jax.jit(hand_step), START, list, calls=FEW)


def one_loop(descend, state, weights):
    """A whole run as one compiled call: descend(state) -> state after EPOCHS."""
    return carried(jax.jit(descend), state, weights, steps=EPOCHS)


def hand_scan():
    return one_loop(
        lambda ws: jax.lax.scan(lambda ws, _: (hand_step(ws), None), ws, length=EPOCHS)[0],
        START,
        list,
    )


def hand_fori():
    return one_loop(
        lambda ws: jax.lax.fori_loop(0, EPOCHS, lambda _, ws: hand_step(ws), ws), START, list
    )


# jaxnet

NET = chain(
    hidden=dense(2, bias=False),
    squash=jax.nn.sigmoid,
    output=dense(1, bias=False),
    answer=jax.nn.sigmoid,
)
PARAMS = {"hidden": {"kernel": START[0]}, "output": {"kernel": START[1]}}


def kernels(params):
    return [params["hidden"]["kernel"], params["output"]["kernel"]]


def loss(params, batch):
    x, y = batch
    return half_square(NET.apply(params, x), y)


def jaxnet_sgd():
    def descend(params):
        return jax.lax.fori_loop(
            0, EPOCHS, lambda _, params: sgd(params, jax.grad(loss)(params, (X, Y)), RATE), params
        )

    return one_loop(descend, PARAMS, kernels)


def jaxnet_loop(loop):
    step = train_step(loss, RATE)
    start = TrainState.create(PARAMS, RATE, jax.random.key(0))
    return one_loop(lambda state: loop(step, state), start, lambda state: kernels(state.params))


def jaxnet_fori():
    return jaxnet_loop(
        lambda step, state: jax.lax.fori_loop(0, EPOCHS, lambda _, s: step(s, (X, Y))[0], state)
    )


def jaxnet_scan():
    return jaxnet_loop(
        lambda step, state: jax.lax.scan(lambda s, _: step(s, (X, Y)), state, length=EPOCHS)[0]
    )


def jaxnet_train_steps():
    run = jax.jit(train_steps(train_step(loss, RATE), batch_size=4, steps=EPOCHS), donate_argnums=0)
    start = jax.tree.map(jnp.array, TrainState.create(PARAMS, RATE, jax.random.key(0)))
    data = jax.tree.map(jnp.asarray, (X, Y))
    return carried(
        lambda state: run(state, data)[0], start, lambda state: kernels(state.params), steps=EPOCHS
    )


# The peers


def equinox():
    import equinox as eqx

    class Net(eqx.Module):
        hidden: eqx.nn.Linear
        output: eqx.nn.Linear

        def __call__(self, x):
            return jax.nn.sigmoid(self.output(jax.nn.sigmoid(self.hidden(x))))

    def weights(model):
        return [model.hidden.weight, model.output.weight]

    keys = jax.random.split(jax.random.key(0))
    model = Net(
        eqx.nn.Linear(2, 2, use_bias=False, key=keys[0]),
        eqx.nn.Linear(2, 1, use_bias=False, key=keys[1]),
    )
    model = eqx.tree_at(weights, model, [jnp.asarray(w.T) for w in START])
    return peers.equinox(
        model, half_square, optax.sgd(RATE), FEED, lambda m: [w.T for w in weights(m)]
    )


def linen():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.sigmoid(nn.Dense(2, use_bias=False)(x))
            return nn.sigmoid(nn.Dense(1, use_bias=False)(x))

    params = {f"Dense_{i}": {"kernel": w} for i, w in enumerate(START)}
    return peers.linen(Net(), params, half_square, optax.sgd(RATE), FEED, jax.tree.leaves)


def nnx(form):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
            self.output = nnx.Linear(2, 1, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return nnx.sigmoid(self.output(nnx.sigmoid(self.hidden(x))))

    model = Net(nnx.Rngs(0))
    model.hidden.kernel[...], model.output.kernel[...] = (jnp.asarray(w) for w in START)

    def weights(model):
        return [model.hidden.kernel[...], model.output.kernel[...]]

    return peers.nnx(model, half_square, optax.sgd(RATE), FEED, weights, form=form)


def haiku():
    import haiku as hk

    def forward(x):
        x = jax.nn.sigmoid(hk.Linear(2, with_bias=False)(x))
        return jax.nn.sigmoid(hk.Linear(1, with_bias=False)(x))

    params = {"linear": {"w": START[0]}, "linear_1": {"w": START[1]}}
    return peers.haiku(forward, params, half_square, optax.sgd(RATE), FEED, jax.tree.leaves)


def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras import layers

    hidden = layers.Dense(2, activation="sigmoid", use_bias=False)
    output = layers.Dense(1, activation="sigmoid", use_bias=False)
    model = keras.Sequential([keras.Input((2,)), hidden, output])
    model.set_weights(START)
    loss = keras.losses.MeanSquaredError(reduction="sum")  # twice ours, hence half the rate
    return peers.keras(model, loss, keras.optimizers.SGD(RATE / 2), FEED, list, shuffle=False)


def torch():
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.Sigmoid(), nn.Linear(2, 1, bias=False), nn.Sigmoid()
    )
    with torch.no_grad():
        for parameter, w in zip(model.parameters(), START, strict=True):
            parameter.copy_(torch.tensor(w.T))

    def loss(prediction, y):
        return (y - prediction).square().sum() / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    feed = FEED._replace(x=torch.tensor(X), y=torch.tensor(Y))
    return peers.torch(
        model, loss, optimizer, feed, lambda m: [p.detach().numpy().T for p in m.parameters()]
    )


COMPETITORS = {
    "JAX, one loop: scan": hand_scan,
    "JAX, one loop: fori_loop": hand_fori,
    "JAX, jitted step in a Python loop": jitted_step,
    "NumPy, Python loop": numpy_loop,
    "jaxnet, one loop: sgd in fori_loop": jaxnet_sgd,
    "jaxnet, one loop: train_step in fori_loop": jaxnet_fori,
    "jaxnet, one loop: train_step in scan": jaxnet_scan,
    "jaxnet, one loop: train_steps": jaxnet_train_steps,
    "Equinox": equinox,
    "Flax Linen": linen,
    "Flax NNX, nnx.jit": lambda: nnx("jit"),
    "Flax NNX, cached_partial": lambda: nnx("cached_partial"),
    "Flax NNX, jit_partial": lambda: nnx("jit_partial"),
    "Haiku": haiku,
    "Keras fit": keras,
    "PyTorch eager": torch,
}

if __name__ == "__main__":
    main()
