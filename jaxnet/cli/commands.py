"""The commands that only read: `inspect`, `verify` and `diff`."""

import argparse
from typing import TYPE_CHECKING, Any

from jaxnet.cli.output import complain, exact, is_damage, printable, say, to_json
from jaxnet.cli.text import as_json, as_text, cut, short, table

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info
    from jaxnet.checkpoint.compare import Statistics

__all__ = ["add_diff", "add_inspect", "add_verify"]

INSPECT = """Show the contents of a checkpoint or of any other safetensors file: path, shape, dtype,
number of parameters (elements) and bytes of every array, the Python values beside them, and the
metadata. Only the header is read and checked, so 10 GB take no longer than 10 kB."""
STATS = """also read the arrays, and show the minimum, maximum, mean and standard deviation of their
finite elements, and the number of other elements (NaN, infinities)"""
VERIFY = """Read every byte of the files and compare it with its checksum. Files of other programs
have no checksums, so only their headers and lengths are checked."""
DIFF = """Compare two files leaf by leaf. The table shows leaves that only one file has, shapes and
dtypes that differ, and how far apart the values are: the number of elements with different bits,
max |A - B|, and |A - B| / |A| in Euclidean norms. Containers and metadata are not compared. All
bytes of common leaves are checked; a damaged file gives code 2, because its original values are
unknown."""


def add_inspect(commands: Any) -> None:
    """Add the parser of `inspect`."""
    parser = commands.add_parser(
        "inspect", help="show the contents of a checkpoint", description=INSPECT
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("--stats", action="store_true", help=STATS)
    text = "show only these leaves: a pattern of paths like 'head' or '**/bias'; may be repeated"
    parser.add_argument("--pattern", action="append", metavar="PATTERN", help=text)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint import inspect

    info = inspect(args.file)
    if args.pattern:
        from jaxnet.checkpoint.selection import select

        names = select(
            args.file, [*(leaf.path for leaf in info.leaves), *info.scalars], args.pattern
        )
        scalars = {path: x for path, x in info.scalars.items() if path in names}
        info = info._replace(
            leaves=tuple(leaf for leaf in info.leaves if leaf.path in names), scalars=scalars
        )
    statistics = _statistics(info) if args.stats else None
    if args.json:
        say(to_json(as_json(info, statistics)))
    else:
        say(printable(as_text(info, statistics)))
    return 0


def _statistics(info: "Info") -> dict[str, "Statistics | None"]:
    from jaxnet.checkpoint import lazy
    from jaxnet.checkpoint.compare import statistics

    with lazy(info.path) as leaves:
        return {leaf.path: statistics(leaves[leaf.path]) for leaf in info.leaves}


def add_verify(commands: Any) -> None:
    """Add the parser of `verify`."""
    parser = commands.add_parser(
        "verify", help="check every byte of checkpoints", description=VERIFY
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a checkpoint, or any *.safetensors file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint import CheckpointError, verify

    results, code = [], 0
    for file in args.files:
        try:
            info = verify(file)
            state, reason = (
                ("good", None)
                if info.version
                else ("unchecked", "it has no checksums: another program's")
            )
            results.append({"path": file, "state": state, "reason": reason})
        except (CheckpointError, OSError, ImportError, ValueError) as e:
            state = "damaged" if is_damage(e) else "unreadable"
            code = max(code, 1 if state == "damaged" else 2)
            results.append({"path": file, "state": state, "reason": str(e)})
            if not args.json:
                complain(args.command, e)
        if not args.json:
            say(printable(f"{file}: {state}", keep=""))
    if args.json:
        say(to_json(results))
    return code


def add_diff(commands: Any) -> None:
    """Add the parser of `diff`."""
    parser = commands.add_parser("diff", help="compare two checkpoints", description=DIFF)
    parser.add_argument("a", metavar="A", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the differences as one JSON list instead of a table",
    )
    parser.set_defaults(run=_diff)


def _diff(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint.compare import differences

    found = differences(args.a, args.b)
    if args.json:
        lines = [
            x._asdict() | {"largest": exact(x.largest), "relative": exact(x.relative)}
            for x in found
        ]
        say(to_json(lines))
    elif found:
        head = ("path", "differs", "A", "B", "elements", "max |A-B|", "relative")
        rows = [
            (x.path, x.what, cut(x.a or "-", 40), cut(x.b or "-", 40), *map(short, x[4:]))
            for x in found
        ]
        say(printable(table(head, rows)))
    else:
        say("the leaves are equal, bit for bit")
    return 1 if found else 0
