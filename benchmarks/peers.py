"""How other frameworks train, each loop as its own documentation shows it.

Every function takes a model with its weights set, `loss(prediction, y)`, an optimizer, and a `Feed`
of batches (x, y), and gives the `Work` of `feed.steps` steps; `weights` reads from the trained
model or parameters what is to be checked. Keras and PyTorch draw the order of an epoch themselves;
where they do, what is checked is the mean loss over all data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from measure import Work

# pyright: reportMissingImports=false


class Feed(NamedTuple):
    """What to train on: arrays [n, ...] that are read in batches, in another order each epoch.

    Where one batch is all of the data it is passed as it stands. `epochs` of it are the work of one
    call.
    """

    x: Any
    y: Any
    batch_size: int
    epochs: int = 1

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.x) // self.batch_size)

    @property
    def whole(self) -> bool:
        return self.batch_size == len(self.x)

    def rows(self) -> Iterator[np.ndarray]:
        """The rows [steps an epoch, batch_size] of one epoch after the other."""
        random = np.random.default_rng(0)
        while True:
            yield random.permutation(len(self.x)).reshape(-1, self.batch_size)

    def stream(self) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch after the other."""
        if self.whole:
            yield from itertools.repeat((self.x, self.y))
        for epoch in self.rows():
            for rows in epoch:
                yield self.x[rows], self.y[rows]


def each_batch(step: Callable, state: Any, feed: Feed, weights: Callable) -> Work:
    """The work of calling a pure function (state, x, y) -> state in a Python loop over batches."""
    stream = feed.stream()

    def run():
        nonlocal state
        for x, y in itertools.islice(stream, feed.steps):
            state = step(state, x, y)
        return state

    return Work(run, feed.steps, weights)


def equinox(model, loss, optimizer, feed, weights) -> Work:
    import equinox as eqx

    @eqx.filter_value_and_grad
    def compute_loss(model, x, y):
        return loss(jax.vmap(model)(x), y)

    @eqx.filter_jit
    def make_step(model, opt_state, x, y):
        value, grads = compute_loss(model, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, value

    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    def step(state, x, y):
        return make_step(state[0], state[1], x, y)

    return each_batch(step, (model, opt_state, None), feed, lambda state: weights(state[0]))


def linen(model, params, loss, optimizer, feed, weights) -> Work:
    from flax.training.train_state import TrainState

    @jax.jit
    def train_step(state, x, y):
        value, grads = jax.value_and_grad(
            lambda params: loss(state.apply_fn({"params": params}, x), y)
        )(state.params)
        return state.apply_gradients(grads=grads), value

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    def step(state, x, y):
        return train_step(state[0], x, y)

    return each_batch(step, (state, None), feed, lambda state: weights(state[0].params))


def nnx(model, loss, optimizer, feed, weights, *, form: str = "jit") -> Work:
    """`form` is one of the ways to compile a step: 'jit', 'cached_partial', 'jit_partial'."""
    from flax import nnx

    def train_step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
        optimizer.update(model, grads)
        return value

    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    if form == "jit_partial":
        step = nnx.jit_partial(train_step, model, optimizer, graph=False)
    elif form == "cached_partial":
        with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
            step = nnx.cached_partial(
                nnx.jit(graph_updates=True, graph=True)(train_step), model, optimizer
            )
    else:
        jitted = nnx.jit(train_step)

        def step(x, y):
            return jitted(model, optimizer, x, y)

    stream = feed.stream()

    def run():
        for x, y in itertools.islice(stream, feed.steps):
            value = step(x, y)
        return value, nnx.state(model)

    return Work(run, feed.steps, lambda output: weights(model))


def haiku(forward, params, loss, optimizer, feed, weights) -> Work:
    import haiku as hk
    import optax

    network = hk.without_apply_rng(hk.transform(forward))

    @jax.jit
    def update(state, x, y):
        params, opt_state, _ = state
        value, grads = jax.value_and_grad(lambda params: loss(network.apply(params, x), y))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state = (params, optimizer.init(params), None)
    return each_batch(update, state, feed, lambda state: weights(state[0]))


def keras(model, loss, optimizer, feed, weights, *, shuffle: bool = True) -> Work:
    """`fit`; the backend is JAX."""
    from keras.utils import set_random_seed

    set_random_seed(0)  # of the orders in which it takes the rows
    model.compile(optimizer=optimizer, loss=loss)

    def run():
        model.fit(
            feed.x,
            feed.y,
            batch_size=feed.batch_size,
            epochs=feed.epochs,
            shuffle=shuffle,
            verbose=0,
        )
        return model.get_weights()

    def result(output):
        return (
            model.evaluate(feed.x, feed.y, batch_size=feed.batch_size, verbose=0)
            if shuffle
            else weights(output)
        )

    return Work(run, feed.steps, result)


def torch(model, loss, optimizer, feed, weights, *, loader: bool = False) -> Work:
    """Batches are indexed from tensors in memory, or with `loader` come from a `DataLoader`."""
    from torch import manual_seed, no_grad, randperm
    from torch.utils.data import DataLoader, TensorDataset

    manual_seed(0)  # of the orders in which it takes the rows

    def epoch():
        if feed.whole:
            yield feed.x, feed.y
        elif loader:
            yield from DataLoader(TensorDataset(feed.x, feed.y), feed.batch_size, shuffle=True)
        else:
            for rows in randperm(len(feed.x)).split(feed.batch_size):
                yield feed.x[rows], feed.y[rows]

    def run():
        for x, y in itertools.chain.from_iterable(epoch() for _ in range(feed.epochs)):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
        return value

    def result(output):
        with no_grad():
            return weights(model) if feed.whole else float(loss(model(feed.x), feed.y))

    return Work(run, feed.steps, result)
