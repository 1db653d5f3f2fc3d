"""Many trainings at once: M members, each with its own weights, order of the data and learning
rate, as one call or as many.

    python benchmarks/ensembles.py                       CPU time on one core, 15 minutes
    python benchmarks/ensembles.py --cores 0 --wall      wall-clock time on all cores
    python benchmarks/ensembles.py --network 64-32-10 --batch 32 --optimizer adam --members 64

A member trains a multilayer perceptron (tanh, squared error) for some steps on batches of 1,024
random examples, drawn anew by `jaxnet.train.train_steps`. Times are those of one step of one
member, so a table says what a further member costs. All forms start from the same weights, and
their results are compared with those of the Python loop. `vmap` of a run is, as JAX maps loops, one
loop over the mapped step. The last table sums up: the time of each form as a multiple of the
fastest one's.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from measure import Work

from jaxnet import chain, dense
from jaxnet.train import TrainState, many, train_step, train_steps

NETWORKS = (
    "2-2-1",
    "2-16-1",
    "16-16-1",
    "8-32-4",
    "64-32-10",
    "64-128-10",
    "64-256-128-10",
    "784-256-128-10",
)
BATCHES = (4, 128)
OPTIMIZERS = {"sgd": lambda rate: rate, "adam": optax.adam}
EXAMPLES = 1024


def main(argv=None):
    def add(parser):
        batches = ", ".join(map(str, BATCHES))
        parser.add_argument(
            "--network", action="append", choices=NETWORKS, help="these only (default: all)"
        )
        parser.add_argument(
            "--batch",
            action="append",
            type=int,
            metavar="B",
            help=f"these only (default: {batches})",
        )
        parser.add_argument(
            "--optimizer", action="append", choices=OPTIMIZERS, help="this only (default: both)"
        )
        parser.add_argument(
            "--members", type=int, default=256, help="networks to train (default: %(default)s)"
        )
        parser.add_argument(
            "--work", type=float, default=1e8, help="multiply-adds a call (default: %(default)g)"
        )

    options = measure.arguments(__doc__, rounds=5, seconds=10.0, add=add, argv=argv)
    cases = itertools.product(
        options.network or NETWORKS, options.batch or BATCHES, options.optimizer or OPTIMIZERS
    )
    tables = {case: compare(*case, options) for case in cases}
    measure.publish(options, *tables.values())
    print(f"\n{summary(tables, options)}")


def compare(network, batch, optimizer, options):
    """The table of one network, batch size and optimizer."""
    run, members, steps = problem(network, batch, optimizer, options)
    one_by_one = jax.jit(run)

    def member(i):
        return jax.tree.map(lambda leaf: leaf[i], members)

    def loop(*_):
        return [one_by_one(*member(i)) for i in range(options.members)]

    def work(form):
        return Work(lambda: form(*members), options.members * steps, last_kernel)

    forms = {
        "jaxnet many": many(run),
        "vmap": many(run, how="vmap"),
        "map": many(run, how="map"),
        **{f"blocks of {size}": many(run, how=size) for size in (4, 16, 64)},
        "Python loop": loop,
    }
    return measure.compare(
        f"{options.members} x {network}, batch {batch}, {optimizer}, {steps} steps",
        {name: functools.partial(work, form) for name, form in forms.items()},
        per="step of one member",
        unit="us",
        reference="jaxnet many",
        expected=lambda _: last_kernel(loop()),
        options=options,
    )


def last_kernel(params):
    """The last layer's kernels of all members: they come stacked, or in a list."""
    if isinstance(params, list):
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return params["out"]["kernel"]


def summary(tables, options):
    """All tables as one: a line for each case, a column for each form, its time as a multiple of
    the fastest one's.
    """
    names = [row.name for row in next(iter(tables.values())).rows]
    lines = [["", *names]]
    for (network, batch, optimizer), table in tables.items():
        seconds = [measure.quartiles(row.seconds)[1] for row in table.rows]
        cells = [f"{value / np.nanmin(seconds):.2f}" for value in seconds]
        lines.append([f"{network}, batch {batch}, {optimizer}", *cells])
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])]) for line in lines
    ]
    return "\n".join(
        [f"{options.members} members: time as a multiple of the fastest form's", "", *text]
    )


def problem(network, batch, optimizer, options):
    """A run (params, key, rate) -> params, its arguments for all members, and its number of
    steps.
    """
    widths = [int(width) for width in network.split("-")]
    hidden = [layer for width in widths[1:-1] for layer in (dense(width), jnp.tanh)]
    net = chain(*hidden, out=dense(widths[-1]))
    random = np.random.default_rng(0)
    x = random.normal(size=(EXAMPLES, widths[0])).astype(np.float32)
    y = random.normal(size=(EXAMPLES, widths[-1])).astype(np.float32)
    data = jax.tree.map(jnp.asarray, (x, y))
    keys = jax.random.split(jax.random.key(0), options.members)
    params = jax.jit(jax.vmap(lambda key: net.init(key, x)))(keys)
    rates = np.geomspace(1e-4, 1e-2, options.members).astype(np.float32)
    # The factor 3 counts the forward product and both gradients.
    products = 3 * batch * sum(a * b for a, b in itertools.pairwise(widths))
    steps = int(np.clip(options.work / (products * options.members), 8, 200))

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(net.apply(params, x) - y))

    def run(params, key, rate):
        tx = OPTIMIZERS[optimizer](rate)
        return train_steps(train_step(loss, tx), batch, steps)(
            TrainState.create(params, tx, key), data
        )[0].params

    return run, (params, keys, rates), steps


if __name__ == "__main__":
    main()
