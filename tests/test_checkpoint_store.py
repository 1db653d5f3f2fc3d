"""The store: the steps that it keeps and finds again, and its state after failures, kills and the
program's end. Every step's tree is made from its number, so a loaded tree shows which step was
saved, bit for bit.
"""

import contextlib
import errno
import fcntl
import functools
import os
import stat
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import Fail, assert_same, damages

from jaxnet.checkpoint import CheckpointError, Checkpoints, inspect, load, verify
from jaxnet.checkpoint import format as fmt

MODES = pytest.mark.parametrize("beside", [False, True], ids=["foreground", "asynchronous"])


def tree_of(step):
    return {"x": np.arange(500.0) * step, "step": step}


def fill(folder, *steps, losses=None, **options):
    """A store with these steps."""
    store = Checkpoints(folder, **options)
    for i, step in enumerate(steps):
        store.save(step, tree_of(step), None if losses is None else {"loss": losses[i]})
    store.wait()
    return store


def damage(folder, step):
    """Flip the last bit of a step's file."""
    path = folder / f"step_{step:08d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------ save, find and keep


@MODES
def test_what_was_saved_is_found(beside, tmp_path):
    state = {
        "params": {"w": jnp.ones((2, 3), jnp.bfloat16)},
        "key": jax.random.key(3),
        "n": np.arange(3),
    }
    store = Checkpoints(tmp_path / "new" / "run", best_rule="max accuracy", asynchronous=beside)
    assert store.latest() is None and store.best() is None and store.steps() == []
    # Listing the steps makes no folders.
    assert not (tmp_path / "new").exists()
    store.save(7, state, {"accuracy": jnp.float32(0.5), "loss": np.float64(1.25)}, {"run": "a"})
    store.save(np.int64(12), jax.tree.map(lambda x: x, state), {"accuracy": 0.25})
    store.wait()
    assert sorted(os.listdir(store.folder)) == [
        "step_00000007.safetensors",
        "step_00000012.safetensors",
    ]
    found = store.best(like=state)
    assert found and found[2:] == (
        {"accuracy": 0.5, "loss": 1.25},
        {"run": "a"},
        str(tmp_path / "new" / "run" / "step_00000007.safetensors"),
        {},
    )
    assert found.step == 7
    assert_same(found.tree, dict(sorted(state.items())))
    latest, certain = store.latest(), store.load(12)
    assert latest and latest.step == certain.step == 12 and latest.metadata == {}
    assert inspect(found.path).metadata == {
        "step": 7,
        "metrics": {"accuracy": 0.5, "loss": 1.25},
        "run": "a",
    }
    # The files are ordinary checkpoints.
    assert_same(load(found.path, pattern="n"), {"n": np.arange(3)})
    part = store.latest(pattern="params/**")
    assert part
    # The options are those of `load`.
    assert_same(part.tree, {"params": state["params"]})


@pytest.mark.parametrize(
    "options, losses, kept",
    [
        # By default, keep=3.
        ({}, None, [3, 4, 5]),
        ({"keep": 1}, None, [5]),
        ({"keep": None}, None, [1, 2, 3, 4, 5]),
        ({"keep": 2, "best_rule": "min loss"}, [0.5, 0.1, 0.3, 0.2, 0.4], [2, 4, 5]),
        ({"keep": 2, "best_rule": "max loss"}, [0.5, 0.1, 0.3, 0.2, 0.4], [1, 4, 5]),
        (
            {"keep": 1, "best_rule": "min loss", "keep_best": 2},
            [0.5, 0.1, 0.3, 0.2, 0.4],
            [2, 4, 5],
        ),
        ({"keep": 1, "best_rule": "min loss", "keep_best": 0}, [0.5, 0.1, 0.3, 0.2, 0.4], [5]),
        # Of equals the earlier.
        ({"keep": 1, "best_rule": "min loss"}, [0.1, 0.1, 0.1, 0.1, 0.1], [1, 5]),
        ({"keep": 1, "best_rule": "min loss"}, [np.nan, np.inf, 3, -np.inf, np.nan], [4, 5]),
        ({"keep": 1, "best_rule": "max loss"}, [np.nan, -np.inf, np.nan, np.nan, np.nan], [2, 5]),
        # Without metrics, no step is the best.
        ({"keep": 1, "best_rule": "min loss"}, None, [5]),
    ],
)
def test_the_newest_and_the_best_are_kept(options, losses, kept, tmp_path):
    store = fill(tmp_path, 1, 2, 3, 4, 5, losses=losses, **options)
    assert store.steps() == kept
    for step in kept:
        assert_same(store.load(step).tree, tree_of(step))
    if "best_rule" in options and losses and options.get("keep_best") != 0:
        sign = -1 if options["best_rule"].startswith("max") else 1
        best = min(set(kept[:-1]), key=lambda step: (sign * losses[step - 1], step))
        found = Checkpoints(tmp_path, best_rule=options["best_rule"]).best()
        assert found and found.step == best


def test_metrics_that_are_not_finite_come_back(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, {}, {"a": float("nan"), "b": jnp.float32(-np.inf), "c": 1e-320})
    metrics = store.load(1).metrics
    assert repr(metrics) == "{'a': nan, 'b': -inf, 'c': 1e-320}"


def test_other_files_are_left_alone(tmp_path):
    others = [
        "step_1.safetensors",
        "step_000000001.safetensors",
        "step_00000001.safetensors.bak",
        "step_0000000x.safetensors",
    ]
    others += ["final.safetensors", ".jaxnet-1-note", "step_-0000001.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "step_00000009.safetensors").mkdir()
    store = fill(tmp_path, 1, 2, 3, keep=1)
    assert store.steps() == [3]
    assert (
        all((tmp_path / name).read_text() == "mine" for name in others)
        and len(os.listdir(tmp_path)) == len(others) + 2
    )


def test_a_step_must_be_newer(tmp_path):
    store = fill(tmp_path, 5)
    for step in (5, 4, 0):
        with pytest.raises(
            ValueError,
            match=f"step {step} is not newer than step 5 in {tmp_path}: continue from latest",
        ):
            store.save(step, {})
    with pytest.raises(ValueError, match="step -1 is not newer than step -1"):
        Checkpoints(tmp_path / "empty").save(-1, {})
    with pytest.raises(TypeError):
        store.save(5.5, {})  # pyright: ignore[reportArgumentType]
    assert_same(store.load(5).tree, tree_of(5))


def test_steps_of_more_than_eight_digits_keep_their_order(tmp_path):
    store = fill(tmp_path, 99_999_998, 99_999_999, 100_000_000, keep=2)
    assert store.steps() == [99_999_999, 100_000_000]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="keep must be at least 1, got 0: the newest checkpoint is never deleted"
    ):
        Checkpoints(tmp_path, keep=0)
    for metric in ("loss", "min", "min ", "minimum loss"):
        with pytest.raises(
            ValueError,
            match="best_rule must be 'min' or 'max' and a name, as in 'min loss', got 'm|, got 'l",
        ):
            Checkpoints(tmp_path, best_rule=metric)
    store = Checkpoints(tmp_path, best_rule="min val/loss")
    with pytest.raises(
        ValueError, match=r"metrics must have 'val/loss', by which .*; they have \['loss'\]"
    ):
        store.save(1, {}, {"loss": 1})
    with pytest.raises(ValueError, match="metric 'val/loss' must be a number, got .*Array.*2"):
        store.save(1, {}, {"val/loss": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"metadata must not have entries called \['metrics', 'step'\]"
    ):
        store.save(1, {}, metadata={"step": 1, "metrics": {}, "a": 1})
    with pytest.raises(CheckpointError, match="leaf 'a': a builtins.object is neither"):
        store.save(1, {"a": object()})
    with pytest.raises(ValueError, match="best.. needs to know what is good"):
        Checkpoints(tmp_path).best()
    for options, text in [
        ({"keep": 2.5}, "keep must be a positive int, got 2.5"),
        ({"keep": "3"}, "keep must be a positive int, got '3'"),
        ({"keep": True}, "keep must be a positive int, got True"),
        ({"keep": -1}, "keep must be at least 1, got -1"),
        ({"keep_best": -1}, "keep_best must be an int of at least 0, got -1"),
        ({"keep_best": 0.5}, "keep_best must be an int of at least 0, got 0.5"),
        ({"keep_best": None}, "keep_best must be an int of at least 0, got None"),
        ({"best_rule": 3}, "best_rule must be 'min' or 'max' and a name"),
    ]:
        with pytest.raises(ValueError, match=text):
            Checkpoints(tmp_path, **options)
    with pytest.raises(ValueError, match="the name of the folder is empty: use '.'"):
        Checkpoints("")
    with pytest.raises(ValueError, match="step must have at most 18 digits"):
        # No search would find a file of this name again.
        store.save(10**18, {}, {"val/loss": 1})
    for value in ("1", None, 1j, 10**400):
        with pytest.raises(ValueError, match="metric 'val/loss' must be a number, got"):
            store.save(1, {}, {"val/loss": value})
    assert os.listdir(tmp_path) == []
    fill(tmp_path, 3, 4)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5, only of \[3, 4\]"):
        store.load(5)


# ---------------------------------------------------------------------------------- what is damaged


def test_the_newest_good_one_is_found_and_the_skipped_are_named(tmp_path):
    fill(tmp_path, 1, 2, 3, 4)
    damage(tmp_path, 4)
    (tmp_path / "step_00000003.safetensors").write_bytes(b"")
    store = Checkpoints(tmp_path)
    with pytest.warns(
        UserWarning,
        match="(?s)step 2 is loaded, since others cannot be read:.*leaf 'x': its bytes.*0 bytes",
    ):
        found = store.latest()
    assert found and found.step == 2 and list(found.skipped) == [4, 3]
    assert (
        "step_00000004.safetensors: leaf 'x': its bytes" in found.skipped[4]
        and "too few" in found.skipped[3]
    )
    assert_same(found.tree, tree_of(2))
    # Training goes on from 2: damaged files are in nobody's way, and do not count among those kept.
    store.save(3, tree_of(3))
    assert store.steps() == [2, 3, 4]
    store.save(4, tree_of(4))
    with warnings.catch_warnings(action="error"):
        found = store.latest()
    assert found and found.step == 4 and found.skipped == {}
    assert_same(found.tree, tree_of(4))


def test_a_damaged_file_never_displaces_the_last_good_one(tmp_path):
    fill(tmp_path, 1, 2, 3)
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    store = Checkpoints(tmp_path, keep=1)
    with pytest.warns(UserWarning, match="step 1 is loaded"):
        store.latest()
    with pytest.raises(OSError, match="full"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", Fail("fsync", 1, OSError(errno.ENOSPC, "full")))
        store.save(2, tree_of(2))
    with pytest.warns(UserWarning, match="step 1 is loaded"):
        found = store.latest()
    assert found and found.step == 1
    # Now there is a newer good one: 1 may go, and 3 is newer than what is kept.
    store.save(2, tree_of(2))
    assert store.steps() == [2, 3]


def test_if_nothing_is_good_it_is_an_error_and_not_a_fresh_start(tmp_path):
    store = fill(tmp_path, 1, 2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(CheckpointError, match="(?s)no checkpoint in it can be read:.*00002.*00001"):
        store.latest()


@pytest.fixture
def closed(monkeypatch):
    """A function that removes the permission to open a file.

    Root has every permission, so the system's answer is replaced as well.
    """
    names, real = set(), os.open

    def refuse(path, *args, **options):
        if os.path.basename(path) in names:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    return lambda step: names.add(f"step_{step:08d}.safetensors") if step else names.clear()


def test_a_file_that_may_not_be_opened_is_no_damaged_one(closed, tmp_path):
    """Going on from an older step would waste a run: no later save would be newer than the existing
    file.
    """
    fill(tmp_path, 10, 20, 30, losses=[3, 2, 1])
    store = Checkpoints(tmp_path, best_rule="min loss")
    closed(30)
    for find in (store.latest, store.best):
        with pytest.raises(PermissionError, match="00000030"):
            find()
    with pytest.raises(PermissionError) as caught:
        store.latest()
    assert "step 30 is not damaged: make it readable, or move it away" in caught.value.__notes__[0]
    closed(None)
    found = store.latest()
    assert found and found.step == 30
    store.save(40, tree_of(40), {"loss": 4})


def test_what_is_damaged_is_skipped_before_what_may_not_be_opened(closed, tmp_path):
    fill(tmp_path, 10, 20, 30)
    damage(tmp_path, 30)
    closed(20)
    with pytest.raises(PermissionError, match="00000020"):
        Checkpoints(tmp_path).latest()


def test_a_step_that_may_not_be_opened_now_is_kept_as_if_it_were_the_best(closed, tmp_path):
    store = fill(tmp_path, 1, 2, 3, losses=[1, 2, 3], keep=1, best_rule="min loss")
    assert store.steps() == [1, 3]
    closed(1)
    store.save(4, tree_of(4), {"loss": 4})
    closed(None)
    # Step 3 is the best of those that can be read.
    assert store.steps() == [1, 3, 4]
    store.save(5, tree_of(5), {"loss": 5})
    assert store.steps() == [1, 5]


def test_looking_if_a_folder_is_writable_disturbs_no_save(tmp_path):
    """A save does not disturb the check either: it does not sweep the file of the check, which is
    locked.
    """
    with places_checked_while_swept(tmp_path) as errors:
        for step in range(1, 30):
            Checkpoints(tmp_path, keep=1).save(step, tree_of(step))
    assert errors == []
    assert os.listdir(tmp_path) == ["step_00000029.safetensors"]


@contextlib.contextmanager
def places_checked_while_swept(folder):
    from jaxnet.checkpoint import places

    errors, ended = [], threading.Event()

    def check():
        while not ended.is_set():
            try:
                places.check_writable(str(folder))
            except OSError as e:
                errors.append(e)

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield errors
    finally:
        ended.set()
        thread.join()


def test_the_best_good_one_is_found(tmp_path):
    fill(tmp_path, 1, 2, 3, losses=[0.2, 0.1, 0.3])
    damage(tmp_path, 2)
    (tmp_path / "step_00000003.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step 1 is loaded"):
        found = Checkpoints(tmp_path, best_rule="min loss").best()
    assert found and found.step == 1 and sorted(found.skipped) == [2, 3]


def test_a_template_that_does_not_fit_is_no_damage(tmp_path):
    """An older file might fit, but loading it would hide the mistake."""
    store = Checkpoints(tmp_path)
    store.save(1, {"a": np.zeros(2)})
    store.save(2, {"a": np.zeros(3)})
    with pytest.raises(
        CheckpointError,
        match=r"00002.safetensors: it does not fit the template .*(.|\n)*shape differs: a",
    ):
        store.latest(like={"a": np.zeros(2)})
    with pytest.raises(CheckpointError, match="no path matches 'b'"):
        store.latest(pattern="b")
    with pytest.raises(TypeError, match="onyl"):
        store.latest(onyl="a")


def test_a_file_of_a_newer_version_is_no_damage(tmp_path):
    store = fill(tmp_path, 1)
    (tmp_path / "step_00000002.safetensors").write_bytes(fmt.write_header("", [], {"version": 4}))
    with pytest.raises(CheckpointError, match="it has format version 4, .* install a newer jaxnet"):
        store.latest()


def test_a_file_under_another_steps_name_is_not_that_step(tmp_path):
    store = fill(tmp_path, 1, 2)
    os.rename(tmp_path / "step_00000002.safetensors", tmp_path / "step_00000009.safetensors")
    with pytest.warns(
        UserWarning, match="00009.safetensors: it was saved as step 2: rename it back"
    ):
        found = store.latest()
    assert found and found.step == 1


def test_a_file_that_another_process_deletes_meanwhile_is_not_damaged(tmp_path, monkeypatch):
    store = fill(tmp_path, 1, 2)
    monkeypatch.setattr(store, "_steps", lambda: [1, 2, 3])
    found = store.latest()
    assert found and found.step == 2 and found.skipped == {}


def test_old_files_go_when_the_new_name_is_on_the_disk(tmp_path, monkeypatch):
    """A name is durable after an fsync of its folder (ALICE, Pillai et al., OSDI 2014): only then
    may anything be deleted.
    """
    store, calls = fill(tmp_path, 1, keep=1), []

    def recording(name, real):
        def call(*args):
            calls.append(
                "fsync folder"
                if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
                else name
            )
            return real(*args)

        return call

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    store.save(2, tree_of(2))
    assert calls == ["fsync", "replace", "fsync folder", "unlink"]


def test_any_damage_of_the_newest_leads_to_the_one_before(tmp_path):
    fill(tmp_path, 1, 2)
    newest = tmp_path / "step_00000002.safetensors"
    for kind, bad in damages(newest.read_bytes(), 160, seed=0):
        newest.write_bytes(bad)
        with pytest.warns(UserWarning, match="step 1 is loaded"):
            found = Checkpoints(tmp_path).latest()
        assert found and (found.step, list(found.skipped)) == (1, [2]), kind
        assert_same(found.tree, tree_of(1))


def test_temporary_files_of_dead_writers_are_swept(tmp_path):
    for name in (".jaxnet-1-dead.tmp", ".jaxnet-2-alive.tmp"):
        (tmp_path / name).write_bytes(b"")
    with open(tmp_path / ".jaxnet-2-alive.tmp") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        fill(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [".jaxnet-2-alive.tmp", "step_00000001.safetensors"]


# ------------------------------------------------------------------------------------- asynchronous


@contextlib.contextmanager
def held():
    """Hold all writing until the event that this gives is set."""
    gate, real = threading.Event(), os.write

    def write(fd, data):
        assert gate.wait(30)
        return real(fd, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        try:
            yield gate
        finally:
            gate.set()


def test_the_tree_may_be_donated_and_changed_while_it_is_written(tmp_path):
    # It has 4 KiB and is aligned, so NumPy and JAX would share its memory.
    x, n = jnp.arange(1024.0), np.arange(5)
    keys, swapped = (
        jax.random.split(jax.random.key(0), 3),
        np.arange(6, dtype=">i4").reshape(2, 3).T,
    )
    expected = {
        "x": np.arange(1024.0, dtype=np.float32),
        "n": np.arange(5),
        "swapped": swapped.copy(),
    }
    data = np.asarray(jax.random.key_data(keys)).copy()
    step = jax.jit(lambda x: x - 1e6, donate_argnums=0)
    with held() as gate, Checkpoints(tmp_path, asynchronous=True) as store:
        store.save(1, {"x": x, "n": n, "keys": keys, "swapped": swapped})
        for _ in range(3):
            x = step(x)
        n[:] = -1
        swapped[:] = -1
        del keys
        assert os.listdir(tmp_path) == [p for p in os.listdir(tmp_path) if "tmp" in p]
        gate.set()
    got = load(tmp_path / "step_00000001.safetensors")
    assert_same(np.asarray(got["x"]), expected["x"])
    assert_same(got["n"], expected["n"])
    np.testing.assert_array_equal(got["swapped"], expected["swapped"])
    np.testing.assert_array_equal(jax.random.key_data(got["keys"]), data)


def test_one_at_a_time_and_in_order(tmp_path):
    with held() as gate, Checkpoints(tmp_path, asynchronous=True) as store:
        store.save(1, tree_of(1))
        # `save` has not waited for the disk.
        assert not (tmp_path / "step_00000001.safetensors").exists()
        threading.Timer(0.2, gate.set).start()
        store.save(2, tree_of(2))
        assert gate.is_set() and (tmp_path / "step_00000001.safetensors").exists()
        assert sum(thread.name.startswith("save ") for thread in threading.enumerate()) <= 1
        # Listing the steps waits, too.
        assert store.steps() == [1, 2]
        # The error is raised at once, not later.
        with pytest.raises(ValueError, match="step 2 is not newer"):
            store.save(2, {})
        with pytest.raises(CheckpointError, match="leaf 'a': a builtins.object"):
            store.save(3, {"a": object()})
    with pytest.raises(ValueError, match="this store has been closed"):
        store.save(3, {})
    assert not any(thread.name.startswith("save ") for thread in threading.enumerate())


ERRORS = [
    OSError(code, os.strerror(code))
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)
]


@MODES
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error.errno])
@pytest.mark.parametrize("call, times", [("open", 2), ("write", 2), ("fsync", 2), ("replace", 1)])
def test_a_failure_is_raised_and_leaves_what_was_there(
    call, times, error, beside, tmp_path, monkeypatch
):
    """In the foreground, `save` raises the error; asynchronously, the next call does.

    The n-th call of the system fails.
    """
    store, failures = fill(tmp_path, 1, keep=1), 0
    for n in range(1, 10):
        store = Checkpoints(tmp_path, keep=1, asynchronous=beside)
        step = store.steps()[-1] + 1
        after = [
            store.wait,
            store.close,
            store.latest,
            functools.partial(store.save, step + 1, {}),
        ][n % 4]
        with monkeypatch.context() as patch:
            patch.setattr(os, call, Fail(call, n, error))
            if fail_expected := n <= times:
                with pytest.raises(OSError) as caught:
                    store.save(step, tree_of(step))
                    if thread := store._background._thread:
                        thread.join()
                    # In the foreground, the error has been raised by `save`.
                    assert beside
                    after()
                assert caught.value is error
                failures += 1
            else:
                store.save(step, tree_of(step))
                store.wait()
        names = os.listdir(tmp_path)
        # No temporary file is left.
        assert set(names) <= {f"step_{s:08d}.safetensors" for s in (step - 1, step)}
        for name in names:
            verify(tmp_path / name)
        # The last call comes after the rename and concerns the folder.
        last = call in ("open", "fsync") and n == times
        assert (f"step_{step - 1:08d}.safetensors" in names) == fail_expected
        assert (f"step_{step:08d}.safetensors" in names) == (last or not fail_expected)
        if not fail_expected:
            break
        # The error is raised once.
        assert store.wait() is None
        if store._closed:
            store = Checkpoints(tmp_path, keep=1)
            step += last
        # The same step can be saved again.
        store.save(step, tree_of(step))
        store.wait()
    assert failures == times


@MODES
def test_failing_to_delete_old_files_is_an_error_but_the_new_one_is_saved(
    beside, tmp_path, monkeypatch
):
    store = fill(tmp_path, 1, keep=1, asynchronous=beside)
    monkeypatch.setattr(os, "unlink", Fail("unlink", 1, OSError(errno.EACCES, "not yours")))
    with pytest.raises(OSError, match="not yours"):
        store.save(2, tree_of(2))
        store.wait()
    found = store.latest()
    assert found and found.step == 2
    store.save(3, tree_of(3))
    # The next save deletes the leftovers.
    assert store.steps() == [3]


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Fail("fsync", 1, OSError(errno.EIO, "bad disk")))
    with (
        pytest.raises(KeyError, match="mine") as caught,
        Checkpoints(tmp_path, asynchronous=True) as store,
    ):
        store.save(1, {})
        raise KeyError("mine")
    assert caught.value.__notes__ == [
        "and the last checkpoint was not saved: OSError(5, 'bad disk')"
    ]


def run(code, folder, *arguments):
    """Run a program, with a time limit that only a hang exceeds."""
    head = "import atexit, os, random, shutil, signal, sys, time\nimport numpy as np\n"
    head += "from jaxnet.checkpoint import Checkpoints\n"
    command = [sys.executable, "-c", head + code, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


SLOW = """
real = os.write
os.write = lambda fd, data: time.sleep(0.05) or real(fd, data)
"""


def test_a_program_that_ends_waits_for_its_last_save(tmp_path):
    """The tree has 40 MiB, so the writer asks for its own thread pool after the interpreter has
    closed all pools.
    """
    code = (
        "store = Checkpoints(sys.argv[1], asynchronous=True)\nstore.save(1, {'x': np.arange(5 << "
        "20)})\nprint('end')"
    )
    done = run(SLOW + code, tmp_path)
    assert (done.stdout, done.stderr) == ("end\n", "")
    np.testing.assert_array_equal(
        load(tmp_path / "step_00000001.safetensors")["x"], np.arange(5 << 20)
    )


def test_a_program_that_ends_says_what_it_did_not_save(tmp_path):
    code = "def fail(fd):\n    raise OSError(28, 'No space left on device')\nos.fsync = fail\n"
    done = run(code + "Checkpoints(sys.argv[1], asynchronous=True).save(1, {})", tmp_path)
    assert (
        "jaxnet: a checkpoint was not saved: OSError(28, 'No space left on device')" in done.stderr
    )
    assert os.listdir(tmp_path) == []


def test_a_save_at_the_very_end_is_waited_for_too(tmp_path):
    code = "store = Checkpoints(sys.argv[1], asynchronous=True)\n"
    code += "atexit.register(lambda: store.save(1, {'x': np.arange(5 << 20)}))"
    done = run(SLOW + code, tmp_path)
    assert done.stderr == ""
    verify(tmp_path / "step_00000001.safetensors")
