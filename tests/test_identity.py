"""A run that resumes is told apart from the run that wrote the file, by its step and by its
order.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet.train import TrainState, balanced, fit, train_step

X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
DATA = (X, X[:, 0].copy())


def loss(params, batch):
    return (batch[0] @ params - batch[1]) ** 2


def ran(file, step, optimizer=0.1, epochs=1, **options):
    start = TrainState.create(jnp.zeros(3), optimizer, jax.random.key(0))
    return fit(
        step, start, DATA, batch_size=8, epochs=epochs, checkpoint=file, progress=False, **options
    )


def weighing(weights):
    table = jnp.asarray(weights, jnp.float32)
    return lambda params, batch: loss(params, batch) * table[jnp.arange(8) % 2]


def looked_up(*rates):
    table = jnp.asarray(rates, jnp.float32)
    return lambda count: table[jnp.minimum(count, len(rates) - 1)]


def with_key(seed):
    key = jax.random.key(seed)
    return lambda params, batch: (
        loss(params, batch) * jax.random.key_data(key)[-1].astype(jnp.float32)
    )


CHANGED = {
    "a rate": lambda one: (train_step(loss, jnp.float32(0.1 if one else 0.2)), 0.1),
    "a rate of adam": lambda one: adam_of(jnp.float32(0.1 if one else 0.2)),
    "class weights": lambda one: (train_step(weighing([1, 2] if one else [1, 3]), 0.1), 0.1),
    "a table of rates": lambda one: (
        train_step(loss, looked_up(0.1, 0.2, 0.3 if one else 0.4)),
        0.1,
    ),
    "weights of numpy": lambda one: (train_step(weighed_by_numpy(1.0 if one else 2.0), 0.1), 0.1),
    "inside jit": lambda one: (train_step(jax.jit(weighing([1, 2] if one else [1, 3])), 0.1), 0.1),
    "a key": lambda one: (train_step(with_key(int(one)), 0.1), 0.1),
}


def adam_of(rate):
    return train_step(loss, optax.adam(rate)), optax.adam(rate)


def weighed_by_numpy(last):
    table = np.asarray([1.0] * 7 + [last], np.float32)
    return lambda params, batch: loss(params, batch) * table


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CHANGED)
def test_a_step_with_other_constants_is_another_one(name, tmp_path):
    file = tmp_path / "run.safetensors"
    ran(file, *CHANGED[name](True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran(file, *CHANGED[name](True), epochs=2)
    with pytest.warns(UserWarning, match="the step is not that of the run before") as told:
        ran(file, *CHANGED[name](False), epochs=4)
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match="Its step was another one"):
        ran(file, *CHANGED[name](True), epochs=4)


def backward():
    return lambda key, n, epoch, positions: n - 1 - positions


def turned(by):
    return lambda key, n, epoch, positions: (positions + by * epoch) % n


LABELS = np.arange(24) % 3
ORDERS = {
    "labels": (lambda: balanced(LABELS), lambda: balanced(LABELS[::-1])),
    "other classes": (lambda: balanced(LABELS), lambda: balanced(np.minimum(LABELS, 1))),
    "functions": (backward, lambda: turned(0)),
    "a later epoch": (lambda: turned(1), lambda: turned(2)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_of_other_rows_is_another_one(name, tmp_path):
    (one, other), step, file = ORDERS[name], train_step(loss, 0.1), tmp_path / "run.safetensors"
    ran(file, step, order=one())
    ran(file, step, order=one(), epochs=2)
    with pytest.raises(ValueError, match="order"):
        ran(file, step, order=other(), epochs=3)


def test_the_type_of_labels_does_not_matter(tmp_path):
    step, file = train_step(loss, 0.1), tmp_path / "run.safetensors"
    ran(file, step, order=balanced(LABELS.astype(np.int64)))
    assert (
        ran(file, step, order=balanced(LABELS.astype(np.uint8)), epochs=2).history[-1]["epoch"] == 2
    )
