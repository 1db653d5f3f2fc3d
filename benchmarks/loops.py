"""The loop around the step: a step at a time, chunks, whole epochs, and `fit` with all it records
and shows.

    python benchmarks/loops.py
    python benchmarks/loops.py --table xor --table adam --cores 0 --wall

Four networks: XOR 2-2-1 on the full batch, 784-256-128-10 at batch 128 with SGD and with Adam, and
the convnet of `convnet.py` at batch 64. Everybody starts from the same weights and takes the data
in a new order each epoch. Batches of the loops in Python are rows of NumPy arrays, where not named
otherwise.

How `fit` is timed: one run of it goes on in a thread of its own, and its `evaluate` hands over to
the clock after every sample, in turns with the other competitors. So a sample has all that `fit`
does for these steps, its records (one per 100 steps; 1,000 for XOR, the default for a million
steps), the evaluation's stop and the progress, and not its compiling, which is in the first sample,
as everybody's. On 'a file' each epoch is a line; on 'a terminal' the line is written anew after
each compiled call, too.

What takes the same batches must arrive at the same weights as the hand-written step in a Python
loop, up to rounding. Keras and PyTorch draw an order of their own: of them it is checked that the
loss over all data falls nearly as far.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import convnet
import jax
import jax.numpy as jnp
import measure
import mlp
import numpy as np
import optax
import peers
import xor
from measure import Work, carried
from peers import Feed

from jaxnet import train
from jaxnet.train.plan import Batching, planned

CHUNK = 100  # steps of a call of `train_steps`, at most
REFERENCE = "JAX, whole epoch: scan, rows from NumPy"


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      hand, loss: (params, batch) -> scalar, hand-written and of the jaxnet network.
      feed: the data; one call of a loop in Python goes through it once (or `feed.epochs` times).
      steps: of a compiled loop; fit_steps: of `fit` between two evaluations; record_steps: and
        between two records.
      checked: params -> what is compared.
      others: the competitors' loops.
      rtol: how far the result may be from the expected one, relative to the largest value in it.
    """

    title: str
    unit: str
    hand: Callable
    loss: Callable
    optimizer: Any
    start: Any
    feed: Feed
    steps: int
    fit_steps: int
    record_steps: int
    checked: Callable
    others: Mapping[str, Callable[[], Work]]
    rtol: float = 2e-3

    @property
    def data(self):
        return jnp.asarray(self.feed.x), jnp.asarray(self.feed.y)


def main(argv=None):
    options = measure.arguments(__doc__, rounds=9, seconds=150, add=add_flags, argv=argv)
    tables = []
    for name in options.table or PROBLEMS:
        problem = PROBLEMS[name](options.rows)
        competitors = competitors_of(problem)
        reference = REFERENCE if REFERENCE in competitors else "JAX, one loop: scan"
        tables.append(
            measure.compare(
                problem.title,
                competitors,
                per="step",
                unit=problem.unit,
                reference=reference,
                expected=functools.partial(after, problem),
                rtol=problem.rtol,
                options=options,
            )
        )
    measure.publish(options, *tables)


def add_flags(parser):
    parser.add_argument(
        "--table", action="append", choices=PROBLEMS, help="those tables (default: all)"
    )
    parser.add_argument(
        "--rows", type=int, help="examples, instead of 12,800 for the MLP and 1,280 for the convnet"
    )


# The problems


def xor_problem(rows):
    others = {
        name: make
        for name, make in xor.COMPETITORS.items()
        if not name.startswith(("JAX", "jaxnet", "NumPy"))
    }
    return Problem(
        "XOR, 2-2-1 sigmoid without biases, full batch, plain SGD",
        "us",
        lambda params, batch: xor.hand_loss(xor.kernels(params), batch),
        xor.loss,
        optax.sgd(xor.RATE),
        xor.PARAMS,
        xor.FEED,
        xor.EPOCHS,
        10 * xor.EPOCHS,
        1000,
        xor.kernels,
        others,
    )


def mlp_problem(rule, rows):
    feed = Feed(*mlp.images(rows or 12_800), 128)
    others = {
        "Equinox": lambda: mlp.equinox(feed, rule),
        "Flax Linen": lambda: mlp.linen(feed, rule),
        "Flax NNX, nnx.jit": lambda: mlp.nnx("jit", feed, rule),
        "Flax NNX, cached_partial": lambda: mlp.nnx("cached_partial", feed, rule),
        "Haiku": lambda: mlp.haiku(feed, rule),
        "Keras fit": lambda: mlp.keras(feed, rule),
        "PyTorch eager, tensors in memory": lambda: mlp.torch(feed, rule),
        "PyTorch eager, DataLoader": lambda: mlp.torch(feed, rule, loader=True),
    }
    return Problem(
        (
            f"784-256-128-10, batch 128, {len(feed.x):,} rows, "
            f"{'Adam' if rule == 'adam' else 'plain SGD'}"
        ),
        "ms",
        mlp.hand_loss,
        mlp.jaxnet_loss(),
        mlp.optimizer(rule),
        mlp.start(),
        feed,
        feed.steps,
        feed.steps,
        100,
        mlp.biases,
        others,
    )


def convnet_problem(rows):
    x, y = mlp.images(rows or 1_280)
    feed = Feed(x.reshape(-1, 28, 28, 1), y, convnet.BATCH)
    others = {
        "Equinox": lambda: convnet.equinox(feed),
        "Flax Linen": lambda: convnet.linen(feed),
        "Flax NNX, nnx.jit": lambda: convnet.nnx("jit", feed),
        "Flax NNX, cached_partial": lambda: convnet.nnx("cached_partial", feed),
        "Haiku": lambda: convnet.haiku(feed),
        "Keras fit": lambda: convnet.keras(feed, shuffle=True),
        "PyTorch eager, tensors in memory": lambda: convnet.torch(feed),
        "PyTorch eager, DataLoader": lambda: convnet.torch(feed, loader=True),
        "PyTorch eager, channels_last": lambda: convnet.torch(feed, channels_last=True),
    }
    return Problem(
        f"Convnet 28x28x1 of convnet.py, batch 64, {len(feed.x):,} rows, plain SGD",
        "ms",
        functools.partial(convnet.hand_loss, convnet.canonical_conv, convnet.reshape_max),
        convnet.jaxnet_loss(),
        optax.sgd(convnet.RATE),
        convnet.START,
        feed,
        feed.steps,
        feed.steps,
        100,
        convnet.biases,
        others,
        # In every step a few of the 1.6 million inputs of a ReLU are zero up to rounding. Each that
        # changes its sign moves the gradient of conv2 by 2e-3, and the runs drift apart. Other
        # batches would give another result altogether.
        rtol=0.1,
    )


PROBLEMS = {
    "xor": xor_problem,
    "sgd": functools.partial(mlp_problem, "sgd"),
    "adam": functools.partial(mlp_problem, "adam"),
    "convnet": convnet_problem,
}


# What is expected


def after(problem, steps, rows=None):
    """The checked part of the parameters after `steps` hand-written steps over the feed's rows, or
    over those given.
    """
    return problem.checked(trained(problem, steps, rows))


def trained(problem, steps, rows=None):
    step, state = jax.jit(functools.partial(hand_step, problem)), hand_start(problem)
    feed = problem.feed
    batches = feed.stream() if rows is None else ((feed.x[each], feed.y[each]) for each in rows)
    for batch in itertools.islice(batches, steps):
        state, _ = step(state, batch)
    return state[0]


def after_own_rows(problem, steps):
    """The same for the rows in the order that jaxnet draws."""
    feed = problem.feed
    if feed.whole:
        return after(problem, steps)
    state = train.TrainState.create(problem.start, problem.optimizer, jax.random.key(0))
    batching = Batching(len(feed.x), feed.batch_size, train.shuffle, True)
    plan = jax.jit(lambda: planned(state.key, state.step, steps, batching))()
    return after(problem, steps, np.asarray(plan))


def falls(problem, work: Work) -> Work:
    """Work that shuffles by itself: what is checked is that the loss over all data falls at least
    0.8 times as far.
    """
    loss, data = jax.jit(problem.hand), problem.data

    def low_enough(output):
        begin, end = (
            float(loss(params, data)) for params in (problem.start, trained(problem, work.steps))
        )
        return float(work.result(output) <= begin + 0.8 * (end - begin))

    return work._replace(result=low_enough, expected=lambda steps: 1.0)


# JAX by hand


def hand_step(problem, state, batch):
    params, opt = state
    value, grads = jax.value_and_grad(problem.hand)(params, batch)
    updates, opt = problem.optimizer.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value


def hand_start(problem):
    params = jax.tree.map(jnp.array, problem.start)
    return params, problem.optimizer.init(params)


def hand_scan(problem, rows_of):
    """`rows_of(i)` gives the rows [steps, batch] of epoch i, an array of NumPy or of JAX."""
    feed, data, numbers = problem.feed, problem.data, itertools.count()

    def epoch(state, data, i, rows):
        def body(state, rows):
            return hand_step(problem, state, jax.tree.map(lambda leaf: leaf[rows], data))

        return jax.lax.scan(body, state, rows_of(i) if rows is None else rows)

    run = jax.jit(epoch, donate_argnums=0)
    host = feed.rows() if rows_of is None else itertools.repeat(None)
    start = hand_start(problem)
    step = lambda state: run(state, data, next(numbers), next(host))[0]  # noqa: E731
    return carried(step, start, lambda state: problem.checked(state[0]), steps=problem.steps)


def hand_full_batch(problem):
    data = problem.data

    def loop(state, data):
        return jax.lax.scan(
            lambda state, _: hand_step(problem, state, data), state, length=problem.steps
        )

    run, start = jax.jit(loop, donate_argnums=0), hand_start(problem)
    return carried(
        lambda s: run(s, data)[0], start, lambda s: problem.checked(s[0]), steps=problem.steps
    )


def permuted(problem, i):
    """The rows of epoch i by `jax.random`."""
    n, size = len(problem.feed.x), problem.feed.batch_size
    return jax.random.permutation(jax.random.fold_in(jax.random.key(0), i), n).reshape(-1, size)


def hand_scan_on_device(problem):
    work = hand_scan(problem, functools.partial(permuted, problem))
    return work._replace(
        expected=lambda steps: after(problem, steps, np.asarray(permuted(problem, 0)))
    )


def hand_batches(problem):
    run = jax.jit(lambda state, x, y: hand_step(problem, state, (x, y))[0], donate_argnums=0)
    return peers.each_batch(
        run, hand_start(problem), problem.feed, lambda state: problem.checked(state[0])
    )


def hand_gathers(problem):
    """The data is on the device, and the step takes its rows from there."""
    data = problem.data

    def step(state, data, rows):
        return hand_step(problem, state, jax.tree.map(lambda leaf: leaf[rows], data))[0]

    run = jax.jit(step, donate_argnums=0)
    rows = itertools.chain.from_iterable(problem.feed.rows())
    start, steps = hand_start(problem), problem.feed.steps
    work = carried(
        lambda state: run(state, data, next(rows)),
        start,
        lambda s: problem.checked(s[0]),
        calls=steps,
    )
    return work


# jaxnet


def start_of(problem):
    state = train.TrainState.create(problem.start, problem.optimizer, jax.random.key(0))
    return jax.tree.map(jnp.array, state)  # ours to donate


def jaxnet_batches(problem):
    step = train.train_step(problem.loss, problem.optimizer)
    run = jax.jit(lambda state, x, y: step(state, (x, y))[0], donate_argnums=0)
    return peers.each_batch(
        run, start_of(problem), problem.feed, lambda state: problem.checked(state.params)
    )


def jaxnet_loop(problem, steps):
    """`train_steps`, or `train_epoch` where an epoch is so many."""
    step = train.train_step(problem.loss, problem.optimizer)
    size = problem.feed.batch_size
    epoch = steps * size == len(problem.feed.x)
    run = jax.jit(
        train.train_epoch(step, size) if epoch else train.train_steps(step, size, steps),
        donate_argnums=0,
    )
    data = problem.data
    work = carried(
        lambda state: run(state, data)[0],
        start_of(problem),
        lambda state: problem.checked(state.params),
        steps=steps,
    )
    return work._replace(expected=functools.partial(after_own_rows, problem))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def jaxnet_fit(problem, stream):
    """A run of `fit` that goes on for `fit_steps` steps at a time; see the description above."""
    states, resume = queue.Queue(), threading.Semaphore(0)

    def evaluate(state):
        # Before the first step `fit` calls it once on the start.
        if not int(state.step):
            return {}
        states.put(state)
        resume.acquire()
        return {}

    def train_on():
        resume.acquire()
        try:
            train.fit(
                train.train_step(problem.loss, problem.optimizer),
                train.TrainState.create(problem.start, problem.optimizer, jax.random.key(0)),
                data,
                batch_size=problem.feed.batch_size,
                steps=100 * problem.fit_steps,  # the line for each hundredth is then one a sample
                record_every=problem.record_steps,
                evaluate=evaluate,
                evaluate_every=problem.fit_steps,
            )
            raise RuntimeError("the run of `fit` is over")
        except Exception as error:
            states.put(error)

    def run():
        # `fit` takes the stream that exists when it begins.
        with contextlib.redirect_stderr(stream):
            resume.release()
            state = states.get()
        if isinstance(state, Exception):
            raise state
        return state

    data = problem.data
    threading.Thread(target=train_on, daemon=True).start()
    result = lambda state: problem.checked(state.params)  # noqa: E731
    return Work(run, problem.fit_steps, result, functools.partial(after_own_rows, problem))


def competitors_of(problem) -> dict[str, Callable[[], Work]]:
    make, chunk = functools.partial, min(CHUNK, -(-problem.steps // 2))
    jaxnet = {
        "jaxnet, jitted step in a Python loop": make(jaxnet_batches, problem),
        f"jaxnet, train_steps, {chunk} a call": make(jaxnet_loop, problem, chunk),
        "jaxnet, fit, progress on a file": make(jaxnet_fit, problem, io.StringIO()),
        "jaxnet, fit, progress on a terminal": make(jaxnet_fit, problem, Terminal()),
    }
    if problem.feed.whole:
        loops = {
            "JAX, one loop: scan": make(hand_full_batch, problem),
            f"jaxnet, train_steps, {problem.steps:,} a call": make(
                jaxnet_loop, problem, problem.steps
            ),
        }
        return {
            **loops,
            "JAX, jitted step in a Python loop": make(hand_batches, problem),
            **jaxnet,
            **problem.others,
        }
    loops = {
        REFERENCE: make(hand_scan, problem, None),
        "JAX, whole epoch: scan, rows by jax.random": make(hand_scan_on_device, problem),
        "JAX, jitted step, NumPy batches": make(hand_batches, problem),
        "JAX, jitted step, rows taken in it": make(hand_gathers, problem),
        "jaxnet, train_epoch": make(jaxnet_loop, problem, problem.steps),
    }
    own = {
        name: lambda f=f: falls(problem, f())
        for name, f in problem.others.items()
        if name.startswith(("Ker", "PyT"))
    }
    return {**loops, **jaxnet, **problem.others, **own}


if __name__ == "__main__":
    main()
