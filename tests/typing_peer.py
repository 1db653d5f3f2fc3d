"""The program of `typing_user.py` for Equinox, as its documentation writes it."""

# pyright: reportMissingImports=false

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = tuple[jax.Array, jax.Array]


class Block(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        up_key, down_key = jax.random.split(key)
        self.up = eqx.nn.Linear(16, 64, key=up_key)
        self.down = eqx.nn.Linear(64, 16, key=down_key)
        self.drop = eqx.nn.Dropout(0.1)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return x + self.drop(self.down(jax.nn.gelu(self.up(x))), key=key, inference=key is None)


class Network(eqx.Module):
    embed: eqx.nn.Linear
    block: Block
    out: eqx.nn.Linear

    def __init__(self, classes: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(5, 16, key=keys[0])
        self.block = Block(keys[1])
        self.out = eqx.nn.Linear(16, classes, key=keys[2])

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.out(jax.nn.relu(self.block(self.embed(x), key)))


net = Network(3, jax.random.key(0))
images, labels = jnp.ones((32, 5)), jnp.zeros(32, jnp.int32)
logits = jax.vmap(net)(images)


def loss(net: Network, batch: Batch, key: jax.Array) -> jax.Array:
    images, labels = batch
    logits = jax.vmap(net)(images, jax.random.split(key, len(images)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def test(net: Network, batch: Batch) -> dict[str, jax.Array]:
    images, labels = batch
    return {"accuracy": (jax.vmap(net)(images).argmax(-1) == labels).mean()}


optimizer = optax.adam(1e-3)
opt_state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))


@eqx.filter_jit
def step(
    net: Network, opt_state: optax.OptState, batch: Batch, key: jax.Array
) -> tuple[Network, optax.OptState, jax.Array]:
    value, grads = eqx.filter_value_and_grad(loss)(net, batch, key)
    updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
    return eqx.apply_updates(net, updates), opt_state, value


def batches(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    images, labels = data
    order = np.random.default_rng(seed).permutation(len(images))
    for i in range(0, len(images), size):
        rows = order[i : i + size]
        yield images[rows], labels[rows]


key = jax.random.key(1)
for epoch in range(2):
    for i, batch in enumerate(batches((images, labels), 8, epoch)):
        net, opt_state, value = step(net, opt_state, batch, jax.random.fold_in(key, 4 * epoch + i))
        print(epoch, float(value))
    print(test(net, (images, labels))["accuracy"])

eqx.tree_serialise_leaves("net.eqx", (net, opt_state))
restored, _ = eqx.tree_deserialise_leaves("net.eqx", (net, opt_state))
for leaf in jax.tree.leaves(eqx.filter(restored, eqx.is_array)):
    print(np.shape(leaf))
