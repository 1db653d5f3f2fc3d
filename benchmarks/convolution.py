"""Convolution and pooling, forward and all gradients, inside and outside of a compiled loop,
against plain `jax.lax`.

    python benchmarks/convolution.py [--only depthwise] [--cores 0 --wall]

A step computes y = op(x, kernel), the gradients of sum(y^2) / 2 with respect to x and kernel, and
moves the kernel. "loop" is a `lax.scan` over the steps in one compiled call, "step" one compiled
call a step. What jax.lax does in a loop is measured for few steps only: it may take 100 times
longer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jax import lax

from jaxnet import ops

# pyright: reportMissingImports=false


class Case(NamedTuple):
    """Spatial sizes give the rank; kernel None is pooling."""

    batch: int
    sizes: tuple[int, ...]
    channels: int
    features: int
    window: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    pool: bool = False


CASES = {
    "64x28x28, 1 -> 32, 3x3": Case(64, (28, 28), 1, 32, 3, padding=1),
    "64x14x14, 32 -> 64, 3x3": Case(64, (14, 14), 32, 64, 3, padding=1),
    "32x32x32, 16 -> 16, 3x3": Case(32, (32, 32), 16, 16, 3, padding=1),
    "32x8x8, 64 -> 64, 3x3": Case(32, (8, 8), 64, 64, 3, padding=1),
    "32x32x32, 3 -> 16, 3x3": Case(32, (32, 32), 3, 16, 3, padding=1),
    "32x28x28, 32 -> 1, 3x3": Case(32, (28, 28), 32, 1, 3, padding=1),
    "32x14x14, 64 -> 256, 1x1": Case(32, (14, 14), 64, 256, 1),
    "stride 2: 32x32x32, 32 -> 64, 3x3": Case(32, (32, 32), 32, 64, 3, stride=2, padding=1),
    "patches: 16x32x32, 3 -> 192, 4x4 / 4": Case(16, (32, 32), 3, 192, 4, stride=4),
    "dilation 2: 32x16x16, 32 -> 32, 3x3": Case(32, (16, 16), 32, 32, 3, padding=2, dilation=2),
    "4 groups: 32x16x16, 64 -> 64, 3x3": Case(32, (16, 16), 64, 64, 3, padding=1, groups=4),
    "depthwise: 32x16x16, 64, 3x3": Case(32, (16, 16), 64, 64, 3, padding=1, groups=64),
    "depthwise, stride 2: 32x16x16, 64, 3x3": Case(
        32, (16, 16), 64, 64, 3, stride=2, padding=1, groups=64
    ),
    "depthwise: 16x16x16, 64, 7x7": Case(16, (16, 16), 64, 64, 7, padding=3, groups=64),
    "depthwise: 4x32x32, 32, 31x31": Case(4, (32, 32), 32, 32, 31, padding=15, groups=32),
    "1-d, depthwise: 8x512, 32, 255": Case(8, (512,), 32, 32, 255, padding=127, groups=32),
    "16x28x28, 8 -> 8, 15x15": Case(16, (28, 28), 8, 8, 15, padding=7),
    "3-d: 2x12x12x12, 4 -> 8, 7x7x7": Case(2, (12, 12, 12), 4, 8, 7, padding=3),
    "1-d: 32x128, 32 -> 64, 5": Case(32, (128,), 32, 64, 5, padding=2),
    "3-d: 4x16x16x16, 16 -> 16, 3x3x3": Case(4, (16, 16, 16), 16, 16, 3, padding=1),
    "max pool: 64x28x28x32, 2x2": Case(64, (28, 28), 32, 32, 2, stride=2, pool=True),
    "max pool: 32x32x32x32, 3x3 / 2": Case(32, (32, 32), 32, 32, 3, stride=2, padding=1, pool=True),
    "max pool: 8x32x32x16, 11x11 / 1": Case(8, (32, 32), 16, 16, 11, padding=5, pool=True),
}
STEPS = 4
COLUMNS = ("ours, loop", "ours, step", "lax, loop", "lax, step", "PyTorch")


def main(argv=None):
    options = measure.arguments(__doc__, rounds=7, seconds=20, argv=argv)
    only, options.only = options.only, None  # names cases here
    names = [
        name for name in CASES if not only or any(part.lower() in name.lower() for part in only)
    ]
    measure.publish(options)
    print(
        "\nms a step, median [quartiles]; steps in a loop to steps outside; ours to jax.lax "
        "outside\n"
    )
    print("".join([f"{'':40}", *(f"{column:>26}" for column in COLUMNS), "  loop/step  ours/lax"]))
    tables = [compare(name, CASES[name], options) for name in names]
    if options.json:
        measure.publish(options, *tables)


def compare(name: str, case: Case, options) -> measure.Table:
    """Measure one case and print its line."""
    competitors = {
        "ours, loop": functools.partial(in_loop, ours(case), case),
        "ours, step": functools.partial(by_step, ours(case), case),
        "lax, loop": functools.partial(in_loop, plain(case), case),
        "lax, step": functools.partial(by_step, plain(case), case),
        "PyTorch": functools.partial(in_torch, case, options.cores),
    }
    table = measure.compare(
        name, competitors, per="step", unit="ms", reference="ours, step", options=options
    )
    seconds = {row.name: measure.quartiles(row.seconds) for row in table.rows}
    cells = [
        f"{1e3 * m:8.2f} [{1e3 * low:6.2f}, {1e3 * high:6.2f}]"
        for low, m, high in (seconds[c] for c in COLUMNS)
    ]
    loop, step, _, lax_step, _ = (seconds[column][1] for column in COLUMNS)
    print(
        "".join(
            [
                f"{name:40}",
                *(f"{cell:>26}" for cell in cells),
                f"{loop / step:11.2f}{step / lax_step:10.2f}",
            ]
        ),
        flush=True,
    )
    for row in table.rows:
        if row.problem and "not installed" not in row.problem:
            print(f"    {row.name}: {row.problem}")
    return table


def ours(case: Case) -> Callable:
    if case.pool:
        return lambda x, kernel: (
            kernel * ops.max_pool(x, case.window, strides=case.stride, padding=case.padding)
        )
    options = dict(
        strides=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups
    )
    return functools.partial(ops.convolve, **options)


def plain(case: Case) -> Callable:
    """The same by `jax.lax`, as it is usually written."""
    n = len(case.sizes)
    pads, strides = [(case.padding, case.padding)] * n, (case.stride,) * n
    if case.pool:
        pads, strides, window = (
            [(0, 0), *pads, (0, 0)],
            (1, *strides, 1),
            (1, *(case.window,) * n, 1),
        )
        return lambda x, kernel: (
            kernel * lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)
        )
    axes = "DHW"[-n:]
    return lambda x, kernel: lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        rhs_dilation=(case.dilation,) * n,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=case.groups,
    )


def inputs(case: Case, order: str = "last"):
    """STEPS batches of images and a kernel; a scalar in its place for pooling."""
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS, case.batch, *case.sizes, case.channels)).astype(np.float32)
    shape = (case.window,) * len(case.sizes) + (case.channels // case.groups, case.features)
    kernel = (
        np.float32(1)
        if case.pool
        else random.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))
    )
    return x, np.asarray(kernel, np.float32)


def make_step(op: Callable) -> Callable:
    """A step of a `scan`: every step has other inputs and another kernel, or XLA would compute what
    is common only once.
    """

    def step(carry, x):
        kernel, _ = carry
        y, pull_back = jax.vjp(op, x, kernel)
        dx, dk = pull_back(y)
        return (kernel - 1e-9 * dk, dx), None

    return step


def in_loop(op: Callable, case: Case) -> measure.Work:
    xs, kernel = jax.device_put(inputs(case))
    run = jax.jit(
        lambda kernel, xs: lax.scan(make_step(op), (kernel, jnp.zeros_like(xs[0])), xs)[0]
    )
    return measure.Work(lambda: run(kernel, xs), STEPS)


def by_step(op: Callable, case: Case) -> measure.Work:
    xs, kernel = jax.device_put(inputs(case))
    batches, step = list(xs), jax.jit(make_step(op))

    def run():
        carry = kernel, xs[0]
        for x in batches:
            carry, _ = step(carry, x)
        return carry

    return measure.Work(run, STEPS)


def in_torch(case: Case, cores: int) -> measure.Work:
    """The fastest order of axes for PyTorch, channels_last."""
    import torch

    torch.set_num_threads(cores or os.cpu_count() or 1)
    n = len(case.sizes)
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(n, torch.contiguous_format)
    xs, kernel = inputs(case)
    batches = [
        torch.tensor(np.moveaxis(x, -1, 1)).to(memory_format=layout).requires_grad_() for x in xs
    ]
    if not case.pool:
        kernel = np.ascontiguousarray(np.moveaxis(kernel, (-1, -2), (0, 1)))
    start = torch.tensor(kernel)
    start = start if case.pool else start.to(memory_format=layout)
    functional = torch.nn.functional

    def op(x, kernel):
        if case.pool:
            return kernel * getattr(functional, f"max_pool{n}d")(
                x, case.window, case.stride, case.padding
            )
        options = (case.stride, case.padding, case.dilation, case.groups)
        return getattr(functional, f"conv{n}d")(x, kernel, None, *options)

    def run():
        kernel = start
        for x in batches:
            kernel = kernel.detach().requires_grad_()
            y = op(x, kernel)
            _, dk = torch.autograd.grad(y, (x, kernel), y.detach())
            kernel = kernel - 1e-9 * dk
        return kernel.detach().numpy()

    return measure.Work(run, STEPS)


if __name__ == "__main__":
    main()
