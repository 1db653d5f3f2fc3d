"""Where batches come from: files larger than memory, and iterables of every kind, give what arrays
in memory give.
"""

import json
import os
import re
import signal
import threading
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import NET, key0, regression

from jaxnet.data import Windows, batches
from jaxnet.train import (
    NonFiniteError,
    TrainState,
    Weighted,
    balanced,
    evaluate,
    fit,
    guarded,
    shuffle,
    train_step,
)
from jaxnet.train.iterables import stacks_of_iterable
from jaxnet.train.iterator_state import from_json, to_json
from jaxnet.train.prefetch import Prefetch


def squares(params, batch):
    x, y = batch
    return jnp.square(NET.apply(params, x) - y)[:, 0]


def fitted(data, **settings):
    optimizer = optax.adam(0.01)
    start = TrainState.create(NET.init(jax.random.key(1), regression(22)[0]), optimizer, key0())
    return not_cut(fit(train_step(squares, optimizer), start, data, progress=False, **settings))


def not_cut(result):
    """The result of a run that no SIGTERM has cut. `fit` takes the signal that ends the tests for
    the end of the run.
    """
    assert result.stopped != "SIGTERM"
    return result


def watched(data, *, record_every=1, progress: bool | None = False, **settings):
    """What the steps of a run see: the sums of their batches, in order."""

    def step(state, batch):
        return state._replace(step=state.step + 1), {
            "sum": sum(leaf.sum() for leaf in jax.tree.leaves(batch))
        }

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    result = not_cut(
        fit(step, start, data, record_every=record_every, progress=progress, **settings)
    )
    return [record["sum"] for record in result.history], result


# Arrays on disk


@pytest.fixture
def on_disk(tmp_path):
    x, y = regression(22)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    return tuple(np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "y.npy"))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "settings", [{}, {"drop_last": False}, {"order": None}, {"order": balanced([0] * 20 + [1] * 2)}]
)
def test_a_memory_map_gives_what_memory_gives(on_disk, settings, monkeypatch):
    monkeypatch.setattr("jaxnet.train.stacks.STACK", 300)  # bytes: a few batches at a time
    inside = fitted(regression(22), batch_size=4, epochs=3, **settings)
    outside = fitted(on_disk, batch_size=4, epochs=3, **settings)
    chex.assert_trees_all_close(inside.train_state.params, outside.train_state.params, rtol=1e-5)
    numbers = np.arange(22, dtype=np.float32)
    np.save(on_disk[0].filename, numbers)
    lazy = np.load(on_disk[0].filename, mmap_mode="r")
    assert (
        watched(numbers, batch_size=4, epochs=3, **settings)[0]
        == watched(lazy, batch_size=4, epochs=3, **settings)[0]
    )


def test_weights_and_full_batches_may_lie_on_disk(on_disk):
    weights = np.arange(22, dtype=np.float32)
    for settings in ({"batch_size": 22}, {"batch_size": 4, "drop_last": False}):
        inside = fitted(Weighted(regression(22), weights), epochs=2, **settings)
        outside = fitted(Weighted(on_disk, weights), epochs=2, **settings)
        chex.assert_trees_all_close(
            inside.train_state.params, outside.train_state.params, rtol=1e-6
        )


def test_a_run_on_disk_resumes_bit_for_bit(on_disk, tmp_path):
    whole = fitted(on_disk, batch_size=4, steps=17)
    fitted(on_disk, batch_size=4, steps=8, checkpoint=tmp_path / "run.safetensors")
    rest = fitted(on_disk, batch_size=4, steps=17, checkpoint=tmp_path / "run.safetensors")
    chex.assert_trees_all_equal(whole.train_state.params, rest.train_state.params)


def test_only_the_rows_of_the_batches_are_read():
    class Counted:
        # 8 GB, if it were an array.
        shape, dtype, read = (1_000_000_000, 2), np.dtype(np.float32), 0

        def __getitem__(self, rows):
            Counted.read += len(rows)
            return np.ones((len(rows), 2), np.float32)

    sums, _ = watched(Counted(), batch_size=4, steps=10)
    # What was used, and a little that was read ahead.
    assert sums == [8.0] * 10 and Counted.read < 4 * 80


def test_windows_are_rows_of_a_sequence(tmp_path):
    tokens = np.arange(100, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    windows = Windows(np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), 9, stride=4)
    expected = np.lib.stride_tricks.sliding_window_view(tokens, 9)[::4]
    assert (
        windows.shape == expected.shape
        and len(windows) == len(expected)
        and windows.dtype == np.uint16
    )
    rows = np.array([3, 0, -1])
    np.testing.assert_array_equal(windows[rows], expected[rows])
    np.testing.assert_array_equal(windows[2:7:2], expected[2:7:2])
    np.testing.assert_array_equal(windows[5], expected[5])
    sums, _ = watched(windows, batch_size=4, epochs=1, order=None)
    np.testing.assert_array_equal(sums, expected[:20].reshape(5, 36).sum(1))
    for wrong, error in [
        (lambda: Windows(tokens, 101), ValueError),
        (lambda: Windows(tokens, 0), ValueError),
    ]:
        with pytest.raises(error, match="Windows"):
            wrong()
    with pytest.raises(IndexError, match=re.escape("rows must be within -23..22, got 23..23")):
        windows[np.array([23])]


# Iterables


def test_batches_of_an_iterable_train_as_arrays_do(monkeypatch):
    x, y = regression(20)
    stream = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]
    arrays = fitted((x, y), batch_size=4, epochs=3, order=None)
    for size in (1 << 25, 100):  # all batches of a pass at once, and one by one
        monkeypatch.setattr("jaxnet.train.stacks.STACK", size)
        for run in (fitted(stream, epochs=3), fitted(stream, steps=15)):
            chex.assert_trees_all_close(
                run.train_state.params, arrays.train_state.params, rtol=1e-5
            )


def test_records_of_an_iterable_end_with_its_passes():
    stream = [np.full(2, i, np.float32) for i in range(5)]
    _, result = watched(stream, epochs=2, record_every=3, evaluate=lambda state: {"at": state.step})
    assert [(r["step"], r["epoch"], r.get("at")) for r in result.history] == [
        (3, 1, None),
        (5, 1, 5),
        (6, 2, None),
        (9, 2, None),
        (10, 2, 10),
    ]
    _, result = watched(
        stream, steps=6, record_every=4, evaluate=lambda state: {"at": state.step}, evaluate_every=4
    )
    assert [(r["step"], r.get("at")) for r in result.history] == [(4, 4.0), (5, None), (6, None)]


def test_another_shape_is_compiled_again_and_named(capsys):
    stream = [np.ones((4, 2), np.float32)] * 3 + [np.ones((1, 2), np.float32)]
    sums, result = watched(stream, epochs=2, progress=None)
    assert sums == [8.0, 8.0, 8.0, 2.0] * 2 and len(result.compiled) == 2
    assert result.compiled[1].endswith("the batch changed, '0' from float32[4, 2] to float32[1, 2]")
    assert result.compiled[1] in capsys.readouterr().err


def test_a_generator_ends_with_its_only_pass():
    sums, result = watched((np.full(2, i, np.float32) for i in range(4)), steps=100)
    assert (
        sums == [0.0, 2.0, 4.0, 6.0]
        and result.train_state.step == 4
        and result.stopped == "the data ended"
    )


def test_a_finished_run_over_an_iterable_stays_finished(tmp_path):
    for _ in range(2):
        _, result = watched(
            [np.ones(2, np.float32)] * 4, epochs=2, checkpoint=tmp_path / "run.safetensors"
        )
        assert result.train_state.step == 8 and result.stopped is None
    _, result = watched(
        [np.ones(2, np.float32)] * 4, epochs=3, checkpoint=tmp_path / "run.safetensors"
    )
    assert result.train_state.step == 12


def test_a_signal_does_not_wait_for_a_slow_iterable():
    release = threading.Event()

    def slow():
        yield np.ones(2, np.float32)
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(60)
        yield np.ones(2, np.float32)

    _, result = watched(slow(), steps=2)  # returns while the source still waits
    release.set()
    assert result.stopped == "SIGINT" and result.train_state.step < 2


def test_the_thread_sees_the_settings_of_its_caller():
    with jax.enable_x64(True):
        _, result = watched([np.full(2, 2.0**40, np.float64)], steps=1)
        seen = [
            batch.dtype
            for (batch,) in [
                stack.inputs
                for stack in Prefetch(stacks_of_iterable(iter([np.ones(2)]), {}, lambda s: 9, 0))
            ]
        ]
    assert seen == [np.float64] and result.train_state.step == 1


def test_a_function_gives_every_pass_its_own_batches():
    data = np.arange(8, dtype=np.float32)
    sums, _ = watched(lambda epoch: batches(data, 4, seed=epoch), epochs=2)
    expected = [batch.sum() for epoch in range(2) for batch in batches(data, 4, seed=epoch)]
    assert sums == expected


def test_what_the_source_raises_is_passed_on(tmp_path):
    def stream():
        yield from [np.ones(2, np.float32)] * 3
        raise OSError("the disk is gone")

    file = tmp_path / "run.safetensors"
    with pytest.raises(OSError, match="the disk is gone") as caught:
        watched(stream(), steps=10, checkpoint=file)
    assert any("the state at step 3 is saved" in note for note in caught.value.__notes__)
    again = [np.full(2, i, np.float32) for i in (1, 1, 1, 3, 4)]
    sums, _ = watched(again, steps=5, checkpoint=file)
    # What was done, and the rest of a source that begins as the first did.
    assert sums == [2.0, 2.0, 2.0, 6.0, 8.0]


@pytest.mark.parametrize("stream", [[], iter([]), lambda epoch: []])
def test_an_iterable_without_batches_is_named(stream):
    with pytest.raises(ValueError, match="the iterable has no batches"):
        watched(stream, steps=3)


def test_integers_of_a_stream_are_checked_too():
    with pytest.raises(
        ValueError, match=r"'x' holds 1099511627776, which int64 can and int32 cannot"
    ):
        watched([{"x": np.array([1])}, {"x": np.array([2**40])}], steps=2)
    with pytest.raises(TypeError, match="'name' must hold numbers, got <U1"):
        watched([{"name": np.array(["a"])}], steps=2)


def test_the_thread_ends_with_the_run():
    def endless():
        while True:
            yield np.ones(2, np.float32)

    watched(endless(), steps=3)
    deadline = time.monotonic() + 10
    while (
        any(thread.name == "jaxnet-prefetch" for thread in threading.enumerate())
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not any(thread.name == "jaxnet-prefetch" for thread in threading.enumerate())


def test_at_most_so_many_items_are_drawn_ahead():
    drawn = []
    items = Prefetch((drawn.append(i) or i for i in range(100)), depth=2)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(drawn) <= 4  # the one taken, two that wait, one in the thread's hand
    items.close()


class Draws:
    """An iterable with a state, in Grain's manner: random batches that nobody could find again by
    counting passes.
    """

    def __iter__(self):
        return DrawsIterator()


class DrawsIterator:
    def __init__(self):
        self.seed, self.restored = 1, False

    def __next__(self):
        self.seed = self.seed * 48271 % 2147483647  # Park & Miller's generator
        return np.full(2, self.seed % 1000, np.float32)

    def __iter__(self):
        return self

    def get_state(self):
        return str(self.seed).encode()

    def set_state(self, state):
        self.seed = int(state)


class Loader:
    """An iterable with a state, in torchdata's manner."""

    def __init__(self):
        self.seed, self.loaded = 1, 0

    def __iter__(self):
        for _ in range(50):
            self.seed = self.seed * 48271 % 2147483647
            yield np.full(2, self.seed % 1000, np.float32)

    def state_dict(self):
        return {"seed": self.seed}

    def load_state_dict(self, state):
        self.seed, self.loaded = state["seed"], self.loaded + 1


class Plain:
    """An iterable without a state: what has been used is drawn again."""

    def __init__(self):
        self.drawn = 0

    def __iter__(self):
        for i in range(9):
            self.drawn += 1
            yield np.full(2, i, np.float32)


@pytest.mark.sample(12)
@pytest.mark.parametrize("source", [Draws, Loader, Plain])
@pytest.mark.parametrize("stack", [8, 24, 1 << 25])
@pytest.mark.parametrize("stop", [1, 4, 9, 11])
def test_an_iterable_goes_on_where_it_stood(source, stack, stop, tmp_path, monkeypatch):
    # One, three and 64 batches on the device at once.
    monkeypatch.setattr("jaxnet.train.stacks.STACK", stack)
    file = tmp_path / "run.safetensors"
    whole, _ = watched(source(), steps=14)
    watched(source(), steps=stop, checkpoint=file)
    again = source()
    rest, _ = watched(again, steps=14, checkpoint=file)
    assert rest == whole and len(whole) == 14
    if source is Loader:
        assert again.loaded == 1


def test_the_states_of_iterators_survive_json():
    state = {
        "a": (1, 2.5, None, "x"),
        3: [True, b"\x00\xff"],
        "rng": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    again = from_json(json.loads(json.dumps(to_json(state))))
    np.testing.assert_array_equal(again.pop("rng"), state.pop("rng"))
    assert again == state
    with pytest.raises(
        TypeError, match="the iterator's state holds a object, which a checkpoint cannot keep"
    ):
        to_json([object()])


def test_torch_tensors_are_batches_as_well():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(torch.arange(10.0), batch_size=4)
    sums, _ = watched(loader, epochs=1)
    assert sums == [6.0, 22.0, 17.0]


@pytest.mark.parametrize("library", ["grain", "torchdata"])
def test_loaders_that_shuffle_go_on_where_they_stood(library, tmp_path):
    pytest.importorskip(library)
    if library == "grain":
        import grain  # pyright: ignore[reportMissingImports]

        def source():
            return (
                grain.MapDataset.source(np.arange(40))
                .shuffle(seed=1)
                .repeat()
                .batch(4)
                .to_iter_dataset()
            )
    else:
        import torch  # pyright: ignore[reportMissingImports]
        from torchdata.stateful_dataloader import StatefulDataLoader  # pyright: ignore[reportMissingImports]

        def source():
            torch.manual_seed(0)
            return StatefulDataLoader(torch.arange(40), batch_size=4, shuffle=True)

    file = tmp_path / "run.safetensors"
    whole, _ = watched(source(), steps=14)
    watched(source(), steps=6, checkpoint=file)
    rest, _ = watched(source(), steps=14, checkpoint=file)
    assert rest == whole and len(set(whole)) > 8


def test_more_skipped_steps_than_allowed_are_an_error(tmp_path):
    optimizer = guarded(1.0, limit=2)
    step = train_step(lambda w, bad: -w * jnp.where(bad[0], jnp.nan, 1), optimizer)

    def run(bad, **settings):
        stream = [np.array([i in bad]) for i in range(9)]
        return fit(
            step,
            TrainState.create(jnp.float32(0), optimizer, key0()),
            stream,
            steps=9,
            progress=False,
            **settings,
        )

    result = run([3, 4, 8])
    assert result.train_state.params == 6 and result.history[-1]["skipped"] == 3
    # Of the steps that were taken.
    assert result.history[-1]["loss"] == pytest.approx(-np.mean([0, 1, 2, 3, 4, 5]))
    with pytest.raises(
        NonFiniteError,
        match="3 steps in a row were not finite, up to step 5, and were skipped; the limit is 2",
    ):
        run([3, 4, 5])


# Arrays of other libraries


NUMBERS = np.arange(12, dtype=np.float32)
SHUFFLED = np.random.default_rng(0).permutation(12)
# One column of numbers in many forms, by the library and the form; by position, all are NUMBERS.
FORMS = {
    "pandas, shuffled index": lambda pandas: pandas.Series(NUMBERS, index=SHUFFLED),
    "pandas, index of letters": lambda pandas: pandas.Series(NUMBERS, index=list("abcdefghijkl")),
    "pandas, filtered": lambda pandas: pandas.Series(np.arange(-3, 12, dtype=np.float32))[
        lambda s: s >= 0
    ],
    "pandas, column of a frame": lambda pandas: pandas.DataFrame({"y": NUMBERS}, index=SHUFFLED)[
        "y"
    ],
    "pandas, categories": lambda pandas: pandas.Series(NUMBERS, index=SHUFFLED).astype("category"),
    "torch": lambda torch: torch.arange(12.0),
    "torch, view": lambda torch: torch.arange(24.0)[::2] / 2,
    "torch, bfloat16": lambda torch: torch.arange(12.0).to(torch.bfloat16),
    "jax": lambda jax: jax.numpy.arange(12.0),
    "numpy, float64": lambda numpy: numpy.arange(12.0),
    "numpy, nothing masked": lambda numpy: numpy.ma.masked_array(NUMBERS, mask=False),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_other_libraries_are_read_by_position(form):
    column: Any = FORMS[form](pytest.importorskip(form.partition(",")[0]))
    numbers: Any = NUMBERS
    settings: dict[str, Any] = {"batch_size": 4, "epochs": 2}
    expected, _ = watched(numbers, **settings)
    assert watched(column, **settings)[0] == expected
    assert watched({"x": column}, **settings)[0] == expected
    weighted = fit(
        train_step(lambda w, x: w * x, 1.0),
        TrainState.create(jnp.float32(0), 1.0, key0()),
        Weighted(numbers, column),
        batch_size=12,
        steps=1,
        progress=False,
    )
    assert float(weighted.train_state.params) == pytest.approx(
        -(numbers * numbers).sum() / numbers.sum(), rel=1e-5
    )
    mean = evaluate(lambda params, x: {"mean": x * 1.0}, column, batch_size=5)(weighted.train_state)
    assert float(mean["mean"]) == 5.5
    if form not in ("torch, bfloat16", "numpy, float64"):
        streamed = [
            batch.sum() for batch in batches({"x": column}, 4) for batch in [np.asarray(batch["x"])]
        ]
        assert streamed == [6.0, 22.0, 38.0]


def test_labels_of_pandas_balance_by_position():
    pandas = pytest.importorskip("pandas")
    labels = np.array([0] * 9 + [1] * 3)
    series = pandas.Series(labels, index=np.random.default_rng(0).permutation(12))
    asked = key0(), 12, jnp.int32(0), jnp.arange(12)
    np.testing.assert_array_equal(balanced(series)(*asked), balanced(labels)(*asked))


def test_arrays_that_cannot_be_read_are_named_with_a_remedy():
    torch = pytest.importorskip("torch")
    masked = np.ma.masked_array(np.arange(4.0), mask=[0, 1, 0, 0])  # pyright: ignore[reportArgumentType, reportCallIssue]
    for data, text in [
        (
            {"x": torch.ones(4, requires_grad=True)},
            r"'x', a Tensor, cannot be read .* \.detach\(\)\.cpu\(\)\.numpy\(\)",
        ),
        ({"x": masked}, "'x' has masked entries"),
        ({"x": np.array([1, None, 3, 4])}, "'x' must hold numbers, got object"),
        ({"x": [1.0, 2.0, 3.0, 4.0]}, "'x' is a list of 4 numbers|in 'x' is a list of 4 numbers"),
        ([np.ones((4, 4), np.float32)] * 40, "list of 40 arrays"),
        ([(np.ones(3, np.float32), 1)] * 40, "list of 40 examples"),
    ]:
        with pytest.raises(TypeError, match=text):
            watched(data, batch_size=2, epochs=1)
        with pytest.raises(TypeError, match=text):
            evaluate(lambda params, batch: {"n": 1.0}, data, batch_size=2)


@pytest.mark.parametrize(
    "bad, text",
    [(-1.0, "got -1.0 in row 3"), (np.nan, "got nan in row 3"), (np.inf, "got inf in row 3")],
)
@pytest.mark.parametrize("source", ["memory", "disk", "stream"])
def test_weights_without_a_meaning_are_refused_before_the_first_step(bad, text, source, on_disk):
    weights = np.ones(22, np.float32)
    weights[3] = bad
    data = {"memory": Weighted(regression(22), weights), "disk": Weighted(on_disk, weights)}.get(
        source
    )
    with pytest.raises(ValueError, match=f"weights' must be at least 0 and finite, {text}"):
        if data is None:
            fitted([Weighted(regression(22), weights)], epochs=1)
        else:
            fitted(data, batch_size=4, epochs=1)


@pytest.mark.parametrize("weights", [np.zeros(22, np.float32), np.full(22, 1e38, np.float32)])
def test_weights_need_a_finite_sum_above_zero(weights):
    with pytest.raises(ValueError, match="'weights' must have a finite sum above 0"):
        fitted(Weighted(regression(22), weights), batch_size=4, epochs=1)


# Datasets of h5py


@pytest.fixture
def in_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    x, y = regression(22)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"], file["flags"] = x, y, np.arange(22) % 3 == 0
    with h5py.File(tmp_path / "data.h5") as file:
        yield file


def repeating(key, n, epoch, positions):
    """An order that takes rows again and again, and none of them in increasing order."""
    return (n - 1 - positions) // 2 % n


@pytest.mark.sample(3)
@pytest.mark.parametrize("order", [shuffle, None, balanced([0] * 20 + [1] * 2), repeating])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_dataset_of_h5py_gives_what_memory_gives(in_hdf5, order, drop_last):
    settings = {"batch_size": 4, "epochs": 3, "order": order, "drop_last": drop_last}
    inside = fitted(regression(22), **settings)
    outside = fitted((in_hdf5["x"], in_hdf5["y"]), **settings)
    chex.assert_trees_all_close(inside.train_state.params, outside.train_state.params, rtol=1e-5)
    assert (
        watched(in_hdf5["flags"], **settings)[0] == watched(np.arange(22) % 3 == 0, **settings)[0]
    )
    right = evaluate(
        lambda params, batch: {"mse": squares(params, batch)}, regression(22), batch_size=5
    )
    lazy = evaluate(
        lambda params, batch: {"mse": squares(params, batch)},
        (in_hdf5["x"], in_hdf5["y"]),
        batch_size=5,
    )
    assert float(lazy(inside.train_state)["mse"]) == pytest.approx(
        float(right(inside.train_state)["mse"]), rel=1e-5
    )


def test_windows_of_a_dataset_of_h5py(tmp_path):
    h5py = pytest.importorskip("h5py")
    tokens = np.random.default_rng(0).integers(0, 50, 100)
    with h5py.File(tmp_path / "tokens.h5", "w") as file:
        file["tokens"] = tokens
        windows, rows = Windows(file["tokens"], np.int64(9), stride=4), np.array([3, 0, -1, 3])  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(windows[rows], Windows(tokens, 9, stride=4)[rows])
        mask = np.arange(len(windows)) % 2 == 1
        np.testing.assert_array_equal(windows[mask], Windows(tokens, 9, stride=4)[1::2])
    np.testing.assert_array_equal(Windows(list(tokens), 9)[2], tokens[18:27])
    with pytest.raises(IndexError, match="rows must be integers"):
        windows[np.array([0.5])]
    for wrong in (True, 2.5, 0):
        with pytest.raises(ValueError, match="Windows: length must be a positive int"):
            Windows(tokens, wrong)  # pyright: ignore[reportArgumentType]


def test_an_array_with_other_rules_for_rows_is_named():
    class Columns:  # takes columns by `[]`, as a table does
        shape, dtype = (10, 3), np.dtype(np.float32)

        def __getitem__(self, rows):
            return np.ones((10, len(rows)), np.float32)

    with pytest.raises(
        TypeError, match=r"a Columns, gives \[10, \d+\] for \d+ rows, not \[\d+, 3\]"
    ):
        watched(Columns(), batch_size=4, epochs=1)


def test_rows_out_of_range_are_refused_on_disk_too(on_disk):
    late = lambda key, n, epoch, positions: positions + jnp.where(epoch > 5, n, 0)  # noqa: E731
    with pytest.raises(ValueError, match="order: rows must be within 0 .. 21, got"):
        fitted(on_disk, batch_size=4, epochs=9, order=late)


def test_short_batches_from_disk_and_memory_have_the_same_records(on_disk, monkeypatch):
    monkeypatch.setattr("jaxnet.train.stacks.STACK", 300)
    settings = {"batch_size": 4, "epochs": 2, "drop_last": False, "order": None}
    inside, outside = fitted(regression(22), **settings), fitted(on_disk, **settings)
    losses = [record["loss"] for record in inside.history]
    assert losses == pytest.approx([record["loss"] for record in outside.history], rel=1e-5)
    frozen = fit(
        train_step(squares, 0.0),
        TrainState.create(NET.init(jax.random.key(1), regression(22)[0]), 0.0, key0()),
        regression(22),
        progress=False,
        **settings,
    )
    by_hand = float(squares(frozen.train_state.params, regression(22)).mean())  # every example once
    assert [record["loss"] for record in frozen.history] == pytest.approx(
        [by_hand] * len(frozen.history), rel=1e-5
    )


# Iterables whose order is not saved


def loader_of_torch(seed=0):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(
        torch.arange(20.0), batch_size=4, shuffle=True, generator=generator
    )


@pytest.mark.parametrize("stop", [2, 5, 7, 10, 12])
def test_a_shuffling_loader_goes_on_rightly_or_not_at_all(stop, tmp_path):
    file = tmp_path / "run.safetensors"
    whole, _ = watched(loader_of_torch(), steps=14)
    watched(loader_of_torch(), steps=stop, checkpoint=file)
    if stop < 5:  # the first pass is the same whenever the loader is made
        assert watched(loader_of_torch(), steps=14, checkpoint=file)[0][:5] == whole[:5]
        return
    with pytest.raises(
        ValueError,
        match=r"data: pass \d does not begin with .*function \(number of the pass\) -> iterable",
    ):
        watched(loader_of_torch(), steps=14, checkpoint=file)


@pytest.mark.parametrize("stop", [2, 5, 7, 10, 12])
def test_a_loader_for_each_pass_goes_on_where_it_stood(stop, tmp_path):
    file = tmp_path / "run.safetensors"
    whole, _ = watched(loader_of_torch, steps=14)
    watched(loader_of_torch, steps=stop, checkpoint=file)
    assert watched(loader_of_torch, steps=14, checkpoint=file)[0] == whole
    with pytest.raises(ValueError, match="does not begin with the batch"):
        watched(loader_of_torch, steps=7, checkpoint=tmp_path / "b.safetensors")
        watched(
            lambda number: loader_of_torch(number + 1),
            steps=14,
            checkpoint=tmp_path / "b.safetensors",
        )


# Numbers in the data that no training survives


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_a_nan_in_the_data_is_named_by_leaf_and_row(kind):
    images = np.ones((16, 3), np.float32)
    images[7, 1] = np.nan
    step = train_step(lambda w, batch: (w * batch["images"]).sum(-1), 0.1)
    data, settings = (
        ({"images": images}, {"batch_size": 4}) if kind == "memory" else ([{"images": images}], {})
    )
    with pytest.raises(
        NonFiniteError, match=r"The cause is in the data: 'images' holds NaN in row 7 of the"
    ) as caught:
        fit(
            step,
            TrainState.create(jnp.float32(1), 0.1, key0()),
            data,
            epochs=1,
            progress=False,
            **settings,  # pyright: ignore[reportArgumentType]
        )
    assert "learning rate" not in str(caught.value)
