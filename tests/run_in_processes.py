"""One of several processes with two devices each: python run_in_processes.py PROCESS PROCESSES PORT
FOLDER WHAT.
"""

import importlib.util
import json
import os
import pathlib
import signal
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxnet.checkpoint import (
    CheckpointError,
    Checkpoints,
    container,
    inspect,
    lazy,
    load,
    save,
    to_torch,
    verify,
)


def make_tree(mesh, scale=1):
    """Arrays over all devices in several ways, and values that each process has for itself;
    `values` gives their contents.
    """

    def spread(x, *spec):
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: x[index]
        )

    x = values(scale)
    return {
        "blocks": spread(x["blocks"], "a", "b"),
        "columns": spread(x["columns"], None, ("a", "b")),
        "copies": spread(x["copies"]),
        "empty": spread(x["empty"], "a"),
        "keys": jax.random.wrap_key_data(spread(np.arange(8, dtype=np.uint32).reshape(4, 2), "b")),
        "a/b": {"own": jax.device_put(x["own"], jax.local_devices()[0]), "host": x["host"]},
        "step": scale,
    }


def values(scale=1):
    return {
        "blocks": scale * np.arange(32, dtype=np.float32).reshape(4, 8),
        "columns": scale * np.arange(16, dtype=np.int8).reshape(2, 8),
        "copies": np.float32(scale) * np.ones((), np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "own": scale * np.arange(3, dtype=np.float32),
        "host": scale * np.arange(4),
    }


def assert_same(got, expected):
    """Assert equal containers, shardings and, on this process, values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.sharding == y.sharding
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if isinstance(x, jax.Array):
            assert x.sharding == y.sharding
            for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data), strict=True)
        else:
            np.testing.assert_array_equal(x, y)


def fails(function, error, text):
    try:
        function()
    except error as e:
        assert text in str(e), str(e)
    else:
        raise AssertionError(f"expected {error.__name__} with {text!r}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# The scenarios. Each is called in all processes, with a folder of its own and the mesh over all
# devices.


def saved_and_loaded(folder, mesh, me):
    path, tree = folder / "x.safetensors", make_tree(mesh)
    save(path, tree, metadata={"by": "two"})
    assert_same(load(path, like=tree), tree)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree["blocks"]
    )
    assert_same(load(path, like={"blocks": like}, pattern="blocks"), {"blocks": tree["blocks"]})
    fails(
        lambda: to_torch({"params": {"kernel": tree["blocks"]}, "state": {}}),
        ValueError,
        "spread over several processes: gather it first",
    )
    assert inspect(path).metadata == {"by": "two"} and verify(path) == inspect(path)
    with lazy(path) as leaves:
        # Also what the other process has.
        np.testing.assert_array_equal(leaves["blocks"], values()["blocks"])


def replaced(folder, mesh, me):
    path = folder / "x.safetensors"
    save(path, make_tree(mesh, 1))
    before = names(folder)
    multihost_utils.sync_global_devices("looked")
    save(path, make_tree(mesh, 2))
    after = names(folder)
    assert len(before) == len(after) == 3 and set(before) & set(after) == {"x.safetensors"}
    assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 2))


def only_what_is_needed_is_read(folder, mesh, me):
    path, tree = folder / "x.safetensors", make_tree(mesh)
    save(path, tree)
    if me == 1:
        (part,) = folder.glob("*-00001")
        data = bytearray(part.read_bytes())
        # Rows 2 and 3 are those of process 1.
        row = data.index(values()["blocks"][2, :4].tobytes())
        data[row] ^= 1
        part.write_bytes(data)
    multihost_utils.sync_global_devices("damaged")
    like = {"blocks": tree["blocks"]}
    if me == 0:
        assert_same(load(path, like=like, pattern="blocks"), like)
    else:
        fails(lambda: load(path, like=like, pattern="blocks"), CheckpointError, "CRC-32")
    fails(lambda: verify(path), CheckpointError, "CRC-32")


def a_disk_fails_in_one_process(folder, mesh, me):
    path, real = folder / "x.safetensors", os.write
    save(path, make_tree(mesh, 1))

    def full(fd, data):
        raise OSError(28, "No space left on device")

    os.write = full if me == 1 else real
    try:
        expected = (
            (OSError, "No space left") if me == 1 else (CheckpointError, "processes [1] failed")
        )
        fails(lambda: save(path, make_tree(mesh, 2)), *expected)
    finally:
        os.write = real
    assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 1))
    multihost_utils.sync_global_devices("looked")
    # Nothing is left of the save that failed.
    assert len(names(folder)) == 3


def the_manifest_cannot_be_written(folder, mesh, me):
    path, real = folder / "x.safetensors", container.replace
    save(path, make_tree(mesh, 1))

    def full(*_):
        raise OSError(28, "No space left on device")

    container.replace = full
    try:
        expected = (
            (OSError, "No space left") if me == 0 else (CheckpointError, "processes [0] failed")
        )
        fails(lambda: save(path, make_tree(mesh, 2)), *expected)
    finally:
        container.replace = real
    assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 1))
    multihost_utils.sync_global_devices("looked")
    assert len(names(folder)) == 3


def processes_that_save_different_trees(folder, mesh, me):
    tree = make_tree(mesh)
    if me == 1:
        del tree["blocks"]
    expected = "its pieces do not fill F32[4, 8]" if me == 0 else "processes [0] failed"
    fails(lambda: save(folder / "x.safetensors", tree), CheckpointError, expected)
    multihost_utils.sync_global_devices("swept")
    assert names(folder) == []


def processes_that_share_no_folder(folder, mesh, me):
    own = folder / str(me)
    expected = (
        "00001 is not there: all processes must save to one folder"
        if me == 0
        else "processes [0] failed"
    )
    fails(lambda: save(own / "x.safetensors", make_tree(mesh)), CheckpointError, expected)
    assert names(own) == []


def two_load_what_one_has_saved(folder, mesh, me):
    path, tree = folder / "x.safetensors", make_tree(mesh)
    if me == 0:
        keys = jax.random.wrap_key_data(jnp.arange(8, dtype=jnp.uint32).reshape(4, 2))
        save(path, {"blocks": jnp.asarray(values()["blocks"]), "keys": keys})
    multihost_utils.sync_global_devices("saved")
    like = {"blocks": tree["blocks"], "keys": tree["keys"]}
    assert inspect(path).version == 1
    assert_same(load(path, like=like), like)


def rounded_while_it_is_loaded(folder, mesh, me):
    path, tree = folder / "x.safetensors", make_tree(mesh)
    save(path, {"w": tree["blocks"]})
    sharding = NamedSharding(mesh, PartitionSpec(("a", "b")))
    like = {"w": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=sharding)}
    got = load(path, like=like, cast=True)["w"]
    assert got.sharding == sharding and got.dtype == jnp.bfloat16
    for shard in got.addressable_shards:
        np.testing.assert_array_equal(
            np.asarray(shard.data, np.float32), values()["blocks"][shard.index]
        )
    odd = {
        "w": jax.ShapeDtypeStruct(
            (3,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a"))
        )
    }
    save(path, {"w": tree["a/b"]["own"], "x": tree["blocks"]})
    fails(
        lambda: load(path, like=odd, pattern="w"),
        CheckpointError,
        "the shardings of `like` do not suit its shapes",
    )


def a_store_of_steps(folder, mesh, me):
    with Checkpoints(folder, keep=2, asynchronous=True) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_tree(mesh, step))
        multihost_utils.sync_global_devices("all deleted")
        assert checkpoints.steps() == [2, 3] and len(names(folder)) == 6
        found = checkpoints.latest(like=make_tree(mesh))
        assert found and found.step == 3
        assert_same(found.tree, make_tree(mesh, 3))


def orbax_saves_and_all_load(folder, mesh, me):
    path = folder / "x.safetensors"
    for scale in (1, 2):
        save(path, make_tree(mesh, scale), metadata={"by": "Orbax"}, engine="orbax")
    own = jax.make_mesh((2,), ("own",), devices=jax.local_devices(), axis_types=(AxisType.Auto,))
    # What process 0 has counts.
    here = jax.device_put(np.arange(4) + 10 * me, NamedSharding(own, PartitionSpec("own")))
    save(folder / "own", {"here": here, "all": make_tree(mesh)["blocks"]}, engine="orbax")
    np.testing.assert_array_equal(load(folder / "own", pattern="here")["here"], np.arange(4))
    assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 2))
    assert inspect(path).version == 3 and verify(path).metadata == {"by": "Orbax"}
    with lazy(path) as leaves:
        # Also what the other process has.
        np.testing.assert_array_equal(leaves["columns"], values(2)["columns"])
    multihost_utils.sync_global_devices("loaded")
    # These are the files and one folder.
    assert len(names(folder)) == 4


def of_orbax_only_what_is_needed_is_read(folder, mesh, me):
    """Each process sees damage to its own half of the rows, and does not see damage to the other
    half.
    """
    path, x = (
        folder / "x.safetensors",
        np.random.default_rng(0).integers(0, 2**32, (128, 64), np.uint32),
    )
    rows = NamedSharding(mesh, PartitionSpec("a"))
    tree = {"x": jax.make_array_from_callback(x.shape, rows, lambda index: x[index])}
    save(path, tree, engine="orbax")
    if me == 1:
        files = [p for p in folder.glob("x.safetensors.orbax-*/**/*") if p.is_file()]
        file, at = next((p, at) for p in files if (at := p.read_bytes().find(x[64].tobytes())) >= 0)
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
    multihost_utils.sync_global_devices("damaged")
    if me == 0:
        assert_same(load(path, like=tree), tree)
    else:
        fails(
            lambda: load(path, like=tree),
            CheckpointError,
            "its block [64, 64] at [64, 0] is not what was saved",
        )
    fails(lambda: verify(path), CheckpointError, "CRC-32")


def orbax_fails_in_one_process(folder, mesh, me):
    """Orbax fails at the beginning, when the other process waits for this one, and at the end."""
    import orbax.checkpoint as ocp

    from jaxnet.checkpoint import orbax, orbax_library

    path = folder / "x.safetensors"
    save(path, make_tree(mesh, 1), engine="orbax")

    async def full_later(*_, **__):
        raise OSError(28, "No space left on device")

    def full_now(*_):
        raise OSError(28, "No space left on device")

    # Orbax would wait so long for a process that does not come.
    assert orbax_library.TIMEOUT > 600
    for where, name, broken in [
        (ocp.PyTreeCheckpointHandler, "async_save", full_later),
        (orbax, "_sums", full_now),
        (orbax, "_check_complete", full_now),
    ]:
        # That one is called by process 0 alone.
        ill, real = int(name != "_check_complete"), getattr(where, name)
        if me == ill:
            setattr(where, name, broken)
        expected = "No space left" if me == ill else f"processes [{ill}] failed to save"
        began = time.monotonic()
        fails(lambda: save(path, make_tree(mesh, 2), engine="orbax"), Exception, expected)
        # That no process waits longer than a minute is promised.
        assert time.monotonic() - began < 60
        setattr(where, name, real)
        assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 1))
        multihost_utils.sync_global_devices("looked")
        assert len(names(folder)) == 2
    # The next save works.
    save(path, make_tree(mesh, 3), engine="orbax")
    assert_same(load(path, like=make_tree(mesh)), make_tree(mesh, 3))


def orbax_in_processes_that_differ(folder, mesh, me):
    expected = (
        "of process 0 is not there: all processes must save to one folder"
        if me == 1
        else "processes [1] failed"
    )
    own = folder / str(me)
    fails(
        lambda: save(own / "x.safetensors", make_tree(mesh), engine="orbax"),
        CheckpointError,
        expected,
    )
    assert not own.exists() or names(own) == []
    tree = make_tree(mesh)
    if me == 1:
        del tree["blocks"]
    expected = "its pieces do not fill F32[4, 8]" if me == 0 else "processes [0] failed"
    fails(lambda: save(folder / "x.safetensors", tree, engine="orbax"), CheckpointError, expected)
    multihost_utils.sync_global_devices("swept")
    assert names(folder) == ["0"]


def a_store_of_orbax_beside_the_training(folder, mesh, me):
    with Checkpoints(folder, keep=2, asynchronous=True, engine="orbax") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_tree(mesh, step))
            # `steps` waits until the file is in place for all processes.
            assert checkpoints.steps()[-1] == step
        multihost_utils.sync_global_devices("all deleted")
        assert checkpoints.steps() == [2, 3]
        found = checkpoints.latest(like=make_tree(mesh))
        assert found and found.step == 3
        assert_same(found.tree, make_tree(mesh, 3))


SCENARIOS = [
    saved_and_loaded,
    replaced,
    only_what_is_needed_is_read,
    a_disk_fails_in_one_process,
    the_manifest_cannot_be_written,
    processes_that_save_different_trees,
    processes_that_share_no_folder,
    two_load_what_one_has_saved,
    rounded_while_it_is_loaded,
    a_store_of_steps,
]
if importlib.util.find_spec("orbax"):
    SCENARIOS += [
        orbax_saves_and_all_load,
        of_orbax_only_what_is_needed_is_read,
        orbax_fails_in_one_process,
        orbax_in_processes_that_differ,
        a_store_of_orbax_beside_the_training,
    ]


def run_all(folder, mesh, me):
    """For each scenario, print the error or an empty string."""
    results = {}
    for scenario in SCENARIOS:
        place = folder / scenario.__name__
        place.mkdir(exist_ok=True)
        try:
            scenario(place, mesh, me)
            results[scenario.__name__] = ""
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
            # If the others are stuck, all that is seen.
            print(results[scenario.__name__], file=sys.stderr, flush=True)
        multihost_utils.sync_global_devices(scenario.__name__)
    print(json.dumps(results))


def save_and_die(folder, mesh, me, process, suffix, when):
    """Save twice.

    In the second save, one process is killed when it renames a file, `before` or `after` the
    rename.
    """
    path, real = folder / "x.safetensors", os.replace
    save(path, make_tree(mesh, 1))

    def replace(source, target):
        last = str(target).endswith(suffix)
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    if me == int(process):
        os.replace = replace
    save(path, make_tree(mesh, 2))


def save_for_ever(folder, mesh, me, engine=None):
    """Save tree after tree, until somebody kills both processes."""
    for scale in range(1, 10_000):
        save(folder / "x.safetensors", make_tree(mesh, scale), engine=engine)


def orbax_beside_one_that_dies(folder, mesh, me):
    """Save twice.

    In the second save, process 1 dies while Orbax writes. Process 0 prints how long it waited.
    """
    import orbax.checkpoint as ocp

    path = folder / "x.safetensors"
    save(path, make_tree(mesh, 1), engine="orbax")

    async def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if me == 1:
        ocp.PyTreeCheckpointHandler.async_save = dies
    began = time.monotonic()
    fails(
        lambda: save(path, make_tree(mesh, 2), engine="orbax"),
        CheckpointError,
        "processes [1] have said nothing for 40 s",
    )
    print(time.monotonic() - began, flush=True)


def main():
    me, processes, port, folder, what, *rest = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    address, me = f"127.0.0.1:{port}", int(me)
    # After which JAX ends the processes beside a dead one.
    patience = 100 if what == "orbax_dies" else 10
    jax.distributed.initialize(address, int(processes), me, heartbeat_timeout_seconds=patience)
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((int(processes), 2), ("a", "b"), axis_types=auto)
    {
        "all": run_all,
        "die": save_and_die,
        "for_ever": save_for_ever,
        "orbax_dies": orbax_beside_one_that_dies,
    }[what](pathlib.Path(folder), mesh, me, *rest)


if __name__ == "__main__":
    main()
