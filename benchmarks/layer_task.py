"""What `layers.py` trains, and the compiled functions that it times for each library."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import layer_nets as nets
import numpy as np
import optax
from layer_nets import Net, TorchNet, Weights
from measure import Work

# pyright: reportMissingImports=false

STEPS = 20  # of a compiled loop, at most
SINGLE = 2  # calls of a single step: the second loss shows that the first step was right
SHORT = 2  # steps of the loops in `Task.slow`
KINDS = {
    "forward": "the loss of a batch, one call",
    "forward loop": "the losses of many batches in a compiled loop",
    "step": "forward, backward and update, one call",
    "step loop": "many such steps in a compiled loop",
}


class Task(NamedTuple):
    """A network that is trained.

    Attributes:
      data: steps -> inputs [steps, batch, ...] and targets.
      loss: "mean square" or "cross entropy" (of the last axis, with integer targets).
      weights: those that every library starts with.
      nets: by competitor, () -> its network.
      judges: by competitor, () -> the hand-written network that it is compared with, if that is
        another than the reference.
      slow: competitors whose compiled training loop takes only SHORT steps, because a step takes
        seconds there.
      references: by kind, what its ratios are to; "JAX by hand" otherwise.
      rate: the learning rate of plain SGD, or of AdamW with `adamw`.
    """

    title: str
    data: Callable[[int], tuple[Any, Any]]
    loss: str
    weights: Weights
    nets: Mapping[str, Callable[[], Net | TorchNet]]
    rate: float
    adamw: bool = False
    judges: Mapping[str, Callable[[], Net]] = {}
    slow: Sequence[str] = ()
    references: Mapping[str, str] = {}

    @property
    def optimizer(self):
        return optax.adamw(self.rate) if self.adamw else optax.sgd(self.rate)


class SlowError(Exception):
    """A competitor takes too long to be called again."""


def loss_of(task: Task, outputs: Any, targets: Any) -> Any:
    if task.loss == "mean square":
        return jnp.square(outputs - targets).mean()
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


@functools.cache
def arrays(data: Callable, steps: int) -> tuple[Any, Any]:
    return data(steps)


def started(task: Task, net: Net) -> tuple[Any, Any]:
    """(params, state) of a network with the weights of the task."""
    x, _ = arrays(task.data, STEPS)
    params, state = net.init(jax.random.key(0), jnp.asarray(x[0]))
    return nets.filled(net, params, task.weights), state


def value(task: Task, net: Net, train: bool, params, state, batch):
    outputs, state = net.apply(params, state, batch[0], train)
    return loss_of(task, outputs, batch[1]), state


def step(task: Task, net: Net, carry, batch):
    """Forward, backward and update: (params, state, memory), batch -> the same, loss."""
    params, state, memory = carry
    loss = functools.partial(value, task, net, True)
    (reached, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
    updates, memory = task.optimizer.update(grads, memory, params)
    return (optax.apply_updates(params, updates), state, memory), reached


def work(task: Task, name: str, kind: str, *, steps: int, patience: float) -> Work:
    """The work of one competitor. Its result is the losses of all steps."""
    net: Any = task.nets[name]()
    steps = steps_of(task, name, kind, steps)
    make: Any = torch_work if isinstance(net, TorchNet) else jax_work
    judge = task.judges.get(name, task.nets["JAX by hand"])
    expected = functools.partial(losses, task, judge, kind.removesuffix(" loop"))
    return Work(patient(make(task, net, kind, steps), steps, patience), steps, expected=expected)


def steps_of(task: Task, name: str, kind: str, steps: int) -> int:
    if "loop" not in kind:
        return SINGLE
    return min(SHORT, steps) if kind == "step loop" and name in task.slow else steps


_LOSSES: dict[Any, np.ndarray] = {}


def losses(task: Task, judge: Callable[[], Any], kind: str, steps: int) -> np.ndarray:
    """What is expected: the losses of the hand-written network, one compiled call a step."""
    key = task.title, judge, kind
    if len(_LOSSES.get(key, ())) < steps:
        _LOSSES[key] = np.asarray(jax_work(task, judge(), kind, steps)())
    return _LOSSES[key][:steps]


def jax_work(task: Task, net: Net, kind: str, steps: int) -> Callable[[], Any]:
    """() -> losses, going on where the last call stopped."""
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf[:steps]), arrays(task.data, STEPS))
    params, state = started(task, net)
    if kind.startswith("forward"):
        loss = lambda params, state, batch: value(task, net, False, params, state, batch)[0]  # noqa: E731
        if kind == "forward":
            run, batches = jax.jit(loss), parts(data, steps)
            return lambda: [run(params, state, batch) for batch in batches]
        loop = jax.jit(
            lambda params, state, data: jax.lax.map(lambda batch: loss(params, state, batch), data)
        )
        return lambda: loop(params, state, data)
    # Ours to donate.
    carry = jax.tree.map(jnp.array, (params, state, task.optimizer.init(params)))
    one = functools.partial(step, task, net)
    if kind == "step":
        run, batches = jax.jit(one, donate_argnums=0), parts(data, steps)

        def single():
            nonlocal carry
            reached = []
            for batch in batches:
                carry, loss = run(carry, batch)
                reached.append(loss)
            return reached

        return single
    loop = jax.jit(lambda carry, data: jax.lax.scan(one, carry, data), donate_argnums=0)

    def many():
        nonlocal carry
        carry, reached = loop(carry, data)
        return reached

    return many


def parts(data: Any, steps: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], data) for i in range(steps)]


def torch_work(task: Task, net: TorchNet, kind: str, steps: int) -> Callable[[], Any]:
    import torch
    from torch.nn import functional

    xs, ys = arrays(task.data, STEPS)
    batches = [
        (net.to_input(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y)))
        for x, y in zip(xs[:steps], ys[:steps], strict=True)
    ]
    module = net.module.train(kind.startswith("step"))

    def loss_on(x, y):
        outputs = module(x)
        if task.loss == "mean square":
            return functional.mse_loss(outputs, y)
        return functional.cross_entropy(outputs.flatten(0, -2), y.flatten().long())

    if kind.startswith("forward"):

        def forward():
            with torch.inference_mode():
                return np.stack([loss_on(*batch).numpy() for batch in batches])

        return forward
    trained = [p for p in module.parameters() if p.requires_grad]
    if task.adamw:
        optimizer = torch.optim.AdamW(trained, task.rate, weight_decay=1e-4)
    else:
        optimizer = torch.optim.SGD(trained, task.rate)

    def train():
        reached = []
        for batch in batches:
            loss = loss_on(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reached.append(loss.detach().numpy())
        return reached

    return train


def patient(run: Callable[[], Any], steps: int, patience: float) -> Callable[[], Any]:
    """`run`, until its second or a later call took longer than `patience` seconds."""
    taken: list[float] = []

    def once():
        if taken[1:] and taken[-1] > patience:
            raise SlowError(f"{taken[-1] / steps:.2f} s a step, so it was not called again")
        start = time.perf_counter()
        output = jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
        return np.asarray(output)

    return once
