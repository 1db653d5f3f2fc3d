"""Hostile files: small files that need large memory, headers with a right digest, names that
control a terminal. The limits are those that docs/reliability.md promises: one second of CPU time
and 100 MB.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from forgeries import forge_file
from test_checkpoint import forge

from jaxnet.checkpoint import (
    CheckpointError,
    Checkpoints,
    engines,
    inspect,
    lazy,
    load,
    manifests,
    save,
    verify,
)
from jaxnet.checkpoint import format as fmt
from jaxnet.checkpoint.grids import Grid
from jaxnet.checkpoint.tensors import Tensor, crcs, layout
from jaxnet.checkpoint.words import printable

GOLDEN = pathlib.Path(__file__).parent / "golden"
NUMBER = "0123456789abcdef"


def read_lazily(path):
    with lazy(path) as leaves:
        dict(leaves)


READERS = (inspect, load, verify, read_lazily)


def file_of(path, entry, content, tree=("dict", [["w", ["jax", "float32"]]])):
    """A file of version 2 or 3 with this entry about tensors outside the file."""
    version = {"parts": 2, "orbax": 3}[entry]
    manifest = {
        "version": version,
        "metadata": {},
        "tree": tree,
        "crc32": [],
        entry: {"id": NUMBER} | content,
    }
    path.write_bytes(fmt.write_header("", [], manifest))


# -------------------------------------------------------------------- small files that ask for much


def zarr_bomb(path, shape, chunks, *, data=None, compressor=None, cuts=None):
    """A file of version 3 and a folder of a few hundred bytes, whose array of this shape stores
    nothing, or `data`.
    """
    import tensorstore

    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}.orbax-{NUMBER}/"}}
    about = {
        "chunks": chunks,
        "compressor": compressor,
        "dtype": "<f4",
        "fill_value": 0,
        "filters": None,
    }
    about |= {"order": "C", "shape": shape, "zarr_format": 2}
    tensorstore.KvStore.open(base).result().write("w/.zarray", json.dumps(about).encode()).result()
    if data is not None:
        array = tensorstore.open(
            {"driver": "zarr", "kvstore": base | {"path": "w/"}}, open=True
        ).result()
        array[...].write(data).result()
    whole = Tensor("w", "F32", tuple(shape), 0, 4 * int(np.prod(shape)))
    blocks = Grid(
        cuts or [[0] for _ in shape], ["0"] * int(np.prod([len(cut) for cut in cuts or [[0]]]))
    ).blocks(whole)
    crcs = ["0" * 8 * block.chunks for _, block, _ in blocks]
    file_of(path, "orbax", {"tensors": [["w", "F32", shape, cuts or [[0] for _ in shape], crcs]]})


# These 128 MB are compressed to a few hundred bytes.
ZEROS = np.zeros(1 << 25, np.float32)
ZARR = {
    "2^40 elements, none of them stored": ([1 << 40], [1 << 40], {}),
    "2^30 elements, none of them stored": ([1 << 30], [1 << 30], {}),
    "2^30 elements in many chunks, none of them stored": ([1 << 30], [1 << 20], {}),
    "compressed": ([1 << 25], [1 << 25], {"data": ZEROS, "compressor": {"id": "zstd", "level": 1}}),
    "many small blocks of one chunk": (
        [1 << 16],
        [1 << 16],
        {"data": ZEROS[: 1 << 16], "cuts": [list(range(1 << 16))]},
    ),
}
MEASURE = """
import resource, sys, time
from test_checkpoint_hostile import READERS, CheckpointError
import jax, tensorstore

jax.device_put(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read in READERS[1:]:
        start = time.process_time()
        try:
            read(path)
        except CheckpointError as e:
            assert "its arrays need" in str(e) or "no compressor" in str(e), str(e)
        else:
            raise AssertionError(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(time.process_time() - start, grown / 1024, path)
"""


@pytest.mark.parametrize(
    "names", [list(ZARR)[:1], pytest.param(list(ZARR), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_folders_of_orbax_that_announce_more_than_they_have(names, tmp_path):
    """Load in a separate process: Python does not count the memory of TensorStore, and bad_alloc
    would end this process.
    """
    pytest.importorskip("orbax")
    for i, (shape, chunks, options) in enumerate(ZARR[name] for name in names):
        zarr_bomb(tmp_path / str(i), shape, chunks, **options)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2_000_000
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(GOLDEN.parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / str(i)) for i in range(len(names)))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    costs = [line.split() for line in done.stdout.splitlines()]
    assert len(costs) == 3 * len(names) and all(
        float(seconds) < 5 and float(size) < 100 for seconds, size, _ in costs
    )


def test_a_chunk_that_is_missing_is_damage_and_not_zeros(tmp_path):
    """The folder is large enough here, because another array fills it."""
    pytest.importorskip("orbax")
    shape = [1 << 10]
    zarr_bomb(tmp_path / "x", shape, shape)
    (tmp_path / f"x.orbax-{NUMBER}" / "filling").write_bytes(bytes(1 << 16))
    for read in READERS[1:]:
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tmp_path / "x")


def nested_keys(levels, size, leaves):
    """Nested dicts with long keys and many scalars at the bottom: their paths are much longer than
    the file.
    """
    node = ["list", [["bool", True]] * leaves]
    for _ in range(levels):
        node = ["dict", [["k" * size, node]]]
    return node


SMALL = {
    "pieces on a diagonal of 8 axes": lambda path: diagonal(path, 8, 24),
    "pieces on a diagonal of 64 axes": lambda path: diagonal(path, 64, 2),
    "paths of 98 long keys": lambda path: path.write_bytes(forge(nested_keys(98, 2000, 8000))),
    "paths of one long key": lambda path: path.write_bytes(forge(nested_keys(1, 100_000, 40_000))),
    "more chunks than can be counted": lambda path: uncountable(path),
    "a size of 2^62 without elements": lambda path: file_of(
        path, "orbax", {"tensors": [["w", "F32", [2**62, 0], [[0], [0]], ["0" * 8]]]}
    ),
}


def diagonal(path, axes, count):
    """A file of version 2 with `count` pieces of one byte, (0, 0, ...), (1, 1, ...), ...: a grid of
    count^axes cells.
    """
    pieces = [[",".join([str(i)] * axes), ["numpy", "uint8"]] for i in range(count)]
    placed = layout([(f"w/{start}", "U8", (1,) * axes) for start, _ in pieces])
    sums = [crcs(t, bytes(1)) for t in placed]
    part = {
        "version": 1,
        "metadata": {},
        "tree": ["dict", [["w", ["dict", pieces]]]],
        "crc32": sums,
    }
    data = fmt.write_header("", placed, part) + bytes(count)
    path.with_name(f"{path.name}.part-{NUMBER}-00000").write_bytes(data)
    shape = [count] * axes
    files = [[data[42:106].decode(), 1 << 62]]
    tree = ["dict", [["w", ["numpy", "uint8"]]]]
    file_of(path, "parts", {"files": files, "tensors": [["w", "U8", shape]]}, tree)


def uncountable(path):
    tensors = [["w", "F32", [1 << 56], [[0]], ["0" * 8]]]
    file_of(path, "orbax", {"tensors": tensors})


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SMALL)
def test_small_files_that_ask_for_much_are_refused(name, tmp_path):
    path = tmp_path / "x"
    SMALL[name](path)
    for read in READERS if "2^62" not in name else READERS[1:]:
        start = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            if read is inspect and "diagonal" in name:
                # In the header alone, nothing is wrong.
                verify(path)
            read(path)
        assert time.process_time() - start < 5
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            (verify if read is inspect else read)(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6 and len(str(caught.value)) < 100_000


def test_a_tree_whose_paths_could_not_be_read_is_not_saved(tmp_path):
    tree = [None] * 4000
    for _ in range(90):
        tree = {"k" * 500: tree}
    with pytest.raises(
        CheckpointError,
        match="paths of its leaves together have .* shorten the keys of nested dicts",
    ):
        save(tmp_path / "x", {"a": 1, "b": jax_free(tree)})
    assert os.listdir(tmp_path) == []


def jax_free(tree):
    """The same tree with numbers in place of None, which is not a leaf."""
    ((key, below),) = tree.items()
    return {key: jax_free(below) if isinstance(below, dict) else [1] * len(below)}


# ---------------------------------------------------------------------- headers with a right digest


def forged(tmp_path, version, count):
    """Read `count` forgeries of the golden files of a version.

    Return how many were refused, and how many were not.
    """
    if version == 3:
        pytest.importorskip("orbax")
    shutil.copytree(GOLDEN, folder := tmp_path / "golden")
    files = [path for path in sorted(folder.glob(f"v{version}_*")) if path.is_file()]
    refused, loaded, slowest = 0, 0, 0.0
    for i, path in enumerate(files):
        main = path.with_name(path.name.partition(".part-")[0])
        for _ in forge_file(path, -(-count // len(files)), seed=i):
            start = time.process_time()
            for read in READERS:
                try:
                    read(main)
                except CheckpointError as e:
                    refused += read is load
                    assert printable(str(e), "\n") == str(e) and len(str(e)) < 100_000
                else:
                    loaded += read is load
            slowest = max(slowest, time.process_time() - start)
    print(
        f"\nversion {version}: {refused} forged headers refused, {loaded} loaded, at most "
        f"{slowest:.2f} s"
    )
    assert refused + loaded >= count and refused > 0.8 * count and slowest < 5


@pytest.mark.parametrize("version", [1, 2, 3])
def test_forged_headers_raise_nothing_but_checkpoint_errors(version, tmp_path):
    forged(tmp_path, version, 150)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3])
def test_six_thousand_forged_headers(version, tmp_path):
    forged(tmp_path, version, 6000)


# ------------------------------------------------------------------------------- what an error says

EVIL = "\x1b[31m\a\r\n  forged line\x9b2J\u202e\u2066\x7f"


@pytest.mark.parametrize(
    "where",
    ["names", "template", "rename", "only", "path", "lazy", "version", "kind of keys", "dtype"],
)
def test_errors_are_printable_and_names_stay_on_their_line(where, tmp_path):
    path = tmp_path / ("x" + EVIL.replace("/", "") if where == "path" else "x")
    save(path, {EVIL: np.ones(3), "b": 1})
    calls = {
        "names": lambda: load(path, like={"b": 1}),
        "template": lambda: load(path, like={EVIL: np.ones(4), "b": 1, "c" + EVIL: 1}),
        "rename": lambda: load(path, rename={EVIL: "b"}),
        "only": lambda: load(path, pattern="a" + EVIL),
        "path": lambda: load(path, pattern="a"),
        "lazy": lambda: load_one(path, "a" + EVIL),
        "version": lambda: load(path),
        "kind of keys": lambda: load(path),
        "dtype": lambda: load(path),
    }
    if where == "version":
        path.write_bytes(forge(["none", None], version=EVIL))
    elif where == "kind of keys":
        path.write_bytes(forge(["dict", [["a", ["key", EVIL]]]], [("a", "U32", (0, 2))]))
    elif where == "dtype":
        path.write_bytes(forge(["dict", [["a", ["jax", EVIL]]]], [("a", "U32", (0, 2))]))
    with pytest.raises((CheckpointError, KeyError)) as caught:
        calls[where]()
    text = str(caught.value)
    assert printable(text, "\n") == text and "\n  forged line" not in text and r"\x1b[31m" in text


def load_one(path, name):
    with lazy(path) as leaves:
        return leaves[name]


def test_errors_do_not_grow_with_the_file(tmp_path):
    """The trees differ in 20,000 leaves, and one name has a million characters."""
    save(tmp_path / "x", {f"leaf {i}": 1 for i in range(20_000)} | {"a" * 1_000_000: 2})
    with pytest.raises(
        CheckpointError, match=r"not in the template: leaf 7 int[\s\S]*more lines"
    ) as caught:
        load(tmp_path / "x", like={"b": 1})
    assert len(str(caught.value)) < 60_000 and len(repr(caught.value)) < 70_000


@pytest.mark.parametrize(
    "metadata",
    [
        {"x": float("inf")},
        {"x": [float("-inf")]},
        {"x": float("nan")},
        {"x": (1,)},
        {1: 2},
        [1],
        {"x": 10**5000},
    ],
)
def test_metadata_that_json_cannot_hold_is_refused_at_the_call(metadata, tmp_path):
    with pytest.raises(CheckpointError, match="metadata must be a dict of str keys"):
        save(tmp_path / "x", {}, metadata=metadata)
    store = Checkpoints(tmp_path / "run", asynchronous=True)
    with pytest.raises(CheckpointError, match="metadata must be a dict of str keys"):
        store.save(1, {}, metadata={"y": metadata} if isinstance(metadata, dict) else {"y": {1: 2}})
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_too_long_is_refused_before_anything_is_written(tmp_path):
    for call in (
        lambda: save(tmp_path / ("x" * 300), {}),
        lambda: Checkpoints(tmp_path / ("x" * 300)).save(1, {}),
    ):
        with pytest.raises(OSError, match="too long"):
            call()
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------ a process without threads

WITHOUT_THREADS = """
import atexit, sys, threading
import numpy as np
from jaxnet.checkpoint import load, verify

def read():
    for path in sys.argv[1:]:
        assert load(path)["x"][-1] == 2**20 - 1 and verify(path)
    print("read", flush=True)

def no_more(self):
    raise RuntimeError("can't start new thread")

# At that time, no thread can be started.
threading._register_atexit(read)
if sys.version_info:
    load(sys.argv[1])
    real, threading.Thread.start = threading.Thread.start, no_more
    read()
    threading.Thread.start = real
"""


def test_large_files_are_read_where_no_thread_can_start(tmp_path):
    """No thread can be started while the interpreter ends, and at the system's limit of threads."""
    save(tmp_path / "x", {"x": np.arange(2**20)})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS, tmp_path / "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "read\nread\n"), done.stderr


def test_a_store_saves_in_the_foreground_where_no_thread_can_start(tmp_path, monkeypatch):
    import threading

    def no_more(self):
        raise RuntimeError("can't start new thread")

    with Checkpoints(tmp_path, asynchronous=True) as store:
        monkeypatch.setattr(threading.Thread, "start", no_more)
        store.save(1, {"x": np.ones(3)})
        assert os.listdir(tmp_path) == ["step_00000001.safetensors"]
        monkeypatch.undo()


# ------------------------------------------------------------------------------ readers and writers

WRITER = """
import sys, time
import numpy as np
from jaxnet.checkpoint import save

stop = time.monotonic() + float(sys.argv[2])
i = 0
while time.monotonic() < stop or i < 3:
    tree = {"x": np.full(1000, i), "y": np.full((64, 64), i), "i": i}
    save(sys.argv[1], tree, engine=sys.argv[3] or None)
    i += 1
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("seconds", ["0.2", pytest.param("1.5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["", "orbax"])
def test_readers_beside_a_writer_get_one_save_or_the_next(engine, seconds, tmp_path):
    if engine:
        pytest.importorskip("orbax")
    path, reads = str(tmp_path / "x"), 0
    save(path, {"x": np.full(1000, 0), "y": np.full((64, 64), 0), "i": 0}, engine=engine or None)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path, seconds, engine], stderr=subprocess.PIPE, text=True
    ) as writer:
        while writer.poll() is None:
            tree = load(path)
            assert (np.asarray(tree["x"]) == tree["i"]).all() and (
                np.asarray(tree["y"]) == tree["i"]
            ).all()
            verify(path)
            reads += 1
        assert writer.returncode == 0, writer.communicate()[1]
    assert reads > 3


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """The test chooses the moment at which the file is replaced: after the manifest, before the
    arrays.
    """
    pytest.importorskip("orbax")
    orbax = engines.ENGINES[manifests.ORBAX]
    path, saves = tmp_path / "x", []
    save(path, {"x": np.zeros(3)}, engine="orbax")

    def late(*args):
        if len(saves) < 2:
            saves.append(1)
            save(path, {"x": np.full(3, len(saves))}, engine="orbax")
        return orbax.reader(*args)

    monkeypatch.setitem(engines.ENGINES, manifests.ORBAX, orbax._replace(reader=late))
    np.testing.assert_array_equal(load(path)["x"], np.full(3, 2))
    saves.clear()
    assert verify(path).leaves[0].shape == (3,) and len(saves) == 2
    saves.clear()
    with (
        lazy(path) as leaves,
        pytest.raises(CheckpointError, match="was replaced after it was opened, .* open it again"),
    ):
        leaves["x"]
