"""The training loop: its steps against hand-written JAX and NumPy, its order of the data against
theory, its errors by text.
"""

import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import NET, key0, mean_square, params_of, regression

import jaxnet
from jaxnet import batch_norm, cast, chain, dense, dropout, layer_norm
from jaxnet.train import (
    TrainState,
    Weighted,
    augmented,
    averaged,
    averaged_params,
    balanced,
    by_path,
    evaluate,
    freeze,
    guarded,
    sgd,
    shuffled,
    train_epoch,
    train_step,
    train_steps,
)

# One step


def test_sgd_is_w_minus_rate_times_gradient_and_keeps_the_dtype():
    params = {"a": jnp.float32(2), "b": jnp.ones(3, jnp.bfloat16)}
    new = sgd(params, {"a": jnp.float32(4), "b": jnp.full(3, 2, jnp.bfloat16)}, np.float64(0.25))
    assert new["a"] == 2 - 0.25 * 4 and new["b"].dtype == jnp.bfloat16 and (new["b"] == 0.5).all()


def test_sgd_contracts_a_parabola_at_rate_one_minus_lr_h():
    h, lr = 4.0, 0.1
    step = train_step(lambda w, batch: h * w**2 / 2, lr)
    state, metrics = jax.lax.scan(
        step, TrainState.create(jnp.float32(1), lr, key0()), jnp.zeros(20)
    )
    # Exact linear recursion.
    np.testing.assert_allclose(state.params, (1 - lr * h) ** 20, rtol=1e-5)
    assert metrics["loss"].shape == (20,) and state.step == 20


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.adamw(1e-2), optax.chain(optax.clip(0.1), optax.sgd(0.1))]
)
def test_any_optax_optimizer_goes_through_the_step_as_written_by_hand(optimizer):
    batch, params = regression(), params_of()
    state = TrainState.create(params, optimizer, key0())
    step = jax.jit(train_step(mean_square, optimizer))
    opt = optimizer.init(params)
    for _ in range(3):
        state, metrics = step(state, batch)
        value, grads = jax.value_and_grad(mean_square)(params, batch)
        updates, opt = optimizer.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    chex.assert_trees_all_close(state.params, params, rtol=1e-5)
    chex.assert_trees_all_close(state.opt, opt, rtol=1e-5)


def test_plain_sgd_takes_an_optax_schedule_of_the_step():
    schedule = optax.linear_schedule(1.0, 0.0, 4)  # 1, 3/4, 1/2, 1/4, then 0
    step = train_step(lambda w, batch: w, schedule)
    state, _ = jax.lax.scan(step, TrainState.create(jnp.float32(0), schedule, key0()), jnp.zeros(6))
    assert state.params == -(1 + 0.75 + 0.5 + 0.25)


def test_the_step_compiles_once():
    step = jax.jit(chex.assert_max_traces(train_step(mean_square, optax.adam(1e-3)).run, n=1))
    state = TrainState.create(params_of(), optax.adam(1e-3), key0())
    for _ in range(3):
        state, _ = step(state, regression())


def test_a_loss_gets_key_and_state_only_if_it_names_them():
    net = chain(dense(4), batch_norm(), dropout(0.5), dense(1))
    x, y = regression()
    params, state = net.init(key0(), x), net.init_state(x)

    def loss(params, batch, state, key):
        out, state = net.apply(params, batch[0], state=state, key=key, train=True)
        return jnp.mean(jnp.square(out - batch[1])), state, {"mean": out.mean()}

    step = jax.jit(train_step(loss, 0.1))
    start = TrainState.create(params, 0.1, key0(), state=state)
    one, metrics = step(start, (x, y))
    assert set(metrics) == {"loss", "mean"}
    assert not np.array_equal(one.state["1"]["mean"], state["1"]["mean"])
    again, same = step(start, (x, y))
    assert same["loss"] == metrics["loss"]  # the noise follows from key and step alone
    _, other = step(start._replace(step=jnp.int32(1)), (x, y))
    assert other["loss"] != metrics["loss"]


@pytest.mark.parametrize(
    "loss, error, text",
    [
        (
            lambda p, b: p * jnp.ones(3),
            ValueError,
            r"must be a scalar or one value per example \[2\], got shape \(3,\); take its mean",
        ),
        (lambda p, b: (p, {}, {}), TypeError, r"returns a scalar or \(value, metrics\)"),
        (lambda p, b: (p, 3.0), TypeError, "with a dict of metrics"),
        (lambda p, b, state: p, TypeError, r"returns \(value, new_state\)"),
    ],
)
def test_a_loss_of_another_form_is_named(loss, error, text):
    with pytest.raises(error, match=text):
        train_step(loss, 0.1)(TrainState.create(jnp.float32(1), 0.1, key0()), jnp.zeros(2))


# The order of the data


@pytest.mark.sample(4)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1797])
def test_shuffled_is_a_permutation(n):
    assert sorted(np.asarray(shuffled(key0(), n, jnp.arange(n)))) == list(range(n))


def test_every_order_of_four_is_equally_likely():
    runs = 24_000
    orders = jax.jit(jax.vmap(lambda key: shuffled(key, 4, jnp.arange(4))))(
        jax.random.split(key0(), runs)
    )
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    expected = runs / math.factorial(4)
    assert len(counts) == 24
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    # Mean and deviation of chi squared with 23 degrees of freedom.
    assert chi_squared < 23 + 5 * math.sqrt(2 * 23)


def test_neighbours_come_apart_as_they_should():
    n, runs = 101, 4000
    orders = np.asarray(
        jax.jit(jax.vmap(lambda key: shuffled(key, n, jnp.arange(n))))(
            jax.random.split(key0(), runs)
        )
    )
    apart = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    expected = apart.sum() / (n - 1)  # each difference but 0 is equally likely
    chi_squared = np.sum((apart - expected) ** 2 / expected)
    assert abs(chi_squared - (n - 2)) < 5 * math.sqrt(2 * (n - 2))


def seen_rows(chunks, batch_size, n, **settings):
    """Which rows the steps of these chunks see, in order."""

    def step(state, batch):
        return state._replace(step=state.step + 1), {"rows": batch}

    state, rows = TrainState({}, {}, (), jax.random.key(7), jnp.int32(0)), []
    for steps in chunks:
        state, metrics = jax.jit(train_steps(step, batch_size, steps, **settings))(
            state, jnp.arange(n)
        )
        rows += list(np.asarray(metrics["rows"]))
    return rows


def test_each_epoch_sees_each_example_at_most_once_and_another_order():
    # Two epochs of three steps; one example of ten is left out of each.
    rows = seen_rows([6], batch_size=3, n=10)
    first, second = np.concatenate(rows[:3]), np.concatenate(rows[3:])
    assert len(set(first)) == len(set(second)) == 9 and not np.array_equal(first, second)


@pytest.mark.parametrize("chunks", [[1] * 8, [3, 5]])
def test_the_order_does_not_depend_on_the_chunks(chunks):
    np.testing.assert_array_equal(seen_rows(chunks, 3, 10), seen_rows([8], 3, 10))


def test_a_full_batch_is_the_data_as_it_stands():
    np.testing.assert_array_equal(seen_rows([2], 7, 7), [np.arange(7)] * 2)


def test_an_epoch_equals_a_python_loop_over_its_steps():
    data, optimizer = regression(), optax.adam(1e-2)
    step = train_step(mean_square, optimizer)
    start = TrainState.create(params_of(), optimizer, key0())
    state, metrics = jax.jit(train_epoch(step, 4))(start, data)
    rows = shuffled(
        jax.random.fold_in(jax.random.fold_in(key0(), 0x6F726465), 0), 12, jnp.arange(12)
    ).reshape(3, 4)
    expected = start
    for row in rows:
        expected, _ = step(
            expected, jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf)[row], data)
        )
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
    assert metrics["loss"].shape == (3,)


def test_a_run_maps_over_seeds_and_rates():
    data = regression()

    def run(key, lr):
        state, metrics = train_steps(train_step(mean_square, lr), 4, 9)(
            TrainState.create(params_of(), lr, key), data
        )
        return state.params, metrics["loss"][-1]

    keys, rates = jax.random.split(key0(), 3), jnp.array([0.01, 0.05, 0.1])
    params, losses = jax.jit(jax.vmap(run))(keys, rates)
    for i in range(3):
        one, loss = jax.jit(run)(keys[i], rates[i])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], params), one, rtol=1e-4)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-3)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    net = chain(dense(4), batch_norm(), dropout(0.5), dense(1))
    data, optimizer = regression(), optax.adamw(optax.cosine_decay_schedule(0.05, 8))

    def loss(params, batch, state, key):
        out, state = net.apply(params, batch[0], state=state, key=key, train=True)
        return jnp.mean(jnp.square(out - batch[1])), state

    start = TrainState.create(
        net.init(key0(), data[0]), optimizer, key0(), state=net.init_state(data[0])
    )
    run = jax.jit(train_steps(train_step(loss, optimizer), 4, 4))
    half, _ = run(start, data)
    whole, losses = run(half, data)
    jaxnet.save(tmp_path / "half.safetensors", half)
    again, same = run(jaxnet.load(tmp_path / "half.safetensors", like=half), data)
    chex.assert_trees_all_equal(jax.tree.map(bits, again), jax.tree.map(bits, whole))
    np.testing.assert_array_equal(losses["loss"], same["loss"])


def bits(leaf):
    """What can be compared bit for bit: also of a key."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


# The order of the data: classes


def test_balanced_gives_every_class_its_share_and_every_example_its_turn():
    labels = np.array([0] * 70 + [5] * 20 + [9] * 9)  # 99 positions an epoch, 33 for each class
    order = balanced(labels)
    seen = np.zeros(99)
    for epoch in range(40):
        rows = np.asarray(order(key0(), 99, jnp.int32(epoch), jnp.arange(99)))
        assert [(labels[rows] == label).sum() for label in (0, 5, 9)] == [33, 33, 33]
        counts = np.bincount(rows, minlength=99)
        for label, size in ((0, 70), (5, 20), (9, 9)):
            mine = counts[labels == label]
            # As equally often as 33 draws from so many can be.
            assert set(mine) <= {33 // size, -(-33 // size)}
        seen += counts
    assert (seen[:70] > 0).all() and abs(seen[:70] - 40 * 33 / 70).max() < 5 * math.sqrt(
        40 * 33 / 70
    )


def test_balanced_says_what_it_cannot_use():
    with pytest.raises(TypeError, match=r"labels must be integers \[n\], got float64\[2\]"):
        balanced([0.5, 1.0])
    with pytest.raises(ValueError, match="there are no labels"):
        balanced(np.zeros(0, int))
    with pytest.raises(ValueError, match="made for 3 labels, used on data with 10 examples"):
        seen_rows([1], 2, 10, order=balanced([0, 1, 1]))


def test_without_an_order_the_data_come_as_they_stand():
    np.testing.assert_array_equal(seen_rows([5], 3, 9, order=None), np.arange(15).reshape(5, 3) % 9)


def test_the_last_batch_of_an_epoch_has_its_true_size():
    def step(state, batch):
        counts = jnp.zeros(10, jnp.int32).at[batch].add(1)
        named = {f"row{i}": counts[i] for i in range(10)}
        return state._replace(step=state.step + 1), named | {"size": jnp.int32(len(batch))}

    start = TrainState({}, {}, (), jax.random.key(7), jnp.int32(0))
    # Two epochs of three batches.
    _, seen = jax.jit(train_steps(step, 4, 6, drop_last=False))(start, jnp.arange(10))
    assert list(seen["size"]) == [4, 4, 2] * 2 and list(seen["weight"]) == [4, 4, 2] * 2
    for epoch in (slice(0, 3), slice(3, 6)):
        assert [seen[f"row{i}"][epoch].sum() for i in range(10)] == [1] * 10


def test_statistics_of_the_last_batch_are_of_its_own_examples():
    """18 examples in batches of 8: after the third step of an epoch the running variance has seen
    two rows, not copies.
    """
    net = chain(norm=batch_norm(momentum=0.0))  # keeps the last batch's statistics
    x = np.asarray(jax.random.normal(jax.random.key(3), (18, 2)), np.float32) * 2

    def loss(params, x, state):
        out, state = net.apply(params, x, state=state, train=True)
        return jnp.square(out).sum(-1), state

    start = TrainState.create(net.init(key0(), x), 0.0, key0(), state=net.init_state(x))
    run = jax.jit(train_steps(train_step(loss, 0.0), 8, 3, order=None, drop_last=False))
    end, metrics = run(start, x)
    np.testing.assert_allclose(end.state["norm"]["mean"], x[16:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(end.state["norm"]["var"], x[16:].var(0, ddof=1), rtol=1e-5)
    assert list(metrics["weight"]) == [8, 8, 2]


def test_one_example_that_is_left_over_is_refused_by_a_layer_that_needs_two():
    net, x = chain(batch_norm()), np.ones((9, 2), np.float32)

    def loss(params, x, state):
        out, state = net.apply(params, x, state=state, train=True)
        return out.sum(-1), state

    start = TrainState.create(net.init(key0(), x), 0.1, key0(), state=net.init_state(x))
    with pytest.raises(ValueError) as caught:
        train_steps(train_step(loss, 0.1), 4, 3, drop_last=False)(start, x)
    assert any(
        "with drop_last=False an epoch ends with a batch of 1 examples" in note
        for note in caught.value.__notes__
    )


def test_a_metric_whose_shape_follows_the_batch_cannot_end_an_epoch_early():
    def step(state, batch):
        return state, {"rows": batch}

    start = TrainState({}, {}, (), key0(), jnp.int32(0))
    with pytest.raises(
        ValueError,
        match=r"the metrics \['rows'\] have another shape in the last batch, of 2 examples",
    ):
        train_steps(step, 4, 3, drop_last=False)(start, jnp.arange(10))


@pytest.mark.parametrize("loss_is", ["scalar", "per example"])
def test_an_epoch_with_a_short_batch_equals_a_loop_in_python(loss_is):
    data, optimizer = regression(10), optax.adam(1e-2)
    step = train_step(mean_square if loss_is == "scalar" else squares, optimizer)
    start = TrainState.create(params_of(), optimizer, key0())
    state, metrics = jax.jit(train_epoch(step, 4, order=None, drop_last=False))(start, data)
    expected, losses = start, []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        expected, one = step(
            expected, jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), data)
        )
        losses.append(one["loss"])
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)


# Weights


def squares(params, batch):
    x, y = batch
    return jnp.square(NET.apply(params, x) - y)[:, 0]


def test_one_value_an_example_is_averaged_as_by_hand():
    batch, params = regression(), params_of()
    by_hand = jax.jit(train_step(mean_square, 0.1))(TrainState.create(params, 0.1, key0()), batch)
    by_step = jax.jit(train_step(squares, 0.1))(TrainState.create(params, 0.1, key0()), batch)
    chex.assert_trees_all_close(by_hand[0].params, by_step[0].params, rtol=1e-6)
    np.testing.assert_allclose(by_hand[1]["loss"], by_step[1]["loss"], rtol=1e-6)


def test_weights_count_as_repetitions_do():
    (x, y), params = regression(4), params_of()
    weights = np.array([2, 1, 0, 3], np.float32)
    rows = np.repeat(np.arange(4), weights.astype(int))
    step = jax.jit(train_step(lambda p, b: (squares(p, b), {"big": squares(p, b) > 1}), 0.1))
    weighted, metrics = step(TrainState.create(params, 0.1, key0()), Weighted((x, y), weights))
    repeated, expected = step(TrainState.create(params, 0.1, key0()), (x[rows], y[rows]))
    chex.assert_trees_all_close(weighted.params, repeated.params, rtol=1e-5)
    assert metrics["weight"] == 6 and metrics["big"] == pytest.approx(float(expected["big"]))
    nothing, _ = step(
        TrainState.create(params, 0.1, key0()), Weighted((x, y), np.zeros(4, np.float32))
    )
    chex.assert_trees_all_equal(nothing.params, params)


def test_weights_go_with_their_rows_through_an_epoch():
    def step(state, batch):
        return state._replace(step=state.step + 1), {"same": (batch.batch == batch.weights).all()}

    data = Weighted(jnp.arange(9.0), jnp.arange(9.0))
    start = TrainState({}, {}, (), jax.random.key(7), jnp.int32(0))
    assert jax.jit(train_steps(step, 3, 6))(start, data)[1]["same"].all()


def test_a_scalar_loss_cannot_be_weighted():
    (x, y), weights = regression(4), np.ones(4, np.float32)
    with pytest.raises(
        ValueError, match=r"the loss must be one value per example \[B\], got a scalar"
    ):
        train_step(mean_square, 0.1)(
            TrainState.create(params_of(), 0.1, key0()), Weighted((x, y), weights)
        )


# Parts of a batch


@pytest.mark.parametrize("loss", [mean_square, squares])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_gradients_are_those_of_the_large_batch(loss, weighted):
    if weighted and loss is mean_square:
        pytest.skip("a scalar loss cannot be weighted")
    batch = Weighted(regression(), np.arange(12, dtype=np.float32)) if weighted else regression()
    params, optimizer = params_of(), optax.sgd(0.1)

    def noted(params, batch):
        return loss(params, batch), {"mean": batch[0].mean()} if not weighted else {
            "first": batch[0][:, 0]
        }

    whole = jax.jit(train_step(noted, optimizer))(
        TrainState.create(params, optimizer, key0()), batch
    )
    parts = jax.jit(train_step(noted, optimizer, accumulate=4))(
        TrainState.create(params, optimizer, key0()), batch
    )
    chex.assert_trees_all_close(whole[0].params, parts[0].params, rtol=1e-5)
    chex.assert_trees_all_close(whole[1], parts[1], rtol=1e-5)


def test_parts_take_less_memory_than_the_whole():
    def loss(w, x):
        return jnp.mean(jnp.tanh(jnp.outer(x, w)) ** 2)  # an activation of [B, D]

    def temporary(accumulate):
        step = jax.jit(train_step(loss, 0.1, accumulate=accumulate))
        args = TrainState.create(jnp.ones(1000), 0.1, key0()), jnp.ones(1000)
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes  # pyright: ignore

    assert temporary(10) < temporary(1) / 4


def test_parts_draw_noise_of_their_own_and_pass_state_on():
    def loss(w, batch, state, key):
        return w + jnp.mean(batch), {"n": state["n"] + 1}, {"noise": jax.random.uniform(key)}

    step = jax.jit(train_step(loss, 0.1, accumulate=3))
    state, metrics = step(
        TrainState.create(jnp.float32(0), 0.1, key0(), state={"n": jnp.int32(0)}), jnp.ones(6)
    )
    assert state.state["n"] == 3
    step_key = jax.random.fold_in(key0(), 0)
    noise = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.clone(step_key), i)))
        for i in range(3)
    ]
    assert len(set(noise)) == 3 and metrics["noise"] == pytest.approx(np.mean(noise))


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match="a batch of 12 does not divide into accumulate=5 equal parts"
    ):
        train_step(mean_square, 0.1, accumulate=5)(
            TrainState.create(params_of(), 0.1, key0()), regression()
        )
    with pytest.raises(ValueError, match="accumulate must be a positive int, got 0"):
        train_step(mean_square, 0.1, accumulate=0)


def test_a_change_of_the_batch_follows_from_key_and_step():
    def loss(w, x):
        return w * x.mean()

    def noise(key, x):
        return x + jax.random.normal(key, x.shape)

    step = jax.jit(augmented(train_step(loss, 0.0), noise))
    start = TrainState.create(jnp.float32(1), 0.0, key0())
    first, one = step(start, jnp.zeros(8))
    assert (
        one["loss"] == step(start, jnp.zeros(8))[1]["loss"] != step(first, jnp.zeros(8))[1]["loss"]
    )
    weighted, _ = jax.jit(augmented(train_step(lambda w, x: w * x, 0.1), lambda key, x: x + 1))(
        start, Weighted(jnp.zeros(2), jnp.ones(2))
    )
    # The gradient is 1, the mean of what came out of the change.
    assert weighted.params == pytest.approx(0.9)


# Around an optimizer


def test_groups_have_optimizers_of_their_own_and_frozen_ones_do_not_move():
    params = {"body": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
    optimizer = by_path({"body/kernel": None, "**/bias": 0.5, "**": optax.sgd(0.25)})
    step = jax.jit(
        train_step(lambda p, b: sum(leaf.sum() for leaf in jax.tree.leaves(p)), optimizer)
    )
    state, _ = step(TrainState.create(params, optimizer, key0()), jnp.zeros(1))
    assert jax.tree.map(lambda leaf: float(leaf[0]), state.params) == {
        "body": {"kernel": 1.0, "bias": 0.5},
        "head": {"kernel": 0.75},
    }
    frozen = freeze(0.25, "body")
    state, _ = jax.jit(
        train_step(lambda p, b: sum(leaf.sum() for leaf in jax.tree.leaves(p)), frozen)
    )(TrainState.create(params, frozen, key0()), jnp.zeros(1))
    assert jax.tree.map(lambda leaf: float(leaf[0]), state.params)["body"] == {
        "kernel": 1.0,
        "bias": 1.0,
    }


@pytest.mark.cpu_only("it counts the products in the CPU's program")
def test_a_frozen_layers_gradient_is_not_computed():
    params = {"body": jnp.ones((64, 64)), "head": jnp.ones((64, 64))}

    def loss(p, x):
        return jnp.mean(x @ p["body"] @ p["head"])

    def products(optimizer):
        text = jax.jit(train_step(loss, optimizer)).lower(
            TrainState.create(params, optimizer, key0()), jnp.ones((8, 64))
        )
        return (text.compile().as_text() or "").count(" dot(")

    assert products(freeze(0.1, "body")) < products(0.1)


def test_groups_that_miss_something_are_named():
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(KeyError, match=r"no pattern matches \['b'\]; the last may be '\*\*'"):
        by_path({"a": 0.1}).init(params)
    with pytest.raises(
        KeyError, match=r"nothing is left for \['c'\].* The parameters are \['a', 'b'\]"
    ):
        freeze(0.1, "c").init(params)


def test_the_average_follows_its_formula():
    optimizer = averaged(1.0, decay=0.5)
    step = jax.jit(train_step(lambda w, b: -w, optimizer))  # w = 0, 1, 2, 3, ...
    state, expected = TrainState.create(jnp.float32(0), optimizer, key0()), 0.0
    for t in range(12):
        state, _ = step(state, jnp.zeros(1))
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * (t + 1)
        assert averaged_params(state) == pytest.approx(expected, rel=1e-5)
    assert state.params == 12
    with pytest.raises(ValueError, match="wrap it in `averaged`"):
        averaged_params(TrainState.create(jnp.float32(0), 0.1, key0()))


def test_half_precision_is_averaged_in_float32():
    optimizer = averaged(optax.sgd(0.0), decay=0.999)
    state = TrainState.create(jnp.bfloat16(1), optimizer, key0())
    assert state.opt.params.dtype == jnp.float32 and averaged_params(state).dtype == jnp.bfloat16


def poisoned(at, limit=10, optimizer=None, **settings):
    """A run whose loss is not finite at some steps; its parameter and its state count the
    others.
    """
    optimizer = guarded(1.0 if optimizer is None else optimizer, limit=limit, **settings)

    def loss(w, bad, state):
        return -w * jnp.where(bad, jnp.nan, 1), {"n": state["n"] + 1}

    bad = jnp.zeros(12, bool).at[jnp.array(at)].set(True)
    start = TrainState.create(jnp.float32(0), optimizer, key0(), state={"n": jnp.int32(0)})
    return jax.jit(lambda start: jax.lax.scan(train_step(loss, optimizer), start, bad))(start)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    state, metrics = poisoned([3, 4, 8])
    assert state.params == 9 and state.state["n"] == 9 and state.step == 12
    assert list(np.flatnonzero(metrics["skipped"])) == [3, 4, 8]
    assert state.opt.in_all == 3 and state.opt.skipped == 0


def test_beyond_the_limit_nothing_is_applied_any_more():
    state, metrics = poisoned([3, 4, 5], limit=2)
    assert state.params == 3 and state.state["n"] == 3 and metrics["skipped"][3:].all()


def test_a_skipped_step_leaves_the_optimizer_alone():
    state, _ = poisoned([3, 4], optimizer=optax.adam(1.0))
    inner: Any = state.opt.inner
    assert inner[0].count == 10 and np.isfinite(inner[0].mu)


def test_the_loss_scale_halves_and_doubles():
    state, _ = poisoned([3, 4], loss_scale=1024.0, interval=3)
    # doubled after steps 0-2, halved at 3 and 4, doubled after 5-7 and 8-10
    assert state.opt.scale == 1024 * 2 / 2 / 2 * 2 * 2 and state.params == 10


def test_a_scaled_loss_rescues_gradients_that_underflow_in_float16():
    def loss(w, x):
        return (
            (w.astype(jnp.float16) * x.astype(jnp.float16) * jnp.float16(1e-4))
            .astype(jnp.float32)
            .mean()
        )

    # The gradient is 1e-4 * 1e-5: less than float16's least 6e-8, until it is scaled.
    def moved(optimizer):
        step = jax.jit(train_step(loss, optimizer))
        return float(
            step(TrainState.create(jnp.float32(0), optimizer, key0()), jnp.full(1, 1e-5))[0].params
        )

    assert moved(1.0) == 0
    assert moved(guarded(1.0, loss_scale=2.0**15)) == pytest.approx(-1e-9, rel=0.05)


def test_mixed_precision_keeps_parameters_norms_and_loss_in_float32():
    net = cast(chain(dense(8), layer_norm(), dense(3)), jnp.bfloat16)
    x = jax.random.normal(key0(), (4, 5))
    params = net.init(jax.random.key(1), x)

    def loss(params, x):
        return jax.nn.logsumexp(net.apply(params, x), axis=-1)

    state, metrics = jax.jit(train_step(loss, 0.1))(TrainState.create(params, 0.1, key0()), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, metrics))} == {"float32"}
    text = (
        jax.jit(train_step(loss, 0.1))
        .lower(TrainState.create(params, 0.1, jax.random.key(2)), x)
        .as_text()
    )
    assert re.search(r"dot_general.*bf16", text) and not re.search(r"dot_general.*xf32", text)
    # The norm's and the softmax's inner steps.
    assert not re.search(r"(rsqrt|exponential).*bf16", text)


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        averaged(0.1, decay=1)
    with pytest.raises(ValueError, match="loss_scale must be in"):
        guarded(0.1, loss_scale=0)
    for settings in ({"limit": -1}, {"interval": 0}, {"interval": 2.5}, {"limit": True}):
        with pytest.raises(ValueError, match="guarded: (limit|interval) must be"):
            guarded(0.1, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_loss_scale_that_grows_at_every_step_stays_finite_and_exact(factor):
    """As PyTorch's GradScaler(growth_interval=1): after 113 doublings of 2^15 the scale is not
    infinite.
    """
    optimizer = guarded(0.5, loss_scale=2.0**15, interval=1)

    def loss(w, x):
        return factor * w.mean()

    start = TrainState.create(jnp.ones(2), optimizer, key0())
    end, metrics = jax.jit(lambda s: jax.lax.scan(train_step(loss, optimizer), s, jnp.zeros(300)))(
        start
    )
    taken = 300 - metrics["skipped"].sum()
    assert np.isfinite(end.opt.scale) and end.opt.scale <= 2.0**127 and taken >= 200
    np.testing.assert_allclose(end.params, 1 - 0.5 * factor / 2 * taken, rtol=1e-4)


def test_a_loss_scale_below_one_does_not_grow_when_a_step_is_skipped():
    state, _ = poisoned([0, 1, 2], loss_scale=0.5, interval=100)
    assert state.opt.scale == 0.5


def test_float16_parameters_keep_their_gradients_at_a_large_scale():
    optimizer = guarded(1.0, loss_scale=2.0**20)  # more than float16 can hold
    step = jax.jit(
        train_step(lambda w, x: 1e-2 * w.astype(jnp.float32).sum() * x.mean(), optimizer)
    )
    state, _ = step(
        TrainState.create(jnp.ones(2, jnp.float16), optimizer, key0()), jnp.full(4, 1e-2)
    )
    np.testing.assert_allclose(state.params, 1 - 1e-4, rtol=1e-3)


# Keys of changes


def coins(steps=200, wrapped=lambda step: step):
    """The draws of two changes, one around the other, and of the loss, over many steps."""

    def loss(w, batch, key):
        return w, {
            "loss coin": jax.random.bernoulli(key),
            **{name: batch[name][0] for name in ("inner", "outer")},
        }

    def flip(name):
        return lambda key, batch: {
            **batch,
            name: jnp.full(4, jax.random.bernoulli(key), jnp.float32),
        }

    step = augmented(wrapped(augmented(train_step(loss, 0.0), flip("inner"))), flip("outer"))
    zeros = {"inner": jnp.zeros(4), "outer": jnp.zeros(4)}
    start = TrainState.create(jnp.float32(0), 0.0, key0())
    end, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, zeros), s, None, steps))(
        start
    )
    np.testing.assert_array_equal(jax.random.key_data(end.key), jax.random.key_data(start.key))
    return [np.asarray(metrics[name]) for name in ("inner", "outer", "loss coin")]


@pytest.mark.parametrize(
    "wrapped", [lambda step: step, lambda step: lambda *args: step(*args), jax.jit]
)
def test_changes_around_each_other_and_the_loss_draw_independently(wrapped):
    draws = coins(wrapped=wrapped)
    for i in range(3):
        assert 60 < draws[i].sum() < 140  # 5.6 standard deviations
        for j in range(i):
            assert 60 < (draws[i] == draws[j]).sum() < 140


# Things that are not what they should be


@pytest.mark.parametrize(
    "weights, text",
    [
        (np.ones((4, 1), np.float32), r"must be one number per example, \[4\], got shape \[4, 1\]"),
        (np.float32(1), r"got shape \[\]|is a scalar"),
        (np.ones(1, np.float32), r"got shape \[1\]|same number of examples"),
    ],
)
def test_weights_of_another_shape_are_refused(weights, text):
    batch, start = regression(4), TrainState.create(params_of(), 0.1, key0())
    with pytest.raises(ValueError, match=text):
        train_step(squares, 0.1)(start, Weighted(batch, weights))
    with pytest.raises(ValueError, match=text):
        jax.jit(train_step(squares, 0.1))(start, Weighted(batch, weights))
    with pytest.raises(ValueError, match=text):
        jax.jit(train_steps(train_step(squares, 0.1), 2, 2))(start, Weighted(batch, weights))
    with pytest.raises(ValueError, match="one number per example"):
        train_step(lambda p, b: Weighted(squares(p, b), weights), 0.1)(start, batch)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 3e38])
def test_weights_without_a_meaning_never_look_like_a_result(bad):
    weights = np.array([1, 3e38, bad, 1], np.float32)
    _, metrics = jax.jit(train_step(squares, 0.1))(
        TrainState.create(params_of(), 0.1, key0()), Weighted(regression(4), weights)
    )
    assert np.isnan(metrics["loss"])


def test_complex_and_integer_parameters_are_refused_by_path():
    params = {"body": {"w": jnp.ones(2, jnp.complex64)}, "n": jnp.arange(3)}
    with pytest.raises(
        TypeError, match=r"TrainState.create: 'body/w' is complex64, parameters are real"
    ):
        TrainState.create(params, 0.1, key0())
    with pytest.raises(TypeError, match=r"sgd: 'body/w' is complex64"):
        sgd(params, params, 0.1)
    with pytest.raises(
        TypeError,
        match=r"'n' is int32\[3\], parameters are floats; cast it, or keep it in the state",
    ):
        TrainState.create({"n": params["n"]}, optax.adam(0.1), key0())
    real = TrainState.create({"w": jnp.ones(2)}, 0.1, key0())
    with pytest.raises(TypeError, match=r"train_step: 'w' is complex64"):
        train_step(lambda p, b: jnp.abs(p["w"] - (1 + 2j)).mean(), 0.1)(
            real._replace(params={"w": jnp.ones(2, jnp.complex64)}), jnp.ones(2)
        )
    with pytest.raises(TypeError, match="the loss must be real, got complex64"):
        train_step(lambda p, b: (p["w"] * 1j).mean(), 0.1)(real, jnp.ones(2))


def test_another_optimizer_than_the_states_is_told_before_the_first_step():
    batch = regression(4)
    for ours, theirs, text in [
        (
            optax.adam(1e-3),
            optax.sgd(0.1, momentum=0.9),
            r"TraceState\(trace\).*this optimizer's is ScaleByAdamState",
        ),
        (
            0.1,
            optax.adam(1e-3),
            r"ScaleByAdamState\(count, mu, nu\).*this optimizer's is empty, as for plain SGD",
        ),
        (
            optax.adam(1e-3),
            0.1,
            r"its `opt` is empty, as for plain SGD, this optimizer's is ScaleByAdamState",
        ),
        (guarded(optax.adam(1e-3)), optax.adam(1e-3), r"this optimizer's is Guarded\("),
    ]:
        start = TrainState.create(params_of(), theirs, key0())
        with pytest.raises(
            ValueError, match="the train state was made with another optimizer.*" + text
        ):
            jax.jit(train_step(mean_square, ours))(start, batch)
    wider = TrainState.create({"w": jnp.ones(3)}, optax.adam(0.1), key0())._replace(
        params={"w": jnp.ones(5)}
    )
    with pytest.raises(
        ValueError,
        match=r"made for other parameters: 'opt/0/mu/w' has the shape \[3\], .* need \[5\]",
    ):
        train_step(lambda p, b: p["w"].sum(), optax.adam(0.1))(wider, jnp.ones(2))


class Optimizer:  # what torch.optim's classes look like
    param_groups = []

    def step(self): ...


@pytest.mark.parametrize(
    "wrong, text",
    [
        ("adam", "got the text 'adam'"),
        (optax.adam, r"got the function adam, .* call it: adam\(1e-3\)"),
        (Optimizer(), "got PyTorch's Optimizer"),
        (Optimizer, "got the class Optimizer"),
        (None, "got a NoneType"),
        (True, "got a bool"),
        (1j, "got a complex"),
        (np.ones(2), "got a ndarray"),
    ],
)
def test_something_that_is_no_optimizer_is_named(wrong, text):
    wanted = "the optimizer is an optax transformation such as optax.adam"
    for make in (
        lambda: TrainState.create(params_of(), wrong, key0()),
        lambda: train_step(mean_square, wrong),
    ):
        with pytest.raises(TypeError, match=wanted + ".*" + text):
            make()
    if wrong is not None:  # None stands for frozen parameters there
        with pytest.raises(TypeError, match=wanted):
            by_path({"**": wrong})


def test_parameters_and_numbers_in_place_of_states_and_keys_are_named():
    step, batch = train_step(mean_square, 0.1), regression(4)
    for call in (step, augmented(step, lambda key, batch: batch), train_steps(step, 2, 2)):
        with pytest.raises(
            TypeError,
            match=(
                r"needs a train state, as TrainState.create\(params, optimizer, key\) .*got a "
                r"dict"
            ),
        ):
            call(params_of(), batch)
    with pytest.raises(TypeError, match="key must be a PRNG key such as jax.random.key.*got int 0"):
        TrainState.create(params_of(), 0.1, 0)  # pyright: ignore[reportArgumentType]


def test_sizes_are_whole_positive_and_fit_into_int32():
    step = train_step(mean_square, 0.1, accumulate=np.int64(2))  # pyright: ignore[reportArgumentType]
    start, data = TrainState.create(params_of(), 0.1, key0()), regression()
    _, metrics = jax.jit(train_steps(step, np.int64(4), np.int32(3)))(start, data)  # pyright: ignore[reportArgumentType]
    assert metrics["loss"].shape == (3,)
    for wrong in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="train_steps: steps must be a positive int"):
            train_steps(step, 4, wrong)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="batch_size must be a positive int"):
            train_steps(step, wrong, 4)(start, data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError,
        match=r"must be less than 2\*\*31, since steps are counted in int32, got 2147483658",
    ):
        train_steps(step, 4, 2**31 + 10)
    with pytest.raises(
        ValueError, match=r"rows are counted in int32, at most 2\*\*31 - 1 of them, got 3000000000"
    ):
        jax.eval_shape(
            train_steps(step, 4, 1), start, jax.ShapeDtypeStruct((3_000_000_000,), jnp.uint8)
        )


@pytest.mark.parametrize(
    "order, text",
    [
        (
            lambda key, n, epoch, positions: positions + 1,
            r"rows must be within 0 \.\. 9, got 10 in epoch 0",
        ),
        (
            lambda key, n, epoch, positions: positions + epoch,
            r"rows must be within 0 \.\. 9, got 10 in epoch 1",
        ),
        (lambda key, n, epoch, positions: positions - n, r"got -10 in epoch 0"),
        (
            lambda key, n, epoch, positions: positions.astype(jnp.float32),
            r"must return integers \[2\]",
        ),
        (
            lambda key, n, epoch, positions: positions[:1],
            r"must return integers \[2\], one row per position",
        ),
    ],
)
def test_rows_out_of_range_are_refused_before_the_first_step(order, text):
    with pytest.raises(ValueError, match="order: .*" + text):
        seen_rows([5], 2, 10, order=order)


def test_an_order_of_ones_own_is_used_as_it_is():
    np.testing.assert_array_equal(
        seen_rows([5], 2, 10, order=lambda key, n, epoch, positions: n - 1 - positions),
        np.arange(9, -1, -1).reshape(5, 2),
    )


def test_balanced_does_not_depend_on_numpys_generators():
    """Golden rows: a run goes on under another version of NumPy as it began."""
    rows = balanced([0, 1, 0, 1, 0, 0, 0, 0])(jax.random.key(5), 8, jnp.int32(3), jnp.arange(8))
    assert list(map(int, rows)) == [3, 1, 4, 1, 3, 6, 2, 7]


# Means that a loss takes itself


def masked():
    """Sequences with masks of different lengths, and the mean over all unmasked places by NumPy."""
    random = np.random.default_rng(4)
    x = random.normal(size=(8, 5)).astype(np.float32)
    mask = (np.arange(5) < random.integers(1, 6, 8)[:, None]).astype(np.float32)
    return (x, mask), float(((0.5 - x) ** 2 * mask).sum() / mask.sum())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_loss_with_weights_of_its_own_is_exact_in_any_number_of_parts(accumulate):
    (x, mask), right = masked()

    def loss(w, batch):
        x, mask = batch
        tokens = mask.sum(-1)
        mean = ((w - x) ** 2 * mask).sum(-1) / jnp.maximum(tokens, 1)
        return Weighted(mean, tokens), {"mean": mean}

    step = jax.jit(train_step(loss, 0.1, accumulate=accumulate))
    state, metrics = step(TrainState.create(jnp.float32(0.5), 0.1, key0()), (x, mask))
    assert float(metrics["loss"]) == pytest.approx(right, rel=1e-5) == float(metrics["mean"])
    assert metrics["weight"] == mask.sum()
    gradient = (2 * (0.5 - x) * mask).sum() / mask.sum()
    assert float(state.params) == pytest.approx(0.5 - 0.1 * gradient, rel=1e-5)
    # Weights of a batch multiply those of the loss.
    twice = np.array([2, 1, 1, 1, 1, 1, 1, 1], np.float32)
    _, metrics = step(TrainState.create(jnp.float32(0.5), 0.1, key0()), Weighted((x, mask), twice))
    expected = ((0.5 - x) ** 2 * mask * twice[:, None]).sum() / (mask * twice[:, None]).sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_frozen_body_keeps_its_statistics_too():
    """The recipe of the training page: the body is applied as in evaluation, and its state is
    handed on.
    """
    body, head = chain(dense=dense(3), norm=batch_norm()), chain(norm=batch_norm(), out=dense(1))
    x, y = regression(12)
    hidden = jax.eval_shape(lambda: jnp.zeros((12, 3)))
    params = {"body": body.init(key0(), x), "head": head.init(jax.random.key(1), hidden)}
    state = {"body": body.init_state(x), "head": head.init_state(hidden)}

    def loss(params, batch, state):
        features, _ = body.apply(params["body"], batch[0], state=state["body"])
        out, head_state = head.apply(params["head"], features, state=state["head"], train=True)
        return jnp.square(out - batch[1])[:, 0], {**state, "head": head_state}

    optimizer = freeze(optax.adam(0.01), "body")
    start = TrainState.create(params, optimizer, key0(), state=state)
    end, metrics = jax.jit(train_steps(train_step(loss, optimizer), 4, 9))(start, (x, y))
    chex.assert_trees_all_equal(end.params["body"], params["body"])
    chex.assert_trees_all_equal(end.state["body"], state["body"])
    assert (end.state["head"]["norm"]["mean"] != state["head"]["norm"]["mean"]).all()
    assert (end.params["head"]["out"]["kernel"] != params["head"]["out"]["kernel"]).all()
    assert np.isfinite(metrics["loss"]).all()


SWITCHES = {
    "jax_debug_nans": lambda: jax.debug_nans(True),
    "jax_disable_jit": jax.disable_jit,
    "jax_transfer_guard": lambda: jax.transfer_guard("disallow"),
    "jax_check_tracer_leaks": jax.checking_leaks,
    "jax_debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "jax_enable_checks": lambda: jax.enable_checks(True),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("switch", SWITCHES)
def test_jaxs_own_switches_for_debugging_change_no_number(switch):
    data, optimizer = jax.tree.map(jnp.asarray, regression(10)), optax.adam(0.01)

    def loss(params, batch, key):
        return squares(params, batch) + 0 * jax.random.uniform(key)

    params, key = params_of(), key0()

    def run():
        start = TrainState.create(params, optimizer, key)
        step = augmented(train_step(loss, optimizer), lambda key, batch: batch)
        end, metrics = jax.jit(train_steps(step, 4, 4, drop_last=False))(start, data)
        mean = evaluate(
            lambda params, batch: {"mse": squares(params, batch)}, regression(10), batch_size=4
        )(end)
        return end.params, metrics, mean

    expected = run()
    # Together with checks on, JAX's check of keys refuses `fold_in` in any compiled loop.
    with SWITCHES[switch](), jax.debug_key_reuse(switch != "jax_enable_checks"):
        found = run()
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
