"""The engine Orbax: the same calls and promises, with the arrays in a folder that Orbax writes.

Trees are known from how they were made; what Orbax wrote is read by Orbax itself, too. Kills and
power cuts as the system sees them are in benchmarks/checkpoint_faults.py, since Orbax writes from
C++; two processes are in run_in_processes.py. Object stores need an emulator (`pip install gcsfs
gcp-storage-emulator`), and are skipped without.
"""

import errno
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import READS_CACHE
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_checkpoint import DTYPES, NOT_IN_JAX, TREES, assert_same, plain, values
from test_faults import KINDS

import jaxnet.checkpoint.orbax as engine
from jaxnet.checkpoint import (
    CheckpointError,
    Checkpoints,
    inspect,
    lazy,
    load,
    places,
    save,
    verify,
)
from jaxnet.checkpoint.format import write_header
from jaxnet.cli import main

ocp = pytest.importorskip("orbax.checkpoint", reason="needs Orbax: pip install 'jaxnet[orbax]'")
HERE = pathlib.Path(__file__).parent
X = np.arange(64, dtype=np.float32).reshape(8, 8)


def sharding(n, *spec):
    mesh = jax.make_mesh((n,), ("x",), devices=jax.devices("cpu")[:n], axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def tree_of(step):
    return {
        "x": jax.device_put(X * step, sharding(4, "x")),
        "y": {"n": np.arange(500) * step},
        "step": step,
    }


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


# ---------------------------------------------------------------------------------- what comes back


def test_every_kind_of_tree_comes_back(tmp_path):
    """All kinds of leaves are in one tree, because each save of Orbax takes a tenth of a second."""
    trees, plains, fulls = ({kind: (x * 3)[:3][i] for kind, x in KINDS.items()} for i in range(3))
    save(tmp_path / "t", trees, engine="orbax")
    assert_same(load(tmp_path / "t"), plains)
    got, expected = load(tmp_path / "t", like=trees), fulls
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_same(a, b)


def test_every_dtype_comes_back_from_several_devices(tmp_path):
    names = [name for name in DTYPES if name not in NOT_IN_JAX]
    tree = {name: jax.device_put(values(DTYPES[name], (8, 3)), sharding(4, "x")) for name in names}
    tree["keys"] = jax.device_put(jax.random.split(jax.random.key(0), 8), sharding(4, "x"))
    save(tmp_path / "t", tree, engine="orbax")
    assert_same(load(tmp_path / "t"), tree)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(2, "x")), tree
    )
    got = load(tmp_path / "t", like=like)
    assert_same(got, dict(sorted(tree.items())))
    assert all(x.sharding == sharding(2, "x") for x in got.values())
    with jax.enable_x64(True):
        wide = {
            name: jax.device_put(values(DTYPES[name], (8,)), sharding(4, "x"))
            for name in NOT_IN_JAX[2:]
        }
        save(tmp_path / "wide", wide, engine="orbax")
        assert_same(load(tmp_path / "wide"), wide)


def test_random_trees_come_back(tmp_path):
    for i in range(5):
        # Hypothesis warns that examples are drawn outside a test.
        with warnings.catch_warnings(action="ignore"):
            tree = {str(j): TREES.example() for j in range(20)}
        save(tmp_path / f"{i}", tree, engine="orbax")
        assert_same(load(tmp_path / f"{i}"), plain(tree))


@pytest.mark.parametrize(
    "tree", [{}, None, 3, jnp.ones(3), np.zeros((0, 2)), {"": np.ones(1)}, {"": {"": 1}}], ids=str
)
def test_trees_that_orbax_itself_refuses_or_would_confuse(tree, tmp_path):
    save(tmp_path / "t", tree, engine="orbax")
    assert_same(load(tmp_path / "t"), tree)
    verify(tmp_path / "t")


def test_names_that_orbax_would_merge_stay_apart(tmp_path):
    tree = {
        "a.b": jnp.ones(2),
        "a": {"b": jnp.zeros(2)},
        "a%2Eb": jnp.full(2, 3.0),
        "..": {"/abs/x": jnp.full(2, 4.0)},
    }
    save(tmp_path / "in" / "t", tree, engine="orbax")
    assert_same(load(tmp_path / "in" / "t"), tree)
    assert [p.name for p in tmp_path.iterdir()] == ["in"] and len(
        list((tmp_path / "in").iterdir())
    ) == 2


@pytest.mark.parametrize("name", ["a b", "100 %", "%41", "what?", "#1", "a:b", "é 日", "new\nline"])
def test_paths_that_look_like_something_else(name, tmp_path):
    for _ in range(2):
        save(tmp_path / name / name, {"x": X}, engine="orbax")
        assert_same(load(tmp_path / name / name, like={"x": X}), {"x": X})
    assert os.listdir(tmp_path) == [name] and len(os.listdir(tmp_path / name)) == 2


def test_a_path_that_orbax_cannot_have_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"Orbax takes the '\[' or '\*\*' in the path for a pattern: use"
    ):
        save(tmp_path / "[x]" / "t", {"x": X}, engine="orbax")
    assert os.listdir(tmp_path) == []


def test_replicas_that_differ_are_saved_as_one_of_them(tmp_path):
    """Replicas should not differ, but they do in the statistics of each replica: Orbax would put an
    array together from all of them.
    """
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), (AxisType.Auto, AxisType.Auto), devices=jax.devices("cpu")
    )
    where, blocks = NamedSharding(mesh, PartitionSpec("a")), []
    for i, device in enumerate(mesh.devices.flat):
        blocks.append(jax.device_put(np.full((2, 4), i, np.float32), device))
    save(
        tmp_path / "t",
        jax.make_array_from_single_device_arrays((4, 4), where, blocks),
        engine="orbax",
    )
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "t"))[:, 0], [0, 0, 2, 2])


def test_bytes_of_bool_other_than_one(tmp_path):
    save(tmp_path / "t", np.array([0, 1, 2, 255], np.uint8).view(bool), engine="orbax")
    assert_same(load(tmp_path / "t"), np.array([False, True, True, True]))


def test_arrays_in_the_memory_of_the_host(tmp_path):
    x = jax.device_put(
        values(DTYPES["int4"], (8, 3)), sharding(4, "x").with_memory_kind("unpinned_host")
    )
    with Checkpoints(tmp_path, asynchronous=True, engine="orbax") as store:
        store.save(
            1, {"x": x, "y": jax.device_put(X, sharding(4, "x").with_memory_kind("unpinned_host"))}
        )
    assert_same(
        store.load(1).tree,
        {"x": jax.device_put(values(DTYPES["int4"], (8, 3))), "y": jnp.asarray(X)},
    )


def test_threads_save_at_once(tmp_path):
    def work(i):
        for step in range(6):
            save(tmp_path / str(i), {"x": np.full(100, step)}, engine="orbax")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([load(tmp_path / str(i)) for i in range(2)], [{"x": np.full(100, 5)}] * 2)


def test_a_target_that_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(IsADirectoryError, match="this is a folder: add a file name"):
        save(tmp_path / "t", {"x": X}, engine="orbax")
    assert os.listdir(tmp_path) == ["t"]


def test_a_store_that_is_out_of_reach_is_no_damage(tmp_path, monkeypatch):
    """A step that cannot be read now neither counts as damaged nor is skipped: no save could follow
    the older one.
    """
    import tensorstore

    store = Checkpoints(tmp_path, engine="orbax")
    store.save(1, tree_of(1))
    store.save(2, tree_of(2))
    real = tensorstore.open

    def unreachable(spec, **options):
        if "00000002" in spec["kvstore"]["base"]["path"]:
            raise ValueError("UNAVAILABLE: connection reset")
        return real(spec, **options)

    monkeypatch.setattr(tensorstore, "open", unreachable)
    with pytest.raises(OSError, match="cannot be read now") as caught:
        store.latest()
    assert "step 2 is not damaged: make it readable, or move it away" in caught.value.__notes__[0]
    monkeypatch.undo()
    found = store.latest()
    assert found and found.step == 2 and found.skipped == {}
    with pytest.raises(ValueError, match="step 2 is not newer than step 2"):
        store.save(2, tree_of(2))


def test_orbax_reads_what_it_wrote(tmp_path):
    tree = {
        "params": {"dense": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias.": np.arange(2)}},
        "step": 3,
    }
    save(tmp_path / "t", tree, engine="orbax")
    (folder,) = folders(tmp_path)
    restored = ocp.PyTreeCheckpointer().restore(
        tmp_path / folder,
        restore_args={
            "params": {
                "dense": {
                    k: ocp.RestoreArgs(restore_type=np.ndarray) for k in ("kernel", "bias%2E")
                }
            }
        },
    )
    expected = {"kernel": np.ones((3, 2), jnp.bfloat16), "bias%2E": np.arange(2)}
    assert_same(dict(sorted(restored["params"]["dense"].items(), reverse=True)), expected)


# ----------------------------------------------------------------------------------- the same calls


def test_the_calls_are_the_same(tmp_path, capsys):
    path, tree = tmp_path / "t.safetensors", tree_of(1)
    save(path, tree, metadata={"a": 1}, engine="orbax")
    info = inspect(path)
    assert (info.version, info.metadata, info.scalars) == (3, {"a": 1}, {"step": 1})
    assert [(leaf.path, leaf.shape, leaf.dtype) for leaf in info.leaves] == [
        ("x", (8, 8), "float32"),
        ("y/n", (500,), "int64"),
    ]
    assert verify(path) == info and info.nbytes == path.stat().st_size + 256 + 4000
    assert_same(load(path, pattern="y"), {"y": {"n": np.arange(500)}})
    like = {"z": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=sharding(2, None, "x"))}
    got = load(path, like=like, rename={"x": "z"}, strict=False, cast=True)["z"]
    assert got.sharding == sharding(2, None, "x")
    np.testing.assert_array_equal(np.asarray(got, np.float32), X)
    with pytest.raises(
        CheckpointError, match=r"shape differs: x: template float32\[3\], file float32\[8,8\]"
    ):
        load(path, like=tree | {"x": jnp.zeros(3)})
    with lazy(path) as leaves:
        np.testing.assert_array_equal(leaves["x"], X)
        assert leaves["step"] == 1
    save(tmp_path / "plain", tree)
    assert main(["inspect", str(path), "--stats"]) == main(["verify", str(path)]) == 0
    assert main(["diff", str(path), str(tmp_path / "plain")]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out


def test_the_file_says_what_the_format_page_says(tmp_path):
    path = tmp_path / "t.safetensors"
    save(path, tree_of(1), engine="orbax")
    raw = path.read_bytes()
    header = json.loads(raw[8:])
    assert list(header) == ["__metadata__"]
    manifest = json.loads(header["__metadata__"]["jaxnet"])
    orbax = manifest.pop("orbax")
    assert manifest.pop("tree")[0] == "dict" and manifest == {
        "version": 3,
        "metadata": {},
        "crc32": [],
    }
    assert folders(tmp_path) == [f"t.safetensors.orbax-{orbax['id']}"]
    names = {}
    for part in (
        (HERE.parent / "docs" / "checkpoint_format.md").read_text().split("```python\n")[1:]
    ):
        exec(part.split("```")[0], names)
    tensors = names["read_orbax"](path)
    np.testing.assert_array_equal(tensors["x"], X)
    np.testing.assert_array_equal(tensors["y/n"], np.arange(500))


# Written once, on two devices: never regenerate it.
GOLDEN = HERE / "golden" / "v3_orbax.safetensors"


def test_golden_orbax(tmp_path):
    """The golden file of version 3 still loads, and today's writer writes the same manifest, except
    for the random number.
    """
    tree = {
        "x": jax.device_put(X[:4, :2], sharding(2, "x")),
        "key": jax.random.key(1),
        "e": np.zeros((0, 3), np.float16),
        "f8": values(DTYPES["float8_e4m3fnuz"], (2,)),
        "a.b": [1.5, (None, jnp.ones((), jnp.bfloat16))],
    }
    assert_same(load(GOLDEN), tree)
    assert verify(GOLDEN).metadata == {"by": "orbax"}
    save(tmp_path / "t", tree, metadata={"by": "orbax"}, engine="orbax")
    manifests = [
        json.loads(json.loads(p.read_bytes()[8:])["__metadata__"]["jaxnet"])
        for p in (GOLDEN, tmp_path / "t")
    ]
    ids = [manifest["orbax"].pop("id") for manifest in manifests]
    assert manifests[0] == manifests[1] and ids[0] != ids[1]


def test_wrong_calls(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="engine must be 'orbax' or None, got 'Orbax'"):
        save(tmp_path / "t", {}, engine="Orbax")  # type: ignore
    with pytest.raises(
        ValueError, match=r"gs://b/t is in an object store: say engine='orbax' \(in `fit`: "
    ):
        save("gs://b/t", {})
    with pytest.raises(ValueError, match="gs://b is in an object store"):
        Checkpoints("gs://b").save(1, {})
    for url in (
        "gs://b/a%41",
        "gs://b//a",
        "gs://b/../a",
        "gs://b",
        "foo://b/a",
        "GS://b/a",
        pathlib.Path("gs://b/a"),
    ):
        with pytest.raises(ValueError, match="a URL must be gs://bucket/name or s3://bucket/name"):
            save(url, {}, engine="orbax")
    with pytest.raises(CheckpointError, match="a ShapeDtypeStruct has no values"):
        save(tmp_path / "t", jax.ShapeDtypeStruct((), jnp.float32), engine="orbax")
    save(tmp_path / "t", {"a": np.ones(2)}, engine="orbax")
    with pytest.raises(
        ImportError, match=r"engine='orbax' needs Orbax: pip install 'jaxnet\[orbax\]'"
    ):
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        save(tmp_path / "t", {}, engine="orbax")
    with pytest.raises(
        ImportError, match=r"Orbax has written it, and is needed to read it: pip install"
    ):
        monkeypatch.setitem(sys.modules, "tensorstore", None)
        load(tmp_path / "t")
    with pytest.raises(
        ImportError, match=r"object stores need Orbax: pip install 'jaxnet\[orbax\]'"
    ):
        load("gs://b/t")


def test_without_etils_an_object_store_is_not_damaged(tmp_path, monkeypatch):
    """The size of the folder is the first question to the store that needs etils."""
    pytest.importorskip("tensorstore")
    save(tmp_path / "t", {"a": np.ones(2)}, engine="orbax")
    content = (tmp_path / "t").read_bytes()
    monkeypatch.setattr(places, "fetch", lambda url: content)
    monkeypatch.setitem(sys.modules, "etils", None)
    text = r"gs://b/t.orbax-.*: object stores need Orbax: pip install 'jaxnet\[orbax\]'"
    for read in (load, verify):
        with pytest.raises(ImportError, match=text):
            read("gs://b/t")


# --------------------------------------------------------------------------------------- durability


def test_the_new_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "t"
    for step in (1, 2):
        save(path, tree_of(step), engine="orbax")
        assert len(folders(tmp_path)) == 1 and load(path)["step"] == step
    shutil.copytree(
        tmp_path / folders(tmp_path)[0], tmp_path / "t.orbax-0123456789abcdef.orbax-checkpoint-tmp"
    )
    shutil.copytree(tmp_path / folders(tmp_path)[0], tmp_path / "t.orbax-of-somebody-else")
    # This save sweeps the leftovers of the killed one.
    save(path, tree_of(3), engine="orbax")
    assert len(folders(tmp_path)) == 2
    save(path, tree_of(4))
    assert folders(tmp_path) == ["t.orbax-of-somebody-else"] and load(path)["step"] == 4


def test_all_is_synced_before_the_new_takes_the_place_of_the_old(tmp_path, monkeypatch):
    """The manifest is renamed when all files are on the disk, so no power cut can leave a manifest
    without its arrays.
    """
    synced, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real_fsync(fd)

    def replace(source, target):
        if str(target) == str(tmp_path / "new" / "t"):
            (folder,) = (tmp_path / "new").glob("t.orbax-*")
            assert {str(p) for p in [folder, *folder.rglob("*"), tmp_path / "new"]} <= set(synced)
            assert max(map(synced.index, map(str, folder.rglob("*")))) < len(synced) - 1 - synced[
                ::-1
            ].index(str(tmp_path / "new"))
            synced.append("renamed")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path / "new" / "t", tree_of(1), engine="orbax")
    assert synced[-1] == str(tmp_path / "new") and "renamed" in synced


FULL = """
import os, resource, signal, sys
import numpy as np
from jaxnet.checkpoint import Checkpoints, save

limit, beside = int(sys.argv[2]), sys.argv[3] == "beside"
x = np.random.default_rng(0).random(100_000)
import orbax.checkpoint, tensorstore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if beside:
        with Checkpoints(sys.argv[1], asynchronous=True, engine="orbax") as store:
            store.save(2, {"x": x})
    else:
        save(f"{sys.argv[1]}/t", {"x": x}, engine="orbax")
except OSError as e:
    print("raised", type(e).__name__)
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("beside", ["foreground", "beside"])
def test_on_a_full_disk_saving_is_an_error_and_the_old_stays(beside, tmp_path):
    if beside == "beside":
        with Checkpoints(tmp_path, engine="orbax") as store:
            store.save(1, tree_of(1))
    else:
        save(tmp_path / "t", tree_of(1), engine="orbax")
    before = sorted(os.listdir(tmp_path))
    for limit in (0, 5000):
        done = subprocess.run(
            [sys.executable, "-c", FULL, tmp_path, str(limit), beside],
            capture_output=True,
            text=True,
            timeout=60,
            env=READS_CACHE,
        )
        assert done.stdout.startswith("raised"), done.stderr
        assert sorted(os.listdir(tmp_path)) == before
        tree = load(tmp_path / "t") if beside != "beside" else Checkpoints(tmp_path).load(1).tree
        assert_same(tree, tree_of(1))


KILLED = """
import os, signal, sys
import numpy as np
import orbax.checkpoint, tensorstore
from jaxnet.checkpoint import Checkpoints, save

CALLS = ("open", "write", "fchmod", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
CALLS += ("close",)
folder, modes = sys.argv[1], sys.argv[2].split(",")

def work(mode):
    if mode == "save":
        save(f"{folder}/save-{n}/t", {"x": np.arange(500) * 2, "step": 2}, engine="orbax")
    else:
        with Checkpoints(f"{folder}/store-{n}", keep=1, asynchronous=True, engine="orbax") as store:
            store.save(2, {"x": np.arange(500) * 2, "step": 2})

for mode in modes:
    n = 0
    while True:
        n += STRIDE
        os.mkdir(f"{folder}/{mode}-{n}")
        if (child := os.fork()) == 0:
            if mode == "save":
                save(f"{folder}/save-{n}/t", {"x": np.arange(500), "step": 1}, engine="orbax")
            else:
                store = Checkpoints(f"{folder}/store-{n}", engine="orbax")
                store.save(1, {"x": np.arange(500), "step": 1})
            left = [n]
            def dying(real):
                def call(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)
                return call
            for name in CALLS:
                setattr(os, name, dying(getattr(os, name)))
            work(mode)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """Kill at every fifth call by which Python changes the disk, including those of Orbax."""
    code = KILLED.replace("STRIDE", "5")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, "save,store"],
        capture_output=True,
        text=True,
        timeout=240,
        env=READS_CACHE,
    )
    assert done.returncode == 0, done.stderr
    steps, kills = set(), 0
    for root in tmp_path.iterdir():
        mode = root.name.split("-")[0]
        tree = load(root / "t") if mode == "save" else Checkpoints(root).latest().tree  # type: ignore
        np.testing.assert_array_equal(tree["x"], np.arange(500) * tree["step"])
        steps.add(tree["step"])
        kills += 1
        if mode == "save":
            save(root / "t", {"step": 3}, engine="orbax")
            assert sorted(os.listdir(root)) == ["t"]
        else:
            with Checkpoints(root, keep=1, engine="orbax") as store:
                store.save(3, {"step": 3})
            assert sorted(os.listdir(root)) == ["step_00000003.safetensors"]
    print(f"\n{kills} kills, none lost")
    assert steps == {1, 2} and kills > 10


WRITER = """
import sys, numpy as np
from jaxnet.checkpoint import save
save(sys.argv[1] + "/warm", {"x": 1}, engine="orbax")
print("ready", flush=True)
input()
for i in range(12):
    y = int(sys.argv[2])
    save(sys.argv[1] + "/t", {"x": np.full(50_000, y), "y": y}, engine="orbax")
"""


def test_of_two_processes_one_wins_and_nothing_is_lost(tmp_path):
    """Neither save sweeps the files that the other is writing."""
    command = [sys.executable, "-c", WRITER, tmp_path]
    writers = [subprocess.Popen([*command, str(i)], stdin=-1, stdout=-1, text=True) for i in (1, 2)]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    results = [writer.communicate(timeout=60) and writer.returncode for writer in writers]
    assert results == [0, 0]
    tree = load(tmp_path / "t")
    np.testing.assert_array_equal(tree["x"], np.full(50_000, tree["y"]))
    save(tmp_path / "t", {}, engine="orbax")
    assert sorted(os.listdir(tmp_path)) == ["t", "warm"]


# ------------------------------------------------------------------------------------------- damage


def damaged_folder(path, tree, count, seed):
    """Load after random damage to any file of the checkpoint. Return how many damages were noticed,
    and how many were harmless. Harmless is damage to bytes that only Orbax reads.
    """
    save(path, tree, engine="orbax")
    expected, rng = load(path), random.Random(seed)
    files = {
        p: p.read_bytes()
        for p in [path, *sorted(path.parent.glob(f"{path.name}.orbax-*/**/*"))]
        if p.is_file()
    }
    noticed = harmless = 0
    for _ in range(count):
        p = rng.choice([*files])
        bad, at = bytearray(files[p]), rng.randrange(len(files[p]))
        kind = rng.choice(["flip", "cut", "zero", "delete", "insert", "append", "missing"])
        if kind == "flip":
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del bad[at:]
        elif kind == "zero":
            bad[at : at + 64] = bytes(len(bad[at : at + 64]))
        elif kind == "delete":
            del bad[at]
        elif kind == "insert":
            bad.insert(at, rng.randrange(256))
        else:
            bad += rng.randbytes(8)
        if bad == files[p]:
            continue
        p.unlink() if kind == "missing" else p.write_bytes(bad)
        try:
            assert_same(load(path), expected)
            harmless += 1
        except CheckpointError:
            noticed += 1
        except FileNotFoundError:
            assert p == path and kind == "missing"
        p.write_bytes(files[p])
    assert_same(load(path), expected)
    return noticed, harmless


SMALL = {"x": X, "y": {"n": np.arange(500)}, "b": np.ones(3, np.int8)}


def test_no_damage_is_loaded(tmp_path):
    noticed, harmless = damaged_folder(tmp_path / "t", SMALL, 250, seed=1)
    assert noticed > 60 and harmless > 60


@pytest.mark.slow
def test_thousands_of_damages(tmp_path):
    noticed, harmless = damaged_folder(tmp_path / "t", SMALL, 5000, seed=2)
    print(f"\nOrbax's folder: {noticed} damages noticed, {harmless} harmless, 0 silent")


# So that no compression hides them.
BITS = np.random.default_rng(0).integers(0, 2**32, (64, 64), np.uint32)


def place_of_bits(folder):
    """The file that holds the bytes of BITS, and their position."""
    files = [p for p in folder.glob("t.orbax-*/**/*") if p.is_file()]
    return next((p, at) for p in files if (at := p.read_bytes().find(BITS.tobytes())) >= 0)


def test_the_bytes_of_arrays_are_checked(tmp_path):
    """Orbax itself would not notice: it has no checksum on them."""
    path = tmp_path / "t"
    save(path, SMALL | {"bits": BITS}, engine="orbax")
    p, at = place_of_bits(tmp_path)
    data = p.read_bytes()
    for i in range(at, at + BITS.nbytes, 499):
        p.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        for check in (load, verify):
            with pytest.raises(
                CheckpointError,
                match=r"leaf 'bits': its block \[64, 64\] at \[0, 0\] is not what was",
            ):
                check(path)
        # Nothing else of the file is read.
        assert_same(load(path, pattern="x"), {"x": X})


def test_a_folder_that_is_missing_or_of_another_save_is_named(tmp_path):
    path = tmp_path / "t"
    save(path, {"x": X}, engine="orbax")
    (folder,) = folders(tmp_path)
    os.rename(tmp_path / folder, tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError,
        match=f"its arrays in {tmp_path / folder} are missing: copy and rename it with",
    ):
        load(path)
    save(tmp_path / "u", {"x": X + 1}, engine="orbax")
    os.rename(next(tmp_path.glob("u.orbax-*")), tmp_path / folder)
    with pytest.raises(CheckpointError, match="leaf 'x': its block"):
        load(path)
    save(tmp_path / "v", {"x": X[:4]}, engine="orbax")
    shutil.rmtree(tmp_path / folder)
    os.rename(next(tmp_path.glob("v.orbax-*")), tmp_path / folder)
    with pytest.raises(
        CheckpointError, match=r"leaf 'x': it is float32\[4, 8\] in .*, expected float32\[8, 8\]"
    ):
        load(path)


GOOD = {
    "id": "0123456789abcdef",
    "tensors": [["w", "F32", [4, 2], [[0, 2], [0]], ["0" * 8, "1" * 8]]],
}


def with_tensor(*tensor):
    return GOOD | {"tensors": [list(tensor)]}


FORGED = {
    "nothing": None,
    "a path for an id": GOOD | {"id": "../../../etc/x"},
    "two tensors of one name": GOOD | {"tensors": GOOD["tensors"] * 2},
    "no tensors": {"id": GOOD["id"]},
    "an unknown dtype": with_tensor("w", "F33", [4, 2], [[0, 2], [0]], ["0" * 8, "1" * 8]),
    "half bytes": with_tensor("w", "F4", [4, 2], [[0, 2], [0]], ["0" * 8, "1" * 8]),
    "too few cuts": with_tensor("w", "F32", [4, 2], [[0, 2]], ["0" * 8, "1" * 8]),
    "cuts that do not rise": with_tensor("w", "F32", [4, 2], [[0, 2, 2], [0]], ["0" * 8] * 3),
    "not from the beginning": with_tensor("w", "F32", [4, 2], [[1, 2], [0]], ["0" * 8, "1" * 8]),
    "beyond the end": with_tensor("w", "F32", [4, 2], [[0, 4], [0]], ["0" * 8, "1" * 8]),
    "no cuts": with_tensor("w", "F32", [4, 2], [[], [0]], []),
    "a cut of no number": with_tensor("w", "F32", [4, 2], [[0, "2"], [0]], ["0" * 8, "1" * 8]),
    "a CRC too few": with_tensor("w", "F32", [4, 2], [[0, 2], [0]], ["0" * 8]),
    "a CRC that is none": with_tensor("w", "F32", [4, 2], [[0, 2], [0]], ["0" * 8, "x" * 8]),
    "another tensor than in the tree": with_tensor(
        "v", "F32", [4, 2], [[0, 2], [0]], ["0" * 8, "1" * 8]
    ),
    "more than there is": with_tensor("w", "F32", [1 << 40], [[0]], ["0" * 8 * (1 << 16)]),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_manifests_are_refused(name, tmp_path):
    manifest = {
        "version": 3,
        "metadata": {},
        "tree": ["dict", [["w", ["jax", "float32"]]]],
        "crc32": [],
    }
    (tmp_path / "x").write_bytes(write_header("x", [], manifest | {"orbax": GOOD}))
    assert inspect(tmp_path / "x").leaves[0].shape == (4, 2)
    (tmp_path / "x").write_bytes(write_header("x", [], manifest | {"orbax": FORGED[name]}))
    for check in (load, verify):
        with pytest.raises(CheckpointError):
            check(tmp_path / "x")


# ---------------------------------------------------------------------------------------- the store


@pytest.mark.parametrize("beside", [False, True], ids=["foreground", "asynchronous"])
def test_a_store_of_steps(beside, tmp_path):
    with Checkpoints(
        tmp_path, keep=2, best_rule="min loss", asynchronous=beside, engine="orbax"
    ) as store:
        for step in range(1, 6):
            store.save(step, tree_of(step), {"loss": abs(step - 2)})
        assert store.steps() == [2, 4, 5]
    # The folders were deleted with their steps.
    assert len(folders(tmp_path)) == 3
    found = store.latest(like=tree_of(0))
    assert found and found.step == 5 and found.metrics == {"loss": 3}
    assert_same(found.tree, dict(sorted(tree_of(5).items())))
    assert found.tree["x"].sharding == sharding(4, "x")
    shutil.rmtree(next(tmp_path.glob("step_00000005*.orbax-*")))
    with pytest.warns(UserWarning, match="step 4 is loaded, since others cannot be read"):
        found = store.latest()
    assert found and found.step == 4


def test_a_copy_is_saved_beside_the_training(tmp_path):
    """Arrays that are changed or donated after `save` has returned are saved as they were then."""
    x, n = jax.device_put(jnp.asarray(X), sharding(4, "x")), np.ones(1_000_000)
    with Checkpoints(tmp_path, asynchronous=True, engine="orbax") as store:
        store.save(1, {"x": x, "n": n, "one": (one := jnp.arange(1e6))})
        n[:] = 2
        jax.jit(lambda x, one: (x * 0, one * 0), donate_argnums=(0, 1))(x, one)
    found = store.load(1).tree
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_array_equal(found["n"], np.ones(1_000_000))
    np.testing.assert_array_equal(found["one"], np.arange(1e6, dtype=np.float32))


def test_a_program_that_ends_waits_and_does_not_hang(tmp_path):
    """Orbax alone would be cut off here, because Python closes thread pools before it waits for
    threads.
    """
    code = """
import sys, numpy as np
from jaxnet.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1], asynchronous=True, engine="orbax")
store.save(3, {"x": np.random.default_rng(0).random(3_000_000)})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    np.testing.assert_array_equal(
        Checkpoints(tmp_path).load(3).tree["x"], np.random.default_rng(0).random(3_000_000)
    )


def test_what_went_wrong_beside_is_raised_by_the_next_call(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, asynchronous=True, engine="orbax")
    store.save(1, tree_of(1))
    store.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine, "_sync", full)
    store.save(2, tree_of(2))
    with pytest.raises(OSError, match="No space left"):
        store.save(3, tree_of(3))
    monkeypatch.undo()
    # Nothing is left of step 2.
    assert store.steps() == [1] and len(folders(tmp_path)) == 1
    store.save(3, tree_of(3))
    assert store.steps() == [1, 3]


def test_what_killed_saves_left_of_steps_is_swept(tmp_path):
    for name in (
        "step_00000003.safetensors",
        "step_00000004.safetensors",
        "step_00000009.safetensors",
        "x",
    ):
        (tmp_path / f"{name}.orbax-0123456789abcdef").mkdir()
    # What each save leaves until its end; without it somebody may have renamed a file.
    for step in (4, 9):
        (tmp_path / f"step_0000000{step}.safetensors.lock-0123456789abcdef").write_bytes(b"")
    (tmp_path / "step_00000004.safetensors.part-0123456789abcdef-00000").write_bytes(b"")
    store = Checkpoints(tmp_path, engine="orbax")
    store.save(5, tree_of(5))
    left = [name for name in os.listdir(tmp_path) if "step_00000005" not in name]
    names = (
        "step_00000003.safetensors.orbax",
        "step_00000009.safetensors.lock",
        "step_00000009.safetensors.orbax",
        "x.orbax",
    )
    assert sorted(left) == [f"{name}-0123456789abcdef" for name in names]


# ------------------------------------------------------------------------------------ object stores

STORED = """
import os, sys, warnings
import jax, jax.numpy as jnp, numpy as np, optax
from jaxnet import dense
from jaxnet.checkpoint import CheckpointError, Checkpoints, inspect, lazy, load, save, verify
from jaxnet.cli import main
from jaxnet.train import fit, TrainState, train_step

path = "gs://pods/some/run/x.safetensors"
tree = {"a": np.arange(500), "b": jnp.ones((3, 2)), "step": 1}
try:
    load(path)
except FileNotFoundError as e:
    print(">", "missing:", path in str(e))
for step in (1, 2):
    save(path, tree | {"step": step}, metadata={"n": step}, engine="orbax")
got = load(path, like=tree)
same = np.array_equal(got["a"], tree["a"])
print(">", got["step"], same, inspect(path).metadata, verify(path).version)
with lazy(path) as leaves:
    print(">", leaves["b"].sum())
print(">", main(["verify", path]), main(["inspect", path]))

from etils import epath
print(">", sorted(p.name.split("-")[0] for p in epath.Path("gs://pods/some/run").iterdir()))

with Checkpoints("gs://pods/steps", keep=2, asynchronous=True, engine="orbax") as store:
    print(">", store.steps())
    for step in (1, 2, 3):
        store.save(step, tree | {"step": step})
    print(">", store.steps(), store.latest().tree["step"])
epath.Path(store.latest().path).write_bytes(b"damaged")
with warnings.catch_warnings(action="ignore"):
    print(">", Checkpoints("gs://pods/steps", engine="orbax").latest().step)

net = dense(1)
x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
loss = lambda params, batch: jnp.mean((net.apply(params, batch) - 1) ** 2)
step = train_step(loss, optax.sgd(0.1))
for epochs in (2, 4):
    start = TrainState.create(net.init(jax.random.key(0), x), optax.sgd(0.1), jax.random.key(1))
    with Checkpoints("gs://pods/fit", engine="orbax") as store:
        run = fit(step, start, x, batch_size=4, epochs=epochs, checkpoint=store, progress=False)
        print(">", int(run.train_state.step), len(run.history))
"""


EMULATOR = """
import sys
from gcp_storage_emulator.handlers import objects
real = objects.download
# With what it lacks, and TensorStore needs.
def download(request, response, storage, *args, **kwargs):
    try:
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
    except objects.NotFound:
        pass
    real(request, response, storage, *args, **kwargs)
objects.download = download
from gcp_storage_emulator.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def object_store():
    """The environment in which gs://pods/ is a store on this machine."""
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--in-memory",
        "--default-bucket",
        "pods",
    ]
    command = [sys.executable, "-c", EMULATOR, *flags]
    emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        url = f"http://127.0.0.1:{port}"
        yield {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": "127.0.0.1:1",
        }
    finally:
        emulator.kill()
        emulator.wait()


def test_an_object_store(object_store):
    environment = os.environ | object_store
    done = subprocess.run(
        [sys.executable, "-c", STORED], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("> ")]
    assert lines == [
        "missing: True",
        "2 True {'n': 2} 3",
        "6.0",
        "0 0",
        "['x.safetensors', 'x.safetensors.orbax']",
        "[]",
        # These are the steps of the store.
        "[2, 3] 3",
        # This is the step that is found if the newest is damaged.
        "2",
        # The steps and records are those of a run, and of another that goes on from it.
        "4 2",
        "8 4",
    ]
