"""Faults from outside: power cuts, kills, two writers, full disks, damaged and hostile files. docs/reliability.md has the figures.

What must come back is known from how each tree was made: `tree_of(step)`, bit for bit, of a step that the fault allows.
Failures of single calls are in test_checkpoint.py and test_checkpoint_store.py, whole training runs in test_kills.py.
"""

import collections
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_checkpoint import (
    DAMAGED,
    DTYPES,
    FORGED,
    HOSTILE,
    NOT_IN_JAX,
    Moments,
    Nameless,
    Pair,
    assert_same,
    container,
    damages,
    entry,
    forge,
    values,
)

from jaxnet.checkpoint import CheckpointError, Checkpoints, inspect, lazy, load, save, verify

HERE = pathlib.Path(__file__).parent


def tree_of(step):
    return {"x": np.arange(500.0) * step, "step": step}


GONE, FOLDER = -1, -2  # in place of a file's number

# -------------------------------------------------------------------------------------------------------- power cuts
#
# What a disk may hold after a power cut, as POSIX allows it: of a file, what was written before its last fsync, and any
# of four forms of the rest; of a folder, the names at its last fsync, and any subset of the changes since. This is the
# model of ALICE (Pillai et al., OSDI 2014), without changes inside of one call other than a write that is cut in two.


class Recorder:
    """Stands in for the functions of os that change a disk; notes what they do to the files and folders below `root`."""

    def __init__(self, root: pathlib.Path, patch: pytest.MonkeyPatch):
        paths = [root, *sorted(root.rglob("*"))]
        self.files = [path.read_bytes() for path in paths if path.is_file()]  # by number
        self.names = {str(path): FOLDER for path in paths if path.is_dir()}
        self.names |= {str(path): i for i, path in enumerate(path for path in paths if path.is_file())}
        self.before, self.calls = dict(self.names), []
        self.created, self.descriptors = len(self.files), {}
        self.real = {}
        for name in ("open", "close", "lseek", "write", "fsync", "replace", "unlink", "mkdir"):
            self.real[name] = getattr(os, name)
            patch.setattr(os, name, getattr(self, name))

    def returned(self, step):
        """Say that from here on the tree of this step, or a later one, must be found."""
        self.calls.append(("returned", step))

    def open(self, path, flags, *mode):
        descriptor = self.real["open"](path, flags, *mode)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL  # nothing is ever written in place
            self._rename(path, {path: self.created})
            self.created += 1
        self.descriptors[descriptor] = [path, 0]
        return descriptor

    def close(self, descriptor):
        self.descriptors.pop(descriptor, None)
        self.real["close"](descriptor)

    def lseek(self, descriptor, position, how):
        self.descriptors[descriptor][1] = self.real["lseek"](descriptor, position, how)

    def write(self, descriptor, data):
        size = self.real["write"](descriptor, data)
        if descriptor in self.descriptors:
            path, position = self.descriptors[descriptor]
            self.calls.append(("write", self.names[path], (position, bytes(data[:size]))))
            self.descriptors[descriptor][1] += size
        return size

    def fsync(self, descriptor):
        self.real["fsync"](descriptor)
        path = self.descriptors[descriptor][0]
        is_folder = self.names[path] == FOLDER
        self.calls.append(("fsync folder", path) if is_folder else ("fsync", self.names[path]))

    def replace(self, old, new):
        self.real["replace"](old, new)
        self._rename(new, {old: GONE, new: self.names[old]})

    def unlink(self, path):
        self.real["unlink"](path)
        self._rename(path, {path: GONE})

    def mkdir(self, path):
        self.real["mkdir"](path)
        self._rename(path, {path: FOLDER})

    def _rename(self, path, change):
        self.names |= change
        self.calls.append(("names", os.path.dirname(path), change))


def disks(files: list[bytes], names: dict[str, int], calls: list[tuple]) -> Iterator[dict[str, bytes]]:
    """Every {path: content} that the model allows if the power fails right after these calls."""
    writes = collections.defaultdict(list, {i: [(0, content)] for i, content in enumerate(files)})
    certain = collections.Counter(dict.fromkeys(writes, 1))  # how many writes of a file are on the disk
    names, pending = dict(names), []
    for kind, *call in calls:
        if kind == "write":
            writes[call[0]].append(call[1])
        elif kind == "fsync":
            certain[call[0]] = len(writes[call[0]])
        elif kind == "names":
            pending.append(call)
        elif kind == "fsync folder":
            for folder, change in pending:
                names |= change if folder == call[0] else {}
            pending = [other for other in pending if other[0] != call[0]]
    for kept in itertools.product([False, True], repeat=len(pending)):
        found = dict(names)
        for _, change in itertools.compress(pending, kept):
            found |= change
        folders = {path for path, number in found.items() if number == FOLDER}
        there = {path: i for path, i in found.items() if i >= 0 and os.path.dirname(path) in folders}
        forms = [contents(writes[i], certain[i]) for i in there.values()]
        for chosen in itertools.product(*forms):
            yield dict(zip(there, chosen, strict=True))


def contents(writes: list[tuple[int, bytes]], certain: int) -> list[bytes]:
    """What a file may hold if its first `certain` writes are on the disk: none of the rest, all, the last, or half of it."""
    done, rest = writes[:certain], writes[certain:]
    if not rest:
        return [written(done)]
    position, data = rest[-1]
    half = [*rest[:-1], (position, data[: len(data) // 2])]
    return [written(done + part) for part in ([], rest, rest[-1:], half)]


def written(writes: list[tuple[int, bytes]]) -> bytes:
    content = bytearray()
    for position, data in writes:
        content.extend(bytes(max(0, position + len(data) - len(content))))
        content[position : position + len(data)] = data
    return bytes(content)


def save_fresh(root, returned):
    save(root / "new" / "t", tree_of(1))
    returned(1)


def save_over(root, returned):
    for step in (1, 2):
        save(root / "t", tree_of(step))
        returned(step)


def save_steps(root, returned, beside=False):
    with Checkpoints(root, keep=2, metric="min loss", asynchronous=beside) as store:
        for step in (4, 5):  # keeps 1, the best; deletes 2 and then 3
            store.save(step, tree_of(step), {"loss": step})
            store.wait()
            returned(step)


def save_steps_beside(root, returned):
    save_steps(root, returned, beside=True)


def step_of_file(path: pathlib.Path) -> int:
    """The step whose tree a file holds, bit for bit; -1 if there is none."""
    if not path.exists():
        return -1
    tree = load(path)
    assert_same(tree, tree_of(tree["step"]))
    return tree["step"]


def step_of_store(root: pathlib.Path) -> int:
    store = Checkpoints(root, keep=2, metric="min loss")
    with warnings.catch_warnings(action="error"):  # no file is damaged, so that none is skipped
        latest, best = store.latest(), store.best()
    assert latest and best and best.step == 1
    assert_same(best.tree, tree_of(1))
    assert_same(latest.tree, tree_of(latest.step))
    return latest.step


MODES: dict[str, tuple[Callable, Callable, list[int]]] = {  # what is saved, what is found then, the steps it may be
    "fresh": (save_fresh, lambda root: step_of_file(root / "new" / "t"), [-1, 1]),
    "overwrite": (save_over, lambda root: step_of_file(root / "t"), [0, 1, 2]),
    "store": (save_steps, step_of_store, [3, 4, 5]),
    "asynchronous": (save_steps_beside, step_of_store, [3, 4, 5]),
}


def prepare(mode: str, root: pathlib.Path):
    """What is there before a mode's saves."""
    root.mkdir()
    if mode == "overwrite":
        save(root / "t", tree_of(0))
    elif mode != "fresh":
        with Checkpoints(root) as store:
            for step in (1, 2, 3):
                store.save(step, tree_of(step), {"loss": step})


def power_cuts(mode: str, folder: pathlib.Path, forget: str = "") -> tuple[int, set[int], int]:
    """(the disks that were tried, the steps found, how many were lost); `forget`: a kind of call left out of the record."""
    saves, find, allowed = MODES[mode]
    prepare(mode, root := folder / mode)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(root, patch)
        saves(root, recorder.returned)
    calls = [call for call in recorder.calls if call[0] != forget]
    tried, found, lost = set(), set(), 0
    for n in range(len(calls) + 1):
        promised = max([call[1] for call in calls[:n] if call[0] == "returned"], default=allowed[0])
        for disk in disks(recorder.files, recorder.before, calls[:n]):
            if (key := (promised, *sorted(disk.items()))) in tried:
                continue
            tried.add(key)
            shutil.rmtree(root)
            root.mkdir()
            for path, content in disk.items():
                os.makedirs(os.path.dirname(path), exist_ok=True)
                pathlib.Path(path).write_bytes(content)
            try:
                step = find(root)
                assert step in allowed and step >= promised
                found.add(step)
            except (CheckpointError, UserWarning, AssertionError):
                lost += 1
    return len(tried), found, lost


@pytest.mark.parametrize("mode", MODES)
def test_a_power_cut_at_any_moment_loses_nothing(mode, tmp_path):
    tried, found, lost = power_cuts(mode, tmp_path)
    print(f"\npower cuts, {mode}: {tried} different disks, {lost} lost")
    assert lost == 0 and tried > 8 and found == set(MODES[mode][2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["fsync", "fsync folder"])
def test_the_model_notices_a_missing_fsync(call, mode, tmp_path):
    """The same saves lose something if their fsyncs are ignored: else the test above would prove nothing."""
    assert power_cuts(mode, tmp_path, forget=call)[2] > 0


