"""The command line: `jaxnet inspect FILE`.

A subcommand is two functions: one adds its parser, the other runs it and returns the exit code. What takes long to
import is imported in the latter.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jaxnet

if TYPE_CHECKING:
    from jaxnet.checkpoint import Info, Leaf

DESCRIPTION = "Tools for the checkpoints of jaxnet, a library for functional neural networks on JAX."
EPILOG = """examples:
  jaxnet inspect run/state.safetensors            paths, shapes, types and sizes
  jaxnet inspect --json model.safetensors         the same for programs

exit codes: 0 all is well; 1 the file is missing, damaged or no checkpoint; 2 the command itself is wrong
"""
INSPECT = """Show what a checkpoint, or any other safetensors file, holds: path, shape, dtype, number of parameters
(elements) and bytes of every array, the Python values beside them, and the metadata. Only the header is read, and
checked, so that 10 GB take no longer than 10 kB."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A wrong command raises SystemExit(2), as argparse does."""
    from jaxnet.checkpoint import CheckpointError

    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (`head`) has seen enough; Python's own flush at the end shall not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, OSError) as e:
        print(f"jaxnet {args.command}: {_printable(str(e))}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="jaxnet", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"jaxnet {jaxnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    return parser


def _add_inspect(commands: Any):
    parser = commands.add_parser("inspect", help="show what a checkpoint holds", description=INSPECT)
    parser.add_argument("file", metavar="FILE", help="a checkpoint, or any *.safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from jaxnet.checkpoint import inspect

    info = inspect(args.file)
    print(json.dumps(_as_json(info), indent=2) if args.json else _printable(_as_text(info)))
    return 0


def _as_json(info: "Info") -> dict[str, Any]:
    """A dict for JSON; values that JSON cannot hold exactly (numbers, bytes) as Python writes them."""
    leaves = [leaf._asdict() | {"parameters": math.prod(leaf.shape)} for leaf in info.leaves]
    scalars = {path: {"type": type(x).__name__, "value": _show(x)} for path, x in info.scalars.items()}
    total = sum(leaf["parameters"] for leaf in leaves)
    return info._asdict() | {"leaves": leaves, "scalars": scalars, "parameters": total}


def _as_text(info: "Info") -> str:
    ours = f"jaxnet checkpoint, format {info.version}"
    kind = "safetensors file of another program" if info.version is None else ours
    groups: dict[str, list[Leaf]] = {}
    for leaf in info.leaves:
        groups.setdefault(leaf.path.partition("/")[0], []).append(leaf)
    rows = [_row(x.path, str(list(x.shape)), x.dtype, [x]) for x in info.leaves]
    large = {name: leaves for name, leaves in groups.items() if len(leaves) > 1 and len(groups) > 1}
    sums = [_row(f"{name}/*", f"{len(leaves)} arrays", "", leaves) for name, leaves in large.items()]
    sums.append(_row("total", f"{len(rows)} arrays", "", info.leaves))
    parts = [f"{info.path}: {kind}, {info.nbytes:,} bytes"]
    parts.append(_table(("path", "shape", "dtype", "parameters", "bytes"), [*rows, None, *sums]))
    if info.scalars:
        values = [(path, type(x).__name__, _cut(_show(x))) for path, x in info.scalars.items()]
        parts.append(_table(("path", "type", "value"), values))
    if info.metadata:
        parts.append(f"metadata: {json.dumps(info.metadata, indent=2, ensure_ascii=False)}")
    return "\n\n".join(parts)


def _row(path: str, shape: str, dtype: str, leaves: "Sequence[Leaf]") -> tuple[str, ...]:
    parameters, nbytes = sum(math.prod(x.shape) for x in leaves), sum(x.nbytes for x in leaves)
    return path, shape, dtype, f"{parameters:,}", f"{nbytes:,}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...] | None]) -> str:
    """Columns in line, those of numbers to the right; None is a ruled line."""
    cells = [[_printable(cell, keep="") for cell in row] if row else None for row in (head, None, *rows)]
    widths = [max(map(len, column)) for column in zip(*filter(None, cells), strict=True)]
    lines = []
    for row in cells:
        row = row or ["-" * width for width in widths]
        right = [name in ("parameters", "bytes") for name in head]
        padded = [x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _show(x: Any) -> str:
    """repr, but Python refuses to print an int of more than some thousand digits in decimal."""
    return hex(x) if isinstance(x, int) and x.bit_length() > 10_000 else repr(x)


def _cut(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _printable(text: str, keep: str = "\n") -> str:
    """Names come from files: no control characters for the terminal, and nothing that its encoding lacks."""
    text = "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    sys.exit(main())
