"""Checkpoints of sharded arrays: from n devices to m in one process, and of several processes in
parts. Expected values are those from which the arrays were made. The scenarios with two processes
are in run_in_processes.py and all run in one pair, because most of the time is spent on starting
it.
"""

import json
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import READS_CACHE
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from run_in_processes import SCENARIOS, values

from jaxnet.checkpoint import CheckpointError, engines, inspect, lazy, load, manifests, save, verify
from jaxnet.checkpoint.format import Header, read_header, write_header
from jaxnet.checkpoint.parts import pieces
from jaxnet.checkpoint.tensors import layout
from jaxnet.cli import main

HERE = pathlib.Path(__file__).parent

DEVICES = """
import sys, pathlib, numpy as np, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
n, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
jax.config.update("jax_num_cpu_devices", n)
from jaxnet.checkpoint import load, save
mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
rows, copies = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
x, keys = np.arange(64, dtype=np.float32).reshape(8, 8), jax.random.split(jax.random.key(1), 8)
tree = {"x": jax.device_put(x, rows), "keys": jax.device_put(keys, rows)}
tree["copies"] = jax.device_put(x, copies)
like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
files = sorted(folder.iterdir())
for file in files:
    plain, sharded = load(file), load(file, like=like)
    assert all(len(a.sharding.device_set) == 1 for a in plain.values())
    assert all(a.sharding == like[name].sharding for name, a in sharded.items())
    assert all(len(a.sharding.device_set) == n for a in sharded.values())
    for got in plain, sharded:
        np.testing.assert_array_equal(got["x"], x)
        np.testing.assert_array_equal(got["copies"], x)
        np.testing.assert_array_equal(jax.random.key_data(got["keys"]), jax.random.key_data(keys))
save(folder / f"{len(files)}-from-{n}.safetensors", tree)
print(*(file.stem for file in files))
"""


def test_saved_on_n_devices_and_loaded_on_m(tmp_path):
    """Each process has another number of devices, and loads all files that the processes before it
    have saved.
    """
    for n in (8, 4, 2, 1, 8):
        done = subprocess.run(
            [sys.executable, "-c", DEVICES, str(n), tmp_path],
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0-from-8", "1-from-4", "2-from-2", "3-from-1"]
    # The file does not depend on the devices.
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_sharded_leaves_are_gathered_one_at_a_time(tmp_path):
    rows = sharding(4, PartitionSpec("x"))
    # Each leaf has 2 MiB.
    tree = {str(i): jax.device_put(jnp.zeros((4, 1 << 17)), rows) for i in range(8)}
    tracemalloc.start()
    save(tmp_path / "t", tree)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Memory holds the leaf that is written and the next one, not 16 MiB.
    assert peak < 5 << 20


def sharding(n, spec):
    return NamedSharding(
        jax.make_mesh((n,), ("x",), devices=jax.devices("cpu")[:n], axis_types=(AxisType.Auto,)),
        spec,
    )


def start(count, folder, *what):
    """Start processes that know each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, HERE / "run_in_processes.py"]
    return [
        subprocess.Popen(
            [*command, str(i), str(count), str(port), folder, *what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=None if what == ("all",) else READS_CACHE,
        )
        for i in range(count)
    ]


def finish(processes):
    """The exit status and the output of each process.

    All are killed if one takes longer than two minutes.
    """
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
        return [
            (process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The results of all scenarios in two processes, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    done = finish(start(2, folder, "all"))
    assert [status for status, _, _ in done] == [0, 0], done
    return [json.loads(out.splitlines()[-1]) for _, out, _ in done], folder


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(name, pair):
    results, _ = pair
    assert [result[name] for result in results] == ["", ""]


@pytest.fixture
def parts(pair, tmp_path):
    """The files that two processes have saved, for changes: the manifest, and the two parts."""
    for path in (pair[1] / "saved_and_loaded").iterdir():
        shutil.copy(path, tmp_path)
    manifest, *rest = sorted(tmp_path.iterdir())
    assert manifest.name == "x.safetensors" and len(rest) == 2
    return manifest, rest


def assert_values(got, scale=1):
    x = values(scale)
    for name in ("blocks", "columns", "copies", "empty"):
        np.testing.assert_array_equal(np.asarray(got[name]), x[name], strict=True)
    for name in ("own", "host"):
        np.testing.assert_array_equal(np.asarray(got["a/b"][name]), x[name], strict=True)
    np.testing.assert_array_equal(jax.random.key_data(got["keys"]), np.arange(8).reshape(4, 2))
    assert got["step"] == scale


def test_one_process_loads_what_two_have_saved(parts):
    path, _ = parts
    got = load(path)
    assert_values(got)
    assert type(got["a/b"]["host"]) is np.ndarray and isinstance(got["blocks"], jax.Array)
    for n, spec in [(1, PartitionSpec()), (2, PartitionSpec(None, "x")), (4, PartitionSpec("x"))]:
        like = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding(n, spec))
        found = load(path, like={"blocks": like}, pattern="blocks")["blocks"]
        assert found.sharding == like.sharding
        np.testing.assert_array_equal(np.asarray(found), values()["blocks"])
    with lazy(path) as leaves:
        assert leaves["step"] == 1 and set(leaves) == {
            leaf.path for leaf in inspect(path).leaves
        } | {"step"}
        np.testing.assert_array_equal(leaves["a~1b/own"], values()["own"])


def test_parts_that_are_replaced_while_they_are_read_are_no_damage(parts, monkeypatch):
    """After the manifest has been read, another save takes its place and deletes the parts: the new
    tree is loaded.
    """
    path, files = parts
    engine = engines.ENGINES[manifests.PARTS]

    def late(*args):
        save(path, {"w": np.arange(3)})
        return engine.reader(*args)

    monkeypatch.setitem(engines.ENGINES, manifests.PARTS, engine._replace(reader=late))
    np.testing.assert_array_equal(load(path)["w"], np.arange(3))
    assert not any(file.exists() for file in files)


# Written once by two processes: never regenerate it.
GOLDEN = HERE / "golden" / "v2_parts.safetensors"


def test_golden_parts(parts):
    """The golden file of version 2 still loads, and today's writer writes it, except for the random
    number of a save.
    """
    assert_values(load(GOLDEN))
    assert verify(GOLDEN).metadata == {"by": "two"}
    path, written = parts
    for old, new in zip(sorted(GOLDEN.parent.glob(f"{GOLDEN.name}.part-*")), written, strict=True):
        assert old.read_bytes() == new.read_bytes()
    manifests = [
        read_header(str(p), p.read_bytes()[8:], p.stat().st_size).manifest or {}
        for p in (GOLDEN, path)
    ]
    ids = [manifest["parts"].pop("id") for manifest in manifests]
    assert manifests[0] == manifests[1] and ids[0] != ids[1]


def test_the_documented_reader_puts_the_parts_together():
    code = (
        (HERE.parent / "docs" / "checkpoint_format.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
    )
    exec(code, names := {})
    manifest, tensors = names["read_parts"](GOLDEN)
    assert (manifest["version"], manifest["crc32"], manifest["metadata"]) == (2, [], {"by": "two"})
    for name in ("blocks", "columns", "copies", "empty"):
        x = values()[name]
        assert tensors[name][1:] == (x.shape, x.tobytes())
    assert tensors["keys"] == ("U32", (4, 2), np.arange(8, dtype=np.uint32).tobytes())
    assert tensors["a~1b/own"] == ("F32", (3,), values()["own"].tobytes())


def test_inspect_and_verify_of_parts(parts):
    path, (first, second) = parts
    info = inspect(path)
    assert (info.version, info.metadata, info.scalars) == (2, {"by": "two"}, {"step": 1})
    assert [(leaf.path, leaf.shape, leaf.dtype) for leaf in info.leaves] == [
        *[("blocks", (4, 8), "float32"), ("columns", (2, 8), "int8"), ("copies", (), "float32")],
        *[("empty", (0, 4), "float32"), ("keys", (4,), "key<threefry2x32>")],
        *[("a~1b/own", (3,), "float32"), ("a~1b/host", (4,), "int64")],
    ]
    assert (
        main(["inspect", str(path)])
        == main(["verify", str(path)])
        == main(["diff", str(path), str(GOLDEN)])
        == 0
    )
    assert (
        info.nbytes == sum(p.stat().st_size for p in (path, first, second)) and verify(path) == info
    )
    assert [leaf.shape for leaf in inspect(second).leaves if leaf.path.startswith("blocks")] == [
        (2, 4),
        (2, 4),
    ]


def test_every_damaged_byte_of_the_parts_is_found(parts):
    path, files = parts
    for file in (path, *files):
        data = file.read_bytes()
        for i in range(0, len(data), 7):
            file.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
            for check in (load, verify):
                with pytest.raises(CheckpointError):
                    check(path)
        file.write_bytes(data)
    assert_values(load(path))


def test_parts_that_are_missing_or_of_another_save_are_named(parts, pair):
    path, (first, second) = parts
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=f"its part {second} is missing"):
        load(path)
    other = next((pair[1] / "replaced").glob("*-00001"))
    # The other file is not damaged.
    shutil.copy(other, second)
    with pytest.raises(CheckpointError, match=f"its part {second} is that of another checkpoint"):
        load(path)
    second.write_bytes(data)
    assert_values(load(path))
    assert inspect(path) and first.exists()


WELL_FORMED = {"id": "0123456789abcdef", "files": [["0" * 64, 500]], "tensors": [["w", "F32", [2]]]}
FORGED = {
    "no parts": None,
    "a path for an id": WELL_FORMED | {"id": "../../../../etc/x"},
    "no id": {name: x for name, x in WELL_FORMED.items() if name != "id"},
    "a size of no number": WELL_FORMED | {"files": [["0" * 64, "500"]]},
    "a digest alone": WELL_FORMED | {"files": ["0" * 64]},
    "two tensors of one name": WELL_FORMED | {"tensors": [["w", "F32", [2]]] * 2},
    "an unknown dtype": WELL_FORMED | {"tensors": [["w", "F33", [2]]]},
    "half bytes": WELL_FORMED | {"tensors": [["w", "F4", [2]]]},
    "a negative size": WELL_FORMED | {"tensors": [["w", "F32", [-2]]]},
    "no shape": WELL_FORMED | {"tensors": [["w", "F32"]]},
    "more than there is": WELL_FORMED | {"tensors": [["w", "F32", [1 << 40]]]},
    "another tensor than in the tree": WELL_FORMED | {"tensors": [["v", "F32", [2]]]},
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_parts_are_refused(name, tmp_path):
    manifest = {
        "version": 2,
        "metadata": {},
        "tree": ["dict", [["w", ["jax", "float32"]]]],
        "crc32": [],
    }
    for parts in WELL_FORMED, FORGED[name]:
        (tmp_path / "x").write_bytes(write_header("x", [], manifest | {"parts": parts}))
        if parts is WELL_FORMED:
            assert inspect(tmp_path / "x").leaves[0].shape == (2,)
    for check in (inspect, load, verify):
        with pytest.raises(CheckpointError):
            check(tmp_path / "x")


# Pieces (dtype, start, shape) of an F32[4, 6], and whether they fill it.
GRIDS = {
    "the whole": ([("F32", "", (4, 6))], True),
    "rows": ([("F32", "0", (2, 6)), ("F32", "2", (2, 6))], True),
    "uneven": ([("F32", "0,0", (1, 6)), ("F32", "1,0", (3, 6))], True),
    "blocks": ([("F32", f"{i},{j}", (2, 3)) for i in (0, 2) for j in (0, 3)], True),
    "none": ([], False),
    "a hole": ([("F32", f"{i},{j}", (2, 3)) for i, j in [(0, 0), (0, 3), (2, 3)]], False),
    "one twice": ([("F32", "0", (2, 6)), ("F32", "0", (2, 6))], False),
    "an overlap of the right size": ([("F32", "0", (2, 6)), ("F32", "1", (2, 6))], False),
    "too large": ([("F32", "0", (2, 6)), ("F32", "2", (3, 6))], False),
    "not from the beginning": ([("F32", "1", (3, 6))], False),
    "another dtype": ([("I32", "", (4, 6))], False),
    "an axis too few": ([("F32", "", (24,))], False),
    "a position too many": ([("F32", "0,0,0", (4, 6))], False),
}


@pytest.mark.parametrize("name", GRIDS)
def test_pieces_fill_their_tensor_exactly(name):
    found, fill = GRIDS[name]
    (whole,) = layout([("w", "F32", (4, 6))])
    parts = [
        Header(layout([(f"w/{start}", code, shape)]), {}, None, 0) for code, start, shape in found
    ]
    if fill:
        assert len(pieces("x", [whole], parts)["w"]) == len(found)
    else:
        with pytest.raises(CheckpointError, match=r"leaf 'w': its pieces do not fill F32\[4, 6\]"):
            pieces("x", [whole], parts)


def test_one_process_saves_over_the_parts(parts, tmp_path):
    path, files = parts
    others = [
        tmp_path / "y.safetensors.part-0123456789abcdef-00000",
        tmp_path / "x.safetensors.part-1",
        tmp_path / "x",
    ]
    for other in others:
        other.write_bytes(b"of somebody else")
    save(path, {"w": jnp.ones(2)})
    # The parts are gone, and nothing else.
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
    assert inspect(path).version == 1 and not any(file.exists() for file in files)


# Who is killed, at the name of which file, before or after it has it -> which tree must load.
KILLS = {
    "in its part": ("1", "-00001", "before", 1),
    "before the manifest": ("0", "x.safetensors", "before", 1),
    "after the manifest": ("0", "x.safetensors", "after", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_process_leaves_the_old_checkpoint_or_the_new_one(name, tmp_path):
    process, suffix, when, scale = KILLS[name]
    done = finish(start(2, tmp_path, "die", process, suffix, when))
    # The other one is ended by JAX.
    assert done[int(process)][0] == -9 and done[1 - int(process)][0] != 0
    assert_values(load(tmp_path / "x.safetensors"), scale)
    verify(tmp_path / "x.safetensors")
    # The killed processes left files behind.
    assert len(list(tmp_path.glob("*.part-*"))) > 2
    save(tmp_path / "x.safetensors", {"w": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def killed_at_once(folder, engine, rng):
    """Kill two processes at the same moment of their saves.

    Return the number of the tree that must be there, after checking that it is.
    """
    folder.mkdir()
    path, processes = folder / "x.safetensors", start(2, folder, "for_ever", *engine)
    try:
        patience = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < patience and all(
                process.poll() is None for process in processes
            )
            time.sleep(0.01)
        first = load(path)["step"]
        time.sleep(rng.uniform(0, 1))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
    tree = load(path)
    assert_values(tree, tree["step"])
    verify(path)
    assert tree["step"] >= first
    save(path, {"w": 1})
    # What the dead left has been swept.
    assert [entry.name for entry in folder.iterdir()] == ["x.safetensors"]
    return tree["step"]


def test_two_processes_that_are_killed_at_once_leave_one_of_their_saves(tmp_path):
    killed_at_once(tmp_path / "x", [], random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], ["orbax"]], ids=["parts", "orbax"])
def test_many_kills_of_two_processes_at_once(engine, tmp_path):
    if engine:
        pytest.importorskip("orbax")
    found = [killed_at_once(tmp_path / str(i), engine, random.Random(i)) for i in range(8)]
    print(f"\n{len(found)} kills of two processes, none lost; they were at saves {found}")
    assert max(found) > 1


@pytest.mark.slow
def test_a_process_that_dies_inside_orbax_is_noticed_within_a_minute(tmp_path):
    pytest.importorskip("orbax")
    processes = start(2, tmp_path, "orbax_dies")
    try:
        assert processes[0].stdout
        lines = iter(processes[0].stdout.readline, "")
        waited = next(float(line) for line in lines if line[:1].isdigit())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    print(f"\nthe other process raised after {waited:.0f} s")
    assert waited < 60
    assert_values(load(tmp_path / "x.safetensors"), 1)
