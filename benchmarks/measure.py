"""Compare ways of doing the same work: compiled outside the clock, in turns, with every result
checked.

    options = arguments(__doc__)
    table = compare("XOR", competitors, per="epoch", unit="us", reference="JAX scan",
                    expected=weights, options=options)
    publish(options, table)

A competitor is a function that prepares `Work` outside the clock. The clock counts the CPU seconds
of the process on one pinned core, which a busy machine disturbs least; trust the ratios, taken
within each round, before the times.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

SAMPLE_SECONDS = 0.02  # the least that one sample lasts: what is quicker is called several times
PACKAGES = (
    "jax",
    "numpy",
    "optax",
    "equinox",
    "flax",
    "dm-haiku",
    "keras",
    "torch",
    "safetensors",
    "orbax-checkpoint",
)
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


class Work(NamedTuple):
    """What a competitor does inside the clock.

    Attributes:
      run: () -> output; does `steps` steps, going on where the last call stopped. Arrays of JAX in
        it are waited for.
      steps: how many; times are given a step.
      result: output -> tree of arrays, to be compared with those expected after the first call.
      expected: steps -> that tree, for a competitor of which another is expected than of the
        others.
    """

    run: Callable[[], Any]
    steps: int = 1
    result: Callable[[Any], Any] = lambda output: output
    expected: Callable[[int], Any] | None = None


def carried(
    step: Callable, state: Any, result: Callable, *, calls: int = 1, steps: int = 1
) -> Work:
    """The work of calling a pure function state -> state `calls` times in a Python loop, each call
    doing `steps` steps.
    """

    def run():
        nonlocal state
        for _ in range(calls):
            state = step(state)
        return state

    return Work(run, calls * steps, result)


@dataclasses.dataclass
class Row:
    """One competitor: seconds a step and ratios to the reference, a value a round; or the problem
    it had.

    `others` are further columns by their titles, a value a round.
    """

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float | None = None
    problem: str = ""
    others: dict[str, list[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Table:
    """All competitors, with what one step is called (`per`) and the unit of time to print."""

    title: str
    per: str
    unit: str
    reference: str
    rows: list[Row]


def compare(
    title: str,
    competitors: Mapping[str, Callable[[], Work]],
    *,
    per: str,
    unit: str,
    reference: str,
    options: argparse.Namespace,
    expected: Callable[[int], Any] | None = None,
    rtol: float = 1e-3,
    clock: Callable[[], float] | None = None,
) -> Table:
    """Prepare, check and time competitors; the reference goes first.

    The first call of each is apart: it compiles, and its result must be `expected(steps)` (see
    `check`). A competitor that is not installed, fails, or gets another result keeps its row, with
    the problem named; the others go on.
    """
    clock = clock or (time.perf_counter if options.wall else time.process_time)
    rows, samples = [], {}
    for name in sorted(competitors, key=lambda name: name != reference):
        if name != reference and not wanted(name, options):
            continue
        rows.append(row := Row(name))
        with problems_of(row):
            work = competitors[name]()
            output, first = _timed(clock, work.run)
            if wish := work.expected or expected:
                check(work.result(output), wish(work.steps), rtol)
            again = _timed(clock, work.run)[1]
            row.compile_seconds = max(first - again, 0.0)
            samples[name] = _sample(
                clock, work, calls=max(1, math.ceil(SAMPLE_SECONDS / max(again, 1e-6)))
            )
    interleave(rows, samples, reference=reference, options=options)
    return Table(title, per, unit, reference, rows)


def interleave(
    rows: list[Row], samples: Mapping[str, Callable[[], float]], *, reference: str, options
) -> None:
    """Take samples in turns, A B C A B C ..., for `options.rounds` rounds or `options.seconds`,
    whichever ends first.

    Args: samples: by name, () -> seconds a step. The rows of these names get the values.
    """
    start = time.perf_counter()
    for done in range(options.rounds):
        if done and time.perf_counter() - start > options.seconds:
            break
        taken = {}
        for row in rows:
            if row.name in samples and not row.problem:
                with problems_of(row):
                    taken[row.name] = samples[row.name]()
                    row.seconds.append(taken[row.name])
        for row in rows:
            if row.name in taken and reference in taken:
                row.ratios.append(taken[row.name] / taken[reference])


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether `--only`, if it was given, asks for this competitor."""
    return not options.only or any(part.lower() in name.lower() for part in options.only)


def check(result: Any, expected: Any, rtol: float) -> None:
    """Raise ValueError unless two trees of arrays agree, each within `rtol` of the largest value
    expected in it.
    """
    leaves, wanted = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (result, expected)
    )
    if [leaf.shape for leaf in leaves] != [leaf.shape for leaf in wanted]:
        raise ValueError(
            f"the result has shapes {[x.shape for x in leaves]}, expected "
            f"{[x.shape for x in wanted]}"
        )
    errors = [
        np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(leaves, wanted, strict=True)
    ]
    error = np.max(errors)  # NaN if there is one, unlike Python's max
    if not error <= rtol:
        raise ValueError(
            f"the result is off by {error:.1e} of the largest value, {rtol:.0e} allowed"
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile), NaN where there are no values."""
    low, median, high = np.percentile(values, [25, 50, 75]) if values else (math.nan,) * 3
    return float(low), float(median), float(high)


def arguments(
    description: str | None, *, rounds=15, seconds=60.0, add: Callable | None = None, argv=None
):
    """Read the flags that all benchmarks share (`add(parser)` adds more), and pin the process to
    its cores.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="at most so many rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="start no round later (default: %(default)s)"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="those competitors with this in the name"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write all numbers to a file, too"
    )
    parser.add_argument(
        "--wall", action="store_true", help="wall-clock time, for a machine that does nothing else"
    )
    parser.add_argument(
        "--cores", type=int, default=1, help="cores to use, 0 for all (default: %(default)s)"
    )
    if add is not None:
        add(parser)
    options = parser.parse_args(argv)
    if options.cores and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[-options.cores :]
        # Libraries start threads when they are imported.
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
    return options


def publish(options: argparse.Namespace, *tables: Table, text: str | None = None) -> None:
    """Print tables, or a text instead that holds them in another form, and write the JSON file if
    one was asked for.
    """
    facts = environment() | {
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "clock": "wall seconds" if options.wall else "CPU seconds of the process",
    }
    print("{machine}, cores used: {cores}; {clock}; {date}\n{versions}".format(**facts))
    for part in [text] if text is not None else map(format_table, tables):
        print(f"\n{part}", flush=True)
    if options.json:
        facts["tables"] = [dataclasses.asdict(table) for table in tables]
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """What a table needs to be understood later: the date, the machine, the versions."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    models = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    model = (models or [platform.machine()])[0]
    installed = {
        package.name.lower(): package.version for package in importlib.metadata.distributions()
    }
    versions = [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()}-core {model}, {platform.system()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def format_table(table: Table) -> str:
    """The table as aligned text, fastest first, with what its columns mean."""
    rows = sorted(table.rows, key=lambda row: (bool(row.problem), quartiles(row.seconds)[1]))
    compiled = any(row.compile_seconds is not None for row in rows)
    others = list(dict.fromkeys(title for row in rows for title in row.others))
    lines = [
        [
            "",
            table.unit,
            "[quartiles]",
            "ratio",
            "[quartiles]",
            "rounds",
            *["compile"] * compiled,
            *others,
        ]
    ]
    for row in rows:
        low, median, high = (
            digits(seconds * UNITS[table.unit]) for seconds in quartiles(row.seconds)
        )
        below, ratio, above = (digits(value) for value in quartiles(row.ratios))
        cells = [
            row.name,
            median,
            f"[{low}, {high}]",
            ratio,
            f"[{below}, {above}]",
            str(len(row.seconds)),
        ]
        if compiled:
            cells.append(f"{row.compile_seconds or 0:.2f}")
        cells += [
            digits(quartiles(row.others[title])[1]) if title in row.others else ""
            for title in others
        ]
        lines.append([row.name, row.problem] if row.problem else cells)
    wide = max(len(line[0]) for line in lines)
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(1, len(lines[0]))]
    text = [
        f"{line[0]:{wide}}  "
        + "  ".join(map(str.rjust, line[1:], widths) if len(line) > 2 else line[1:])
        for line in lines
    ]
    meaning = (
        f"{table.unit}: time of one {table.per}, median over the rounds; ratio: to "
        f"'{table.reference}', round by round"
    )
    meaning += "\ncompile: seconds that the first call took beyond the second" if compiled else ""
    meaning += f"\n{', '.join(others)}: medians" if others else ""
    return "\n".join([table.title, "", *text, "", meaning])


def _sample(clock: Callable[[], float], work: Work, calls: int) -> Callable[[], float]:
    def run():
        for _ in range(calls):
            jax.block_until_ready(work.run())

    return lambda: _timed(clock, run)[1] / (calls * work.steps)


def _timed(clock: Callable[[], float], run: Callable) -> tuple[Any, float]:
    start = clock()
    output = jax.block_until_ready(run())
    return output, clock() - start


@contextlib.contextmanager
def problems_of(row: Row) -> Iterator[None]:
    """Write an error of the block into the row instead of raising it."""
    try:
        yield
    except ModuleNotFoundError as error:
        row.problem = f"skipped: {error.name} is not installed"
    except Exception as error:
        row.problem = f"failed: {type(error).__name__}: {error}".splitlines()[0]


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else f"{value:g}"
