"""The host loop: the numbers of `train_steps`, whatever it is asked to show, keep, save and
survive.
"""

import csv
import json
import math
import os
import re
import signal
import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import key0, mean_square, params_of, regression

import jaxnet
from jaxnet import batch_norm, chain, dense, dropout
from jaxnet.checkpoint import Checkpoints
from jaxnet.train import (
    NonFiniteError,
    TrainState,
    compile_cache,
    early_stopping,
    evaluate,
    fit,
    plot_history,
    time_budget,
    train_step,
    train_steps,
    write_csv,
    write_jsonl,
)
from jaxnet.train.history import History
from jaxnet.train.progress import Progress
from jaxnet.train.run import Run
from jaxnet.train.schedule import default_record_every


def fitted(loss=mean_square, optimizer: Any = 0.05, data=None, start=None, **changes):
    settings = {"batch_size": 4, "epochs": 3, "progress": False} | changes
    start = TrainState.create(params_of(), optimizer, key0()) if start is None else start
    data = regression() if data is None else data
    return fit(train_step(loss, optimizer), start, data, **settings)


def counting(n=10, **settings):
    """A run whose parameter is the number of its steps, each one call of its own: what the host
    does is all there is.
    """

    def step(state, batch):
        return state._replace(params=state.params + 1, step=state.step + 1), {
            "loss": 100 - state.params
        }

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    settings = {
        "batch_size": 4,
        "steps": n,
        "record_every": 1,
        "evaluate": lambda state: {"seen": state.params},
    } | settings
    return fit(step, start, jnp.zeros(4), evaluate_every=1, progress=False, **settings)


def same_bits(a, b):
    def bits(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    chex.assert_trees_all_equal(jax.tree.map(bits, a), jax.tree.map(bits, b))


# The numbers


def test_fit_is_train_steps_and_leaves_the_callers_arrays_alone():
    params, data = params_of(), regression()
    start = TrainState.create(params, 0.05, key0())
    result = fitted(start=start, data=data)
    again = start._replace(key=key0())
    state, metrics = jax.jit(train_steps(train_step(mean_square, 0.05), 4, 9))(again, data)
    chex.assert_trees_all_close(result.train_state.params, state.params, rtol=1e-6)
    np.testing.assert_allclose(
        [r["loss"] for r in result.history], metrics["loss"].reshape(3, 3).mean(1), rtol=1e-5
    )
    assert (
        not any(leaf.is_deleted() for leaf in jax.tree.leaves(start))
        and result.train_state.step == 9
    )
    assert result.stopped is None and result.exit_code == 0 and len(result.compiled) == 1


def test_the_same_key_gives_the_same_run_bit_for_bit():
    same_bits(fitted().train_state, fitted().train_state)


def test_fit_learns_a_linear_map():
    result = fitted(epochs=300, optimizer=0.1)
    np.testing.assert_allclose(
        result.train_state.params["kernel"][:, 0], [1.0, -2.0, 0.5], atol=1e-3
    )


def test_steps_and_epochs_say_the_same():
    same_bits(fitted(epochs=2).train_state, fitted(epochs=None, steps=6).train_state)


def test_where_calls_end_changes_no_bit(monkeypatch):
    whole = fitted(epochs=8)
    monkeypatch.setattr("jaxnet.train.pace.CALL", 0.0)  # one step a call
    single = fitted(epochs=8)
    same_bits(whole.train_state, single.train_state)
    assert [r["loss"] for r in whole.history] == [r["loss"] for r in single.history]


def test_a_step_of_ones_own_needs_no_loss():
    assert counting(7).train_state.params == 7


@pytest.mark.cpu_only("it wants several devices")
def test_a_train_state_on_several_devices_stays_there():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    start = jax.device_put(TrainState.create(params_of(), 0.05, key0()), everywhere)
    result = fitted(start=start, data=jax.device_put(regression(), spread))
    kernel = result.train_state.params["kernel"]
    assert kernel.sharding.is_equivalent_to(everywhere, 2)
    np.testing.assert_allclose(kernel, fitted().train_state.params["kernel"], rtol=1e-5)


# Records


def test_the_history_is_plain_numbers():
    history = fitted(evaluate=lambda state: {"test_loss": jnp.float32(0.5)}).history
    assert [record["step"] for record in history] == [3, 6, 9] and [
        record["epoch"] for record in history
    ] == [1, 2, 3]
    assert json.loads(json.dumps(history)) == history
    assert history[0]["test_loss"] == 0.5 and history[0]["samples_per_second"] > 0
    assert [record["seconds"] for record in history] == sorted(
        record["seconds"] for record in history
    )


@pytest.mark.parametrize("every, steps", [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (100, [7])])
def test_records_come_where_they_are_asked_for_and_at_the_end(every, steps):
    history = fitted(epochs=None, steps=7, record_every=every).history
    assert [record["step"] for record in history] == steps


def test_a_record_is_the_mean_of_its_steps():
    single = [record["loss"] for record in fitted(epochs=None, steps=6, record_every=1).history]
    grouped = [record["loss"] for record in fitted(epochs=None, steps=6, record_every=3).history]
    np.testing.assert_allclose(grouped, np.reshape(single, (2, 3)).mean(1), rtol=1e-12)


def test_by_default_a_record_is_about_100_steps_and_divides_the_epoch():
    sizes = {n: default_record_every(n, 10 * n) for n in [*range(1, 400), 468, 600, 60_000]}
    assert all(n % size == 0 for n, size in sizes.items())
    # 600,000 steps: 1,000 records.
    assert sizes[468] == 117 and sizes[60_000] == 100 * 6 and sizes[22] == 22
    # A prime: 100 steps would be 10,000 records.
    assert default_record_every(999_983, 999_983) == 1000
    assert default_record_every(1, 10_000_000) == 10_000 and default_record_every(None, None) == 100


def test_the_history_does_not_depend_on_how_it_is_fed():
    values = np.random.default_rng(0).normal(size=23).astype(np.float32)

    def fed(parts):
        history = History(lambda step: (step // 5 + 1) * 5, lambda step: 1)
        for part in np.split(values, parts):
            if len(part):
                history.add(len(part), {"loss": part}, len(part), 4 * len(part))
        return [record["loss"] for record in history.records], [
            r["samples_per_second"] for r in history.records
        ]

    assert fed([3, 4, 11, 19]) == fed([]) == fed(range(1, 23))
    np.testing.assert_allclose(fed([7])[0], values[:20].reshape(4, 5).mean(1), rtol=1e-6)
    np.testing.assert_allclose(fed([7])[1], 4.0)  # four samples a second, by construction


def test_callbacks_get_each_record_with_its_evaluation():
    seen = []
    result = fitted(callbacks=[seen.append], evaluate=lambda state: {"test_loss": 0.25})
    assert seen == result.history and all("test_loss" in record for record in seen)


def test_records_are_written_while_it_runs_and_resume(tmp_path):
    seen = []

    def evaluation(state):
        return {} if state.params < 2 else {"late, metric": float(state.params)}

    def lines():
        return [json.loads(line) for line in (tmp_path / "sub/h.jsonl").read_text().splitlines()]

    callbacks = [
        write_jsonl(tmp_path / "sub/h.jsonl"),
        write_csv(tmp_path / "h.csv"),
        lambda r: seen.append(len(lines())),
    ]
    result = counting(4, callbacks=callbacks, evaluate=evaluation)
    assert seen == [1, 2, 3, 4] and lines() == result.history
    with open(tmp_path / "h.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [row["late, metric"] for row in rows] == ["", "2.0", "3.0", "4.0"]


def test_what_json_cannot_hold_is_null(tmp_path):
    write_jsonl(tmp_path / "h.jsonl")({"step": 1, "loss": math.nan})
    assert json.loads((tmp_path / "h.jsonl").read_text()) == {"step": 1, "loss": None}


def test_learning_curves_are_a_picture(tmp_path):
    history = fitted(evaluate=lambda state: {"test_accuracy": 0.5}).history
    plot_history(history, tmp_path / "curves.png", title="curves")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"  # the PNG signature
    with pytest.raises(ValueError, match="the history is empty"):
        plot_history([], tmp_path / "none.png")


# When it ends


def test_the_best_evaluation_is_kept():
    score = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0}
    result = counting(
        4, evaluate=lambda state: {"score": score[int(state.step)]}, best_rule="min score"
    )
    assert result.best is not None
    # The first of equals.
    assert (result.best.value, result.best.step, float(result.best.params)) == (1.0, 2, 2.0)
    assert result.train_state.params == 4


@pytest.mark.parametrize(
    "values, rule, patience, end",
    [
        ([5, 4, 6, 6, 6, 1], "min score", 2, 4),
        ([5, 4, 6, 3, 6, 6, 1], "min score", 2, 6),
        ([1, 2, 3, 4, 5, 6], "min score", 5, 6),
        ([1, 2, 2, 2, 3], "max score", 3, 5),
        ([math.nan, 2, 3, 1], "max score", 2, 4),
    ],
)
def test_early_stopping_counts_values_without_improvement(values, rule, patience, end):
    result = counting(
        len(values),
        evaluate=lambda s: {"score": values[int(s.step) - 1]},
        stop=early_stopping(rule, patience),
    )
    assert result.train_state.step == end and len(result.history) == end
    assert (result.stopped is None) == (end == len(values)) or "has not improved" in str(
        result.stopped
    )


def test_early_stopping_knows_its_metric():
    with pytest.raises(
        KeyError, match=r"no record has 'test', on which it is to stop; there are \['epoch', 'loss'"
    ):
        fitted(stop=early_stopping("min test", 2))
    with pytest.raises(KeyError, match=r"no record has 'test', on which it is to stop"):
        fitted(evaluate=lambda state: {"score": 1.0}, stop=early_stopping("min test", 2))
    early = fitted(
        evaluate=lambda state: {"score": 1.0}, record_every=1, stop=early_stopping("min score", 9)
    )
    assert len(early.history) == 9  # the first records come before the first evaluation
    with pytest.raises(
        ValueError,
        match="early_stopping: best_rule must be 'min' or 'max' and a name, as .*, got 'loss'",
    ):
        early_stopping("loss", 2)
    with pytest.raises(KeyError, match=r"best_rule='min test', but `evaluate` returns \['score'\]"):
        fitted(evaluate=lambda state: {"score": 1.0}, best_rule="min test")


def test_a_condition_is_asked_at_the_same_steps_wherever_calls_end(monkeypatch):
    def run():
        return fitted(epochs=100, record_every=2, stop=lambda history: history[-1]["loss"] < 1e-3)

    whole = run()
    monkeypatch.setattr("jaxnet.train.pace.CALL", 0.0)
    assert run().train_state.step == whole.train_state.step < 300


def test_a_run_that_a_condition_ended_stays_ended(tmp_path):
    for _ in range(2):
        result = counting(
            9,
            stop=lambda history: history[-1]["step"] >= 4,
            checkpoint=tmp_path / "run.safetensors",
        )
        assert result.train_state.step == 4 and result.stopped == "the condition held"


def test_the_best_is_never_a_nan():
    score = {1: math.nan, 2: 0.5, 3: math.nan}
    result = counting(
        3, evaluate=lambda state: {"score": score[int(state.step)]}, best_rule="max score"
    )
    assert result.best is not None and (result.best.value, result.best.step) == (0.5, 2)


def test_a_budget_of_time_ends_a_run():
    result = counting(50, stop=time_budget(0.0))
    assert result.stopped == "0 s are over" and result.train_state.step == 1
    assert time_budget(10)([{"seconds": 9.9}]) is None and time_budget(10)([{"seconds": 10.0}])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_what_there_is(number, code, tmp_path):
    before = signal.getsignal(number)
    file = tmp_path / "run.safetensors"
    hit = counting(
        9, callbacks=[lambda r: r["step"] == 3 and os.kill(os.getpid(), number)], checkpoint=file
    )
    assert (hit.stopped, hit.exit_code, int(hit.train_state.step)) == (
        signal.Signals(number).name,
        code,
        3,
    )
    assert signal.getsignal(number) is before
    rest = counting(9, checkpoint=file)
    assert rest.train_state.params == 9 and rest.stopped is None and len(rest.history) == 9


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_signal_raises(number, error):
    def twice(record):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        counting(9, callbacks=[twice])
    assert signal.getsignal(number) is before


def test_off_the_main_thread_signals_stay_as_they_are():
    results = []
    thread = threading.Thread(target=lambda: results.append(counting(3)))
    thread.start()
    thread.join()
    assert results[0].train_state.params == 3


# Resuming


RESUMED = chain(dense(4), batch_norm(), dropout(0.5), dense(1))


def resumable(checkpoint, **settings):
    """40 steps of AdamW on a cosine schedule, with dropout, batch norm, shuffling and a padded last
    batch.
    """
    data, optimizer = regression(14), optax.adamw(optax.cosine_decay_schedule(0.05, 40))

    def loss(params, batch, state, key):
        out, state = RESUMED.apply(params, batch[0], state=state, key=key, train=True)
        return jnp.square(out - batch[1])[:, 0], state

    start = TrainState.create(
        RESUMED.init(key0(), data[0]), optimizer, key0(), state=RESUMED.init_state(data[0])
    )
    settings = {"batch_size": 4, "steps": 40, "drop_last": False, "record_every": 7} | settings
    return fit(
        train_step(loss, optimizer), start, data, checkpoint=checkpoint, progress=False, **settings
    )


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty compile cache."""
    from jax.experimental.compilation_cache import compilation_cache

    names = [
        "compilation_cache_dir",
        "persistent_cache_min_compile_time_secs",
        "persistent_cache_min_entry_size_bytes",
    ]
    options = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    compilation_cache.reset_cache()
    compile_cache(tmp_path / "cache")
    yield tmp_path / "cache"
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "steps", [(1, 4, 7, 27, 39), pytest.param(range(1, 40), marks=pytest.mark.slow)]
)
def test_a_run_resumes_at_every_step_as_if_it_had_never_stopped(steps, tmp_path):
    """An epoch has four steps, the last of them with half a batch; a record has seven."""
    file, kept = tmp_path / "run.safetensors", {}

    def keep(state):
        if file.exists():  # what was saved after the step before
            kept[int(state.step) - 1] = file.read_bytes()
        return {}

    whole = resumable(file, evaluate=keep, evaluate_every=1, save_seconds=0.0)
    assert sorted(kept) == list(range(1, 40))
    for step in steps:
        file.write_bytes(kept[step])
        again = resumable(file, record_every=1)
        same_bits(again.train_state, whole.train_state)
        losses = [
            [(r["step"], r["epoch"], r["loss"]) for r in run.history] for run in (again, whole)
        ]
        assert losses[0] == losses[1], f"resumed after step {step}"


def test_between_records_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxnet.train.pace.CALL", 0.0)  # one step a call
    file, whole = tmp_path / "run.safetensors", resumable(None)
    # A record at 14, one at the end; the third was to have seven steps.
    stopped = resumable(file, steps=17)
    assert [record["step"] for record in stopped.history] == [7, 14, 17]

    def interrupt(run, *arguments, **more):
        send(run, *arguments, **more)
        if run.history.step == 15:
            os.kill(os.getpid(), signal.SIGINT)

    send, file = Run._receive, tmp_path / "other.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_receive", interrupt)
        part = resumable(file)
    assert part.stopped == "SIGINT" and 14 < part.train_state.step < 20
    rest = resumable(file)
    same_bits(rest.train_state, whole.train_state)
    assert [(r["step"], r["loss"]) for r in rest.history] == [
        (r["step"], r["loss"]) for r in whole.history
    ]


def test_a_finished_run_is_read_and_not_trained(tmp_path):
    first = counting(4, checkpoint=tmp_path / "run.safetensors", best_rule="max seen")
    again = counting(4, checkpoint=tmp_path / "run.safetensors", best_rule="max seen")
    assert again.compiled == () and again.history == first.history and again.best == first.best
    more = counting(6, checkpoint=tmp_path / "run.safetensors", best_rule="max seen")
    assert more.best is not None and more.best.step == 6 and more.history[:4] == first.history


@pytest.mark.parametrize("asynchronous, engine", [(False, None), (True, None), (True, "orbax")])
def test_a_store_keeps_the_newest_and_the_best_and_passes_over_damage(
    tmp_path, asynchronous, engine
):
    if engine:
        pytest.importorskip("orbax.checkpoint")
    score = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0, 6: 4.5}

    def run(n):
        with Checkpoints(
            tmp_path, keep=2, best_rule="min score", asynchronous=asynchronous, engine=engine
        ) as store:
            return counting(
                n, evaluate=lambda state: {"score": score[int(state.step)]}, checkpoint=store
            ), store.steps()

    first, steps = run(5)
    assert steps == [2, 4, 5]  # the newest two, and the best
    newest = tmp_path / "step_00000005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step 4 is loaded, since others cannot be read"):
        second, steps = run(6)
    assert second.train_state.params == 6 and [r["step"] for r in second.history] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert steps == [2, 5, 6] and second.history[:4] == first.history[:4]


def test_the_checkpoint_is_an_ordinary_file(tmp_path):
    result = fitted(checkpoint=tmp_path / "run.safetensors")
    saved = jaxnet.load(tmp_path / "run.safetensors")
    same_bits(saved["train_state"]["params"], result.train_state.params)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.safetensors"
    fitted(checkpoint=file)
    with pytest.raises(
        ValueError, match=r"'batch_size': 4.*'batch_size': 3.*use the same data and batch size"
    ):
        fitted(checkpoint=file, batch_size=3)
    with pytest.raises(jaxnet.checkpoint.CheckpointError, match="kernel"):
        other = TrainState.create(dense(2).init(key0(), regression()[0]), 0.05, key0())
        fitted(checkpoint=file, start=other)
    jaxnet.save(file, {"params": 1.0})
    with pytest.raises(jaxnet.checkpoint.CheckpointError, match="not written by `fit`"):
        fitted(checkpoint=file)


def test_an_error_from_outside_saves_first(tmp_path):
    def fail(record):
        if record["step"] == 5:
            raise RuntimeError("the network is down")

    with pytest.raises(RuntimeError, match="the network is down") as caught:
        counting(9, callbacks=[fail], checkpoint=tmp_path / "run.safetensors")
    assert any("the state at step 5 is saved in" in note for note in caught.value.__notes__)
    assert counting(9, checkpoint=tmp_path / "run.safetensors").train_state.params == 9


def test_a_place_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    seen = []
    for place in (tmp_path / "file" / "run.safetensors", Checkpoints(tmp_path / "file" / "runs")):
        with pytest.raises(OSError, match="file"):
            counting(3, checkpoint=place, callbacks=[seen.append])
    assert not seen


def test_every_error_carries_the_state(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jaxnet.checkpoint, "save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        counting(3, checkpoint=tmp_path / "run.safetensors")
    assert caught.value.train_state.params == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert any("could not be saved" in note for note in caught.value.__notes__)


# What is wrong is said


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"batch_size": 13}, "batch_size 13 is larger than the data, 12 examples; use at most 12"),
        ({"batch_size": 0}, "batch_size must be a positive int, got 0"),
        ({"epochs": 0}, "epochs must be an int of at least 1, got 0"),
        ({"epochs": None}, "say how long, by one of epochs and steps; got epochs=None, steps=None"),
        ({"steps": 4}, "say how long, by one of epochs and steps; got epochs=3, steps=4"),
        ({"record_every": 0}, "record_every must be an int of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an int of at least 1, got 1.5"),
        (
            {"best_rule": "min test_loss"},
            "best_rule='min test_loss' looks at what `evaluate` returns",
        ),
    ],
)
def test_settings_are_checked_before_anything_starts(changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        fitted(**changes)


@pytest.mark.parametrize(
    "data, text",
    [
        ((np.zeros((0, 3)), np.zeros((0, 1))), "there are no examples"),
        (
            (np.zeros((4, 3)), np.zeros((5, 1))),
            r"the same number of examples, got \{'0': 4, '1': 5\}",
        ),
        ({"x": np.zeros((4, 3)), "y": np.float32(1)}, "'y' is a scalar"),
        ((), "there are no examples"),
        (
            {"x": np.array([1, 2**40, 3, 4])},
            r"'x' holds 1099511627776, which int64 can and int32 cannot",
        ),
        (
            {"x": np.array([1, 2, 3, 2**63], np.uint64)},
            r"'x' holds 9223372036854775808, which uint64 can and uint32 cannot",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(data, text):
    with pytest.raises(ValueError, match=text):
        fitted(data=data, batch_size=2)


def test_small_64_bit_integers_are_welcome():
    def loss(w, batch):
        return jnp.mean(jnp.square(w - batch))

    fitted(
        loss,
        data=np.arange(4, dtype=np.int64),
        start=TrainState.create(jnp.float32(0), 0.1, key0()),
        batch_size=2,
    )


@pytest.mark.parametrize("shapes", [((4, 1), (4,)), ((4,), (4, 1))])
def test_a_prediction_and_a_target_of_other_ranks_are_refused(shapes):
    def loss(w, batch):
        x, y = batch
        return jnp.mean(jnp.square(w * x - y))

    data = tuple(np.ones(shape, np.float32) for shape in shapes)
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.raises(ValueError, match=r"broadcasts \[4, 1\] against \[4\] in 'subtract'"),
    ):
        fitted(loss, data=data, start=TrainState.create(jnp.float32(0), 0.1, key0()), batch_size=4)


def test_all_pairs_may_be_written_out_and_other_warnings_pass():
    def loss(w, batch):
        return jnp.mean(jnp.square(w * batch[:, None] - batch[None, :])) + jnp.sum(
            jnp.ones((3, 4)) + jnp.ones(4)
        )

    with jax.numpy_rank_promotion("allow"):
        fitted(
            loss,
            data=np.ones(4, np.float32),
            start=TrainState.create(jnp.float32(0), 0.1, key0()),
            batch_size=4,
        )


@pytest.mark.parametrize(
    "step, error, text",
    [
        (
            lambda s, b: (s._replace(params=s.params.astype(jnp.bfloat16)), {}),
            TypeError,
            r"'params' from float32\[\] to bfloat16\[\]",
        ),
        (
            lambda s, b: (s._replace(params=jnp.ones(3)), {}),
            TypeError,
            r"'params' from float32\[\] to float32\[3\]; cast",
        ),
        (
            lambda s, b: (s._replace(state={"n": s.step}), {}),
            TypeError,
            r"it adds \['state/n'\] and drops \[\]",
        ),
        (
            lambda s, b: (s, {"confusion": jnp.ones((3, 3))}),
            ValueError,
            r"metric 'confusion' must be a scalar, got float32\[3, 3\]",
        ),
        (
            lambda s, b: (s, {"epoch": jnp.float32(0)}),
            ValueError,
            "metric 'epoch' has a name that every record has already",
        ),
        (
            lambda s, b: (s, jnp.float32(0)),
            TypeError,
            "with a dict of metrics, got ShapeDtypeStruct",
        ),
    ],
)
def test_a_step_that_does_not_fit_into_a_loop_is_named(step, error, text):
    with pytest.raises(error, match=text):
        fit(
            step,
            TrainState.create(jnp.float32(0), 0.1, key0()),
            jnp.zeros(4),
            batch_size=2,
            steps=3,
            progress=False,
        )


def test_steps_that_are_done_already_are_named():
    done = fitted(epochs=2).train_state
    assert fitted(start=done, epochs=3).train_state.step == 9  # three epochs in all
    with pytest.raises(
        ValueError,
        match="the train state has done 6 steps, and 6 are asked for in all; ask for more",
    ):
        fitted(start=done._replace(key=key0()), epochs=2)


def test_arrays_without_a_batch_size_are_named():
    with pytest.raises(
        TypeError, match=r"without batch_size the data is an iterable of batches, got ndarray"
    ):
        fitted(data=np.zeros(4), batch_size=None)


# Numbers that are not finite


def test_the_step_the_parameters_and_the_operation_are_named(tmp_path):
    def loss(params, batch):  # b falls by one a step: 5, 4, ... 0, and then sqrt(-1)
        return params["a"] * 0 + params["b"] + jnp.sqrt(params["b"]) * 0

    start = TrainState.create({"a": jnp.float32(1), "b": jnp.float32(5.5)}, 1.0, key0())
    with pytest.raises(NonFiniteError) as caught:
        fitted(
            loss,
            1.0,
            jnp.zeros(40),
            start,
            batch_size=1,
            epochs=1,
            checkpoint=tmp_path / "run.safetensors",
        )
    error = caught.value
    assert error.step == 6 and error.train_state.step == 6 and error.train_state.params["b"] == -0.5
    assert "at step 6 the loss is nan; gradients that are not finite: 'b'" in str(error)
    assert error.paths == ("b",) and "nan generated by primitive: sqrt" in str(error)
    saved = jaxnet.load(tmp_path / "run.safetensors")["train_state"]
    assert np.isfinite(saved["params"]["b"]) and saved["step"] <= 6


def test_a_gradient_that_is_not_finite_is_found_under_a_finite_loss():
    def loss(w, batch):
        return jnp.sqrt(w * w)  # finite at 0, where its gradient is not

    with pytest.raises(
        NonFiniteError,
        match=(
            r"at step 0 the loss is finite, the update is not; gradients that are not finite: "
            r"''; it begins"
        ),
    ):
        fitted(
            loss, 1.0, jnp.zeros(4), TrainState.create(jnp.float32(0), 1.0, key0()), batch_size=1
        )


def test_labels_out_of_range_do_not_pass_for_a_loss():
    def loss(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            params * jnp.ones((2, 3)), batch
        ).mean()

    with pytest.raises(
        NonFiniteError,
        match=(
            r"at step 0 the loss is nan.*index 5 is out of bounds for axis 1 with size "
            r"3.*check_labels"
        ),
    ):
        fitted(
            loss,
            data=jnp.full(4, 5),
            start=TrainState.create(jnp.float32(1), 0.1, key0()),
            batch_size=2,
        )


def test_a_step_of_ones_own_is_replayed_too():
    def step(state, batch):
        return state._replace(
            params=jnp.where(state.step == 3, jnp.inf, state.params), step=state.step + 1
        ), {}

    start = TrainState.create(jnp.float32(1), 0.1, key0())
    with pytest.raises(
        NonFiniteError, match="at step 3 .*parameters that are no longer finite: ''"
    ) as caught:
        fit(step, start, [jnp.zeros(2)] * 10, steps=10, progress=False)
    assert caught.value.train_state.step == 3 and caught.value.train_state.params == 1


def test_an_evaluation_that_is_no_number_is_named():
    with pytest.raises(
        ValueError,
        match=r"the value 'confusion' that evaluate returns must be a number, got shape \[3, 3\]",
    ):
        fitted(evaluate=lambda state: {"confusion": np.ones((3, 3))})


def test_names_that_are_taken_are_refused():
    with pytest.raises(
        ValueError, match=r"evaluate returns \['loss', 'step'\], names that the record has already"
    ):
        fitted(evaluate=lambda state: {"loss": 1.0, "step": 2.0, "new": 3.0})
    with pytest.raises(
        ValueError, match="a metric is called 'weight', a name that the step itself gives"
    ):
        fitted(lambda params, batch: (mean_square(params, batch), {"weight": 1.0}))


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_progress_that_nobody_can_see_stops_nothing(stream, monkeypatch, tmp_path):
    if stream == "closed":
        stream = open(tmp_path / "stderr", "w")
        stream.close()
    monkeypatch.setattr("sys.stderr", stream)
    assert fitted(progress=None).train_state.step == 9


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_order_is_a_permutation_under_every_generator(impl):
    def step(state, batch):
        return state._replace(step=state.step + 1), {"row": batch[0]}

    start = TrainState(jnp.float32(0), {}, (), jax.random.key(0, impl=impl), jnp.int32(0))
    history = fit(
        step, start, jnp.arange(12.0), batch_size=1, epochs=1, record_every=1, progress=False
    ).history
    assert sorted(record["row"] for record in history) == list(range(12))


def test_an_optimizer_may_look_at_the_loss():
    optimizer = optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1))
    result = fitted(optimizer=optimizer, epochs=5)
    assert float(result.train_state.opt[1].best_value) < np.inf  # it has seen one


def test_the_check_can_be_left_out():
    result = fitted(
        lambda w, batch: w * jnp.nan,
        data=jnp.zeros(4),
        start=TrainState.create(jnp.float32(1), 0.1, key0()),
        check_finite=False,
    )
    assert np.isnan(result.train_state.params) and result.train_state.step == 3


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("kind", ["memory", "memmap", "iterable"])
def test_evaluation_counts_every_example_once(batch_size, kind, tmp_path):
    values = np.arange(10.0, dtype=np.float32)
    data = values
    if kind == "memmap":
        np.save(tmp_path / "values.npy", values)
        data = np.load(tmp_path / "values.npy", mmap_mode="r")
    if kind == "iterable":
        data = [values[i : i + batch_size] for i in range(0, 10, batch_size)]
    mean = evaluate(
        lambda params, batch: {"mean": batch.mean(), "each": batch},
        data,
        batch_size=None if kind == "iterable" else batch_size,
    )
    for _ in range(2):
        result = mean(TrainState.create({}, 0.1, key0()))
        assert result["mean"] == result["each"] == pytest.approx(4.5)  # the mean of 0 .. 9


def test_evaluation_passes_state_to_metrics_that_name_it():
    mean = evaluate(
        lambda params, batch, state: {"sum": batch + state["shift"]}, jnp.zeros(5), batch_size=2
    )
    assert mean(TrainState.create({}, 0.1, key0(), state={"shift": jnp.float32(3)}))["sum"] == 3


def test_an_iterable_that_is_used_up_is_named():
    mean = evaluate(lambda params, batch: {"mean": batch}, iter([np.ones(3)]), batch_size=None)
    assert mean(TrainState.create({}, 0.1, key0()))["mean"] == 1
    with pytest.raises(ValueError, match="must be one that can be iterated again"):
        mean(TrainState.create({}, 0.1, key0()))


# What one sees


def test_progress_is_one_plain_line_an_epoch_where_there_is_no_terminal(capsys):
    fitted(progress=None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("compiled in ") and len(lines) == 4
    assert re.fullmatch(
        r"epoch 3  step 9/9  loss [\d.e-]+  [\d,]+ samples/s  \d:\d\d in all", lines[3]
    )


def test_a_thousand_epochs_are_a_hundred_lines(capsys):
    fitted(progress=None, epochs=1000)
    assert 50 <= len(capsys.readouterr().err.splitlines()) <= 101


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
    show = Progress(200, 200)
    show.note("compiled in 1.2 s")
    show({"step": 100, "epoch": 1, "loss": 0.5, "samples_per_second": 1234.0, "seconds": 60.0})
    show.close()
    first, line, end = terminal.written.split("\r")[1:]
    assert first == "compiled in 1.2 s\n"
    # Half done after a minute.
    assert line == "epoch 1  step 100/200  loss 0.5  1,234 samples/s  1:00 left"
    assert end.endswith("\n")


def test_the_compile_cache_holds_what_was_compiled(cached):
    assert not any(cached.iterdir())
    fitted()
    assert any("jit_run" in file.name for file in cached.iterdir())
