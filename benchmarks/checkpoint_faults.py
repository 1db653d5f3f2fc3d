"""What damage, kills and mistakes do to checkpoints of jaxnet and of others: faults injected, bad
outcomes counted.

    python benchmarks/checkpoint_faults.py                       all that is installed
    python benchmarks/checkpoint_faults.py --only jaxnet --damages 5000

Every system saves a tree of NumPy arrays (51 kB) as its documentation shows, over its last
checkpoint or beside it. The kills and the power cut need `strace` (Linux); without it, kills come
at random moments. Columns of the table:

  tensor, other   one bit flipped in the bytes of the arrays, or anywhere else
  page            4 KiB at a multiple of 4 KiB zeroed
  cut             a file truncated
                  Each: silent wrong loads / faults. 'silent': loading gave no error, and wrong
                  values or names.
  own, foreign    errors of the system's own type for a bad file, and any other errors, of all these
                  faults
  kill            SIGKILL at a system call that changes the disk, the same for each: LOST / kills
                  that landed in the save.
                  'LOST': afterwards neither the previous nor the new checkpoint can be loaded.
  power           after saving has returned, files written since their last fsync are emptied (POSIX
                  allows that): what loads, 'new', 'old' or LOST
  limit           the system refuses to write more (RLIMIT_FSIZE, half of the largest file): what
                  loads
  2 writers       two processes save at once: mixed / unloadable results of so many (fewer if one
                  dies or waits for ever)
  template        wrong templates refused, of 16; '-': there are none
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from measure import environment, wanted

# pyright: reportMissingImports=false

CALLS = "write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,rename,renameat,renameat2"
CALLS += ",unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,sync_file_range,ftruncate,fallocate"
CALLS += ",fchmod,link,linkat,symlink,symlinkat"
DAMAGES = ("tensor", "other", "page", "cut")
SECONDS = 120  # what lasts longer hangs


class System(NamedTuple):
    """One way to save. `save(path, tree, step)` goes over the last checkpoint at this path or, in a
    folder of steps, beside it.

    `load(path, like)` gives the newest tree; `errors` are what it raises by its own documentation
    for a bad file.
    """

    save: Callable[[str, Any, int], Any]
    load: Callable[[str, Any], Any]
    errors: tuple[type[Exception], ...] = ()
    templates: bool = True


def jaxnet_file(engine: Literal["orbax"] | None = None) -> System:
    from jaxnet.checkpoint import CheckpointError, load, save

    return System(
        lambda path, tree, step: save(path, tree, engine=engine),
        lambda path, like: load(path, like=like),
        (CheckpointError,),
    )


def jaxnet_store(asynchronous: bool = False) -> System:
    from jaxnet.checkpoint import CheckpointError, Checkpoints

    def save(path, tree, step):
        with Checkpoints(path, asynchronous=asynchronous) as store:
            store.save(step, tree)

    def load(path, like):
        with warnings.catch_warnings(action="ignore"):  # of what has been skipped
            found = Checkpoints(path).latest(like=like)
        if found is None:
            raise FileNotFoundError(path)
        return found.tree

    return System(save, load, (CheckpointError,))


def orbax_checkpointer() -> System:
    import orbax.checkpoint as ocp

    def save(path, tree, step):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree, force=True)
            checkpointer.wait_until_finished()

    def load(path, like):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, like)

    return System(save, load)


def orbax_manager() -> System:
    import orbax.checkpoint as ocp

    def save(path, tree, step):
        with ocp.CheckpointManager(path) as manager:
            manager.save(step, args=ocp.args.StandardSave(tree))
            manager.wait_until_finished()

    def load(path, like):
        with ocp.CheckpointManager(path) as manager:
            return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))

    return System(save, load)


def safetensors_numpy() -> System:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    def save(path, tree, step):
        save_file(flat(tree), path)

    return System(
        save, lambda path, like: nested(load_file(path)), (SafetensorError,), templates=False
    )


def numpy_npz() -> System:
    def save(path, tree, step):
        with open(path, "wb") as f:  # given a path, it would add '.npz'
            np.savez(f, **flat(tree))

    def load(path, like):
        with np.load(path) as arrays:
            return nested(dict(arrays))

    return System(save, load, templates=False)


def torch_save() -> System:
    import torch

    def save(path, tree, step):
        torch.save({name: torch.from_numpy(x) for name, x in flat(tree).items()}, path)

    def load(path, like):
        return nested({name: x.numpy() for name, x in torch.load(path, weights_only=True).items()})

    return System(save, load, templates=False)


def equinox_leaves() -> System:
    import equinox as eqx

    def save(path, tree, step):
        with open(path, "wb") as f:  # given a path without a suffix, it would add one
            eqx.tree_serialise_leaves(f, tree)

    def load(path, like):
        with open(path, "rb") as f:
            return eqx.tree_deserialise_leaves(f, like)

    return System(save, load)


def flax_msgpack() -> System:
    from flax import serialization

    def save(path, tree, step):
        with open(path, "wb") as f:
            f.write(serialization.to_bytes(tree))

    def load(path, like):
        with open(path, "rb") as f:
            return serialization.from_bytes(like, f.read())

    return System(save, load)


SYSTEMS: dict[str, Callable[[], System]] = {
    "jaxnet save": jaxnet_file,
    "jaxnet Checkpoints": jaxnet_store,
    "jaxnet Checkpoints, asynchronous": lambda: jaxnet_store(asynchronous=True),
    "jaxnet, engine='orbax'": lambda: jaxnet_file("orbax"),
    "orbax StandardCheckpointer(force)": orbax_checkpointer,
    "orbax CheckpointManager": orbax_manager,
    "safetensors save_file": safetensors_numpy,
    "numpy savez": numpy_npz,
    "torch.save": torch_save,
    "equinox tree_serialise_leaves": equinox_leaves,
    "flax msgpack": flax_msgpack,
}


# -------------------------------------------------------------------------------------------- trees


def tree_of(step: int) -> dict[str, Any]:
    """51 kB of random bits, which no compression makes smaller: so the bytes of the arrays stand in
    every file as they are.
    """
    rng = np.random.default_rng(step)
    kernels = {
        f"layer{i}": {"kernel": rng.integers(0, 2**32, (64, 64), np.uint32)} for i in range(3)
    }
    return kernels | {"count": rng.integers(0, 2**31, 400, np.int32)}


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    result = {}
    for key, x in tree.items():
        result |= flat(x, f"{path}{key}/") if isinstance(x, dict) else {path + key: np.asarray(x)}
    return result


def nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = x
    return tree


def same(tree: Any, expected: dict[str, Any]) -> bool:
    """Same names, types, shapes and bits."""
    got, wanted = flat(tree), flat(expected)
    return got.keys() == wanted.keys() and all(
        got[name].dtype == x.dtype
        and got[name].shape == x.shape
        and got[name].tobytes() == x.tobytes()
        for name, x in wanted.items()
    )


LIKE = {
    key: {"kernel": np.zeros_like(x["kernel"])} if isinstance(x, dict) else x * 0
    for key, x in tree_of(0).items()
}


def found(system: System, path: pathlib.Path) -> str:
    """Which tree is there: 'older', 'old' and 'new' (of steps 0, 1 and 2), 'mixed' or 'LOST'."""
    try:
        tree = system.load(str(path), LIKE)
    except Exception:
        return "LOST"
    return next(
        (name for step, name in enumerate(("older", "old", "new")) if same(tree, tree_of(step))),
        "mixed",
    )


# ------------------------------------------------------------------------------------------- damage


def damage(
    system: System, root: pathlib.Path, counts: dict[str, int], rng: random.Random
) -> dict[str, Any]:
    """Columns of the table: silent wrong loads of each kind, and how many errors were of which
    type.
    """
    path, tree = root / "ck", tree_of(1)
    system.save(str(path), tree, 1)
    files = {
        file: file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.stat().st_size
    }
    outcomes: collections.Counter = collections.Counter()
    for kind in DAMAGES:
        for _ in range(counts[kind]):
            file, bad = damaged(kind, files, tree, rng)
            file.write_bytes(bad)
            try:
                with alarm(SECONDS):
                    outcome = (
                        "harmless" if same(system.load(str(path), LIKE), tree) else f"silent {kind}"
                    )
            except Exception as e:
                outcome = "own" if isinstance(e, system.errors) else "foreign"
            outcomes[outcome] += 1
            for other in {*root.rglob("*")} - {*files}:  # what loading itself left there
                if other.is_file():
                    other.unlink()
            file.write_bytes(files[file])
    return {
        **{kind: f"{outcomes[f'silent {kind}']}/{counts[kind]}" for kind in DAMAGES},
        **{kind: str(outcomes[kind]) for kind in ("own", "foreign", "harmless")},
    }


def damaged(
    kind: str, files: dict[pathlib.Path, bytes], tree: Any, rng: random.Random
) -> tuple[pathlib.Path, bytes]:
    """A file, chosen by size, and its content with one fault."""
    for _ in range(10_000):
        file = rng.choices([*files], [len(content) for content in files.values()])[0]
        bad, at = bytearray(files[file]), rng.randrange(len(files[file]))
        if kind in ("tensor", "other"):
            if (kind == "tensor") != in_arrays(files[file], at, tree):
                continue
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == "page":
            at -= at % 4096
            bad[at : at + 4096] = bytes(len(bad[at : at + 4096]))
        else:
            del bad[at:]
        if bad != files[file]:
            return file, bytes(bad)
    raise ValueError(f"found no place for damage of kind '{kind}'")


def in_arrays(content: bytes, at: int, tree: Any) -> bool:
    """Whether a byte of a file is one of an array."""
    around = content[max(0, at - 8) : at + 8]
    return any(
        around[i : i + 8] in x.tobytes()
        for x in flat(tree).values()
        for i in range(len(around) - 7)
    )


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def expired(*_):
        raise TimeoutError(f"no answer in {seconds} s")

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# ----------------------------------------------------------------------------- kills and power cuts


def interrupted(name: str, system: System, root: pathlib.Path, kills: int) -> dict[str, Any]:
    """Columns of the table: what kills, a power cut after saving and a limit of the system
    leave.
    """
    system.save(str(root / "before"), tree_of(1), 1)
    size = max(file.stat().st_size for file in root.rglob("*") if file.is_file())
    # --seccomp-bpf is faster, but cannot inject a kill.
    trace = run(name, root, strace=["-e", "signal=none", "--seccomp-bpf"])
    columns = {"power": after_power_cut(system, root, trace) if trace else "-"}
    points = kill_points(trace) if trace else []
    chosen = [
        points[i * len(points) // min(kills, len(points))] for i in range(min(kills, len(points)))
    ]
    outcomes = []
    for call, n in chosen:
        run(name, root, strace=["-e", f"inject={call}:signal=SIGKILL:when={n}"])
        outcomes.append(found_after_kill(system, root))
    if not trace:
        for i in range(kills):
            run(name, root, kill_after=random.Random(i).uniform(0, 0.1))
            outcomes.append(found_after_kill(system, root))
    landed = [outcome for outcome in outcomes if outcome]
    columns["kill"] = f"{sum(outcome not in ('old', 'new') for outcome in landed)}/{len(landed)}"
    run(name, root, limit=size // 2)
    return columns | {"limit": found(system, root / "ck")}


def run(name, root, *, strace=None, kill_after=None, limit=0) -> list[str]:
    """Save step 2 in a process of its own, over a copy of step 1; returns the trace of its calls,
    if there is one.
    """
    for path in (root / "begin", root / "end", *root.glob("ck*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # Some systems write more than one file or folder, with names that begin alike.
    for path in root.glob("before*"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, root / path.name.replace("before", "ck"))
    command = [sys.executable, "-B", __file__, "--save", name, str(root), "--limit", str(limit)]
    if strace is not None and shutil.which("strace"):
        options = ["-f", "-qq", "-y", "-o", str(root / "trace"), "-e", f"trace={CALLS}"]
        command = ["strace", *options, *strace, *command]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    if kill_after is not None:
        while process.poll() is None and not (root / "begin").exists():
            time.sleep(0.001)
        time.sleep(kill_after)
        process.kill()
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:  # it hangs at its end: some do, after an error
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    trace = root / "trace"
    return trace.read_text(errors="replace").splitlines() if trace.exists() else []


def found_after_kill(system: System, root: pathlib.Path) -> str:
    """'' if the kill came before the save began or after it had ended."""
    if not (root / "begin").exists() or (root / "end").exists():
        return ""
    return found(system, root / "ck")


def calls_of(trace: list[str]) -> Iterator[tuple[str, str, str]]:
    """(thread, call, arguments and result), without the ends of calls that are shown in two
    parts.
    """
    for line in trace:
        if match := re.match(r"(\d+) +(\w+)\((.*)", line):
            yield match[1], match[2], match[3]


def kill_points(trace: list[str]) -> list[tuple[str, int]]:
    """(call, n) for each call between the two marks: strace counts the calls of one name in each
    thread.
    """
    counts: collections.Counter = collections.Counter()
    points, inside = {}, False
    for thread, call, rest in calls_of(trace):
        counts[thread, call] += 1
        inside = inside and '/end"' not in rest
        if inside:
            points[call, counts[thread, call]] = None
        inside = inside or '/begin"' in rest
    return list(points)


def after_power_cut(system: System, root: pathlib.Path, trace: list[str]) -> str:
    """What loads when all files that were written after their last fsync have become empty."""
    dirty: set[str] = set()
    for _, call, rest in calls_of(trace):
        descriptor, names = re.match(r"\d+<([^>]*)>", rest), re.findall(r'"([^"]*)"', rest)
        if call in ("fsync", "fdatasync") and descriptor:
            dirty.discard(descriptor[1])
        elif call.startswith("rename") and len(names) == 2:
            old, new = names
            moved = {path for path in dirty if path == old or path.startswith(f"{old}/")}
            dirty = {path for path in dirty - moved if path != new} | {
                new + path[len(old) :] for path in moved
            }
        elif re.search("write|copy|fallocate|ftruncate", call) and descriptor:
            dirty.add(descriptor[1])
    for path in map(pathlib.Path, dirty):
        if str(path).startswith(f"{root}/ck") and path.is_file():
            path.write_bytes(b"")
    return found(system, root / "ck")


# --------------------------------------------------------------------- two writers, wrong templates


def two_writers(name: str, system: System, root: pathlib.Path, count: int) -> dict[str, Any]:
    """Two processes save the trees of step 1 and 2 at once, each `count` times, to as many paths
    with an older one.
    """
    for i in range(count):
        (root / str(i)).mkdir()
        system.save(str(root / str(i) / "ck"), tree_of(0), 0)
    command = [sys.executable, __file__, "--write", name, str(root), str(count)]
    writers = [
        subprocess.Popen(
            [*command, str(step)], stdin=-1, stdout=-1, stderr=-3, text=True, bufsize=1
        )
        for step in (1, 2)
    ]
    rounds = -1  # the first line of a writer says that it is ready
    with contextlib.suppress(TimeoutError, BrokenPipeError), alarm(SECONDS):
        while rounds < count and all(
            writer.stdout and writer.stdout.readline() for writer in writers
        ):
            rounds += 1
            for writer in writers:
                print("go", file=writer.stdin, flush=True)
    for writer in writers:
        writer.kill()
        writer.communicate()
    rounds = max(rounds, 0)
    outcomes = collections.Counter(found(system, root / str(i) / "ck") for i in range(rounds))
    return {"2 writers": f"{outcomes['mixed']}/{outcomes['LOST']} of {rounds}"}


def write(system: System, root: str, count: int, step: int):
    tree = tree_of(step)
    for i in range(count):
        print("ready", flush=True)
        input()
        # It is not a fault if one of two writers gives up, or waits.
        with contextlib.suppress(Exception), alarm(5):
            system.save(f"{root}/{i}/ck", tree, step)
    print("done", flush=True)
    input()


class Pair(NamedTuple):
    a: Any
    b: Any


def wrong_templates() -> list[tuple[Any, Any]]:
    """(what is saved, a template that does not fit it)."""
    import jax.numpy as jnp

    x, n = jnp.arange(6.0).reshape(2, 3), jnp.arange(4, dtype=jnp.int32)
    return [
        ({"a": x}, {"a": jnp.zeros((3, 3))}),
        ({"a": x}, {"a": jnp.zeros((1, 3))}),
        ({"a": x}, {"a": x.T}),
        ({"a": x}, {"a": jnp.zeros(6)}),
        ({"a": x + 0.7}, {"a": x.astype(jnp.int32)}),
        ({"a": x + 70000}, {"a": x.astype(jnp.float16)}),
        ({"a": n + 16777217}, {"a": n.astype(jnp.float32)}),
        ({"a": x + 0.001}, {"a": x.astype(jnp.bfloat16)}),
        ({"a": x, "b": n}, {"a": x}),
        ({"a": x}, {"a": x, "b": n}),
        ({"a": x, "b": x + 1}, {"b": x, "c": x}),
        ({"a": [x, n]}, {"a": (x, n)}),
        ({"a": {"0": x}}, {"a": [x]}),
        ({"a": Pair(x, n)}, {"a": {"a": x, "b": n}}),
        ({"a": [x]}, {"a": [x, x]}),
        ({"a": x}, {"a": {"b": x}}),
    ]


def mismatches(system: System, root: pathlib.Path) -> dict[str, Any]:
    if not system.templates:
        return {"template": "-"}
    refused = 0
    for i, (tree, like) in enumerate(templates := wrong_templates()):
        system.save(str(root / f"ck{i}"), tree, 1)
        try:
            system.load(str(root / f"ck{i}"), like)
        except Exception:
            refused += 1
    return {"template": f"{refused}/{len(templates)}"}


# ------------------------------------------------------------------------------------------- tables


def row_of(name: str, options: argparse.Namespace) -> dict[str, str]:
    """All columns of one system, or the problem it had."""
    counts = {
        "tensor": options.damages,
        "other": options.damages,
        "page": options.pages,
        "cut": options.pages,
    }
    row = {"system": name, "problem": ""}
    with tempfile.TemporaryDirectory() as folder:
        roots = [
            pathlib.Path(folder).resolve() / part
            for part in ("damage", "kill", "writers", "templates")
        ]
        for root in roots:
            root.mkdir()
        try:
            system = SYSTEMS[name]()
            row |= damage(system, roots[0], counts, random.Random(0))
            row |= interrupted(name, system, roots[1], options.kills)
            row |= two_writers(name, system, roots[2], options.writers)
            row |= mismatches(system, roots[3])
        except ModuleNotFoundError as e:
            row["problem"] = f"skipped: {e.name} is not installed"
        except Exception as e:
            traceback.print_exc()
            row["problem"] = f"failed: {type(e).__name__}: {e}".splitlines()[0]
    return row


def format_rows(rows: list[dict[str, str]]) -> str:
    titles = list(dict.fromkeys(title for row in rows if not row["problem"] for title in row))
    titles = [title for title in titles if title not in ("system", "problem")]
    wide = max(len(row["system"]) for row in rows)
    widths = [
        max([len(title), *(len(row[title]) for row in rows if not row["problem"])])
        for title in titles
    ]
    lines = [" " * wide + "  " + "  ".join(map(str.rjust, titles, widths))]
    for row in rows:
        cells = (
            "  ".join(str.rjust(row[t], w) for t, w in zip(titles, widths, strict=True))
            if not row["problem"]
            else ""
        )
        lines.append(f"{row['system']:{wide}}  {cells or row['problem']}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--damages", type=int, default=50, help="bit flips of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--pages",
        type=int,
        default=20,
        help="zeroed pages and truncations, each (default: %(default)s)",
    )
    parser.add_argument(
        "--kills", type=int, default=40, help="at most so many kills (default: %(default)s)"
    )
    parser.add_argument(
        "--writers", type=int, default=20, help="saves of two at once (default: %(default)s)"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="those systems with this in the name"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the table to a file, too"
    )
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)  # what the program starts itself
    parser.add_argument("--write", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save:
        name, root = options.save
        system, tree = SYSTEMS[name](), tree_of(2)
        os.mkdir(f"{root}/begin")
        if options.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (options.limit, options.limit))
        system.save(f"{root}/ck", tree, 2)
        os.mkdir(f"{root}/end")
    elif options.write:
        name, root, count, step = options.write
        write(SYSTEMS[name](), root, int(count), int(step))
    else:
        rows = [row_of(name, options) for name in SYSTEMS if wanted(name, options)]
        facts = environment()
        print("{machine}; {date}\n{versions}".format(**facts), format_rows(rows), sep="\n\n")
        if options.json:
            options.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
