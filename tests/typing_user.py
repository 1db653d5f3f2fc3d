"""A small program of a user, for type checkers. `test_typing.py` compares it with the same program
for Equinox.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxnet
from jaxnet import Children, Layer, chain, dense, dropout, wire
from jaxnet.train import TrainState, evaluate, fit, train_step, train_steps

Batch = tuple[jax.Array, jax.Array]


@wire(up=dense(64), down=dense(16), drop=dropout(0.1))
def block(f: Children, x: jax.Array) -> jax.Array:
    return x + f.drop(f.down(jax.nn.gelu(f.up(x))))


def network(classes: int) -> Layer:
    first = wire(embed=dense(16))(lambda f, x: f.embed(x))
    return chain(first, block=block, relu=jax.nn.relu, out=dense(classes))


net = network(3)
images, labels = jnp.ones((32, 5)), jnp.zeros(32, jnp.int32)
params = net.init(jax.random.key(0), images)
logits = net.apply(params, images)


def loss(params: dict[str, Any], batch: Batch, key: jax.Array) -> jax.Array:
    images, labels = batch
    logits = net.apply(params, images, key=key, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def test(params: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
    images, labels = batch
    return {"accuracy": net.apply(params, images).argmax(-1) == labels}


optimizer = optax.adam(1e-3)
step = train_step(loss, optimizer)
start = TrainState.create(params, optimizer, jax.random.key(1))
state, metrics = jax.jit(step)(start, (images, labels))
state, metrics = jax.jit(train_steps(step, 8, 4))(state, (images, labels))
print(float(metrics["loss"][-1]), metrics.keys())

measure = evaluate(test, (images, labels))
run = fit(
    step,
    start,
    (images, labels),
    batch_size=8,
    epochs=2,
    evaluate=measure,
    best_rule="max accuracy",
)
for record in run.history:
    print(record["step"], record["loss"])
if run.best is not None:
    print(run.best.value)

jaxnet.save("net.safetensors", run.train_state)
restored = jaxnet.load("net.safetensors", like=run.train_state)
for path, leaf in jaxnet.tree.flatten(restored.params).items():
    print(path, np.shape(leaf))
