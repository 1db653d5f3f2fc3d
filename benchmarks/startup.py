"""What a user waits for before the first step: commands, imports, and the first init of 64 dense
layers nested six deep.

    python benchmarks/startup.py
    python benchmarks/startup.py --distinct      (15 minutes more: each layer compiles its kernels)

Every sample is a process of its own, so that nothing is cached in memory and nothing is compiled
yet.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

import measure
from measure import Row, Table

# pyright: reportMissingImports=false

WIDTH = 64  # of the input, and of the first layer or all
# Whole processes. FILE is the checkpoint of an MLP with Adam, 2.4 MB.
COMMANDS = {
    "python": ("-c", "pass"),
    "python, import jaxnet": ("-c", "import jaxnet"),
    "jaxnet inspect FILE": ("-m", "jaxnet.cli", "inspect", "FILE"),
    "jaxnet verify FILE": ("-m", "jaxnet.cli", "verify", "FILE"),
    "python, import numpy": ("-c", "import numpy"),
    "python, import jax": ("-c", "import jax"),
}
# What is imported before the clock starts, and the statement that is timed.
IMPORTS = {
    "jax": ("time", "import jax"),
    "jaxnet": ("time", "import jaxnet"),
    "jaxnet's layers, after jax": (
        "jax",
        "from jaxnet import chain, conv, dense, repeat, summary, wire",
    ),
    "jaxnet, all names, after jax": ("jax", "from jaxnet import *"),
    "optax, after jax": ("jax", "import optax"),
    "Equinox, after jax": ("jax", "import equinox"),
    "Flax Linen, after jax": ("jax", "import flax.linen"),
    "Flax NNX, after jax": ("jax", "import flax.nnx"),
    "Haiku, after jax": ("jax", "import haiku"),
    "Keras, after jax": ("jax", "import keras"),
    "PyTorch": ("time", "import torch"),
}


def main(argv=None):
    options = measure.arguments(__doc__, rounds=7, seconds=240, add=add_flags, argv=argv)
    clock = "perf_counter" if options.wall else "process_time"
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/state.safetensors"
        child(f"import startup; startup.save_state({file!r})")
        commands = {
            name: [file if x == "FILE" else x for x in command]
            for name, command in COMMANDS.items()
        }
        samples = {
            name: functools.partial(command_seconds, x, options.wall)
            for name, x in commands.items()
        }
        tables = [
            table(
                "From the start of a process to its end",
                samples,
                "process",
                "ms",
                "python",
                options,
            )
        ]
    samples = {
        name: functools.partial(import_seconds, *imports, clock)
        for name, imports in IMPORTS.items()
    }
    tables.append(table("Importing", samples, "import", "ms", "jax", options))
    for widths in [[WIDTH] * 2**options.depth, [WIDTH + i for i in range(2**options.depth)]][
        : 1 + options.distinct
    ]:
        samples = {
            f"{name}, {how}": functools.partial(init_seconds, name, how, widths, clock)
            for name in NETWORKS
            for how in ["eager", "under jit"]
        }
        wide = (
            f"width {WIDTH}" if widths[0] == widths[-1] else f"widths {widths[0]} to {widths[-1]}"
        )
        title = f"First init of {len(widths)} dense layers of {wide}, nested {options.depth} deep"
        tables.append(table(title, samples, "init", "s", "jaxnet, eager", options))
    measure.publish(options, *tables)


def add_flags(parser):
    parser.add_argument(
        "--depth", type=int, default=6, help="how deep the layers are nested (default: %(default)s)"
    )
    parser.add_argument(
        "--distinct",
        action="store_true",
        help="also the network in which no two layers are as wide",
    )


def table(title, samples, per, unit, reference, options) -> Table:
    rows = [Row(name) for name in samples if name == reference or measure.wanted(name, options)]
    measure.interleave(rows, samples, reference=reference, options=options)
    return Table(title, per, unit, reference, rows)


def command_seconds(command: list[str], wall: bool) -> float:
    """Seconds of a whole process: wall-clock time, or CPU seconds with those of the interpreter and
    of the kernel.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=surroundings()
    )
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        end - start if wall else after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )


def save_state(file: str) -> None:
    """In the child: write the checkpoint that the commands read."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxnet
    from jaxnet import chain, dense
    from jaxnet.train import TrainState

    net = chain(dense(256), jax.nn.relu, dense(10))
    params = net.init(jax.random.key(0), jnp.zeros((1, 784)))
    jaxnet.save(file, TrainState.create(params, optax.adam(1e-3), jax.random.key(1)))


def import_seconds(before: str, statement: str, clock: str) -> float:
    """Seconds that a new process needs for an import after other modules are there."""
    return float(
        child(f"import time, {before}; t = time.{clock}(); {statement}; print(time.{clock}() - t)")
    )


def init_seconds(name: str, how: str, widths: list[int], clock: str) -> float:
    """Seconds that a new process needs to initialize the network, after it has imported
    everything.
    """
    seconds, parameters = child(
        f"import startup; startup.measure_init({name!r}, {how!r}, {widths}, {clock!r})"
    ).split()
    expected = sum((d + 1) * n for d, n in zip([WIDTH, *widths], widths, strict=False))
    if int(parameters) != expected:
        raise ValueError(f"the network has {parameters} parameters, expected {expected}")
    return float(seconds)


def child(code: str, **environment: str) -> str:
    """What a new Python process prints."""
    path = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r}); "
    command = [sys.executable, "-c", path + code]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings() | environment)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        missing = re.match("ModuleNotFoundError: No module named '(.*)'", error)
        raise ModuleNotFoundError(error, name=missing[1]) if missing else RuntimeError(error)
    return done.stdout


def surroundings() -> dict[str, str]:
    """The variables of a new process, which may keep compiled modules, as a package does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"KERAS_BACKEND": "jax"}


def measure_init(name: str, how: str, widths: list[int], clock: str) -> None:
    """In the child: print the seconds of the first init and the number of parameters."""
    import jax
    import jax.numpy as jnp

    key, x = jax.random.key(0), jnp.zeros((1, WIDTH))  # also starts the backend
    build = NETWORKS[name]()
    now = getattr(time, clock)
    start = now()
    params = jax.block_until_ready(build(key, x, widths, how == "under jit"))
    print(now() - start, sum(leaf.size for leaf in jax.tree.leaves(params)))


# The networks: each function imports what it needs and returns build(key, x, widths, jit) ->
# parameters


def jaxnet():
    import jax

    from jaxnet import chain, dense

    def tree(widths):
        half = len(widths) // 2
        return chain(tree(widths[:half]), tree(widths[half:])) if half else dense(widths[0])

    def build(key, x, widths, jit):
        net = tree(widths)
        return jax.jit(net.init)(key, x) if jit else net.init(key, x)

    return build


def linen():
    import jax
    from flax import linen as nn

    class Tree(nn.Module):
        widths: tuple[int, ...]

        @nn.compact
        def __call__(self, x):
            half = len(self.widths) // 2
            return (
                Tree(self.widths[half:])(Tree(self.widths[:half])(x))
                if half
                else nn.Dense(self.widths[0])(x)
            )

    def build(key, x, widths, jit):
        net = Tree(tuple(widths))
        return jax.jit(net.init)(key, x) if jit else net.init(key, x)

    return build


def nnx():
    from flax import nnx

    class Tree(nnx.Module):
        def __init__(self, features, widths, rngs):
            half = len(widths) // 2
            self.first = (
                Tree(features, widths[:half], rngs)
                if half
                else nnx.Linear(features, widths[0], rngs=rngs)
            )
            self.second = Tree(widths[half - 1], widths[half:], rngs) if half else None

    def build(key, x, widths, jit):
        def create(key):
            return nnx.state(Tree(x.shape[-1], widths, nnx.Rngs(key)), nnx.Param)

        return nnx.jit(create)(key) if jit else create(key)

    return build


def equinox():
    import equinox as eqx
    import jax

    def tree(features, widths, key):
        if len(widths) == 1:
            return eqx.nn.Linear(features, widths[0], key=key)
        half, keys = len(widths) // 2, jax.random.split(key)
        first, second = (
            tree(features, widths[:half], keys[0]),
            tree(widths[half - 1], widths[half:], keys[1]),
        )
        return eqx.nn.Sequential([first, second])

    def build(key, x, widths, jit):
        def create(key):
            return tree(x.shape[-1], widths, key)

        return eqx.filter(eqx.filter_jit(create)(key) if jit else create(key), eqx.is_array)

    return build


def haiku():
    import haiku as hk
    import jax

    class Tree(hk.Module):
        def __init__(self, widths):
            super().__init__()
            self.widths = widths

        def __call__(self, x):
            half = len(self.widths) // 2
            return (
                Tree(self.widths[half:])(Tree(self.widths[:half])(x))
                if half
                else hk.Linear(self.widths[0])(x)
            )

    def build(key, x, widths, jit):
        net = hk.transform(lambda x: Tree(widths)(x))
        return jax.jit(net.init)(key, x) if jit else net.init(key, x)

    return build


NETWORKS = {
    "jaxnet": jaxnet,
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Equinox": equinox,
    "Haiku": haiku,
}

if __name__ == "__main__":
    main()
