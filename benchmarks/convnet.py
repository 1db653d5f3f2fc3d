"""A convnet for 28x28 images: conv 3x3x32, pool, conv 3x3x64, pool, dense 128, dense 10; batch 64,
plain SGD.

    python benchmarks/convnet.py

On a CPU the same convolution may cost a multiple inside a compiled loop, so the form of the code
decides. "in a loop" is one compiled call for all steps, everything else a call a step. Synthetic
data; all start from the same weights, and the biases of all four layers after the steps are checked
against the plainest form.
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
from measure import carried
from peers import Feed

# pyright: reportMissingImports=false

BATCH, STEPS, RATE = 64, 5, 0.05
LAYERS = {
    "conv1": (3, 3, 1, 32),
    "conv2": (3, 3, 32, 64),
    "hidden": (7 * 7 * 64, 128),
    "output": (128, 10),
}
RANDOM = np.random.default_rng(0)
X = RANDOM.random((BATCH, 28, 28, 1), np.float32)
Y = RANDOM.integers(0, 10, BATCH).astype(np.int32)
FEED = Feed(X, Y, BATCH, STEPS)
TILED = Feed(np.tile(X, (STEPS, 1, 1, 1)), np.tile(Y, STEPS), BATCH)  # the same steps as one epoch
START = {
    name: {
        "kernel": (RANDOM.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(
            np.float32
        ),
        "bias": np.zeros(shape[-1], np.float32),
    }
    for name, shape in LAYERS.items()
}


def main(argv=None):
    options = measure.arguments(__doc__, seconds=120, argv=argv)
    table = measure.compare(
        "Convnet 28x28x1, conv 32, pool, conv 64, pool, dense 128, dense 10; batch 64, plain SGD",
        COMPETITORS,
        per="step",
        unit="ms",
        reference="JAX in a loop: canonical VJP, reshape max",
        expected=biases_after,
        options=options,
    )
    measure.publish(options, table)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def biases(params):
    return [params[name]["bias"] for name in LAYERS]


@functools.cache
def biases_after(steps):
    params, step = START, jax.jit(functools.partial(hand_step, plain_conv, window_max))
    for _ in range(steps):
        params = step(params)
    return biases(params)


# JAX by hand


def plain_conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def canonical_conv(x, kernel):
    """A convolution whose gradients are plain convolutions, too, of operands that are transposed
    beforehand.
    """
    return plain_conv(x, kernel)


def canonical_backward(residuals, dy):
    x, kernel = residuals
    dx = plain_conv(dy, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x, dy = padded.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dk = jax.lax.conv_general_dilated(
        x, dy, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return dx, dk.transpose(1, 2, 0, 3)


canonical_conv.defvjp(lambda x, kernel: (plain_conv(x, kernel), (x, kernel)), canonical_backward)


def im2col_conv(x, kernel):
    """One matrix product of all 3x3 patches."""
    (_, h, w, _), n = x.shape, kernel.shape[-1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate(
        [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1
    )
    return (patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, n)).reshape(-1, h, w, n)


def window_max(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def reshape_max(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def max_of_four(x):
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def hand_loss(conv, pool, params, batch):
    x, y = batch
    for name in ["conv1", "conv2"]:
        x = pool(jax.nn.relu(conv(x, params[name]["kernel"]) + params[name]["bias"]))
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return cross_entropy(x @ params["output"]["kernel"] + params["output"]["bias"], y)


def hand_step(conv, pool, params):
    grads = jax.grad(functools.partial(hand_loss, conv, pool))(params, (X, Y))
    return jax.tree.map(lambda w, g: w - RATE * g, params, grads)


def hand_loop(conv, pool):
    def steps(params):
        return jax.lax.fori_loop(0, STEPS, lambda _, params: hand_step(conv, pool, params), params)

    return carried(jax.jit(steps), START, biases, steps=STEPS)


def hand_single(conv, pool):
    return carried(jax.jit(functools.partial(hand_step, conv, pool)), START, biases, calls=STEPS)


# jaxnet


def jaxnet_loss():
    """(params, batch) -> mean cross-entropy."""
    from jaxnet import chain, conv, dense, flatten, max_pool

    net = chain(
        conv1=conv(32, 3),
        relu1=jax.nn.relu,
        pool1=max_pool(2),
        conv2=conv(64, 3),
        relu2=jax.nn.relu,
        pool2=max_pool(2),
        flatten=flatten(),
        hidden=dense(128),
        relu=jax.nn.relu,
        output=dense(10),
    )

    def loss(params, batch):
        x, y = batch
        return cross_entropy(net.apply(params, x), y)

    return loss


def jaxnet_work(loop):
    from jaxnet.train import TrainState, train_step, train_steps

    step = train_step(jaxnet_loss(), RATE)
    state = jax.tree.map(
        jnp.array, TrainState.create(START, RATE, jax.random.key(0))
    )  # ours to donate
    data = jnp.asarray(X), jnp.asarray(Y)
    run = jax.jit(train_steps(step, BATCH, STEPS) if loop else step, donate_argnums=0)
    work = {"steps": STEPS} if loop else {"calls": STEPS}
    return carried(
        lambda state: run(state, data)[0], state, lambda state: biases(state.params), **work
    )


# The peers


def chw_kernels():
    """Kernels as channel-first frameworks have them: OIHW, and (out, in) with the features in the
    order C, H, W.
    """
    kernels = {name: layer["kernel"] for name, layer in START.items()}
    hidden = kernels["hidden"].reshape(7, 7, 64, 128).transpose(3, 2, 0, 1).reshape(128, -1)
    convs = [kernels[name].transpose(3, 2, 0, 1) for name in ("conv1", "conv2")]
    return [*convs, hidden, kernels["output"].T]


def equinox(feed=FEED):
    import equinox as eqx

    class Net(eqx.Module):
        conv1: eqx.nn.Conv2d
        conv2: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        hidden: eqx.nn.Linear
        output: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.conv1 = eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0])
            self.conv2 = eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1])
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.hidden = eqx.nn.Linear(7 * 7 * 64, 128, key=keys[2])
            self.output = eqx.nn.Linear(128, 10, key=keys[3])

        def __call__(self, x):
            x = self.pool(jax.nn.relu(self.conv1(x)))
            x = self.pool(jax.nn.relu(self.conv2(x)))
            return self.output(jax.nn.relu(self.hidden(jnp.ravel(x))))

    def layers(net):
        return [net.conv1, net.conv2, net.hidden, net.output]

    net = Net(jax.random.key(0))
    for part, values in {
        "weight": chw_kernels(),
        "bias": [layer.bias * 0 for layer in layers(net)],
    }.items():
        net = eqx.tree_at(
            lambda net, p=part: [getattr(x, p) for x in layers(net)],
            net,
            [jnp.array(v) for v in values],
        )
    feed = feed._replace(x=feed.x.transpose(0, 3, 1, 2))
    result = lambda net: [layer.bias.ravel() for layer in layers(net)]  # noqa: E731
    return peers.equinox(net, cross_entropy, optax.sgd(RATE), feed, result)


def linen(feed=FEED):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3), name="conv1")(x)), (2, 2), strides=(2, 2))
            x = nn.max_pool(nn.relu(nn.Conv(64, (3, 3), name="conv2")(x)), (2, 2), strides=(2, 2))
            x = x.reshape((x.shape[0], -1))
            return nn.Dense(10, name="output")(nn.relu(nn.Dense(128, name="hidden")(x)))

    return peers.linen(Net(), START, cross_entropy, optax.sgd(RATE), feed, biases)


def nnx(form, feed=FEED):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
            self.hidden = nnx.Linear(7 * 7 * 64, 128, rngs=rngs)
            self.output = nnx.Linear(128, 10, rngs=rngs)
            self.pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))

        def __call__(self, x):
            x = self.pool(nnx.relu(self.conv1(x)))
            x = self.pool(nnx.relu(self.conv2(x)))
            return self.output(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))

    net = Net(nnx.Rngs(0))
    for name, layer in START.items():
        getattr(net, name).kernel[...] = jnp.asarray(layer["kernel"])
    result = lambda net: [getattr(net, name).bias[...] for name in LAYERS]  # noqa: E731
    return peers.nnx(net, cross_entropy, optax.sgd(RATE), feed, result, form=form)


def haiku(feed=FEED):
    import haiku as hk

    def forward(x):
        x = hk.MaxPool(2, 2, "VALID")(jax.nn.relu(hk.Conv2D(32, 3, name="conv1")(x)))
        x = hk.MaxPool(2, 2, "VALID")(jax.nn.relu(hk.Conv2D(64, 3, name="conv2")(x)))
        return hk.Linear(10, name="output")(
            jax.nn.relu(hk.Linear(128, name="hidden")(hk.Flatten()(x)))
        )

    params = {name: {"w": layer["kernel"], "b": layer["bias"]} for name, layer in START.items()}
    result = lambda params: [params[name]["b"] for name in LAYERS]  # noqa: E731
    return peers.haiku(forward, params, cross_entropy, optax.sgd(RATE), feed, result)


def keras(feed=TILED, *, shuffle=False):
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras import layers

    net = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    net.set_weights([w for layer in START.values() for w in (layer["kernel"], layer["bias"])])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return peers.keras(
        net, loss, keras.optimizers.SGD(RATE), feed, lambda weights: weights[1::2], shuffle=shuffle
    )


def torch(feed=FEED, *, channels_last=False, loader=False):
    import torch
    from torch import nn

    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    x, y = torch.tensor(feed.x.transpose(0, 3, 1, 2)), torch.tensor(feed.y, dtype=torch.long)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    feed = feed._replace(x=x, y=y)
    parameters = list(net.parameters())
    with torch.no_grad():
        for kernel, bias, value in zip(
            parameters[::2], parameters[1::2], chw_kernels(), strict=True
        ):
            kernel.copy_(torch.tensor(value))
            bias.zero_()
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    result = lambda net: [bias.detach().numpy() for bias in parameters[1::2]]  # noqa: E731
    return peers.torch(net, nn.functional.cross_entropy, optimizer, feed, result, loader=loader)


COMPETITORS = {
    "JAX in a loop: lax.conv, reduce_window": lambda: hand_loop(plain_conv, window_max),
    "JAX in a loop: canonical VJP, max of four": lambda: hand_loop(canonical_conv, max_of_four),
    "JAX in a loop: canonical VJP, reshape max": lambda: hand_loop(canonical_conv, reshape_max),
    "JAX in a loop: im2col, reshape max": lambda: hand_loop(im2col_conv, reshape_max),
    "JAX, jitted step: lax.conv, reduce_window": lambda: hand_single(plain_conv, window_max),
    "jaxnet in a loop (train_steps)": lambda: jaxnet_work(loop=True),
    "jaxnet, jitted step": lambda: jaxnet_work(loop=False),
    "Equinox": equinox,
    "Flax Linen": linen,
    "Flax NNX, nnx.jit": lambda: nnx("jit"),
    "Flax NNX, jit_partial": lambda: nnx("jit_partial"),
    "Haiku": haiku,
    "Keras fit": keras,
    "PyTorch eager": torch,
    "PyTorch eager, channels_last": lambda: torch(channels_last=True),
}

if __name__ == "__main__":
    main()
