"""From starting `python` to the loss of the first trained step: an MLP for 8x8 digits,
64-256-128-10, batch 64, AdamW.

    python benchmarks/first_step.py
    python benchmarks/first_step.py --cores 0 --wall      (what a user waits, on an idle machine)

Every sample is a new process that imports, reads the data from a file, initializes, compiles, takes
a step on a cosine schedule and fetches the loss: once with nothing compiled before, once with JAX's
persistent compilation cache filled by an earlier run of the same program. jaxnet's compiled loops
have then trained a chunk of 100 steps, or an epoch of 22.
"""

from __future__ import annotations

import collections
import functools
import pathlib
import tempfile
import time
from typing import NamedTuple

# Nothing else is imported here: what a program needs is part of what is measured.
# pyright: reportMissingImports=false

SIZES, BATCH, RATE, STEPS = (64, 256, 128, 10), 64, 3e-3, 880
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
DATA = {
    "jaxnet.data.digits()": "import jaxnet.data as data; data.digits()",
    "scikit-learn's load_digits()": "from sklearn import datasets; datasets.load_digits()",
}


class Run(NamedTuple):
    """One process: the loss that it got, seconds of wall-clock and CPU time since its start, and
    its peak memory in MB.
    """

    loss: float
    wall: float
    cpu: float
    peak: float


def main(argv=None):
    import measure
    import numpy as np
    import startup

    from jaxnet.data import digits

    options = measure.arguments(__doc__, rounds=5, seconds=240, argv=argv)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = digits().train
        file = pathlib.Path(folder) / "digits.npz"
        np.savez(file, images=images.reshape(len(images), -1), labels=labels)
        tables = []
        for title, cache in [
            ("nothing compiled before", None),
            ("persistent compilation cache", folder),
        ]:
            runs = collections.defaultdict(list)

            def sample(name, cache=cache, runs=runs):
                runs[name].append(run := first_step(name, file, cache and f"{cache}/{name}"))
                return run.wall if options.wall else run.cpu

            samples = {name: functools.partial(sample, name) for name in PROGRAMS}
            title = f"Process start to first trained step, {title}"
            tables.append(
                table := startup.table(title, samples, "process", "s", "jaxnet, fit", options)
            )
            for row in table.rows:
                other = [run.cpu if options.wall else run.wall for run in runs[row.name]]
                row.others = {"CPU s" if options.wall else "wall s": other}
                row.others["peak MB"] = [run.peak for run in runs[row.name]]
    clock = "perf_counter" if options.wall else "process_time"
    timed = "import time, numpy; t = time.{0}(); {1}; print(time.{0}() - t)"
    samples = {
        name: lambda code=code: float(startup.child(timed.format(clock, code)))
        for name, code in DATA.items()
    }
    tables.append(
        startup.table(
            "The digits as arrays, after numpy", samples, "load", "ms", next(iter(DATA)), options
        )
    )
    measure.publish(options, *tables)


def first_step(name: str, file: pathlib.Path, cache: str | None) -> Run:
    """Run a program in a new process; with a folder for JAX's compilation cache, once before if
    that is still empty.
    """
    import startup

    if cache and not pathlib.Path(cache).exists():
        pathlib.Path(cache).mkdir()
        first_step(name, file, cache)
    environment = CACHE | {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    start = time.time()
    printed = startup.child(
        f"import first_step; first_step.measure_step({name!r}, {str(file)!r})", **environment
    )
    loss, end, cpu, peak = map(float, printed.split())
    if not 0.5 < loss < 4:  # ln 10 = 2.3 before the first step; the mean of an epoch is lower
        raise ValueError(f"the loss is {loss}")
    return Run(loss, end - start, cpu, peak)


def measure_step(name: str, file: str) -> None:
    """In the child: print the loss, the time, the CPU seconds and the peak memory in MB."""
    import numpy as np

    with np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    loss = float(PROGRAMS[name](images, labels))
    print(loss, time.time(), time.process_time(), peak_memory())


def peak_memory() -> float:
    """The most memory that this process has had at once, in MB (resident)."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


# The programs: (images [N, 64], labels [N]) -> the first loss, as the documentation of each shows a
# training loop


def optimizer():
    import optax

    return optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=1e-4)


def cross_entropy(logits, labels):
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def jaxnet_network(images):
    """(loss, params, key) of the network."""
    import jax

    from jaxnet import chain, dense

    *hidden, out = SIZES[1:]
    net = chain(*[layer for size in hidden for layer in (dense(size), jax.nn.relu)], dense(out))
    init_key, key = jax.random.split(jax.random.key(0))
    return (
        lambda params, batch: cross_entropy(net.apply(params, batch[0]), batch[1]),
        net.init(init_key, images),
        key,
    )


def jaxnet_fit(images, labels):
    from jaxnet.train import TrainState, fit, train_step

    loss, params, key = jaxnet_network(images)
    start = TrainState.create(params, optimizer(), key)
    step = train_step(loss, optimizer())
    return fit(step, start, (images, labels), epochs=1, batch_size=BATCH, progress=False).history[
        0
    ]["loss"]


def jaxnet_steps(images, labels):
    import jax

    from jaxnet.train import TrainState, train_step, train_steps

    loss, params, key = jaxnet_network(images)
    steps = jax.jit(train_steps(train_step(loss, optimizer()), BATCH, 100), donate_argnums=0)
    _, metrics = steps(TrainState.create(params, optimizer(), key), (images, labels))
    return metrics["loss"][0]


def jaxnet_step(images, labels):
    import jax

    from jaxnet.train import TrainState, train_step

    loss, params, key = jaxnet_network(images)
    step = jax.jit(train_step(loss, optimizer()), donate_argnums=0)
    _, metrics = step(TrainState.create(params, optimizer(), key), (images[:BATCH], labels[:BATCH]))
    return metrics["loss"]


def raw_jax(images, labels):
    import jax
    import jax.numpy as jnp
    import optax

    def init(key, n_in, n_out):
        return {"w": n_in**-0.5 * jax.random.normal(key, (n_in, n_out)), "b": jnp.zeros(n_out)}

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return cross_entropy(x @ params[-1]["w"] + params[-1]["b"], y)

    @jax.jit
    def update(params, opt_state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    keys, tx = jax.random.split(jax.random.key(0), len(SIZES) - 1), optimizer()
    params = [init(*layer) for layer in zip(keys, SIZES[:-1], SIZES[1:], strict=True)]
    return update(params, tx.init(params), images[:BATCH], labels[:BATCH])[-1]


def equinox(images, labels):
    import equinox as eqx
    import jax
    import peers

    keys = jax.random.split(jax.random.key(0), len(SIZES) - 1)
    linears = [
        eqx.nn.Linear(*sizes, key=key)  # pyright: ignore
        for *sizes, key in zip(SIZES[:-1], SIZES[1:], keys, strict=True)
    ]
    relu = eqx.nn.Lambda(jax.nn.relu)
    model = eqx.nn.Sequential([linears[0], relu, linears[1], relu, linears[2]])
    feed = peers.Feed(images[:BATCH], labels[:BATCH], BATCH)
    return peers.equinox(model, cross_entropy, optimizer(), feed, None).run()[-1]


def linen(images, labels):
    import jax
    import peers
    from flax import linen as nn

    *hidden, out = SIZES[1:]
    model = nn.Sequential(
        [*[layer for size in hidden for layer in (nn.Dense(size), nn.relu)], nn.Dense(out)]
    )
    params = model.init(jax.random.key(0), images[:1])["params"]
    feed = peers.Feed(images[:BATCH], labels[:BATCH], BATCH)
    return peers.linen(model, params, cross_entropy, optimizer(), feed, None).run()[-1]


def nnx(images, labels):
    import peers
    from flax import nnx

    rngs = nnx.Rngs(0)
    linears = [nnx.Linear(*sizes, rngs=rngs) for sizes in zip(SIZES[:-1], SIZES[1:], strict=True)]
    model = nnx.Sequential(linears[0], nnx.relu, linears[1], nnx.relu, linears[2])
    feed = peers.Feed(images[:BATCH], labels[:BATCH], BATCH)
    return peers.nnx(model, cross_entropy, optimizer(), feed, None).run()[0]


def haiku(images, labels):
    import haiku as hk
    import jax
    import peers

    def forward(x):
        return hk.nets.MLP(SIZES[1:])(x)

    params = hk.without_apply_rng(hk.transform(forward)).init(jax.random.key(0), images[:1])
    feed = peers.Feed(images[:BATCH], labels[:BATCH], BATCH)
    return peers.haiku(forward, params, cross_entropy, optimizer(), feed, None).run()[-1]


def torch(images, labels):
    import torch
    from torch import nn

    *hidden, out = zip(SIZES[:-1], SIZES[1:], strict=True)
    model = nn.Sequential(
        *[layer for sizes in hidden for layer in (nn.Linear(*sizes), nn.ReLU())], nn.Linear(*out)
    )
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, STEPS)
    x, y = torch.from_numpy(images[:BATCH]), torch.from_numpy(labels[:BATCH]).long()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    adamw.step()
    schedule.step()
    return loss.item()


PROGRAMS = {
    "jaxnet, fit": jaxnet_fit,
    "jaxnet, 100 train_steps": jaxnet_steps,
    "jaxnet, jitted train_step": jaxnet_step,
    "JAX and optax by hand": raw_jax,
    "Equinox": equinox,
    "Flax Linen": linen,
    "Flax NNX": nnx,
    "Haiku": haiku,
    "PyTorch": torch,
}

if __name__ == "__main__":
    main()
