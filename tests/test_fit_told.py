"""What a person is told: wrong arguments before the first step, progress, signals, pictures, files
in the way.
"""

import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import NET, key0, mean_square, params_of, regression

import jaxnet
from jaxnet.checkpoint import Checkpoints
from jaxnet.train import (
    NonFiniteError,
    TrainState,
    early_stopping,
    evaluate,
    fit,
    plot_history,
    time_budget,
    train_step,
    write_csv,
    write_jsonl,
)
from jaxnet.train.interrupt import interruptible
from jaxnet.train.progress import Progress, _width

HERE = str(pathlib.Path(__file__).parent)


def fitted(data: Any = None, **settings: Any):
    settings = {"batch_size": 4, "epochs": 3, "progress": False} | settings
    start = (
        settings.pop("start")
        if "start" in settings
        else TrainState.create(params_of(), 0.05, key0())
    )
    step = settings.pop("step", None) or train_step(mean_square, 0.05)
    return fit(step, start, regression() if data is None else data, **settings)


def count(state, batch):
    return state._replace(params=state.params + 1, step=state.step + 1), {
        "loss": 100 - state.params
    }


def counting(data: Any = None, **settings: Any):
    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    settings = {"progress": False} | ({"batch_size": 4} if data is None else {}) | settings
    return fit(count, start, jnp.zeros(4) if data is None else data, **settings)


# Wrong arguments


class Torch:
    """As an optimizer or a loader of another library looks."""

    def __iter__(self):
        yield np.zeros(3)


IMAGES = [np.zeros((8, 8), np.float32)] * 60
PAIRS = [(np.zeros((8, 8), np.float32), 3)] * 60


@pytest.mark.parametrize(
    "data, changes, text",
    [
        (
            IMAGES,
            {},
            (
                r"list of 60 arrays of shape \(8, 8\); make it one array of 60 examples: "
                r"np.stack\(data\)"
            ),
        ),
        ((IMAGES, np.zeros(60)), {}, r"data in '0' is a list of 60 arrays"),
        (
            {"x": np.zeros((60, 2)), "y": [1] * 60},
            {},
            "data in 'y' is a list of 60 numbers; make it an array: np.asarray",
        ),
        (
            PAIRS,
            {},
            (
                r"list of 60 examples, each \(float32\[8, 8\], int 3\).*tuple\(np.stack\(part\) "
                r"for part in zip"
            ),
        ),
        (
            (x for x in IMAGES),
            {},
            r"with batch_size the data is arrays, got a generator.*without batch_size its items",
        ),
        (
            Torch(),
            {},
            (
                "with batch_size the data is arrays, got .*; without batch_size it is taken as "
                "an iterable of b"
            ),
        ),
        (
            lambda epoch: IMAGES,
            {},
            "with batch_size the data is arrays, got the function .*without batch_size",
        ),
        (
            PAIRS,
            {"batch_size": None},
            r"each item is a batch, and this list of 60 holds single examples: \(float32\[8, 8\]",
        ),
        (np.zeros((4, 3)), {"batch_size": None}, "for arrays say batch_size"),
        ("data.npz", {"batch_size": None}, "an iterable of batches, got str"),
        (
            None,
            {"start": {"hidden": 1, "out": 2}},
            "got a dict with 'hidden', 'out'; these look like parameters: TrainState.cr",
        ),
        (
            None,
            {"start": TrainState.create},
            r"got the function TrainState.create; call it: TrainState.create\(params, optimizer",
        ),
        (None, {"start": 3.0}, "must be what TrainState.* returns, got float 3.0"),
        (
            None,
            {"step": TrainState.create(params_of(), 0.1, jax.random.key(0))},
            "step must be a function",
        ),
        (
            None,
            {"callbacks": print},
            r"callbacks must be a list of functions, got the function print; write callbacks=\[",
        ),
        (
            None,
            {"callbacks": ["log"]},
            r"callbacks\[0\] must be a function \(record\), got str 'log'",
        ),
        (
            None,
            {"callbacks": [lambda: None]},
            r"callbacks\[0\] .* cannot be called with one argument",
        ),
        (
            None,
            {"stop": early_stopping},
            "stop must be .*early_stopping.* cannot be called with one argument",
        ),
        (None, {"stop": "min loss"}, "stop must be a function"),
        (
            None,
            {"evaluate": {"x": 1.0}},
            r"evaluate must be a function \(train_state\) -> dict of numbers, got a dict",
        ),
        (
            None,
            {"evaluate": lambda a, b: {}},
            "evaluate must be .* cannot be called with one argument",
        ),
        (
            None,
            {"evaluate": lambda state: 0.5},
            "evaluate must return a dict of numbers by name, got float 0.5; write fo",
        ),
        (
            None,
            {"evaluate": lambda state: (0.5, {})},
            r"must return a dict of numbers by name, got \(float 0.5",
        ),
        (
            None,
            {"evaluate": lambda state: {"x": "good"}},
            "value 'x' that evaluate returns must be a number, got str 'good'",
        ),
        (None, {"evaluate": lambda state: {3: 1.0}}, "must have names that are strings, got 3"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(data, changes, text):
    seen = []
    with pytest.raises(TypeError, match=text):
        fitted(data, **{"callbacks": [seen.append]} | changes)
    assert not seen


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"evaluate": lambda state: {"a": 1.0}, "best_rule": "min b"},
            r"best_rule='min b', but `evaluate` returns \['a'\]",
        ),
        (
            {"evaluate": lambda state: {"a": 1.0}, "stop": early_stopping("min b", 2)},
            "no record has 'b', on which it is to",
        ),
        (
            {"stop": early_stopping("min b", 2)},
            r"no record has 'b'.*\['epoch', 'loss', 'samples_per_second', 'seconds'",
        ),
        ({"checkpoint": "store"}, "the store keeps the best by 'b', and no record has it"),
    ],
)
def test_a_name_that_nothing_has_is_told_before_the_first_step(changes, text, tmp_path):
    if "checkpoint" in changes:
        changes = {"checkpoint": Checkpoints(tmp_path, best_rule="min b")}
    seen = []
    with pytest.raises(KeyError, match=text):
        fitted(callbacks=[seen.append], **changes)
    assert not seen


def test_an_evaluation_that_jax_can_trace_is_traced_and_not_run(monkeypatch):
    runs = []

    def metrics(params, batch):
        jax.debug.callback(lambda: runs.append(1))
        return {"norm": optax.tree.norm(params)}

    look = evaluate(metrics, jnp.zeros(4))
    result = fitted(evaluate=look)
    jax.effects_barrier()
    assert len(runs) == len(result.evaluations) == 3
    seen = []
    with pytest.raises(KeyError, match="best_rule='min other'"):
        fitted(
            evaluate=jax.jit(lambda state: {"norm": optax.tree.norm(state.params)}),
            best_rule="min other",
        )
    fitted(evaluate=lambda state: {"calls": float(len(seen), *seen.append(int(state.step)) or ())})
    assert seen == [0, 3, 6, 9]


def test_an_iterator_that_is_used_up_is_named():
    with pytest.raises(
        ValueError, match="no batches; an iterator can be used once, and this one is used up"
    ):
        counting(iter([]), steps=3)


def test_two_arrays_in_a_list_are_data():
    assert fitted(list(regression())).train_state.step == 9


def test_examples_that_are_never_seen_are_told_once(capsys):
    data = np.zeros((60, 3), np.float32), np.zeros((60, 1), np.float32)
    settings = {"batch_size": 32, "epochs": 4, "progress": None}
    fitted(data, **settings)
    text = (
        "with batch_size=32 each epoch leaves out 28 of 60 examples; drop_last=False takes them all"
    )
    assert capsys.readouterr().err.count(text) == 1
    fitted(data, order=None, **settings)
    assert "the last 28 of 60 examples are never used" in capsys.readouterr().err
    each = train_step(
        lambda params, batch: jnp.square(NET.apply(params, batch[0]) - batch[1])[:, 0], 0.05
    )
    fitted(data, drop_last=False, step=each, **settings)
    assert "60 examples" not in capsys.readouterr().err


# JAX's switches for debugging


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "switch",
    [
        lambda: jax.debug_nans(True),
        lambda: jax.debug_infs(True),
        lambda: jax.disable_jit(True),
        lambda: jax.transfer_guard("disallow"),
    ],
    ids=["debug_nans", "debug_infs", "disable_jit", "transfer_guard"],
)
@pytest.mark.parametrize("kind", ["memory", "disk", "stream"])
def test_the_switches_for_debugging_change_no_number(switch, kind, tmp_path):
    x, y = regression()
    if kind == "disk":
        np.save(tmp_path / "x.npy", x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)] if kind == "stream" else (x, y)
    settings = {"batch_size": None if kind == "stream" else 4, "record_every": 1}
    plain, start = fitted(data, **settings), TrainState.create(params_of(), 0.05, key0())
    step = train_step(mean_square, 0.05)
    with switch():
        result = fitted(data, start=start, step=step, **settings)
    np.testing.assert_array_equal(
        result.train_state.params["kernel"], plain.train_state.params["kernel"]
    )


@pytest.mark.parametrize("check", [True, False])
def test_under_debug_nans_a_nan_is_an_error_of_fit(check):
    step, start = (
        train_step(lambda w, x: jnp.sqrt(w - 3), 0.1),
        TrainState.create(jnp.float32(1), 0.1, key0()),
    )
    with jax.debug_nans(True), pytest.raises(NonFiniteError, match="at step 0 the loss is nan"):
        fitted(jnp.zeros(4), step=step, start=start, check_finite=check)


# Iterables


def test_a_run_returns_with_its_last_batch():
    """Three batches are ready, and the fourth would come a minute later."""
    asked = threading.Event()

    def source():
        for _ in range(3):
            yield np.ones(2, np.float32)
        asked.wait(60)
        yield np.ones(2, np.float32)

    begin = time.monotonic()
    assert counting(source(), steps=3).train_state.params == 3
    assert time.monotonic() - begin < 30
    asked.set()


def test_no_batch_behind_the_end_is_drawn():
    drawn = []

    def passes(epoch):
        for i in range(4):
            drawn.append((epoch, i))
            yield np.ones(2, np.float32)

    assert counting(passes, epochs=2).train_state.step == 8
    assert drawn == [(epoch, i) for epoch in range(2) for i in range(4)]
    drawn.clear()
    result = counting(passes, steps=6, evaluate=lambda state: {"at": float(state.step)})
    assert drawn == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    # After the pass, and at the end.
    assert [record["at"] for record in result.evaluations] == [4, 6]


def test_a_pass_that_ends_with_the_run_has_ended(tmp_path):
    stream = [np.ones(2, np.float32)] * 4
    for data in (stream, lambda epoch: iter(stream)):
        file = tmp_path / f"{callable(data)}.safetensors"
        whole = counting(data, steps=11, record_every=1)
        counting(data, steps=8, record_every=1, checkpoint=file)
        rest = counting(data, steps=11, record_every=1, checkpoint=file)
        assert (
            [r["epoch"] for r in whole.history]
            == [r["epoch"] for r in rest.history]
            == [1] * 4 + [2] * 4 + [3] * 3
        )


def test_slow_batches_are_trained_on_as_they_come(monkeypatch):
    monkeypatch.setattr("jaxnet.train.iterables.HELD", 0.02)
    sizes = []

    def source():
        for _ in range(12):
            time.sleep(0.05)
            yield np.ones(2, np.float32)

    from jaxnet.train import iterables as module

    stacked = module._stacked
    monkeypatch.setattr(
        module, "_stacked", lambda held, *rest: (sizes.append(len(held)), stacked(held, *rest))[1]
    )
    assert counting(source(), steps=12).train_state.step == 12
    assert max(sizes) == 1


@pytest.mark.parametrize("steps", [2, 50])
def test_a_generator_is_closed_when_fit_returns(steps):
    closed = []

    def source():
        try:
            for _ in range(5):
                yield np.ones(2, np.float32)
        finally:
            closed.append(threading.current_thread().name)

    generator = source()
    counting(generator, steps=steps)
    assert len(closed) == 1
    closed.clear()
    counting(lambda epoch: source(), steps=steps)
    assert len(closed) == max(1, steps // 5)


# Progress


class Terminal:
    def __init__(self):
        self.written, self.encoding = "", "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        self.written += text

    def flush(self):
        pass


RECORD = {
    "step": 100,
    "epoch": 1,
    "loss": 0.123456,
    "accuracy_on_something_long": 0.5,
    "test_accuracy": 0.75,
    "samples_per_second": 1234.0,
    "seconds": 60.0,
}


@pytest.mark.parametrize("columns", [200, 118, 80, 60, 40, 20])
def test_a_line_fits_the_terminal_as_it_is_now(monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    show = Progress(1000, 200)
    for now in (columns, 50, columns):
        monkeypatch.setenv("COLUMNS", str(now))
        terminal.written = ""
        show(RECORD)
        line = re.sub(r"\x1b\[\d*[AJ]", "", terminal.written).strip("\r")
        # Whole fields are left out, and no digit is: 19 columns have no room for the epoch beside
        # the loss.
        assert len(line) < now and line.startswith("epoch 1  ") == (now > 20)
        assert "loss 0.1235" in line
    assert ("test_accuracy 0.75" in line) == (columns >= 60)


def test_a_terminal_made_narrower_is_cleaned_up(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    show = Progress(1000, 200)
    show(RECORD)
    width = len(terminal.written.strip("\r"))
    monkeypatch.setenv("COLUMNS", "40")
    terminal.written = ""
    show(RECORD)
    rows = -(-width // 40) - 1  # the old line now covers so many rows more
    assert rows > 0 and terminal.written.startswith(f"\x1b[{rows}A\r\x1b[J")


def test_wide_characters_count_twice_and_controls_are_escaped(monkeypatch):
    assert [_width(text) for text in ("abc", "训练", "e\u0301")] == [3, 4, 1]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    Progress(1000, 200)({"step": 1, "epoch": 1, "训练损失训练损失": 1.0, "a\x1b[2J": 2.0} | RECORD)
    assert _width(terminal.written.strip("\r")) < 40 and "\x1b" not in terminal.written


def test_compiling_is_said_at_once(monkeypatch):
    terminal, seen = Terminal(), []
    monkeypatch.setattr("sys.stderr", terminal)

    def step(state, batch):
        seen.append(terminal.written)  # while the step is traced
        return count(state, batch)

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    fit(step, start, jnp.zeros(4), batch_size=4, steps=3)
    assert seen[0] == "\rcompiling ..." and re.search(
        r"\rcompiled in \d+\.\d s *\n", terminal.written
    )


def test_a_pipe_gets_a_line_per_evaluation_and_one_after_a_while(capsys, monkeypatch):
    data = regression(1200)
    fitted(data, epochs=1, evaluate=lambda state: {"test": 1.0}, evaluate_every=50, progress=None)
    lines = capsys.readouterr().err.splitlines()
    steps = [re.findall(r"step (\d+)/300 .*  test 1  ", line) for line in lines[1:]]
    assert steps == [["50"], ["100"], ["150"], ["200"], ["250"], ["300"]]
    monkeypatch.setattr(sys.modules["jaxnet.train.progress"], "QUIET", -1.0)
    fitted(data, epochs=1, record_every=50, progress=None)
    assert len(capsys.readouterr().err.splitlines()) > 3


def test_the_line_of_an_epoch_shows_the_mean_of_the_epoch(capsys):
    # Epochs have ten steps; the losses fall from 100 by one per step.
    result = counting(jnp.zeros(40), batch_size=4, epochs=3, record_every=5, progress=None)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines] == [95.5, 85.5, 75.5]  # pyright: ignore
    assert [record["loss"] for record in result.history] == [98, 93, 88, 83, 78, 73]


@pytest.mark.parametrize("examples", [40, 400, 4000])
def test_evaluations_have_one_shape_whatever_the_size_of_the_data(examples):
    look = {"evaluate": lambda state: {"test": float(state.step)}}
    result = counting(jnp.zeros(examples), batch_size=4, epochs=3, **look)
    assert [r["test"] for r in result.evaluations] == [examples // 4 * epoch for epoch in (1, 2, 3)]
    losses = 100 - np.arange(3 * examples // 4).reshape(3, -1).mean(1)
    np.testing.assert_allclose([r["loss"] for r in result.evaluations], losses, rtol=1e-6)


def test_an_interrupted_epoch_has_the_mean_of_all_of_it(tmp_path):
    look = {"evaluate": lambda state: {"test": 0.0}, "evaluate_every": 10, "record_every": 3}
    counting(steps=14, checkpoint=tmp_path / "r.safetensors", **look)
    rest = counting(steps=30, checkpoint=tmp_path / "r.safetensors", **look)
    whole = counting(steps=30, **look)
    assert [r["loss"] for r in whole.evaluations] == [95.5, 85.5, 75.5]
    assert [(r["step"], r["loss"]) for r in rest.evaluations] == [
        (10, 95.5),
        (20, 85.5),
        (30, 75.5),
    ]


# Why it stopped


def test_one_line_says_why_it_stopped_where_and_what_is_saved(tmp_path, capsys):
    file = tmp_path / "r.safetensors"
    kill = [lambda r: r["step"] == 3 and os.kill(os.getpid(), signal.SIGINT)]
    run = counting(
        steps=9,
        record_every=1,
        evaluate_every=1,
        evaluate=lambda s: {"x": 1.0},
        callbacks=kill,
        checkpoint=file,
        progress=None,
    )
    told = capsys.readouterr().err
    assert run.stopped == "SIGINT"
    assert "SIGINT: finishing the running call; a second one ends the program at once" in told
    text = (
        f"stopped by SIGINT at step 3 of 9, saved in {file}; Ctrl-C again within 10 s ends the "
        "program"
    )
    assert text in told
    counting(steps=9, stop=lambda history: "enough", record_every=2, progress=None)
    assert "stopped at step 2 of 9: enough" in capsys.readouterr().err
    counting(iter([np.zeros(4)] * 5), steps=9, progress=None)
    assert "stopped at step 5 of 9: the data ended" in capsys.readouterr().err


def interrupted(asks):
    kill = [lambda r: r["step"] == 3 and os.kill(os.getpid(), signal.SIGINT)]
    settings = {"steps": 9, "record_every": 1, "callbacks": kill, "stop": lambda history: False}
    run = counting(**settings)
    if asks:
        assert run.exit_code == 130
    return lambda: counting(**settings)


def test_a_second_signal_ends_a_sweep_that_does_not_look_at_the_first():
    with pytest.raises(KeyboardInterrupt):
        interrupted(asks=False)()


def test_a_program_that_looks_at_the_first_signal_decides_itself():
    assert interrupted(asks=True)().stopped == "SIGINT"


def test_a_signal_much_later_is_a_first_one(monkeypatch):
    again = interrupted(asks=False)
    monkeypatch.setattr(sys.modules["jaxnet.train.interrupt"], "AGAIN", 0.0)
    assert again().stopped == "SIGINT"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible() as flag:
            assert signal.getsignal(number) == signal.SIG_IGN
            os.kill(os.getpid(), number)
        assert flag.name is None and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_ctrl_c_twice_ends_a_script_with_a_sweep():
    """Real signals, real processes: the first ends a run, the second the script, with Python's code
    for it.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from linear_regression import *;from "
        "jaxnet.train import fit, TrainState, train_step; import time, jax.numpy as jnp\n"
        "for i in range(3):\n"
        "    fit(train_step(mean_square, .1), TrainState.create(params_of(), .1, key0()), "
        "regression(), batch_size=4,\n"
        "        epochs=10**7, callbacks=[lambda r: print('record', flush=True)], "
        "record_every=10**5)\n"
        "    print('next', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, HERE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "record\n"
    process.send_signal(signal.SIGINT)
    while (line := process.stdout.readline()) != "next\n":
        assert line == "record\n"
    assert process.stdout.readline() == "record\n"  # of the second run
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert (
        "next" not in rest and "stopped by SIGINT at step" in told and "KeyboardInterrupt" in told
    )
    assert process.returncode in (-signal.SIGINT, 130)


# Files in the way


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
@pytest.mark.parametrize(
    "content",
    [
        b"name,age\n",
        b"name,age\nx,1\n",
        b"[1, 2]\n",
        b'{"name": 1}\n',
        b"\x00\xff\xfe\n",
        b"hello",
        b"steps\n1\n",
    ],
)
def test_files_of_others_are_left_alone(make, content, tmp_path):
    path = tmp_path / "history"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="exists and holds something other than records; it is left as it is"
    ):
        make(path)
    path.unlink()
    callback = make(path)
    path.write_bytes(content)  # it comes after the check
    with pytest.raises(ValueError, match="other than records"):
        callback({"step": 1, "epoch": 1, "loss": 0.5})
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
def test_places_where_no_record_can_go_are_named_at_the_call(make, tmp_path):
    (tmp_path / "file").write_text("")
    for path, error in [
        ("", ValueError),
        (tmp_path, IsADirectoryError),
        (tmp_path / ("x" * 300), OSError),
        (tmp_path / "file" / "history", OSError),
        (None, TypeError),
    ]:
        with pytest.raises(error):
            make(path)


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
def test_a_line_that_a_kill_has_cut_is_written_anew(make, tmp_path):
    path = tmp_path / "history"
    record = {"step": 1, "epoch": 1, "loss": 0.5}
    first = make(path)
    for step in (1, 2, 3):
        first(record | {"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    make(path)(record | {"step": 3})
    assert path.read_bytes() == whole


class Failed(OSError):
    pass


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_a_file_of_records_is_replaced_whole_or_not_at_all(make, function, tmp_path, monkeypatch):
    """A resumed run replaces the file. If a system call fails, the old file is all that is left."""
    path = tmp_path / "history"
    record = {"step": 1, "epoch": 1, "loss": 0.5}
    first = make(path)
    for step in (1, 2, 3):
        first(record | {"step": step})
    whole, resumed = path.read_bytes(), make(path)
    resumed.begin(2, resumed=True)

    def fail(*arguments):
        raise Failed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"jaxnet.checkpoint.atomic.os.{function}", fail)
        with pytest.raises(Failed):
            resumed(record | {"step": 3})
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["history"]
    resumed(record | {"step": 3})
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["history"]


@pytest.mark.parametrize("make", [write_csv, write_jsonl])
def test_the_bytes_of_a_file_of_records_are_synced_before_it_is_renamed(
    make, tmp_path, monkeypatch
):
    path, calls = tmp_path / "history", []
    make(path)({"step": 1, "epoch": 1, "loss": 0.5})
    sync, replace = os.fsync, os.replace

    def synced(fd):
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), replace(*a)))
    resumed = make(path)
    resumed.begin(0, resumed=True)
    resumed({"step": 1, "epoch": 1, "loss": 0.5})
    # A new column of a table replaces the file once more.
    assert calls[:3] == ["file", "rename", "folder"] and len(calls) == calls.count("file") * 3


# Rules


@pytest.mark.parametrize("patience", [2.5, True, 0, "3", None])
def test_a_patience_that_is_no_size_is_refused(patience):
    with pytest.raises(
        ValueError, match=f"early_stopping: patience must be a positive int, got {patience!r}"
    ):
        early_stopping("min loss", patience)


@pytest.mark.parametrize(
    "rule", ["loss", "min", "min ", "min  loss", "least loss", 3, ("min", "a")]
)
def test_a_malformed_rule_is_named_with_its_argument_and_function(rule):
    text = re.escape(f"best_rule must be 'min' or 'max' and a name, as in 'min loss', got {rule!r}")
    with pytest.raises(ValueError, match=f"early_stopping: {text}"):
        early_stopping(rule, 2)
    with pytest.raises(ValueError, match=f"fit: {text}"):
        fitted(regression(), best_rule=rule, evaluate=lambda state: {"loss": 1.0})


def test_a_metric_with_one_of_the_reserved_names_is_refused():
    def step(state, batch):
        return state._replace(step=state.step + 1), {"seconds": jnp.float32(0)}

    with pytest.raises(ValueError, match="metric 'seconds' has a name that every record has"):
        fitted(regression(), step=step)


@pytest.mark.parametrize(
    "values", [[np.nan] * 9, [1.0, np.nan, np.nan, np.nan], [np.nan, 1.0, np.nan, np.nan, 2.0]]
)
def test_nan_is_no_improvement(values):
    stop = early_stopping("max score", 2)
    told = [bool(stop([{"score": v} for v in values[: i + 1]])) for i in range(len(values))]
    best = next((i for i, v in enumerate(values) if not np.isnan(v)), 0)
    assert told.index(True) == best + 2


def test_a_budget_that_is_no_time_is_refused():
    wrong: Any = (-1, float("nan"), "60")
    for seconds in wrong:
        with pytest.raises(ValueError, match="time_budget: seconds must be a number of at least 0"):
            time_budget(seconds)


# Pictures


def drawn(history, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    plot_history(history, tmp_path / "curves.png")
    return figures[0].axes


def history_of(losses, epoch_steps=10):
    fixed = {"samples_per_second": 1.0, "seconds": 1.0}
    return [
        {"step": i, "epoch": -(-i // epoch_steps), "loss": float(x), **fixed}
        for i, x in enumerate(losses, 1)
    ]


@pytest.mark.parametrize(
    "losses, scale",
    [
        (2.4 + 0.2 * np.cos(np.arange(50)), "linear"),
        (-np.arange(50.0), "linear"),
        (np.linspace(5, -5, 50), "linear"),
        (np.exp(-np.arange(50) / 5), "log"),
        (np.full(50, np.nan), "linear"),
        (np.r_[3.0, np.nan, 0.01 * np.ones(48)], "log"),
    ],
)
def test_an_axis_suits_its_losses_and_has_plain_numbers(losses, scale, tmp_path, monkeypatch):
    (axes,) = drawn(history_of(losses), tmp_path, monkeypatch)
    assert axes.get_yscale() == scale and axes.get_xlabel() == "epoch"
    low, high = axes.get_xlim()
    assert all(float(tick).is_integer() for tick in axes.get_xticks() if low <= tick <= high)
    labels = [label.get_text() for label in axes.get_yticklabels() + axes.get_xticklabels()]
    assert not any(re.search(r"10\^|times|e[+-]?\d", label) for label in labels) and len(labels) > 3
    finite = losses[np.isfinite(losses)]
    bottom, top = axes.get_ylim()
    assert finite.size == 0 or (bottom <= finite.min() and finite.max() <= top)


def test_inspect_tells_of_a_run_in_one_line(tmp_path, capsys):
    from jaxnet import cli

    file = tmp_path / "r.safetensors"
    fitted(
        checkpoint=file, evaluate=lambda state: {"score": float(state.step)}, best_rule="max score"
    )
    assert cli.main(["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    assert "a run of fit: 3 records, step 9 of 9, best max score 9 at step 9" in told
    assert "digest" not in told and max(map(len, told.splitlines())) < 200
    jaxnet.save(file, {"x": 1.0}, metadata={"fit": "no JSON"})
    assert cli.main(["inspect", str(file)]) == 0 and "no JSON" in capsys.readouterr().out
