"""What it costs to save a tree until it is safe on the disk, and to load it: beside other formats
and the disk alone.

    python benchmarks/checkpoints.py      (three sizes; the peak memory of the largest)
    python benchmarks/checkpoints.py --megabytes 1000 --folder /some/disk

Wall-clock time on all cores, since waiting for a disk takes no CPU seconds. jaxnet's `save` returns
when a power cut would lose nothing. The others are measured as their documentation shows them, and
again with what they leave to the caller ("durable": a temporary name, fsync, rename, fsync of the
folder). Each file is loaded and compared with the tree before anything is timed, and is in the page
cache when it is read.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from measure import Row, Table
from startup import child

# pyright: reportMissingImports=false

DISK = "the disk alone"
RETURNS, WRITTEN = (
    "jaxnet, asynchronous: until save returns",
    "jaxnet, asynchronous: until it is on the disk",
)
BY_ORBAX = "jaxnet, engine='orbax'"
PEAK = "peak / tree"
# With it, glibc gives back freed memory, so that peaks can be compared.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}


class Format(NamedTuple):
    """How a library does it: save(path, tree), and load(path, tree of shapes) -> tree."""

    save: Callable[[str, Any], Any]
    load: Callable[[str, Any], Any]


def main(argv=None):
    options = measure.arguments(__doc__, rounds=15, seconds=60, add=add_flags, argv=argv)
    trees = {
        "70 KB in 9 leaves": (9, 1_950),
        f"{options.leaves:,} leaves of 2 KB": (options.leaves, 512),
        f"{options.megabytes:,} MB in 8 leaves": (8, options.megabytes * 31_250),
    }
    tables = []
    for title, (leaves, size) in trees.items():
        with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.folder) as folder:
            tree = make_tree(leaves, size)
            durable = [
                f"{name}, durable" for name in FORMATS if name not in (DISK, "jaxnet", BY_ORBAX)
            ]
            saves = {name: sample(save_work, name, tree, folder) for name in [*FORMATS, *durable]}
            saves |= {
                name: sample(asynchronous_work, name, tree, folder) for name in (RETURNS, WRITTEN)
            }
            loads = {name: sample(load_work, name, tree, folder) for name in FORMATS}
            for what, samples in {"save": saves, "load": loads}.items():
                rows = [
                    Row(name) for name in samples if name == DISK or measure.wanted(name, options)
                ]
                measure.interleave(rows, samples, reference=DISK, options=options)
                if title == list(trees)[-1]:
                    for row in rows:
                        if row.name in FORMATS and row.name != DISK and not row.problem:
                            call = (
                                f"print_peak({what!r}, {row.name!r}, {leaves}, {size}, {folder!r})"
                            )
                            row.others[PEAK] = [
                                float(child(f"import checkpoints; checkpoints.{call}", **ALLOCATOR))
                            ]
                tables.append(Table(f"{what.capitalize()} {title}", what, "ms", DISK, rows))
    measure.publish(options, *tables)


def add_flags(parser):
    parser.set_defaults(wall=True, cores=0)
    parser.add_argument(
        "--leaves", type=int, default=2000, help="of the tree of many leaves (default: %(default)s)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=200, help="of the large tree (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", default=".", help="on the disk to be measured (default: the current folder)"
    )


def make_tree(leaves: int, size: int) -> dict[str, Any]:
    """Arrays of `size` float32s, in dicts of ten."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.random(size, np.float32)).block_until_ready() for _ in range(leaves)]
    return {
        f"layer_{i}": {f"leaf_{j}": x for j, x in enumerate(arrays[i : i + 10])}
        for i in range(0, leaves, 10)
    }


# What is timed. Each function prepares outside the clock; it returns what is called inside, and
# what after it.


def save_work(name: str, tree: Any, folder: str):
    plain, path = name.removesuffix(", durable"), file_of(name, folder)
    save, load = FORMATS[plain]()
    save = save if name == plain else functools.partial(save_durably, save)
    save(path, tree)
    check(load(path, shapes(tree)), tree)
    return lambda: save(path, tree), lambda: None


def load_work(name: str, tree: Any, folder: str):
    path, (save, load) = file_of(name, folder), FORMATS[name]()
    save(path, tree)
    check(load(path, shapes(tree)), tree)
    return lambda: jax.block_until_ready(load(path, shapes(tree))), lambda: None


def asynchronous_work(name: str, tree: Any, folder: str):
    from jaxnet.checkpoint import Checkpoints

    store, step = Checkpoints(file_of(name, folder), keep=1, asynchronous=True), 0

    def save():
        nonlocal step
        store.save(step := step + 1, tree)
        if name == WRITTEN:
            store.wait()

    save()
    if found := store.latest(like=tree):
        check(found.tree, tree)
    return save, store.wait


def sample(prepare: Callable, *arguments: Any) -> Callable[[], float]:
    """() -> seconds a call of the work that `prepare` makes when this is called for the first
    time.
    """
    work = functools.cache(lambda: prepare(*arguments))

    def seconds() -> float:
        run, after = work()
        total, calls = 0.0, 0
        while total < measure.SAMPLE_SECONDS and calls < 20:
            start = time.perf_counter()
            run()
            total, calls = total + time.perf_counter() - start, calls + 1
            after()
        return total / calls

    return seconds


def file_of(name: str, folder: str) -> str:
    return os.path.join(folder, re.sub(r"\W+", "_", name))


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check(result: Any, tree: Any) -> None:
    """Raise ValueError unless all leaves are those that were saved, bit for bit."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(tree), strict=True)
    if wrong := sum(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs):
        raise ValueError(f"{wrong} leaves are not those that were saved")


def save_durably(save: Callable, path: str, tree: Any) -> None:
    """Save under another name, wait for the disk, and put the file or folder in the old one's
    place.
    """
    new, old = f"{path}.new", f"{path}.old"
    save(new, tree)
    sync(
        new,
        *(
            os.path.join(root, name)
            for root, folders, files in os.walk(new)
            for name in [*folders, *files]
        ),
    )
    if os.path.isdir(path):
        os.replace(path, old)
    os.replace(new, path)
    sync(os.path.dirname(path))
    shutil.rmtree(old, ignore_errors=True)


def sync(*paths: str) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def print_peak(what: str, name: str, leaves: int, size: int, folder: str) -> None:
    """In the child: print the most memory that a tree and its saving, or loading, take, in sizes of
    the tree.
    """
    save, load = FORMATS[name]()
    path, small = file_of(f"{name} small", folder), make_tree(2, 1000)
    save(path, small)
    load(path, shapes(small))
    tree = make_tree(leaves, size if what == "save" else 1)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size,), x.dtype, sharding=x.sharding), tree)
    # The peak begins again, at the memory in use now.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    result = (
        save(file_of(name, folder), tree) if what == "save" else load(file_of(name, folder), like)
    )
    jax.block_until_ready(result)
    print((what == "save") + (memory("VmHWM") - before) / (4 * leaves * size))


def memory(what: str) -> int:
    """Bytes, as Linux counts them for this process."""
    return 1024 * int(
        re.findall(rf"{what}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[0]
    )


# The formats: each function imports what it needs.


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path, for those that know no trees."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


def unflat(arrays: Any, like: Any) -> Any:
    return jax.tree.unflatten(
        jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in flat(like)]
    )


def jaxnet():
    from jaxnet.checkpoint import load, save

    return Format(save, lambda path, like: load(path, like=like))


def jaxnet_by_orbax():
    from jaxnet.checkpoint import load, save

    return Format(functools.partial(save, engine="orbax"), lambda path, like: load(path, like=like))


def disk():
    """The same bytes in one piece; what is put together in the first call is outside the clock."""
    pieces = []

    def write(path, tree):
        if not pieces:
            pieces.append(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree)))
        data = memoryview(pieces[0])
        with open(path, "wb", buffering=0) as file:
            while data:
                data = data[file.write(data) :]

    def read(path, like):
        return np.split(
            np.frombuffer(pathlib.Path(path).read_bytes(), np.float32), len(jax.tree.leaves(like))
        )

    return Format(functools.partial(save_durably, write), read)


def safetensors():
    from safetensors.flax import load_file, save_file

    return Format(
        lambda path, tree: save_file(flat(tree), path),
        lambda path, like: unflat(load_file(path), like),
    )


def npz():
    def save(path, tree):
        with open(path, "wb") as file:  # given a name, np.savez would add .npz to it
            np.savez(file, **flat(tree))

    return Format(save, lambda path, like: unflat(np.load(path), like))


def torch():
    import torch

    def save(path, tree):
        torch.save({name: torch.from_dlpack(x) for name, x in flat(tree).items()}, path)

    def load(path, like):
        tensors = torch.load(path, weights_only=True)
        return jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in flat(like)])

    return Format(save, lambda path, like: load(path, like=like))


def equinox():
    import equinox as eqx

    def save(path, tree):
        with open(path, "wb") as file:  # given a name, it would add .eqx to it
            eqx.tree_serialise_leaves(file, tree)

    def load(path, like):
        with open(path, "rb") as file:
            return eqx.tree_deserialise_leaves(file, like)

    return Format(save, lambda path, like: load(path, like=like))


def flax():
    from flax import serialization

    def save(path, tree):
        pathlib.Path(path).write_bytes(serialization.to_bytes(tree))

    return Format(
        save, lambda path, like: serialization.from_bytes(like, pathlib.Path(path).read_bytes())
    )


def orbax():
    import orbax.checkpoint as ocp

    def save(path, tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(os.path.abspath(path), tree, force=True)

    def load(path, like):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(os.path.abspath(path), like)

    return Format(save, lambda path, like: load(path, like=like))


FORMATS = {
    DISK: disk,
    "jaxnet": jaxnet,
    BY_ORBAX: jaxnet_by_orbax,
    "safetensors": safetensors,
    "npz": npz,
    "PyTorch": torch,
    "Equinox": equinox,
    "Flax msgpack": flax,
    "Orbax": orbax,
}

if __name__ == "__main__":
    main()
