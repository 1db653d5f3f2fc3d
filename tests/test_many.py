"""Many trainings at once: every form of `many` against one run at a time, its choice of blocks, its
errors by text.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnet import chain, dense
from jaxnet.train import TrainState, many, train_step, train_steps

MEMBERS = 6
FORMS = ["vmap", "map", 4, None]  # blocks of 4 leave a rest of 2


def keys():
    return jax.random.split(jax.random.key(0), MEMBERS)


def rates():
    return jnp.geomspace(1e-3, 1e-1, MEMBERS)


@functools.cache
def problem():
    random = np.random.default_rng(0)
    data = (
        random.normal(size=(24, 3)).astype(np.float32),
        random.normal(size=(24, 2)).astype(np.float32),
    )
    return chain(up=dense(5), bend=jnp.tanh, down=dense(2)), data


def mean_square(params, batch):
    net, (x, y) = problem()[0], batch
    return jnp.mean(jnp.square(net.apply(params, x) - y))


def run(key, lr):
    """A whole training, its learning rate traced: initial weights, batches in an order of its own,
    Adam.
    """
    net, data = problem()
    optimizer = optax.adam(lr)
    init_key, run_key = jax.random.split(key)
    start = TrainState.create(net.init(init_key, data[0]), optimizer, run_key)
    return train_steps(train_step(mean_square, optimizer), 8, 7)(start, data)


def assert_equal_members(all, ones, rtol=2e-5):
    """`all` is the stack of `ones`, each leaf to `rtol` of its largest value."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *ones)
    assert jax.tree.structure(all) == jax.tree.structure(stacked)
    for leaf, expected in zip(jax.tree.leaves(all), jax.tree.leaves(stacked), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=rtol * np.abs(expected).max())


@functools.cache
def one_by_one():
    """(params, losses) of each member, trained alone."""
    single = jax.jit(run)
    ends = [single(key, lr) for key, lr in zip(keys(), rates(), strict=True)]
    return [jax.tree.map(np.asarray, (end.params, metrics["loss"])) for end, metrics in ends]


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", FORMS)
def test_every_member_is_the_run_alone(how):
    end, metrics = many(run, how=how)(keys(), rates())
    assert_equal_members((end.params, metrics["loss"]), one_by_one())
    np.testing.assert_array_equal(
        jax.random.key_data(end.key)[1], jax.random.key_data(jax.random.split(keys()[1])[1])
    )
    if how == "map":  # the same program in a loop: no rounding either
        assert_equal_members((end.params, metrics["loss"]), one_by_one(), rtol=0)


def test_each_member_has_its_own_learning_rate():
    """The first step of Adam is lr * sign(g) for every weight (Kingma & Ba 2015, section 2.1),
    epsilon aside.
    """

    def first_step(lr):
        optimizer = optax.adam(lr)
        params = {"w": jnp.ones(3)}
        step = train_step(lambda params, batch: jnp.sum(params["w"] * batch), optimizer)
        return step(
            TrainState.create(params, optimizer, jax.random.key(0)), jnp.array([5.0, -3.0, 2.0])
        )[0].params["w"]

    moved = many(first_step)(rates()) - 1
    np.testing.assert_allclose(moved, -np.outer(rates(), [1.0, -1.0, 1.0]), rtol=1e-4)


@pytest.mark.parametrize("how", ["vmap", "map", 4, None])
def test_jit_grad_and_vmap_go_through(how):
    def descend(params, lr):
        """20 steps on h w^2 / 2: w (1 - lr h)^20."""
        return jax.lax.fori_loop(0, 20, lambda _, w: w - lr * 3.0 * w, params["w"])

    f = many(descend, how=how)
    w, lr = {"w": jnp.arange(1.0, 6.0)}, jnp.linspace(0.01, 0.1, 5)
    expected = w["w"] * (1 - 3 * lr) ** 20
    np.testing.assert_allclose(jax.jit(f)(w, lr), expected, rtol=1e-5)
    slope = jax.grad(lambda w, lr: f(w, lr).sum(), argnums=(0, 1))(w, lr)
    np.testing.assert_allclose(slope[0]["w"], (1 - 3 * lr) ** 20, rtol=1e-5)
    np.testing.assert_allclose(slope[1], -60 * w["w"] * (1 - 3 * lr) ** 19, rtol=1e-5)
    twice = jax.vmap(f)(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), w), jnp.stack([lr, lr]))
    np.testing.assert_allclose(twice, jnp.stack([expected, -expected]), rtol=1e-5)


def test_it_compiles_once_and_takes_keywords():
    traces = []

    def add(x, *, y):
        traces.append(1)
        return x + y

    f = many(add, how="vmap")
    for start in range(3):
        np.testing.assert_array_equal(
            f(jnp.arange(3) + start, y=jnp.ones(3, int)), np.arange(3) + start + 1
        )
    assert len(traces) == 1


# The choice of blocks on a CPU


def widths_of_calls(f, *args):
    """How many members in step the program has: the leading axis of its largest result of rank 2,
    read off its text.
    """
    text = jax.jit(f).lower(*args).as_text()
    shapes = [
        line.split("tensor<")[-1].split("x")
        for line in text.splitlines()
        if "stablehlo.tanh" in line
    ]
    return {int(shape[0]) if len(shape) == 3 else 1 for shape in shapes}


@pytest.mark.cpu_only("it counts the blocks of the CPU")
@pytest.mark.parametrize(
    "members, size, block",
    [
        (64, 100, 16),  # small: as many as hide the cost of a loop
        (64, 128 * 1024, 4),  # 512 KiB each: four are 2 MiB
        (64, 1024 * 1024, 1),  # 4 MiB: one after the other
        (40, 100, 10),  # a divisor, so that no rest needs a program of its own
        (6, 100, 6),
        (19, 100, 16),  # no divisor above half: a rest of 3
    ],
)
def test_blocks_on_a_cpu_share_two_mebibytes(members, size, block):
    def grow(seed):
        w = jnp.full(size, seed)
        return jax.lax.fori_loop(0, 3, lambda _, w: jnp.tanh(w), w).sum()

    widths = widths_of_calls(many(grow), jnp.ones(members))
    assert widths == {block} | ({members % block} - {0})


@pytest.mark.cpu_only("it counts the blocks of the CPU")
def test_what_the_loop_carries_counts_wherever_it_is_nested():
    """Half a MiB in two leaves within a jit within a loop: blocks of four; integers, such as an
    order of data, do not count.
    """

    @jax.jit
    def inner(carry):
        a, b, order = carry
        return jnp.tanh(a), -b, order[::-1]

    def nested(seed):
        start = jnp.full(2**16, seed), jnp.full(2**16, seed), jnp.arange(2**20)
        return jax.lax.scan(lambda carry, _: (inner(carry), None), start, length=3)[0][0][0]

    assert widths_of_calls(many(nested), jnp.ones(64)) == {4}


def test_other_platforms_get_vmap():
    lowered = jax.export.export(jax.jit(many(lambda x: jnp.tanh(x) * 2)), platforms=["cuda"])(
        jnp.ones((64, 3))
    )
    assert "tensor<64x3xf32>" in lowered.mlir_module() and "while" not in lowered.mlir_module()


# Errors


def test_arguments_without_a_common_leading_axis_are_named():
    with pytest.raises(
        ValueError,
        match=r"must have the same number of members, got {'0': 6, '1': 5}; let `run` close",
    ):
        many(run)(keys(), rates()[:5])
    with pytest.raises(ValueError, match=r"needs a leading axis of members, '0/lr' is a scalar"):
        many(lambda p: p["w"] * p["lr"])({"w": jnp.ones((6, 2)), "lr": 0.1})
    with pytest.raises(ValueError, match="there are no members"):
        many(lambda x: x)(x=jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="there are no members"):
        many(lambda: 1)()


def test_a_size_of_numpy_is_a_how():
    added = many(lambda x: x + 1, how=np.int64(2))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(added(jnp.arange(5)), np.arange(5) + 1)


@pytest.mark.parametrize("how", ["pmap", 0, -1, 2.0, True, np.bool_(True)])
def test_another_how_is_refused(how):
    with pytest.raises(
        ValueError,
        match="how must be 'vmap', 'map' or None, or else it must be a positive int, got",
    ):
        many(run, how=how)
