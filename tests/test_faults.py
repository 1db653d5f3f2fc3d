"""Faults from outside: power cuts, kills, two writers, full disks, damaged and hostile files.

docs/reliability.md says what is promised, and has the figures of the tests that are marked slow.

What must come back is known from how each tree was made: `tree_of(step)`, bit for bit, of a step
that the fault allows. Failures of single calls are in test_checkpoint.py and
test_checkpoint_store.py, whole training runs in test_kills.py.
"""

import collections
import errno
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
from children import READS_CACHE
from saves_to_be_killed import SAVES, before, tree_of
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
    forge,
    values,
)

from jaxnet.checkpoint import CheckpointError, Checkpoints, load, save

HERE = pathlib.Path(__file__).parent
# These stand in place of a file's number.
GONE, FOLDER = -1, -2


def spread(x):
    """An array on all devices, a part on each."""
    return jax.device_put(
        x,
        jax.sharding.NamedSharding(
            jax.make_mesh((4,), ("a",), devices=jax.devices("cpu")), jax.sharding.PartitionSpec("a")
        ),
    )


def fields_of(tree):
    """The result without a template: dicts of fields in place of NamedTuples."""
    if hasattr(tree, "_asdict"):
        return {name: fields_of(x) for name, x in tree._asdict().items()}
    return tuple(map(fields_of, tree)) if isinstance(tree, tuple) else tree


# --------------------------------------------------------------------------------------- power cuts
#
# What a disk may hold after a power cut, as POSIX allows it: of a file, what was written before its
# last fsync, and any of four forms of the rest; of a folder, the names at its last fsync, and any
# subset of the changes since. This is the model of ALICE (Pillai et al., OSDI 2014), without
# changes inside of one call other than a write that is cut in two.


class Recorder:
    """Replaces the functions of os that change a disk, and records their effects on the files and
    folders below `root`.
    """

    def __init__(self, root: pathlib.Path, patch: pytest.MonkeyPatch):
        paths = [root, *sorted(root.rglob("*"))]
        # The contents of the files by their numbers.
        self.files = [path.read_bytes() for path in paths if path.is_file()]
        self.names = {str(path): FOLDER for path in paths if path.is_dir()}
        self.names |= {
            str(path): i for i, path in enumerate(path for path in paths if path.is_file())
        }
        self.before, self.calls = dict(self.names), []
        self.created, self.descriptors = len(self.files), {}
        self.real = {}
        for name in ("open", "close", "lseek", "write", "fsync", "replace", "unlink", "mkdir"):
            self.real[name] = getattr(os, name)
            patch.setattr(os, name, getattr(self, name))

    def returned(self, step):
        """Record that from here on, the tree of this step or of a later one must be found."""
        self.calls.append(("returned", step))

    def open(self, path, flags, *mode):
        descriptor = self.real["open"](path, flags, *mode)
        if flags & os.O_CREAT:
            # Nothing is ever written in place.
            assert flags & os.O_EXCL
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


def disks(
    files: list[bytes], names: dict[str, int], calls: list[tuple]
) -> Iterator[dict[str, bytes]]:
    """Every {path: content} that the model allows if the power fails right after these calls."""
    writes = collections.defaultdict(list, {i: [(0, content)] for i, content in enumerate(files)})
    # How many writes of a file are on the disk.
    certain = collections.Counter(dict.fromkeys(writes, 1))
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
        there = {
            path: i for path, i in found.items() if i >= 0 and os.path.dirname(path) in folders
        }
        forms = [contents(writes[i], certain[i]) for i in there.values()]
        for chosen in itertools.product(*forms):
            yield dict(zip(there, chosen, strict=True))


def contents(writes: list[tuple[int, bytes]], certain: int) -> list[bytes]:
    """The contents that a file may have if its first `certain` writes are on the disk: none of the
    rest, all, the last, or half of it.
    """
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


def step_of_file(path: pathlib.Path) -> int:
    """The step whose tree a file holds, bit for bit; -1 if there is none."""
    if not path.exists():
        return -1
    tree = load(path)
    assert_same(tree, tree_of(tree["step"]))
    return tree["step"]


def step_of_store(root: pathlib.Path) -> int:
    store = Checkpoints(root, keep=2, best_rule="min loss")
    # No file is damaged, so none is skipped.
    with warnings.catch_warnings(action="error"):
        latest, best = store.latest(), store.best()
    assert latest and best and best.step == 1
    assert_same(best.tree, tree_of(1))
    assert_same(latest.tree, tree_of(latest.step))
    return latest.step


# How to find a mode's step; the steps it may be.
FOUND: dict[str, tuple[Callable[[pathlib.Path], int], list[int]]] = {
    "fresh": (lambda root: step_of_file(root / "new" / "t"), [-1, 1]),
    "overwrite": (lambda root: step_of_file(root / "t"), [0, 1, 2]),
    "store": (step_of_store, [3, 4, 5]),
    "asynchronous": (step_of_store, [3, 4, 5]),
}
assert FOUND.keys() == SAVES.keys()


def power_cuts(mode: str, folder: pathlib.Path, forget: str = "") -> tuple[int, int, set[int], int]:
    """(moments, different disks, steps found, how many were lost); `forget`: a kind of call left
    out of the record.
    """
    find, allowed = FOUND[mode]
    before(mode, root := folder / mode)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(root, patch)
        SAVES[mode](root, recorder.returned)
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
    return len(calls) + 1, len(tried), found, lost


@pytest.mark.parametrize("mode", SAVES)
def test_a_power_cut_at_any_moment_loses_nothing(mode, tmp_path):
    moments, tried, found, lost = power_cuts(mode, tmp_path)
    print(f"\npower cuts, {mode}: {moments} moments, {tried} different disks, {lost} lost")
    assert lost == 0 and tried > 8 and found == set(FOUND[mode][1])


@pytest.mark.parametrize("mode", SAVES)
@pytest.mark.parametrize("call", ["fsync", "fsync folder"])
def test_the_model_notices_a_missing_fsync(call, mode, tmp_path):
    """The same saves lose something if their fsyncs are ignored.

    Otherwise, the test above would prove nothing.
    """
    assert power_cuts(mode, tmp_path, forget=call)[3] > 0


# -------------------------------------------------------------------------------------------- kills


def test_a_kill_at_any_moment_leaves_the_old_checkpoints_or_the_new_one(tmp_path):
    (tmp_path / "before").mkdir()
    for mode in SAVES:
        before(mode, tmp_path / "before" / mode)
    script = HERE / "saves_to_be_killed.py"
    command = [sys.executable, script, tmp_path, "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=READS_CACHE)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "before")
    outcomes, kills = collections.defaultdict(set), collections.Counter()
    for root in sorted(tmp_path.iterdir()):
        mode = root.name.split("-")[0]
        kills[mode] += 1
        if mode == "random":
            check_random_kill(root)
            continue
        outcomes[mode].add(FOUND[mode][0](root))
        saved_again(mode, root)
        left = [path.name for path in root.rglob("*") if path.is_file()]
        # What the dead left has been swept.
        assert all(name == "t" or name.endswith(".safetensors") for name in left)
    assert outcomes == {mode: set(steps) for mode, (_, steps) in FOUND.items()}
    # The last child of each mode was not killed.
    kills.subtract(SAVES.keys())
    print(f"\nkills: {dict(kills)}, none lost")
    assert kills["random"] > 0 and all(kills[mode] >= 10 for mode in SAVES)


def saved_again(mode, root):
    if mode == "fresh":
        SAVES[mode](root, lambda step: None)
    elif mode == "overwrite":
        save(root / "t", tree_of(3))
        assert step_of_file(root / "t") == 3
    else:
        with Checkpoints(root, keep=2, best_rule="min loss") as store:
            store.save(6, tree_of(6), {"loss": 6})
            assert len(store.steps()) <= 3


def check_random_kill(root):
    store = Checkpoints(root, keep=2, best_rule="min loss")
    with warnings.catch_warnings(action="error"):
        latest, best = store.latest(), store.best()
    if latest:
        np.testing.assert_array_equal(latest.tree["x"], np.full(200_000, latest.step))
        assert best and best.step == min(latest.step, 5)


# ---------------------------------------------------------------------------------- writers at once

WRITERS = """
import os, sys
import numpy as np
from jaxnet.checkpoint import save

# The forked processes then find all modules imported.
save(f"{sys.argv[1]}/first", {"x": np.zeros(1)})
os.remove(f"{sys.argv[1]}/first")
for i in range(20):
    start, go = os.pipe()
    children = []
    for writer in range(2):
        if (child := os.fork()) == 0:
            os.close(go)
            # The read ends for both at once, when the parent closes the other end.
            os.read(start, 1)
            save(f"{sys.argv[1]}/{i}", {"x": np.full(200_000, writer), "y": [writer] * 3})
            os._exit(0)
        children.append(child)
    os.close(start)
    os.close(go)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_of_two_processes_one_wins_and_nothing_is_mixed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # And no temporary files.
    assert sorted(os.listdir(tmp_path), key=int) == [str(i) for i in range(20)]
    for path in tmp_path.iterdir():
        tree = load(path)
        assert tree["y"] in ([0, 0, 0], [1, 1, 1])
        np.testing.assert_array_equal(tree["x"], np.full(200_000, tree["y"][0]))


# -------------------------------------------------------------------------------------- a full disk

FULL = """
import os, resource, shutil, sys
import numpy as np
from jaxnet.checkpoint import Checkpoints, save

# The forked processes then find all modules imported.
save(f"{sys.argv[1]}/first", {"x": np.zeros(1)})
for mode in ("overwrite", "store", "asynchronous"):
    # The limits lie in the header and in the data.
    for limit in (0, 1, 300, 4096):
        root = f"{sys.argv[1]}/{mode}-{limit}"
        shutil.copytree(f"{sys.argv[1]}/before/{mode}", root)
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                if mode == "overwrite":
                    save(f"{root}/t", {"x": np.ones(500)})
                with Checkpoints(root, asynchronous=mode == "asynchronous") as store:
                    store.save(4, {"x": np.ones(500)})
            except OSError as e:
                os._exit(e.errno)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_at_a_limit_of_the_system_saving_is_an_error_and_the_old_stays(tmp_path):
    """The kernel itself refuses further writes (RLIMIT_FSIZE), also in the middle of a call."""
    (tmp_path / "before").mkdir()
    for mode in SAVES:
        before(mode, tmp_path / "before" / mode)
    command = [sys.executable, "-c", FULL, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=READS_CACHE)
    assert done.stdout.split() == [str(errno.EFBIG)] * 12, done.stderr
    for mode in ("overwrite", "store", "asynchronous"):
        expected = sorted(os.listdir(tmp_path / "before" / mode))
        for limit in (0, 1, 300, 4096):
            root = tmp_path / f"{mode}-{limit}"
            assert sorted(os.listdir(root)) == expected and FOUND[mode][0](root) == min(
                FOUND[mode][1]
            )


# ------------------------------------------------------------------------ damaged and hostile files


def peak(read: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy held during a call."""
    tracemalloc.start()
    try:
        read()
    finally:
        _, result = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result


def damaged(path: pathlib.Path, tree: Any, count: int, seed: int) -> dict[str, float]:
    """Load a tree's file after random damage, each of which must be a CheckpointError.

    Return their number, and the worst costs.
    """
    save(path, tree, metadata={"a": 1})
    data, bad = path.read_bytes(), path.with_name("bad")
    number, seconds, most = 0, 0.0, 0
    for number, (kind, content) in enumerate(damages(data, count, seed), 1):
        bad.write_bytes(content)

        def read(like=tree if number % 2 else None, kind=kind):
            with pytest.raises(CheckpointError):
                load(bad, like=like)
                pytest.fail(f"damage of kind {kind} went unnoticed")

        start = time.perf_counter()
        most = max(most, peak(read))
        seconds = max(seconds, time.perf_counter() - start)
    return {
        "damages": number,
        "file's bytes": len(data),
        "most bytes": most,
        "slowest, s": round(seconds, 3),
    }


def test_damage_never_costs_much_memory(tmp_path):
    # The array has 1 MiB.
    figures = damaged(tmp_path / "t", {"large": np.arange(1 << 17)}, 80, seed=7)
    assert figures["most bytes"] < 2 * figures["file's bytes"]


@pytest.mark.slow
def test_ten_thousand_damages(tmp_path):
    total = 0
    for name, tree in {"small": DAMAGED, "large": DAMAGED | {"large": np.arange(1 << 15)}}.items():
        figures = damaged(tmp_path / "t", tree, 6000, seed=8)
        print(f"\n{name} tree: {figures}; 0 silent, all CheckpointError")
        total += figures["damages"]
        # Errors and the header's JSON as objects.
        assert figures["most bytes"] < 2 * figures["file's bytes"] + 500_000
        # A longer time would be a hang.
        assert figures["slowest, s"] < 10
    assert total >= 10_000


def header_of(count: int, start: str, part: Callable[[int], str], stop: str) -> bytes:
    return container((start + ",".join(part(i) for i in range(count)) + stop).encode())


def tensor(name: Any, at: int = 0) -> str:
    return f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[{at},{at}]}}'


# Files of about 2 MB, made to be slow or to need much memory.
LARGE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: container(b'{"a":' + b"[" * 2_000_000),
    "deep objects": lambda: container(b'{"a":' * 400_000),
    "many lists": lambda: header_of(600_000, '{"a":[', lambda i: "[]", "]}"),
    "one name": lambda: header_of(30_000, "{", lambda i: tensor("a"), "}"),
    "many entries, the last is wrong": lambda: header_of(
        30_000, "{", lambda i: tensor(i, i == 29_999), "}"
    ),
    "a long name": lambda: container(b'{"' + b"a" * 2_000_000 + b'":1}'),
    "a long number": lambda: container(b'{"a":' + b"1" * 2_000_000 + b"}"),
    "long paths": lambda: header_of(
        8_000, "{", lambda i: tensor(f"{i}" + "/a" * 98, i == 7_999), "}"
    ),
    "many axes": lambda: container(
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 1_000_000 + b'1],"data_offsets":[0,1]}}'
    ),
    "a long integer": lambda: forge(["list", [["int", "0x" + "f" * 2_000_000], ["int", 1]]]),
    "a long text": lambda: forge(["list", [["str", "a" * 2_000_000], ["str", 1]]]),
    "many nodes": lambda: forge(["list", [*[["none", None]] * 80_000, ["none", 1]]]),
    "keys of one hash": lambda: forge(
        ["dict", [[["int", hex(i * (2**61 - 1))], ["none", None]] for i in range(40_000)]]
    ),
    "keys of one hash, in many dicts": lambda: forge(
        [
            "list",
            [["dict", [[["int", hex(i * (2**61 - 1))], ["none", None]] for i in range(100)]]] * 400
            + [["none", 1]],
        ]
    ),
    "many keys": lambda: forge(
        ["dict", [*[[["int", hex(i)], ["none", None]] for i in range(40_000)], [1, 1]]]
    ),
}


@pytest.mark.slow
def test_hostile_files_are_refused_within_a_second_and_100_megabytes(tmp_path):
    """CPU seconds count, because the machine may be busy; a reader's needs grow with the file."""
    files = {name: data for name, (data, _) in (HOSTILE | FORGED).items()} | LARGE
    costs = {}
    for name, data in files.items():
        (tmp_path / "f").write_bytes(data() if callable(data) else data)

        def refused():
            with pytest.raises(CheckpointError):
                load(tmp_path / "f")

        seconds = []
        # The machine may do other things, so the least of three times counts.
        while len(seconds) < 3 and min(seconds, default=1) >= 1:
            start = time.process_time()
            refused()
            seconds.append(time.process_time() - start)
        costs[name] = min(seconds), peak(refused)
    slowest, largest = (max(costs, key=lambda name, i=i: costs[name][i]) for i in range(2))
    seconds, size = costs[slowest][0], costs[largest][1]
    print(
        f"\n{len(files)} hostile files: at most {seconds:.2f} s ({slowest}) and {size / 1e6:.0f} "
        f"MB ({largest})"
    )
    # It takes 0.65 s on a machine that does nothing else.
    assert seconds < 5 and size < 100e6


def test_names_like_paths_name_leaves_and_no_files(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["../../etc/x", "/etc/x", "..", "./a", "a/../b", "C:\\x", "\0", "a\n", ""]
    (tmp_path / "in" / "f").write_bytes(
        container(f"{{{','.join(tensor(json.dumps(n)[1:-1]) for n in names)}}}".encode())
    )
    # ".." is a leaf and would be a folder too: no name is split.
    assert set(load(tmp_path / "in" / "f")) == {*names}
    save(tmp_path / "in" / "f", {name: np.ones(1) for name in names})
    assert list(load(tmp_path / "in" / "f")) == names
    # Nothing has been written anywhere else.
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "f"]


# ----------------------------------------------------------------------------------- kinds of trees

W = np.arange(6, dtype=np.float32).reshape(2, 3)
ADAM = optax.adamw(1e-3).init({"w": jnp.ones(2)})
# kind -> what is saved and, if that is not the same, what comes back without and with the tree
# itself as a template.
KINDS: dict[str, tuple[Any, ...]] = {
    **{f"NumPy {name}": (values(dtype),) for name, dtype in DTYPES.items()},
    **{
        f"JAX {name}": (jax.device_put(values(dtype)),)
        for name, dtype in DTYPES.items()
        if name not in NOT_IN_JAX
    },
    **{
        f"keys {impl}": (jax.random.key(1, impl=impl),)
        for impl in ("threefry2x32", "rbg", "unsafe_rbg")
    },
    "array of keys": (jax.random.split(jax.random.key(0), (2, 3)),),
    "0-d": (np.array(5.0),),
    "0-d of JAX": (jnp.float32(5),),
    "no elements": (np.zeros((0, 3)),),
    "scalar of NumPy": (np.float32(1.5),),
    "NaN with a payload": (np.array([0x7FC12345], np.uint32).view(np.float32),),
    "transposed": (W.T,),
    "reversed": (W[::-1, ::2],),
    "broadcast": (np.broadcast_to(np.float32(3), (2, 2)),),
    "big-endian": (np.arange(3, dtype=">i4"),),
    "spread over devices": (spread(jnp.arange(8.0)),),
    "None": (None,),
    "bool": (True,),
    "int": (-31,),
    "long int": (2**200,),
    "float": (0.1,),
    "-0.0, NaN, infinity": ([-0.0, float("nan"), float("-inf")],),
    "complex": (1 - 2j,),
    "str": ("é\n",),
    "bytes": (b"\0\xff",),
    "empty dict": ({},),
    "empty list": ([],),
    "empty tuple": ((),),
    "nested dicts": ({"a": {"b": {"c": W}}},),
    "list": ([W, [1, W]],),
    "tuple": ((W, (1, W)),),
    "OrderedDict": (collections.OrderedDict(b=W, a=1),),
    "defaultdict": (
        collections.defaultdict(list, a=1),
        {"a": 1},
        collections.defaultdict(list, a=1),
    ),
    "int keys": ({3: W, -1: 1},),
    "float, bool, bytes, None as keys": ([{0.5: 1}, {True: 1}, {b"x": 1}, {None: 1}],),
    "tuples as keys": ({(0, "a"): W},),
    "slash in a key": ({"a/b": np.ones(1), "a": {"b": np.zeros(1)}},),
    "tilde in a key": ({"~": {"~1": W}},),
    "dot in a key": ({"a.b": np.ones(1), "a": {"b": np.zeros(1)}},),
    "__metadata__ as a key": ({"__metadata__": W, "file": W},),
    "empty key": ({"": {"": W}},),
    "keys that are no ASCII": ({"é": {"日本": W}},),
    "NamedTuple": (Pair(W, 1), {"first": W, "second": 1}, Pair(W, 1)),
    "dataclass": (Moments(W, None), {"mean": W, "var": None}, Moments(W, None)),
    "class without names": (Nameless(1, [2]), {"0": 1, "1": [2]}, Nameless(1, [2])),
    "state of optax": (ADAM, fields_of(ADAM), ADAM),
    "state of a training": (
        {"params": {"w": jnp.ones(2)}, "opt": ADAM, "key": jax.random.key(0), "step": 7},
        {"params": {"w": jnp.ones(2)}, "opt": fields_of(ADAM), "key": jax.random.key(0), "step": 7},
        {"params": {"w": jnp.ones(2)}, "opt": ADAM, "key": jax.random.key(0), "step": 7},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree_comes_back(kind, tmp_path):
    tree, plain, full = (KINDS[kind] * 3)[:3]
    save(tmp_path / "t", tree)
    assert_same(load(tmp_path / "t"), plain)
    got = load(tmp_path / "t", like=tree)
    assert jax.tree.structure(got) == jax.tree.structure(full)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        assert_same(a, b)


def test_there_are_as_many_kinds_as_promised():
    assert len(KINDS) >= 52
