"""A GPT of 24 layers of width 64: what its depth costs to trace, to compile and to initialize; see
`layers.py`.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import layer_gpt
import layer_gpt_jax
import layer_task
import measure
from layer_task import Task
from measure import Row, Table
from startup import child

REFERENCE = "JAX by hand"


def tables(options) -> list[Table]:
    """One table of a training step, and one of the first init in a new process."""
    size = layer_gpt.TINY._replace(depth=3) if options.quick else layer_gpt.DEEP
    deep, shallow = (layer_gpt.task(size._replace(depth=depth)) for depth in (size.depth, 2))
    names = [name for name in layer_gpt.NETS if name == REFERENCE or measure.wanted(name, options)]
    title = f"{size.depth} layers of width {size.width}"
    rows = [Row(name) for name in names]
    measured = functools.partial(compiled, deep, shallow)
    samples = {row.name: functools.partial(measured, row) for row in rows}
    measure.interleave(rows, samples, reference=REFERENCE, options=options)
    steps = Table(f"Compile a training step of {title}", "compilation", "s", REFERENCE, rows)
    names += ["PyTorch"] * measure.wanted("PyTorch", options)
    rows = [Row(name) for name in names]
    samples = {name: functools.partial(first_init, name, options.quick) for name in names}
    measure.interleave(rows, samples, reference=REFERENCE, options=options)
    return [steps, Table(f"First init of {title}", "init", "s", REFERENCE, rows)]


def compiled(deep: Task, shallow: Task, row: Row) -> float:
    """CPU seconds to compile the deep step; the row gets the trace, and the shallow step, too."""
    # The shallow one first: what a process traces only once is not the cost of depth.
    _, less = lowered_and_compiled(shallow, row.name)
    trace, seconds = lowered_and_compiled(deep, row.name)
    for title, value in {
        "trace s": trace,
        "2 layers s": less,
        "to 2 layers": seconds / less,
    }.items():
        row.others.setdefault(title, []).append(value)
    return seconds


def lowered_and_compiled(task: Task, name: str) -> tuple[float, float]:
    net: Any = task.nets[name]()
    x, y = layer_task.arrays(task.data, layer_task.STEPS)
    params, state = layer_task.started(task, net)
    carry = params, state, task.optimizer.init(params)
    step = jax.jit(functools.partial(layer_task.step, task, net))
    start = time.process_time()
    made = step.lower(carry, (jnp.asarray(x[0]), jnp.asarray(y[0])))
    traced = time.process_time()
    made.compile()
    return traced - start, time.process_time() - traced


def first_init(name: str, quick: bool) -> float:
    """CPU seconds of the library's own init, after everything has been imported and the backend has
    been started.
    """
    return float(child(f"import layer_deep; layer_deep.measure_init({name!r}, {quick})"))


def measure_init(name: str, quick: bool) -> None:
    """In the child: print the CPU seconds."""
    jax.config.update("jax_enable_compilation_cache", False)
    size = layer_gpt.TINY if quick else layer_gpt.DEEP
    x, key = jnp.zeros((size.batch, size.tokens), jnp.int32), jax.random.key(0)
    if name == "PyTorch":
        make = layer_gpt.torch_module(size)
    elif name.startswith("JAX"):
        make = functools.partial(layer_gpt_jax.hand_init, size, "scan" in name, key)
    else:
        make = functools.partial(layer_gpt.NETS[name](size).init, key, x)
    start = time.process_time()
    jax.block_until_ready(make())
    print(time.process_time() - start)
