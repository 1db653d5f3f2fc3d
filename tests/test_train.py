"""The training loop: its steps against hand-written JAX and NumPy, its order of the data against theory, its errors by text."""

import itertools
import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxnet
from jaxnet import batch_norm, chain, dense, dropout
from jaxnet.train import (
    TrainState,
    evaluate,
    fit,
    plot_history,
    sgd,
    shuffled,
    train_epoch,
    train_state,
    train_step,
    train_steps,
)
from jaxnet.train.progress import Progress


def key0():
    return jax.random.key(0)  # a fresh one each time: a key is used once


def regression(n=12, width=3):
    x = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)
    return x, x @ np.array([[1.0], [-2.0], [0.5]], np.float32)[:width]


NET = dense(1)


def mean_square(params, batch):
    x, y = batch
    return jnp.mean(jnp.square(NET.apply(params, x) - y))


def params_of():
    return NET.init(jax.random.key(1), regression()[0])


# One step


def test_sgd_is_w_minus_rate_times_gradient_and_keeps_the_dtype():
    params = {"a": jnp.float32(2), "b": jnp.ones(3, jnp.bfloat16)}
    new = sgd(params, {"a": jnp.float32(4), "b": jnp.full(3, 2, jnp.bfloat16)}, np.float64(0.25))
    assert new["a"] == 2 - 0.25 * 4 and new["b"].dtype == jnp.bfloat16 and (new["b"] == 0.5).all()


def test_sgd_contracts_a_parabola_at_rate_one_minus_lr_h():
    h, lr = 4.0, 0.1
    step = train_step(lambda w, batch: h * w**2 / 2, lr)
    state, metrics = jax.lax.scan(step, train_state(jnp.float32(1), lr, key0()), jnp.zeros(20))
    np.testing.assert_allclose(state.params, (1 - lr * h) ** 20, rtol=1e-5)  # exact linear recursion
    assert metrics["loss"].shape == (20,) and state.step == 20


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adamw(1e-2), optax.chain(optax.clip(0.1), optax.sgd(0.1))])
def test_any_optax_optimizer_goes_through_the_step_as_written_by_hand(optimizer):
    batch, params = regression(), params_of()
    state = train_state(params, optimizer, key0())
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
    state, _ = jax.lax.scan(step, train_state(jnp.float32(0), schedule, key0()), jnp.zeros(6))
    assert state.params == -(1 + 0.75 + 0.5 + 0.25)


def test_the_step_compiles_once():
    step = jax.jit(chex.assert_max_traces(train_step(mean_square, optax.adam(1e-3)), n=1))
    state = train_state(params_of(), optax.adam(1e-3), key0())
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
    start = train_state(params, 0.1, key0(), state=state)
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
        (lambda p, b: p * jnp.ones(3), ValueError, r"the loss must be a scalar, got shape \(3,\); take its mean"),
        (lambda p, b: (p, {}, {}), TypeError, r"returns a scalar or \(value, metrics\)"),
        (lambda p, b: (p, 3.0), TypeError, "with a dict of metrics"),
        (lambda p, b, state: p, TypeError, r"returns \(value, new_state\)"),
    ],
)
def test_a_loss_of_another_form_is_named(loss, error, text):
    with pytest.raises(error, match=text):
        train_step(loss, 0.1)(train_state(jnp.float32(1), 0.1, key0()), jnp.zeros(2))


# The order of the data


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1797])
def test_shuffled_is_a_permutation(n):
    assert sorted(np.asarray(shuffled(key0(), n, jnp.arange(n)))) == list(range(n))


def test_every_order_of_four_is_equally_likely():
    runs = 24_000
    orders = jax.jit(jax.vmap(lambda key: shuffled(key, 4, jnp.arange(4))))(jax.random.split(key0(), runs))
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    expected = runs / math.factorial(4)
    assert len(counts) == 24
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert chi_squared < 23 + 5 * math.sqrt(2 * 23)  # mean and deviation of chi squared with 23 degrees of freedom


def test_neighbours_come_apart_as_they_should():
    n, runs = 101, 4000
    orders = np.asarray(jax.jit(jax.vmap(lambda key: shuffled(key, n, jnp.arange(n))))(jax.random.split(key0(), runs)))
    apart = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    expected = apart.sum() / (n - 1)  # each difference but 0 is equally likely
    chi_squared = np.sum((apart - expected) ** 2 / expected)
    assert abs(chi_squared - (n - 2)) < 5 * math.sqrt(2 * (n - 2))


def seen_rows(chunks, batch_size, n):
    """Which rows the steps of these chunks see, in order."""

    def step(state, batch):
        return state._replace(step=state.step + 1), {"rows": batch}

    state, rows = TrainState({}, {}, (), jax.random.key(7), jnp.int32(0)), []
    for steps in chunks:
        state, metrics = jax.jit(train_steps(step, batch_size, steps))(state, jnp.arange(n))
        rows += list(np.asarray(metrics["rows"]))
    return rows


def test_each_epoch_sees_each_example_at_most_once_and_another_order():
    rows = seen_rows([6], batch_size=3, n=10)  # two epochs of three steps; one example of ten is left out of each
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
    start = train_state(params_of(), optimizer, key0())
    state, metrics = jax.jit(train_epoch(step, 4))(start, data)
    rows = shuffled(jax.random.fold_in(jax.random.fold_in(key0(), 0x6F726465), 0), 12, jnp.arange(12)).reshape(3, 4)
    expected = start
    for row in rows:
        expected, _ = step(expected, jax.tree.map(lambda leaf, row=row: jnp.asarray(leaf)[row], data))
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
    assert metrics["loss"].shape == (3,)


def test_a_run_maps_over_seeds_and_rates():
    data = regression()

    def run(key, lr):
        state, metrics = train_steps(train_step(mean_square, lr), 4, 9)(train_state(params_of(), lr, key), data)
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

    start = train_state(net.init(key0(), data[0]), optimizer, key0(), state=net.init_state(data[0]))
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


# fit


def fitted(**changes):
    settings = {"optimizer": 0.05, "epochs": 3, "batch_size": 4, "key": key0(), "progress": False}
    return fit(mean_square, params_of(), regression(), **(settings | changes))


def test_fit_is_train_steps_and_leaves_the_callers_arrays_alone():
    params, data = params_of(), regression()
    result = fit(mean_square, params, data, optimizer=0.05, epochs=3, batch_size=4, key=key0(), progress=False)
    state, metrics = jax.jit(train_steps(train_step(mean_square, 0.05), 4, 9))(train_state(params, 0.05, key0()), data)
    chex.assert_trees_all_close(result.train_state.params, state.params, rtol=1e-6)
    np.testing.assert_allclose([r["loss"] for r in result.history], metrics["loss"].reshape(3, 3).mean(1), rtol=1e-5)
    assert not jax.tree.leaves(params)[0].is_deleted() and result.train_state.step == 9


def test_the_same_key_gives_the_same_run_bit_for_bit():
    chex.assert_trees_all_equal(fitted().train_state.params, fitted().train_state.params)


def test_the_history_is_plain_numbers():
    history = fitted(evaluate=lambda state: {"test_loss": jnp.float32(0.5)}).history
    assert [record["step"] for record in history] == [3, 6, 9] and [record["epoch"] for record in history] == [1, 2, 3]
    assert json.loads(json.dumps(history)) == history
    assert history[0]["test_loss"] == 0.5 and history[0]["samples_per_second"] > 0
    assert [record["seconds"] for record in history] == sorted(record["seconds"] for record in history)


def test_fit_learns_a_linear_map():
    result = fitted(epochs=300, optimizer=0.1)
    np.testing.assert_allclose(result.train_state.params["kernel"][:, 0], [1.0, -2.0, 0.5], atol=1e-3)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"batch_size": 13}, "batch_size 13 is larger than the data, 12 examples; use at most 12"),
        ({"batch_size": 0}, "batch_size must be a positive int, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_fit_says_what_is_wrong_before_it_starts(changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fitted(**changes)


@pytest.mark.parametrize(
    "data, text",
    [
        ((np.zeros((0, 3)), np.zeros((0, 1))), "there are no examples"),
        ((np.zeros((4, 3)), np.zeros((5, 1))), r"as many examples, got \{'0': 4, '1': 5\}"),
        ({"x": np.zeros((4, 3)), "y": np.float32(1)}, "'y' is a scalar"),
        ((), "there are no examples"),
    ],
)
def test_data_without_a_common_length_is_named(data, text):
    with pytest.raises(ValueError, match=text):
        fit(mean_square, params_of(), data, optimizer=0.1, epochs=1, batch_size=2, key=key0(), progress=False)


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    def loss(w, batch):
        return jnp.where(w > 2.5, jnp.nan, -w)  # w grows by one a step: 0, 1, 2, 3

    with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
        fit(loss, jnp.float32(0), jnp.zeros(10), optimizer=1.0, epochs=1, batch_size=1, key=key0(), progress=False)


def test_labels_out_of_range_do_not_pass_for_a_loss():
    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(params * jnp.ones((2, 3)), batch).mean()

    with pytest.raises(FloatingPointError, match="check_labels"):
        fit(loss, jnp.float32(1), jnp.full(4, 5), optimizer=0.1, epochs=1, batch_size=2, key=key0(), progress=False)


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
def test_evaluation_counts_every_example_once(batch_size):
    values = np.arange(10.0, dtype=np.float32)
    mean = evaluate(lambda params, batch: {"mean": batch.mean(), "each": batch}, values, batch_size=batch_size)
    result = mean(train_state({}, 0.1, key0()))
    assert result["mean"] == result["each"] == pytest.approx(4.5)  # the mean of 0 .. 9


def test_evaluation_passes_state_to_metrics_that_name_it():
    mean = evaluate(lambda params, batch, state: {"sum": batch + state["shift"]}, jnp.zeros(5), batch_size=2)
    assert mean(train_state({}, 0.1, key0(), state={"shift": jnp.float32(3)}))["sum"] == 3


# What one sees


def test_progress_is_one_plain_line_an_epoch_where_there_is_no_terminal(capsys):
    fitted(progress=None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("compiled in ") and len(lines) == 4
    assert re.fullmatch(r"epoch 3  step 9/9  loss [\d.e-]+  [\d,]+ samples/s  0:00 in all", lines[3])


def test_progress_can_be_silent(capsys):
    fitted(progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_rewrites_its_line_on_a_terminal(monkeypatch):
    class Terminal:
        written = ""

        def isatty(self):
            return True

        def write(self, text):
            self.written += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    show = Progress(200, compile_seconds=1.25)
    show({"step": 100, "epoch": 1, "loss": 0.5, "samples_per_second": 1234.0, "seconds": 60.0})
    show.close()
    first, line, end = terminal.written.split("\r")[1:]
    assert first == "compiled in 1.2 s\n"
    assert line == "epoch 1  step 100/200  loss 0.5  1,234 samples/s  1:00 left"  # half done after a minute
    assert end.endswith("\n")


def test_learning_curves_are_a_picture(tmp_path):
    history = fitted(evaluate=lambda state: {"test_accuracy": 0.5}).history
    plot_history(history, tmp_path / "curves.png", title="curves")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"  # the PNG signature
    with pytest.raises(ValueError, match="the history is empty"):
        plot_history([], tmp_path / "none.png")


def test_chunks_divide_the_epoch():
    from jaxnet.train.fit import _chunk

    sizes = {n: _chunk(n) for n in itertools.chain(range(1, 400), [468, 600, 60_000])}
    assert all(n % size == 0 for n, size in sizes.items())
    assert sizes[468] == 117 and sizes[60_000] == 100 and sizes[22] == 22 and sizes[397] == 397  # 397 is prime
