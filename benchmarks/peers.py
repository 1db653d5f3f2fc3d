"""How other frameworks train on one batch, each loop as its own documentation shows it.

Every function takes a model with its weights set, `loss(prediction, y)`, an optimizer, and the batch (x, y), and gives
the `Work` of `steps` steps; `weights` reads from the trained model or parameters what is to be checked.
"""

from __future__ import annotations

import jax
from measure import Work, carried

# pyright: reportMissingImports=false


def equinox(model, loss, optimizer, batch, steps, weights) -> Work:
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

    def step(state):
        return make_step(*state[:2], *batch)

    return carried(step, (model, opt_state, None), lambda state: weights(state[0]), calls=steps)


def linen(model, params, loss, optimizer, batch, steps, weights) -> Work:
    from flax.training.train_state import TrainState

    @jax.jit
    def train_step(state, x, y):
        value, grads = jax.value_and_grad(lambda params: loss(state.apply_fn({"params": params}, x), y))(state.params)
        return state.apply_gradients(grads=grads), value

    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    def step(state):
        return train_step(state[0], *batch)

    return carried(step, (state, None), lambda state: weights(state[0].params), calls=steps)


def nnx(model, loss, optimizer, batch, steps, weights, *, form: str = "jit") -> Work:
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
            step = nnx.cached_partial(nnx.jit(graph_updates=True, graph=True)(train_step), model, optimizer)
    else:
        jitted = nnx.jit(train_step)

        def step(x, y):
            return jitted(model, optimizer, x, y)

    def run():
        for _ in range(steps):
            value = step(*batch)
        return value, nnx.state(model)

    return Work(run, steps, lambda output: weights(model))


def haiku(forward, params, loss, optimizer, batch, steps, weights) -> Work:
    import haiku as hk
    import optax

    network = hk.without_apply_rng(hk.transform(forward))

    @jax.jit
    def update(state, x, y):
        params, opt_state, _ = state
        value, grads = jax.value_and_grad(lambda params: loss(network.apply(params, x), y))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def step(state):
        return update(state, *batch)

    state = (params, optimizer.init(params), None)
    return carried(step, state, lambda state: weights(state[0]), calls=steps)


def keras(model, loss, optimizer, data, epochs, steps, weights) -> Work:
    """`fit` over data of `steps` batches in all epochs together; the backend is JAX."""
    (x, y), batch_size = data
    model.compile(optimizer=optimizer, loss=loss)

    def run():
        model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
        return model.get_weights()

    return Work(run, steps, weights)


def torch(model, loss, optimizer, batch, steps, weights) -> Work:
    x, y = batch

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
        return value

    return Work(run, steps, lambda output: weights(model))
