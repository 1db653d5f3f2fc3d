"""Mistakes of a first week with `fit`: no file is overwritten in silence, and each error says what
to write.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import NET, key0, mean_square, params_of, regression

import jaxnet
from jaxnet import batch_norm, chain, dense, flatten
from jaxnet.checkpoint import CheckpointError, Checkpoints
from jaxnet.checkpoint.errors import Misfit
from jaxnet.data import digits
from jaxnet.train import (
    NonFiniteError,
    TrainState,
    evaluate,
    fit,
    train_step,
    write_csv,
    write_jsonl,
)
from jaxnet.train.identity import begins_alike, start_of
from jaxnet.train.progress import Progress


def fitted(data=None, *, optimizer=0.05, loss=mean_square, start=None, step=None, **settings):
    settings = {"batch_size": 4, "epochs": 2, "progress": False} | settings
    start = TrainState.create(params_of(), optimizer, key0()) if start is None else start
    return fit(
        step or train_step(loss, optimizer),
        start,
        regression() if data is None else data,
        **settings,
    )


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Records of another run


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
def test_a_fresh_run_does_not_touch_the_records_of_another(make, tmp_path):
    path = tmp_path / "history"
    fitted(record_every=1, callbacks=[make(path)])
    before = path.read_bytes()
    refused = "holds records up to step 6 of another run: name another file or delete it"
    again = make(path)
    for settings in ({}, {"checkpoint": tmp_path / "fresh.safetensors"}, {"epochs": 1}):
        with pytest.raises(ValueError, match=refused):
            fitted(record_every=1, callbacks=[again], **settings)
        assert path.read_bytes() == before
    # A function around it hides it from `fit`.
    with pytest.raises(ValueError, match=refused):
        fitted(record_every=1, callbacks=[lambda record: again(record)])
    assert path.read_bytes() == before


def test_records_go_on_behind_a_state_that_a_program_loaded(tmp_path):
    path = tmp_path / "h.jsonl"
    first = fitted(record_every=1, callbacks=[write_jsonl(path)])
    fitted(start=first.train_state, epochs=3, record_every=1, callbacks=[write_jsonl(path)])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, 10)]


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
def test_a_resumed_run_takes_out_the_records_of_steps_that_it_does_again(make, tmp_path):
    path, file, old = (
        tmp_path / "history",
        tmp_path / "run.safetensors",
        tmp_path / "old.safetensors",
    )
    fitted(record_every=1, checkpoint=file, callbacks=[make(path)])
    old.write_bytes(file.read_bytes())
    fitted(record_every=1, epochs=3, checkpoint=file, callbacks=[make(path)])
    # The file of the run as it was at step 6, and records up to step 9, as after a kill.
    fitted(record_every=1, epochs=4, checkpoint=old, callbacks=[make(path)])
    lines = path.read_text().splitlines()[make is write_csv :]
    steps = [
        int(line.split(",")[0]) if make is write_csv else json.loads(line)["step"] for line in lines
    ]
    assert steps == [*range(1, 13)]


def test_a_run_that_is_killed_before_its_first_epoch_finds_its_own_records(tmp_path):
    path, file = tmp_path / "h.jsonl", tmp_path / "run.safetensors"
    seen = []

    def copy(record):
        if not seen:
            seen.extend([path.read_bytes(), file.read_bytes()])

    whole = fitted(record_every=1, checkpoint=file, callbacks=[write_jsonl(path), copy])
    # What a kill would have left at the first record.
    path.write_bytes(seen[0])
    file.write_bytes(seen[1])
    again = fitted(record_every=1, checkpoint=file, callbacks=[write_jsonl(path)])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(1, 7)]
    assert same(again.train_state.params, whole.train_state.params)


# Checkpoints of another run


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_that_began_with_other_parameters_is_refused(kind, tmp_path):
    place = tmp_path / "run.safetensors" if kind == "file" else Checkpoints(tmp_path / "run")
    first = fitted(checkpoint=place)
    other = NET.init(jax.random.key(2), regression()[0])
    with pytest.raises(
        ValueError,
        match=r"began with other parameters \(another key of init\?\); name another file",
    ):
        fitted(start=TrainState.create(other, 0.05, key0()), epochs=3, checkpoint=place)
    # The start itself, and a later state of the run, go on; so does the start once more afterwards.
    assert int(fitted(start=first.train_state, epochs=3, checkpoint=place).train_state.step) == 9
    assert int(fitted(epochs=4, checkpoint=place).train_state.step) == 12
    with pytest.raises(ValueError, match="began with other parameters"):
        fitted(start=TrainState.create(other, 0.05, key0()), epochs=5, checkpoint=place)


def test_a_start_is_known_by_every_leaf_to_within_rounding():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(200_000), "n": jnp.zeros(2)}
    start = TrainState.create(params, 0.1, key0(), state={"count": jnp.int32(3)})
    now = start_of(start)
    assert json.loads(json.dumps(now)) == now

    def alike(**changes):
        return begins_alike(now, start_of(start._replace(**changes)))

    assert alike() and alike(params=jax.tree.map(lambda x: x * (1 + 1e-6), params))
    assert not alike(params=params | {"n": jnp.array([0.0, 1e-3])})
    assert not alike(params=params | {"b": -params["b"]})
    assert not alike(params=params | {"a": params["a"].reshape(-1)[::-1].reshape(2, 3)})
    assert not alike(state={"count": jnp.int32(4)})
    assert alike(step=jnp.int32(5), params=params | {"n": jnp.ones(2)})
    assert begins_alike(None, now)


@pytest.mark.parametrize(
    "before, now",
    [(optax.adam(0.1), optax.adamw(0.1)), (optax.sgd(0.1), 0.1), (0.1, optax.sgd(0.1))],
)
def test_another_optimizer_with_the_same_leaves_is_named_in_words_of_fit(before, now, tmp_path):
    for place in (tmp_path / "run.safetensors", Checkpoints(tmp_path / "run")):
        fitted(optimizer=before, checkpoint=place)
        with pytest.raises(
            Misfit, match="of another network or optimizer: .*opt/.* name another file, or del"
        ) as error:
            fitted(optimizer=now, checkpoint=place)
        assert "like" not in str(error.value)
    with pytest.raises(
        ValueError,
        match=r"'opt' is (an empty tuple|a tuple of \d parts) there and (an empty tuple|a tuple)",
    ):
        train_step(mean_square, now)(TrainState.create(params_of(), before, key0()), regression())


def test_two_programs_do_not_replace_the_checkpoint_of_each_other(tmp_path):
    file = tmp_path / "run.safetensors"

    def other_program(record):
        if record["step"] == 7:
            file.unlink(missing_ok=True)
            fitted(checkpoint=file, epochs=1)
            taken.append(file.read_bytes())

    taken = []
    with pytest.raises(
        CheckpointError, match="another program writes this checkpoint.*a file of its own"
    ) as error:
        fitted(
            checkpoint=file, epochs=4, record_every=1, save_seconds=1e-9, callbacks=[other_program]
        )
    assert file.read_bytes() == taken[-1]
    step = int(error.value.train_state.step)  # pyright: ignore[reportAttributeAccessIssue]
    assert step >= 7
    alone = fitted(steps=step, epochs=None)
    assert same(alone.train_state.params, error.value.train_state.params)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_checkpoint_that_was_touched_copied_or_deleted_is_still_that_of_the_run(tmp_path):
    file = tmp_path / "run.safetensors"

    def change(record):
        if record["step"] == 4:
            os.utime(file, ns=(1, 1))
        if record["step"] == 5:
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
        if record["step"] == 6:
            file.unlink()

    run = fitted(
        checkpoint=file,
        epochs=4,
        record_every=1,
        save_seconds=1e-9,
        callbacks=[change],
        stop=lambda h: False,
    )
    assert int(run.train_state.step) == 12 and int(jaxnet.load(file)["train_state"]["step"]) == 12


def test_a_file_that_cannot_be_written_names_the_argument(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"fit: checkpoint='.*/run.safetensors' cannot be written"):
        fitted(checkpoint=str(tmp_path / "file" / "run.safetensors"))


# The best


def test_best_on_a_run_that_has_ended_says_that_it_stays_none(tmp_path, capsys):
    file = tmp_path / "run.safetensors"
    fitted(checkpoint=file)
    run = fitted(
        checkpoint=file, best_rule="min x", evaluate=lambda state: {"x": 1.0}, progress=None
    )
    assert run.best is None and "run.best stays None: no step is left" in capsys.readouterr().err


def test_nan_is_no_best():
    values = iter([np.nan] * 3)
    assert fitted(best_rule="min x", evaluate=lambda state: {"x": next(values)}).best is None
    values = iter([np.nan, np.nan, 2.0, 3.0])
    best = fitted(best_rule="min x", epochs=3, evaluate=lambda state: {"x": next(values)}).best
    assert best is not None and (best.value, best.step) == (2.0, 6)


def test_a_result_is_one_line():
    run = fitted(best_rule="min x", evaluate=lambda state: {"x": 0.5})
    assert (
        repr(run) == f"Result(step=6, records={len(run.history)}, best=0.5 at step 3, stopped=None)"
    )


# Words


X, Y = regression()
NORM = chain(a=dense(3), norm=batch_norm(), out=dense(1))
DATA = digits()
TEN = chain(flatten(), out=dense(10))


def with_state(params, batch, state):
    out, state = NORM.apply(params, batch[0], state=state, train=True)
    return jnp.mean(jnp.square(out - batch[1])), state


def without_state(params, batch):
    return jnp.mean(NORM.apply(params, batch[0], train=True))


def of_images(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        TEN.apply(params, batch.images), batch.labels
    )


def of_digits(data, **settings):
    start = TrainState.create(TEN.init(key0(), DATA.train.images), 0.1, key0())
    return fitted(data, loss=of_images, start=start, batch_size=64, epochs=1, **settings)


@pytest.mark.parametrize("loss", [with_state, without_state])
def test_a_forgotten_state_is_named_with_its_place(loss):
    start = TrainState.create(NORM.init(key0(), X), 0.1, key0())
    with pytest.raises(
        ValueError, match=r"TrainState.create\(params, optimizer, key, state=net.init_state\(x\)\)"
    ):
        fitted(loss=loss, start=start)
    with pytest.raises(
        ValueError, match=r"TrainState.create\(params, optimizer, key, state=net.init_state\(x\)\)"
    ):
        evaluate(lambda params, batch, state: {"x": with_state(params, batch, state)[0]}, (X, Y))(
            start
        )


def test_an_evaluation_that_returns_an_array_is_told_what_to_write():
    test = evaluate(lambda params, batch: NET.apply(params, batch[0]), (X, Y))
    with pytest.raises(
        TypeError,
        match=r"must return a dict of values by name, got float32\[12, 1\]; write .*'test_loss'",
    ):
        fitted(evaluate=test)


def test_functions_of_parameters_are_told_that_they_get_the_train_state():
    def refused(match, **settings):
        with pytest.raises(TypeError, match=match) as error:
            fitted(**settings)
        assert "TrainState(" not in str(error.value)
        return str(error.value) + "".join(getattr(error.value, "__notes__", ()))

    for f in (
        lambda params: {"x": NET.apply(params, X).mean()},
        lambda params: {"x": list(params.items())[0][1].mean()},
    ):
        refused(
            r"evaluate receives the train state.*`state.params`.*`evaluate\(test, data\)`",
            evaluate=f,
        )
    told = refused("tuple indices", evaluate=lambda params: {"x": params["kernel"].mean()})
    assert "evaluate receives the train state: use `state.params`" in told
    refused(r"cannot be called with one argument; evaluate\(test, data\)", evaluate=mean_square)
    refused(
        r"step receives the train state.* train_step\(loss, optimizer\) makes a step",
        step=mean_square,
    )
    refused(
        r"returns \(train_state, metrics\), got a ShapeDtypeStruct; train_step",
        step=lambda s, b: jnp.float32(0),
    )
    # A mistake in a step or an evaluation of one's own keeps its own words.
    with pytest.raises(AttributeError, match="no attribute 'parms'"):
        fitted(evaluate=lambda state: {"x": state.parms})


def test_a_list_is_named_by_its_field():
    with pytest.raises(TypeError, match="data in 'labels' is a list of 1438 numbers"):
        of_digits(DATA.train._replace(labels=DATA.train.labels.tolist()))


def test_an_index_out_of_range_is_no_matter_of_the_learning_rate():
    with pytest.raises(NonFiniteError, match="index 10 is out of bounds.*check_labels") as error:
        of_digits(DATA.train._replace(labels=DATA.train.labels + 1))
    assert "learning rate" not in str(error.value)


@pytest.mark.parametrize(
    "form, text",
    [(tuple, "a tuple of 2: float32["), (lambda d: d._asdict(), "a dict with 'images': fl")],
)
def test_a_batch_of_another_form_is_described(form, text):
    for call in (
        lambda: of_digits(form(DATA.train)),
        lambda: evaluate(lambda p, b: {"x": b.images.mean()}, form(DATA.test))(
            TrainState.create(params_of(), 0.1, key0())
        ),
    ):
        with pytest.raises(AttributeError) as error:
            call()
        assert any(f"the batch is {text}" in note for note in error.value.__notes__)


def test_a_generator_function_is_called_with_the_number_of_the_pass():
    def batches():
        yield regression()

    with pytest.raises(TypeError, match="fit calls it with the number of the pass"):
        fitted(batches, batch_size=None)


def test_the_arguments_of_evaluate_in_the_other_order():
    for data in (DATA.test, (X, Y), X):
        with pytest.raises(
            TypeError, match=r"the function comes first: evaluate\(metrics, data\)"
        ) as error:
            evaluate(data, lambda params, batch: {})  # pyright: ignore[reportArgumentType]
        assert len(str(error.value)) < 300


# Lines


class Terminal:
    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(
    "metric, kept", [(None, "loss 0.1235"), ("test_accuracy", "test_accuracy 0.9712")]
)
def test_a_narrow_line_keeps_whole_numbers_and_what_best_looks_at(metric, kept, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    show = Progress(1000, 200, metric=metric)
    record = {"step": 100, "epoch": 1, "loss": 0.123456, "accuracy": 0.5, "test_accuracy": 0.9712}
    record |= {"samples_per_second": 1234.0, "seconds": 60.0}
    whole = {
        "epoch 1",
        "step 100/1,000",
        "loss 0.1235",
        "accuracy 0.5",
        "test_accuracy 0.9712",
        "1,234 samples/s",
        "9:00 left",
    }
    for columns in range(1, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        line = show.line(record)
        assert len(line) <= max(columns - 1, 0)
        if len(kept) < columns:
            assert kept in line and set(line.split("  ")) <= whole
        else:
            assert line in ("", kept.split()[1])


def test_behind_a_signal_only_the_last_line_of_a_call_is_written(capsys):
    show = Progress(10, 1)
    records = [
        {"step": i, "epoch": i, "loss": 0.5, "samples_per_second": 1.0, "seconds": 1.0}
        for i in range(1, 5)
    ]
    show(records[0], last=False)
    show.ending = True
    for i in (1, 2, 3):
        show(records[i], last=i == 3)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1", "4"]


def test_the_loading_of_a_program_is_no_training(monkeypatch):
    """The first call takes 1 s with 1 step, all others 0.1 s: 0.1 s per step of the second call are
    training.
    """
    from jaxnet.train import clock

    laps = iter([0.0, 1.0])
    monkeypatch.setattr(clock.Clock, "lap", lambda self: next(laps, 0.1))
    history = fitted(steps=30, epochs=None, record_every=30).history
    assert len(history) == 1 and history[0]["seconds"] < 1.0
