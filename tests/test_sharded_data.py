"""Training on data that an explicit mesh axis shards over the examples. The values are those of the
unsharded run.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxnet.train import (
    NonFiniteError,
    TrainState,
    Weighted,
    augmented,
    balanced,
    evaluate,
    fit,
    train_epoch,
    train_step,
    train_steps,
)

pytestmark = pytest.mark.cpu_only("it wants four devices")

X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
DATA = (X, X[:, 0].copy())
OPTIMIZER = optax.adam(0.1)
# Each place and each context in one way; all ways with the slow tests.
each_way = pytest.mark.parametrize(
    "context, place",
    [
        ("set_mesh", "off the mesh"),
        ("no context", "replicated"),
        pytest.param("set_mesh", "replicated", marks=pytest.mark.slow),
        pytest.param("no context", "off the mesh", marks=pytest.mark.slow),
    ],
)
each_context = pytest.mark.parametrize("context", ["set_mesh", "no context"])


def loss(params, batch):
    return (batch[0] @ params - batch[1]) ** 2


def noise(key, batch):
    return batch[0] + 0.1 * jax.random.normal(key, batch[0].shape), batch[1]


def mesh():
    made = jax.make_mesh((4,), ("d",))
    assert all(kind == jax.sharding.AxisType.Explicit for kind in made.axis_types)
    return made


def sharded(data):
    return jax.device_put(data, NamedSharding(mesh(), PartitionSpec("d")))


def start(place="off the mesh"):
    made = TrainState.create(jnp.zeros(3), OPTIMIZER, jax.random.key(0))
    return (
        jax.device_put(made, NamedSharding(mesh(), PartitionSpec()))
        if place == "replicated"
        else made
    )


def weighted(data):
    return Weighted(data, np.linspace(0.5, 2, 60).astype(np.float32))


def within(context):
    return jax.set_mesh(mesh()) if context == "set_mesh" else contextlib.nullcontext()


def agree(result, expected):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-6)


PURE = {
    "steps": lambda: train_steps(train_step(loss, OPTIMIZER), 12, 7),
    "all at once": lambda: train_steps(train_step(loss, OPTIMIZER), 60, 3),
    "indivisible": lambda: train_steps(train_step(loss, OPTIMIZER), 7, 9),
    "accumulate": lambda: train_steps(train_step(loss, OPTIMIZER, accumulate=2), 16, 7),
    "accumulate, indivisible": lambda: train_steps(
        train_step(loss, OPTIMIZER, accumulate=3), 12, 7
    ),
    "short batch": lambda: train_epoch(train_step(loss, OPTIMIZER), 16, drop_last=False),
    "short batch, indivisible": lambda: train_epoch(
        train_step(loss, OPTIMIZER), 14, drop_last=False
    ),
    "in order": lambda: train_epoch(train_step(loss, OPTIMIZER), 16, order=None),
    "balanced": lambda: train_epoch(
        train_step(loss, OPTIMIZER), 16, order=balanced(np.arange(60) % 7)
    ),
    "augmented": lambda: train_epoch(augmented(train_step(loss, OPTIMIZER), noise), 16),
}


@functools.cache
def unsharded(name):
    return PURE[name]()(start(), DATA)


@pytest.mark.sample(3)
@each_way
@pytest.mark.parametrize("name", PURE)
def test_many_steps(name, context, place):
    expected_state, expected = unsharded(name)
    with within(context):
        state, metrics = PURE[name]()(start(place), sharded(DATA))
        agree((state.params, metrics), (expected_state.params, expected))


@pytest.mark.sample(2)
@each_context
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weighted(context, accumulate):
    run = train_epoch(train_step(loss, OPTIMIZER, accumulate=accumulate), 16)
    expected_state, expected = run(start(), weighted(DATA))
    with within(context):
        state, metrics = run(start(), sharded(weighted(DATA)))
        agree((state.params, metrics), (expected_state.params, expected))


@pytest.mark.parametrize("accumulate, size", [(1, 16), (2, 8)])
def test_a_batch_is_sharded_as_the_data_are(accumulate, size):
    seen = []

    def looking(params, batch):
        seen.append([(leaf.shape, jax.typeof(leaf).sharding.spec) for leaf in batch])
        return loss(params, batch)

    train_epoch(train_step(looking, OPTIMIZER, accumulate=accumulate), 16)(start(), sharded(DATA))
    assert seen[-1] == [((size, 3), PartitionSpec("d", None)), ((size,), PartitionSpec("d"))]


@each_context
@pytest.mark.parametrize("size", [12, 16, 7, 500])
def test_evaluate(context, size):
    def metrics(params, batch):
        return {"error": loss(params, batch)}

    with within(context):
        result = evaluate(metrics, sharded(DATA), batch_size=size)(start())
        np.testing.assert_allclose(result["error"], np.mean(DATA[1].astype(float) ** 2), rtol=1e-5)


@pytest.mark.sample(2)
@each_way
@pytest.mark.parametrize("options", [{}, {"drop_last": False}], ids=str)
def test_fit_resumes(context, place, options, tmp_path):
    def ran(data, begin, epochs, **more):
        result = fit(
            train_step(loss, OPTIMIZER),
            begin,
            data,
            batch_size=16,
            epochs=epochs,
            progress=False,
            **options,
            **more,
        )
        return result.train_state.params, [record["loss"] for record in result.history]

    expected = ran(DATA, start(), 3)
    with within(context):
        data, file = sharded(DATA), tmp_path / "run.safetensors"
        ran(data, start(place), 1, checkpoint=file)
        agree(ran(data, start(place), 3, checkpoint=file), expected)


def test_a_step_that_is_not_finite_is_explained():
    bad = (X.copy(), DATA[1])
    bad[0][3, 1] = np.nan
    with pytest.raises(NonFiniteError, match="row 3"):
        fit(
            train_step(loss, OPTIMIZER),
            start(),
            sharded(bad),
            batch_size=16,
            epochs=1,
            drop_last=False,
            progress=False,
        )


def test_data_may_be_sharded_over_the_features_too():
    both = NamedSharding(jax.make_mesh((2, 2), ("d", "m")), PartitionSpec("d", "m"))
    wide = np.concatenate([X, X[:, :1]], 1)
    begin = TrainState.create(jnp.zeros(4), 0.1, jax.random.key(0))

    def squares(params, batch):
        return ((batch * params[None]).sum(1) - 1) ** 2

    for accumulate, size in ((1, 16), (2, 12)):
        run = train_epoch(train_step(squares, 0.1, accumulate=accumulate), size)
        agree(run(begin, jax.device_put(wide, both))[1], run(begin, wide)[1])
