"""Where batches come from: files larger than memory, and iterables of every kind, give what arrays in memory give."""

import json
import os
import re
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_regression import NET, key0, regression

from jaxnet.data import Windows, batches
from jaxnet.train import NonFiniteError, TrainState, Weighted, balanced, fit, guarded, train_state, train_step
from jaxnet.train.iterator_state import from_json, to_json
from jaxnet.train.prefetch import Prefetch
from jaxnet.train.source import stacks_of_iterable


def squares(params, batch):
    x, y = batch
    return jnp.square(NET.apply(params, x) - y)[:, 0]


def fitted(data, **settings):
    optimizer = optax.adam(0.01)
    start = train_state(NET.init(jax.random.key(1), regression(22)[0]), optimizer, key0())
    return fit(train_step(squares, optimizer), start, data, progress=False, **settings)


def watched(data, *, record_every=1, progress: bool | None = False, **settings):
    """What the steps of a run see: the sums of their batches, in order."""

    def step(state, batch):
        return state._replace(step=state.step + 1), {"sum": sum(leaf.sum() for leaf in jax.tree.leaves(batch))}

    start = TrainState(jnp.float32(0), {}, (), key0(), jnp.int32(0))
    result = fit(step, start, data, record_every=record_every, progress=progress, **settings)
    return [record["sum"] for record in result.history], result


# Arrays on disk


@pytest.fixture
def on_disk(tmp_path):
    x, y = regression(22)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    return tuple(np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "y.npy"))


@pytest.mark.parametrize(
    "settings", [{}, {"drop_last": False}, {"order": None}, {"order": balanced([0] * 20 + [1] * 2)}]
)
def test_a_memory_map_gives_what_memory_gives(on_disk, settings, monkeypatch):
    monkeypatch.setattr("jaxnet.train.source.STACK", 300)  # bytes: a few batches at a time
    inside = fitted(regression(22), batch_size=4, epochs=3, **settings)
    outside = fitted(on_disk, batch_size=4, epochs=3, **settings)
    chex.assert_trees_all_close(inside.train_state.params, outside.train_state.params, rtol=1e-5)
    numbers = np.arange(22, dtype=np.float32)
    np.save(on_disk[0].filename, numbers)
    lazy = np.load(on_disk[0].filename, mmap_mode="r")
    assert (
        watched(numbers, batch_size=4, epochs=3, **settings)[0] == watched(lazy, batch_size=4, epochs=3, **settings)[0]
    )


def test_weights_and_full_batches_may_lie_on_disk(on_disk):
    weights = np.arange(22, dtype=np.float32)
    for settings in ({"batch_size": 22}, {"batch_size": 4, "drop_last": False}):
        inside = fitted(Weighted(regression(22), weights), epochs=2, **settings)
        outside = fitted(Weighted(on_disk, weights), epochs=2, **settings)
        chex.assert_trees_all_close(inside.train_state.params, outside.train_state.params, rtol=1e-6)


def test_a_run_on_disk_resumes_bit_for_bit(on_disk, tmp_path):
    whole = fitted(on_disk, batch_size=4, steps=17)
    fitted(on_disk, batch_size=4, steps=8, checkpoint=tmp_path / "run.safetensors")
    rest = fitted(on_disk, batch_size=4, steps=17, checkpoint=tmp_path / "run.safetensors")
    chex.assert_trees_all_equal(whole.train_state.params, rest.train_state.params)


def test_only_the_rows_of_the_batches_are_read():
    class Counted:
        shape, dtype, read = (1_000_000_000, 2), np.dtype(np.float32), 0  # 8 GB, if it were an array

        def __getitem__(self, rows):
            Counted.read += len(rows)
            return np.ones((len(rows), 2), np.float32)

    sums, _ = watched(Counted(), batch_size=4, steps=10)
    assert sums == [8.0] * 10 and Counted.read < 4 * 80  # what was used, and a little that was read ahead


def test_windows_are_rows_of_a_sequence(tmp_path):
    tokens = np.arange(100, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    windows = Windows(np.memmap(tmp_path / "tokens.bin", np.uint16, "r"), 9, stride=4)
    expected = np.lib.stride_tricks.sliding_window_view(tokens, 9)[::4]
    assert windows.shape == expected.shape and len(windows) == len(expected) and windows.dtype == np.uint16
    rows = np.array([3, 0, -1])
    np.testing.assert_array_equal(windows[rows], expected[rows])
    np.testing.assert_array_equal(windows[2:7:2], expected[2:7:2])
    np.testing.assert_array_equal(windows[5], expected[5])
    sums, _ = watched(windows, batch_size=4, epochs=1, order=None)
    np.testing.assert_array_equal(sums, expected[:20].reshape(5, 36).sum(1))
    for wrong, error in [(lambda: Windows(tokens, 101), ValueError), (lambda: Windows(tokens, 0), ValueError)]:
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
        monkeypatch.setattr("jaxnet.train.source.STACK", size)
        for run in (fitted(stream, epochs=3), fitted(stream, steps=15)):
            chex.assert_trees_all_close(run.train_state.params, arrays.train_state.params, rtol=1e-5)


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
    _, result = watched(stream, steps=6, record_every=4, evaluate=lambda state: {"at": state.step}, evaluate_every=4)
    assert [(r["step"], r.get("at")) for r in result.history] == [(4, 4.0), (5, None), (6, None)]


def test_another_shape_is_compiled_again_and_named(capsys):
    stream = [np.ones((4, 2), np.float32)] * 3 + [np.ones((1, 2), np.float32)]
    sums, result = watched(stream, epochs=2, progress=None)
    assert sums == [8.0, 8.0, 8.0, 2.0] * 2 and len(result.compiled) == 2
    assert result.compiled[1].endswith("the batch changed, '0' from float32[4, 2] to float32[1, 2]")
    assert result.compiled[1] in capsys.readouterr().err


def test_a_generator_ends_with_its_only_pass():
    sums, result = watched((np.full(2, i, np.float32) for i in range(4)), steps=100)
    assert sums == [0.0, 2.0, 4.0, 6.0] and result.train_state.step == 4 and result.stopped == "the data ended"


def test_a_finished_run_over_an_iterable_stays_finished(tmp_path):
    for _ in range(2):
        _, result = watched([np.ones(2, np.float32)] * 4, epochs=2, checkpoint=tmp_path / "run.safetensors")
        assert result.train_state.step == 8 and result.stopped is None
    _, result = watched([np.ones(2, np.float32)] * 4, epochs=3, checkpoint=tmp_path / "run.safetensors")
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
                stack.inputs for stack in Prefetch(stacks_of_iterable(iter([np.ones(2)]), {}, lambda s: 9, 0))
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
    assert sums == [2.0, 2.0, 2.0, 6.0, 8.0]  # what was done, and the rest of a source that begins as the first did


@pytest.mark.parametrize("stream", [[], iter([]), lambda epoch: []])
def test_an_iterable_without_batches_is_named(stream):
    with pytest.raises(ValueError, match="the iterable has no batches"):
        watched(stream, steps=3)


def test_integers_of_a_stream_are_checked_too():
    with pytest.raises(ValueError, match=r"'x' holds 1099511627776, which int64 can and int32 cannot"):
        watched([{"x": np.array([1])}, {"x": np.array([2**40])}], steps=2)
    with pytest.raises(TypeError, match="'name' must hold numbers, got <U1"):
        watched([{"name": np.array(["a"])}], steps=2)


def test_the_thread_ends_with_the_run():
    def endless():
        while True:
            yield np.ones(2, np.float32)

    watched(endless(), steps=3)
    deadline = time.monotonic() + 10
    while any(thread.name == "jaxnet-prefetch" for thread in threading.enumerate()) and time.monotonic() < deadline:
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
    """An iterable with a state, in Grain's manner: random batches that nobody could find again by counting passes."""

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


@pytest.mark.parametrize("source", [Draws, Loader, Plain])
@pytest.mark.parametrize("stack", [8, 24, 1 << 25])
@pytest.mark.parametrize("stop", [1, 4, 9, 11])
def test_an_iterable_goes_on_where_it_stood(source, stack, stop, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxnet.train.source.STACK", stack)  # one, three and 64 batches on the device at once
    file = tmp_path / "run.safetensors"
    whole, _ = watched(source(), steps=14)
    watched(source(), steps=stop, checkpoint=file)
    again = source()
    rest, _ = watched(again, steps=14, checkpoint=file)
    assert rest == whole and len(whole) == 14
    if source is Loader:
        assert again.loaded == 1


def test_the_states_of_iterators_survive_json():
    state = {"a": (1, 2.5, None, "x"), 3: [True, b"\x00\xff"], "rng": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    again = from_json(json.loads(json.dumps(to_json(state))))
    np.testing.assert_array_equal(again.pop("rng"), state.pop("rng"))
    assert again == state
    with pytest.raises(TypeError, match="the iterator's state holds a object, which a checkpoint cannot keep"):
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
            return grain.MapDataset.source(np.arange(40)).shuffle(seed=1).repeat().batch(4).to_iter_dataset()
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
        return fit(step, train_state(jnp.float32(0), optimizer, key0()), stream, steps=9, progress=False, **settings)

    result = run([3, 4, 8])
    assert result.train_state.params == 6 and result.history[-1]["skipped"] == 3
    assert result.history[-1]["loss"] == pytest.approx(-np.mean([0, 1, 2, 3, 4, 5]))  # of the steps that were taken
    with pytest.raises(
        NonFiniteError, match="3 steps in a row were not finite, up to step 5, and were skipped; the limit is 2"
    ):
        run([3, 4, 5])
