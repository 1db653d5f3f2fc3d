"""Networks of the layers that researchers use: forward, training and compile time in every library.

    python benchmarks/layers.py
    python benchmarks/layers.py --row lstm --row gru --only jaxnet --only PyTorch
    python benchmarks/layers.py --row gpt --kind "step loop" --cores 0 --wall
    python benchmarks/layers.py --quick      (tiny networks, to see that all losses are equal)

Each row is a network, and every library has it from its own layers, with the weights of the
hand-written one. A step is forward, backward and update. Each is timed as single jitted calls, and
as a compiled loop over 20 batches; PyTorch runs eagerly in both. The losses of every call are
checked against those of the hand-written network. A compiled loop uses the functional form that a
library documents: `apply` of Flax Linen and Haiku, `nnx.split` and `nnx.merge`, `eqx.partition` and
`eqx.combine`, `stateless_call` of Keras. All of them use the same loop and the same optimizer.

"deep" is a GPT of 24 layers: the compile time of a step and that of 2 layers, the time of the
trace, and that of the library's own init, in processes of their own.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable

import jax
import layer_deep
import layer_gpt
import layer_linear
import layer_moe
import layer_resnet
import layer_rnn
import layer_separable
import measure
from layer_task import KINDS, STEPS, Task, work
from measure import Row, Table

ROWS: dict[str, Callable[[bool], Task]] = {
    "lstm": layer_rnn.lstm_task,
    "gru": layer_rnn.gru_task,
    "gpt": layer_gpt.gpt_task,
    "gpt24": layer_gpt.deep_task,
    "resnet": layer_resnet.resnet_task,
    "separable": layer_separable.separable_task,
    "moe": layer_moe.moe_task,
    "linear": layer_linear.linear_task,
}


def main(argv=None):
    options = measure.arguments(__doc__, rounds=7, seconds=30, add=add_flags, argv=argv)
    jax.config.update("jax_enable_compilation_cache", False)
    chosen, parts, tables = options.row or [*ROWS, "deep"], [], []
    for row in chosen:
        if row == "deep":
            made = layer_deep.tables(options)
            parts += map(measure.format_table, made)
        else:
            task = ROWS[row](options.quick)
            made = {kind: table(task, kind, options) for kind in options.kind or KINDS}
            parts.append(text_of(task.title, made))
            made = list(made.values())
        tables += made
        # A run of all rows is long.
        print(parts[-1], "\n", file=sys.stderr, flush=True)
    measure.publish(options, *tables, text="\n\n".join([*parts, MEANING]))


def add_flags(parser):
    parser.add_argument(
        "--row", action="append", choices=[*ROWS, "deep"], help="those rows (default: all)"
    )
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="those columns (default: all)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of a compiled loop, at most %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="call nothing again that took more seconds"
    )


def table(task: Task, kind: str, options) -> Table:
    print(f"{task.title}: {kind} ...", file=sys.stderr, flush=True)
    names = dict(task.nets)
    if options.cores != 1:
        names["PyTorch eager, 1 thread"] = names["PyTorch eager"]
    competitors = {name: functools.partial(competitor, task, name, kind, options) for name in names}
    return measure.compare(
        f"{task.title}: {kind}",
        competitors,
        per="step",
        unit="ms",
        reference=task.references.get(kind, "JAX by hand"),
        options=options,
        # Twenty steps multiply the roundings.
        rtol=2e-2 if "step" in kind else 1e-3,
    )


def competitor(task, name, kind, options):
    one_thread = name.endswith(", 1 thread")
    made = work(
        task,
        name.removesuffix(", 1 thread"),
        kind,
        steps=options.steps,
        patience=options.patience,
    )
    return made._replace(run=functools.partial(on_one_thread, made.run)) if one_thread else made


def on_one_thread(run):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(threads)


def text_of(title: str, tables: dict[str, Table]) -> str:
    """All tables of a row as one: a line for each competitor."""
    rows = {kind: {row.name: row for row in table.rows} for kind, table in tables.items()}
    names = list(dict.fromkeys(name for part in rows.values() for name in part))
    last = list(rows.values())[-1]
    names.sort(key=lambda name: measure.quartiles(last[name].seconds if name in last else [])[1])
    head = [cell for kind in tables for cell in (f"{kind}, ms", "ratio", "[quartiles]", "compile")]
    lines = [["", *head]]
    for name in names:
        cells = [cell for part in rows.values() for cell in cells_of(part.get(name))]
        lines.append([name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    problems = [
        f"{row.name}, {kind}: {row.problem}"
        for kind, part in rows.items()
        for row in part.values()
        if row.problem
    ]
    return "\n".join([title, "", *body, *([""] if problems else []), *problems])


def cells_of(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 4
    if row.problem:
        # What is only slow is said in the place of its time.
        slow = re.search(r"SlowError: ([\d.]+) s", row.problem)
        return [f"{1e3 * float(slow[1]):,.0f}" if slow else row.problem.split(":")[0], "", "", ""]
    low, ratio, high = map(measure.digits, measure.quartiles(row.ratios))
    milliseconds = measure.digits(1e3 * measure.quartiles(row.seconds)[1])
    return [milliseconds, ratio, f"[{low}, {high}]", f"{row.compile_seconds or 0:.2f}"]


MEANING = "\n".join(
    [
        *(f"{kind}: {meaning}" for kind, meaning in KINDS.items()),
        "ms: time of one batch or step, median over the rounds; ratio: to the hand-written "
        "network, round by round",
        "compile: seconds that the first call took beyond the second",
    ]
)


if __name__ == "__main__":
    main()
