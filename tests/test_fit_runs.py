"""What makes a run the same run: what a checkpoint remembers, refuses and says; and what grows or
is counted in it.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import key0, mean_square, params_of, regression

import jaxnet
from jaxnet.checkpoint import CheckpointError, Checkpoints
from jaxnet.train import TrainState, balanced, fit, train_step
from jaxnet.train.records import columns_of, records_of


def fitted(
    file: Any,
    rate: Any = 0.05,
    data: Any = None,
    loss: Any = mean_square,
    start: Any = None,
    key: Any = 0,
    **settings: Any,
):
    settings = {"batch_size": 4, "epochs": 3, "progress": None} | settings
    start = TrainState.create(params_of(), rate, jax.random.key(key)) if start is None else start
    return fit(
        train_step(loss, rate),
        start,
        regression() if data is None else data,
        checkpoint=file,
        **settings,
    )


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.safetensors"


# What is refused, and what is said


def other_rows(seed):
    x, y = regression()
    return x + np.float32(seed), y


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"key": 1}, "of a run with another key"),
        ({"order": None}, "another order .'order': 'shuffle' in the file, 'order': 'None' here"),
        ({"order": balanced([0, 1] * 6)}, "'order': 'balanced' here"),
        ({"data": other_rows(1)}, "of a run with other data;"),
        ({"data": regression(16)}, "data of another length"),
        ({"data": tuple(x.astype(np.float64) * 2 for x in regression())}, "other data"),
        ({"drop_last": False}, "another drop_last"),
        ({"data": [regression()] * 9, "batch_size": None}, "data of another kind"),
    ],
)
def test_a_run_with_another_key_order_or_data_is_refused(file, changes, text):
    fitted(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=text) as caught:
        fitted(file, epochs=5, **{"drop_last": True} | changes)
    assert (
        "name another file, or delete this one" in str(caught.value) and file.read_bytes() == before
    )


def test_one_other_row_in_the_middle_is_other_data(file):
    fitted(file)
    x, y = regression()
    changed = x.copy()
    changed[5, 1] += 1
    with pytest.raises(ValueError, match="other data"):
        fitted(file, epochs=5, data=(changed, y))


def test_the_same_numbers_in_another_container_are_the_same_data(file):
    first = fitted(file)
    x, y = regression()
    more = fitted(file, epochs=5, data=(jnp.asarray(x), y.astype(np.float64)))
    assert more.train_state.step == 15 and more.history[:3] == first.history


def test_a_few_rows_of_an_array_on_disk_tell_it_from_another(tmp_path, file):
    def on_disk(values):
        np.save(tmp_path / "x.npy", values)
        return np.load(tmp_path / "x.npy", mmap_mode="r")

    def run(values, steps):
        start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
        step = lambda s, b: (s._replace(params=s.params + b.sum(), step=s.step + 1), {})  # noqa: E731
        return fit(
            step, start, on_disk(values), batch_size=4, steps=steps, checkpoint=file, progress=False
        )

    values = np.arange(40, dtype=np.float32)
    run(values, 5)
    assert run(values, 8).train_state.step == 8
    with pytest.raises(ValueError, match="other data"):
        run(values + 1, 9)


def test_learning_rate_epochs_and_evaluation_may_change_and_are_told(file, capsys):
    fitted(file)
    result = fitted(
        file, rate=0.01, epochs=5, evaluate=lambda state: {"norm": optax.tree.norm(state.params)}
    )
    told = capsys.readouterr().err
    assert (
        "goes on from step 9, saved in" in told and "the step is not that of the run before" in told
    )
    assert result.train_state.step == 15 and len(result.evaluations) == 2
    capsys.readouterr()
    fitted(file, rate=0.01, epochs=6)
    assert "the step is not" not in capsys.readouterr().err


def test_a_finished_run_says_that_nothing_is_left_and_what_changed(file, capsys):
    fitted(file)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(file)
    assert f"{file} is at step 9 of 9: nothing left to train" in capsys.readouterr().err
    with pytest.warns(
        UserWarning, match="step 9 of 9: nothing left to train.*learning rate, loss or network"
    ):
        fitted(file, rate=0.5)
    with pytest.warns(UserWarning, match="learning rate, loss or network"):
        fitted(file, loss=lambda params, batch: 2 * mean_square(params, batch), progress=False)
    with pytest.raises(
        ValueError,
        match=r"is at step 9 of 6: nothing left to train. To begin anew, delete it or name ano",
    ):
        fitted(file, epochs=2)


def test_passes_that_are_over_are_told_too(file):
    stream = [regression()] * 2
    fitted(file, data=stream, batch_size=None)
    with pytest.raises(ValueError, match="is after pass 3 of 2: nothing left to train"):
        fitted(file, data=stream, batch_size=None, epochs=2)


@pytest.mark.parametrize(
    "rate, width, text",
    [
        (
            0.05,
            2,
            (
                r"of another network or optimizer: 'params/bias' is float32\[1\] in the file and "
                r"float32\[2\] here"
            ),
        ),
        (optax.adam(0.05), 1, "'opt/0/count' is not in the file"),
    ],
)
def test_another_network_is_named_in_the_words_of_fit(file, rate, width, text):
    fitted(file)
    params = jaxnet.dense(width).init(key0(), regression()[0])
    with pytest.raises(CheckpointError, match=text) as caught:
        fitted(file, rate=rate, start=TrainState.create(params, rate, key0()))
    assert "name another file, or delete this one" in str(caught.value)
    assert "like" not in str(caught.value) and "rename" not in str(caught.value)


def test_the_best_by_another_rule_is_looked_for_anew(file, capsys):
    scores = {"up": 2.0, "down": 1.0}
    settings: Any = {"evaluate": lambda state: scores}
    first = fitted(file, best_rule="max up", **settings).best
    again = fitted(file, epochs=4, best_rule="min down", **settings).best
    assert first is not None and again is not None and first.value == 2.0
    assert (again.value, again.step) == (1.0, 12)
    assert "the best so far was by 'max up' and is now by 'min down'" in capsys.readouterr().err


def test_a_step_has_one_digest_in_every_process(tmp_path):
    """Otherwise a script that has not changed would be told that it has."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import jax, optax; from linear_regression "
        "import *;from jaxnet.train import fit, TrainState, train_step; o = "
        "optax.adamw(optax.cosine_decay_schedule(.1, 9));fit(train_step(mean_square, o), "
        "TrainState.create(params_of(), o, key0()), regression(), batch_size=4, epochs=3, "
        "checkpoint=sys.argv[2])"
    )
    for told in ("compiled in", "nothing left to train"):
        run = subprocess.run(
            [
                sys.executable,
                "-W",
                "error",
                "-c",
                code,
                str(pathlib.Path(__file__).parent),
                str(tmp_path / "r.safetensors"),
            ],
            capture_output=True,
            text=True,
        )
        assert (
            run.returncode == 0
            and told in run.stderr
            and "another" not in run.stderr.replace("name another", "")
        )


# Promises to the bit


def test_a_parameter_that_is_a_python_float_resumes_to_the_same_bits(file):
    """float32 + bfloat16 is float32, but a weakly typed number beside bfloat16 computes in
    bfloat16.
    """
    data = jnp.asarray(regression()[0][:, 0], jnp.bfloat16)

    def run(steps, checkpoint):
        start = TrainState.create({"w": 0.3, "b": jnp.asarray(0.1)}, 0.01, key0())
        loss = lambda p, x: jnp.mean(jnp.square(p["w"] * x + p["b"] - 1.7 * x))  # noqa: E731
        return fit(
            train_step(loss, 0.01),
            start,
            data,
            batch_size=4,
            steps=steps,
            checkpoint=checkpoint,
            progress=False,
        )

    whole = run(20, None)
    run(7, file)
    assert bits(run(20, file).train_state.params) == bits(whole.train_state.params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(whole.train_state.params))


@pytest.mark.parametrize("settings", [{"steps": 2**31 + 10}, {"epochs": 2**30}, {"steps": 2**31}])
def test_more_steps_than_the_counter_holds_are_refused(settings):
    with pytest.raises(
        ValueError, match=r"int32.*2,147,483,647|2,147,483,647.*int32|less than 2\*\*31"
    ):
        fitted(None, **{"epochs": None} | settings)


# What is saved, and when


def test_the_first_save_comes_with_the_first_epoch(file):
    seen = []
    fitted(
        file,
        callbacks=[lambda record: seen.append(file.exists())],
        record_every=3,
        save_seconds=1e9,
    )
    assert seen == [False, True, True]


def test_the_first_save_comes_with_the_first_evaluation(file):
    seen = []

    def look(state):
        seen.append((int(state.step), file.exists()))
        return {"x": 1.0}

    fitted(
        file,
        epochs=None,
        steps=40,
        evaluate=look,
        evaluate_every=2,
        data=regression(400),
        save_seconds=1e9,
    )
    assert seen[:3] == [(0, False), (2, False), (4, True)]  # at 0 the function is tried out


def test_the_first_save_comes_soon_in_a_long_epoch(file, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxnet.train.save_times"], "SOON", 0.0)
    seen = []
    fitted(
        file,
        data=regression(400),
        epochs=1,
        record_every=1,
        callbacks=[lambda r: seen.append(file.exists())],
    )
    assert any(seen[:50])


def test_a_killed_process_has_lost_at_most_an_epoch(tmp_path):
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from linear_regression import "
        "*;from jaxnet.train import fit, TrainState, train_step;kill = lambda r: r['step'] == 6 "
        "and os.kill(os.getpid(), signal.SIGKILL);fit(train_step(mean_square, .1), "
        "TrainState.create(params_of(), .1, key0()), regression(), batch_size=4, epochs=30, "
        "checkpoint=sys.argv[2], record_every=1, callbacks=[kill])"
    )
    place = tmp_path / "r.safetensors"
    subprocess.run(
        [sys.executable, "-c", code, str(pathlib.Path(__file__).parent), str(place)],
        capture_output=True,
    )
    assert jaxnet.load(place)["train_state"]["step"] >= 3


def test_half_a_million_records_are_saved_and_come_back(tmp_path, file):
    """In a header of JSON they would be 60 MB, and beyond a bound that readers of such files
    have.
    """
    records = [
        {"step": i, "epoch": 1 + i // 7, "loss": i / 3}
        | ({"test": i / 7} if i % 5 == 0 else {})
        | {"seconds": i * 0.1}
        for i in range(1, 500_001)
    ]
    table = columns_of(records)
    jaxnet.save(file, {"history": table})
    assert records_of(jaxnet.load(file)["history"]) == records
    assert jaxnet.checkpoint.inspect(file).nbytes < 30e6


def test_the_history_of_a_run_is_arrays_in_its_file(file):
    result = fitted(file, record_every=1, evaluate=lambda state: {"x": jnp.nan})
    saved = jaxnet.load(file)["history"]["records"]["columns"]
    np.testing.assert_array_equal(saved["step"], range(1, 10))
    np.testing.assert_array_equal(saved["loss"], [record["loss"] for record in result.history])
    assert len(jaxnet.checkpoint.inspect(file).metadata["fit"]) < 2000
    again = fitted(file, record_every=1, evaluate=lambda state: {"x": jnp.nan})
    np.testing.assert_equal(again.history, result.history)
    np.testing.assert_equal(again.evaluations, result.evaluations)


def test_a_file_with_its_history_in_the_header_still_loads(file):
    """As files were before: records among the metadata, fewer facts, no digest."""
    whole = fitted(None, epochs=5, record_every=2)
    fitted(file, record_every=2)
    saved, text = jaxnet.load(file), json.loads(jaxnet.checkpoint.inspect(file).metadata["fit"])
    numbers = {name: text["history"][name] for name in ("step", "seconds", "samples")}
    history = numbers | {"records": records_of(saved["history"]["records"]), "pending": {}}
    history["records"][1]["test"] = 0.5
    facts = {name: text["facts"][name] for name in ("examples", "batch_size", "drop_last")}
    old = {"history": history, "position": {}, "passes": 0, "facts": facts, "in_a_row": 0}
    state = TrainState.create(params_of(), 0.05, key0())
    like = {"train_state": state}
    kept = jaxnet.load(file, like=like, strict=False)["train_state"]
    jaxnet.save(file, {"train_state": kept, "best": None}, metadata={"fit": json.dumps(old)})
    result = fitted(file, epochs=5, record_every=2)
    assert bits(result.train_state.params) == bits(whole.train_state.params)
    assert [record["step"] for record in result.evaluations] == [4]
    about = subprocess.run(
        [sys.executable, "-m", "jaxnet.cli", "inspect", file], capture_output=True, text=True
    ).stdout
    assert "a run of fit: 9 records, step 15 of 15" in about


# The files


@pytest.mark.parametrize("store", [False, True])
def test_a_resumed_run_opens_its_newest_file_once(tmp_path, store, monkeypatch):
    place = Checkpoints(tmp_path / "runs", keep=2) if store else tmp_path / "run.safetensors"
    fitted(place)
    from jaxnet.checkpoint import container

    opened, names = container.opened, []

    @contextlib.contextmanager
    def counted(path):
        names.append(os.path.basename(path))
        with opened(path) as found:
            yield found

    monkeypatch.setattr(container, "opened", counted)
    place = Checkpoints(tmp_path / "runs", keep=2) if store else place
    fitted(place, epochs=4)
    assert names.count("step_00000009.safetensors" if store else "run.safetensors") == 1


def test_a_newest_file_that_cannot_be_opened_is_named_at_once(tmp_path, monkeypatch):
    fitted(Checkpoints(tmp_path, keep=5), epochs=3)
    fitted(Checkpoints(tmp_path, keep=5), epochs=4)
    from jaxnet.checkpoint import container

    opened, trained = container.opened, []

    def refused(path):
        if "00000012" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path)

    monkeypatch.setattr(container, "opened", refused)
    with pytest.raises(OSError, match="Permission denied"):
        fitted(Checkpoints(tmp_path, keep=5), epochs=6, callbacks=[trained.append])
    assert not trained


@pytest.mark.parametrize(
    "name, error, text",
    [
        ("", ValueError, "checkpoint must be the name of a file, as in 'run.safetensors', got ''"),
        ("x" * 300, OSError, "File name too long"),
        ("folder", IsADirectoryError, "this is a folder: add a file name, or give Checkpoints"),
        ("new/", IsADirectoryError, "add a file name"),
        (7, TypeError, "int"),
    ],
)
def test_a_place_that_is_no_file_is_named_at_the_call(tmp_path, monkeypatch, name, error, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    seen = []
    with pytest.raises(error, match=text) as caught:
        fitted(name, callbacks=[seen.append])
    assert not seen and len(str(caught.value)) < 500 and sorted(os.listdir()) == ["folder"]


# Times


def test_times_are_those_of_the_work():
    """Each step sleeps 20 ms on the host: neither shorter records nor shorter runs may claim to be
    faster.
    """

    def step(state, batch):
        slept = jax.pure_callback(
            lambda x: (time.sleep(0.02), x)[1], jax.ShapeDtypeStruct((), jnp.float32), batch.sum()
        )
        return state._replace(params=state.params + slept, step=state.step + 1), {"loss": slept}

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    for steps, every in [(3, 1), (12, 1), (12, 3)]:
        result = fit(
            step, start, jnp.ones(40), batch_size=4, steps=steps, record_every=every, progress=False
        )
        rates = [record["samples_per_second"] for record in result.history]
        assert max(rates) <= 4 / 0.02 and result.history[-1]["seconds"] >= steps * 0.02


def counted(state, batch):
    return state._replace(step=state.step + 1), {"sum": batch.sum()}


def test_waiting_for_data_counts():
    def slow():
        for _ in range(10):
            time.sleep(0.05)
            yield np.ones(4, np.float32)

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    result = fit(counted, start, slow(), steps=10, record_every=1, progress=False)
    assert result.history[-1]["seconds"] > 0.1  # of ten times 50 ms, without what compiling hides


def test_evaluating_does_not_count():
    def look(state):
        time.sleep(0.3)
        return {"x": 1.0}

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    settings = {"batch_size": 4, "epochs": 4, "record_every": 1, "progress": False}
    result = fit(counted, start, jnp.ones(4), evaluate=look, **settings)
    assert len(result.evaluations) == 4 and result.history[-1]["seconds"] < 0.3
